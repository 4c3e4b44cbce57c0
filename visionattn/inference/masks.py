"""Masks that a network gives of stretched boxes, on the pixels of the image."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.data.boxes import pixels_of

__all__ = ["pasted"]

SURE = 0.5  # probability from which a pixel belongs to an object


def pasted(shapes: Tensor, xyxy: np.ndarray) -> Sequence[np.ndarray]:
    """Of each object a bool crop of the pixels that its box touches, as `Boxes.masks`; never all of the image.

    Args:
        shapes: (N, h, w) probabilities on a grid over each box.
        xyxy: (N, 4) the boxes in pixels.
    """
    crops = []
    for shape, box in zip(shapes, xyxy, strict=True):
        rows, columns = pixels_of(box)
        y = (torch.arange(rows.start, rows.stop) + 0.5 - float(box[1])) / max(float(box[3] - box[1]), 1e-6)
        x = (torch.arange(columns.start, columns.stop) + 0.5 - float(box[0])) / max(float(box[2] - box[0]), 1e-6)
        places = torch.stack(torch.meshgrid(2 * y - 1, 2 * x - 1, indexing="ij")[::-1], -1)
        values = F.grid_sample(shape[None, None].float(), places[None], padding_mode="border", align_corners=False)
        crops.append((values[0, 0] >= SURE).numpy())
    return crops
