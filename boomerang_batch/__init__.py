"""boomerang-batch: a dataset of images in, its private, augmented or enhanced twin out."""

__version__ = "0.1.0"
