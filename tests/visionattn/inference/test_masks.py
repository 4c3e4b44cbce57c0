"""Masks that a network gives of stretched boxes, back on the pixels of the image."""

import numpy as np
import torch

from visionattn.data.boxes import pixels_of
from visionattn.inference.masks import pasted


def test_a_pasted_mask_covers_what_the_box_was_stretched_from():
    """A disc and a half plane, in boxes of any place and shape."""
    grid = (torch.arange(28) + 0.5) / 28
    disc = ((grid[:, None] - 0.5) ** 2 + (grid - 0.5) ** 2 < 0.16).float()
    half = (grid[None] < 0.5).float().expand(28, 28)
    xyxy = np.array([[3.2, 10.7, 40.1, 31.3], [100, 7, 112, 60]], np.float32)
    for shape, inside in ((disc, lambda x, y: (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.16), (half, lambda x, y: x < 0.5)):
        for box, mask in zip(xyxy, pasted(torch.stack([shape, shape]), xyxy), strict=True):
            rows, columns = pixels_of(box)
            assert mask.shape == (rows.stop - rows.start, columns.stop - columns.start)
            y = (np.arange(rows.start, rows.stop)[:, None] + 0.5 - box[1]) / (box[3] - box[1])
            x = (np.arange(columns.start, columns.stop)[None] + 0.5 - box[0]) / (box[2] - box[0])
            expected = np.broadcast_to(inside(x, y), mask.shape)
            assert (mask & expected).sum() / (mask | expected).sum() > 0.9


def test_no_mask_is_larger_than_its_box():
    count = 500
    corners = np.random.default_rng(0).uniform(0, 2000, (count, 2))
    xyxy = np.concatenate([corners, corners + 40], 1).astype(np.float32)
    masks = pasted(torch.rand(count, 28, 28), xyxy)
    assert sum(mask.nbytes for mask in masks) < count * 42 * 42
    assert pasted(torch.zeros(0, 28, 28), xyxy[:0]) == []
