"""What a run directory is, and what is done with one."""
