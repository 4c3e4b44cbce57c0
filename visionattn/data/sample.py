"""What every source of segmentation data is made of: 2-D images with masks, read when they are needed.

A module per format (`image_mask`, `volumes`, `rasters`) has

    scan(data) -> (items, problems)

where `data` is the recipe's data section. Problems are one line each and name the file; items are picklable, so that
loading processes can have them, and hold no open file.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["IGNORE", "Item", "Window"]

IGNORE = 255  # the number of unlabelled pixels in every mask, whatever number the files have
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Item:
    """One 2-D image with its mask: an image file, a slice of a volume, a scene.

    Attributes:
        name: unique in its data set, shown to users.
        case: a row of the results: image, volume or scene. Items of a case are in order (slices from first to last).
        group: what is never split apart: patient, scene.
        size: (H, W) in pixels.
        channels: of the image.
    """

    name: str
    case: str
    group: str
    size: tuple[int, int]
    channels: int

    def image(self, window: Window | None = None) -> np.ndarray:
        """(C, h, w) float32 of the window (rows, columns), or of the whole image.

        Image files are scaled to 0..1, volumes by their window and level to 0..1; rasters keep their values, NaN where
        there are no data.
        """
        raise NotImplementedError

    def mask(self, window: Window | None = None) -> np.ndarray | None:
        """(h, w) int64 class numbers, IGNORE where unlabelled; None without a mask."""
        raise NotImplementedError

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a pixel as (rows, columns), of slices as (slice distance, rows, columns), in mm; else pixels."""
        return (1.0, 1.0)

    @property
    def ground(self) -> tuple[str, tuple[float, float, float, float]] | None:
        """Of a scene the CRS and its left, bottom, right and top there; None where unknown."""
        return None
