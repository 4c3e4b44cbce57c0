"""Rectangles that cover a region: all that cannot be made larger, so that what fits into the region fits into one."""

from collections.abc import Iterator

import numpy as np

__all__ = ["largest_rectangles"]


def largest_rectangles(region: np.ndarray) -> np.ndarray:
    """(N, 4) left, top, right, bottom of the rectangles in a bool region (h, w) that no other one in it holds."""
    below = np.vstack([region[1:], np.zeros_like(region[:1])])
    height = np.zeros(region.shape[1], np.int64)
    found = []
    for row, (here, further) in enumerate(zip(region, below, strict=True)):
        height = np.where(here, height + 1, 0)
        for left, right, rows in _under(height.tolist()):
            if not further[left:right].all():
                found.append([left, row + 1 - rows, right, row + 1])
    return np.array(found, np.int64).reshape(-1, 4)


def _under(heights: list[int]) -> Iterator[tuple[int, int, int]]:
    """Start, end and height of the rectangles under a skyline that reach as far to both sides as their height lets."""
    open_ones: list[tuple[int, int]] = []  # start and height, from low to high
    for place, height in enumerate([*heights, 0]):
        start = place
        while open_ones and open_ones[-1][1] > height:
            start, rows = open_ones.pop()
            yield start, place, rows
        if height and (not open_ones or open_ones[-1][1] < height):
            open_ones.append((start, height))
