"""Image classifiers: images and their classes, the task that they make up, and its pages."""
