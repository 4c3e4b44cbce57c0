"""Views of test-time augmentation: mirrored and turned images, and the way back for maps."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["View", "views"]


class View(NamedTuple):
    """A change of images (B, C, H, W), and what undoes it on maps (B, K, H, W)."""

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def views(names: Sequence[str], square: bool = True) -> list[View]:
    """The image as it is, and every different image that mirroring and quarter turns make of it.

    Args:
        names: among "hflip", "vflip" and "rot90".
        square: quarter turns keep the shape; else half turns only.
    """
    turns = (0,) if "rot90" not in names else range(4) if square else (0, 2)
    flips = [dim for name, dim in (("hflip", 3), ("vflip", 2)) if name in names]
    if "rot90" in names:
        flips = flips[:1]  # the other mirror image is this one, turned
    mirrors = [dims for n in range(len(flips) + 1) for dims in itertools.combinations(flips, n)]
    return [_view(k, dims) for k in turns for dims in mirrors]


def _view(turns: int, dims: tuple[int, ...]) -> View:
    return View(
        lambda x: torch.rot90(x, turns, (2, 3)).flip(dims),
        lambda x: torch.rot90(x.flip(dims), -turns, (2, 3)),
    )
