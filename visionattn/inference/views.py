"""Views of test-time augmentation: mirrored and turned images, and the way back for maps."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["View", "views"]


class View(NamedTuple):
    """Images turned by quarters and then mirrored, and what undoes it.

    Attributes:
        turns: anticlockwise.
        dims: axes that are mirrored, -1 from left to right and -2 from top to bottom.
    """

    turns: int
    dims: tuple[int, ...]

    def forth(self, images: Tensor) -> Tensor:
        """Of images (..., H, W)."""
        return torch.rot90(images, self.turns, (-2, -1)).flip(self.dims)

    def back(self, maps: Tensor) -> Tensor:
        """Of maps (..., H, W) of the view, as of the image."""
        return torch.rot90(maps.flip(self.dims), -self.turns, (-2, -1))

    def boxes_back(self, xyxy: Tensor, size: tuple[int, int]) -> Tensor:
        """Of boxes (N, 4) in the view of an image of (H, W) pixels, as in the image."""
        height, width = size if self.turns % 2 == 0 else size[::-1]
        left, top, right, bottom = xyxy.unbind(1)
        if -1 in self.dims:
            left, right = width - right, width - left
        if -2 in self.dims:
            top, bottom = height - bottom, height - top
        for _ in range(self.turns):  # clockwise: what is at the top was at the right
            left, top, right, bottom = height - bottom, left, height - top, right
            height, width = width, height
        return torch.stack([left, top, right, bottom], 1)


def views(names: Sequence[str], square: bool = True) -> list[View]:
    """The image as it is, and every different image that mirroring and quarter turns make of it.

    Args:
        names: among "hflip", "vflip" and "rot90".
        square: quarter turns keep the shape; else half turns only.
    """
    turns = (0,) if "rot90" not in names else range(4) if square else (0, 2)
    flips = [dim for name, dim in (("hflip", -1), ("vflip", -2)) if name in names]
    if "rot90" in names:
        flips = flips[:1]  # the other mirror image is this one, turned
    mirrors = [dims for n in range(len(flips) + 1) for dims in itertools.combinations(flips, n)]
    return [View(k, dims) for k in turns for dims in mirrors]
