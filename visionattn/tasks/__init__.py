"""What is learned: a folder for each task, with the same file names in each."""
