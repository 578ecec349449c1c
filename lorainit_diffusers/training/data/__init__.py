"""Reading the data of a training: what counts as an image, as a caption and as a split, and what was left out."""
