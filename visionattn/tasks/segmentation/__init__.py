"""Naming what every pixel belongs to."""
