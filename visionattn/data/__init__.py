"""Images with what is known about them: samples, their formats, splits, and batches."""
