"""How data lie on the disk: a file for each format."""
