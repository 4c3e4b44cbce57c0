"""Finding objects: boxes with classes."""
