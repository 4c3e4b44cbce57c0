"""Networks for each task, on any backbone."""
