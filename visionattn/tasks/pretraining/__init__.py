"""The pretraining task: a backbone that learns from images without labels."""
