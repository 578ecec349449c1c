"""Questions about images: reading them, the task that they make up, and its pages."""
