"""Naming what is in an image."""
