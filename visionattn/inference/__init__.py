"""Predicting images of any size."""
