"""Predictions as files: a file for each output format."""
