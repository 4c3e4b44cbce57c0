"""Masks as pictures for people: the colour of each class, and images under tints of their classes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from visionattn.data.labels import MaskSection
from visionattn.data.sample import IGNORE

__all__ = ["PALETTE", "UNLABELLED", "Colors", "class_colors", "displayed", "overlay"]

PALETTE = [
    *("0072b2", "d55e00", "00805c", "e69f00", "a8538a", "56b4e9"),
    *("c44536", "7b9e3b", "6f5aa8", "00a6a6", "f0e442", "8c564b"),
]
TINT = 0.45
UNLABELLED = (128, 128, 128)

Colors = Sequence[tuple[int, int, int] | None]


def class_colors(section: MaskSection, shown: Sequence[int]) -> list[tuple[int, int, int] | None]:
    """RGB of each class, those of the recipe where it has them; None for classes that are not shown."""
    texts = [section.palette.get(name, PALETTE[k % len(PALETTE)]) for k, name in enumerate(section.class_names)]
    rgb = [(red, green, blue) for red, green, blue in (bytes.fromhex(text.lstrip("#")) for text in texts)]
    return [color if k in shown else None for k, color in enumerate(rgb)]


def overlay(image: np.ndarray, mask: np.ndarray | None, colors: Colors) -> Image.Image:
    """An image (C, h, w) with the classes of a mask (h, w) as tints with solid borders; None shows the image alone."""
    pixels = displayed(image)
    if mask is None:
        return Image.fromarray(pixels)
    border = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        differ = np.diff(mask.astype(np.int16), axis=axis) != 0
        border |= np.insert(differ, 0, False, axis=axis) | np.insert(differ, differ.shape[axis], False, axis=axis)
    mixed = pixels.astype(np.float32)
    for k, color in [*enumerate(colors), (IGNORE, UNLABELLED)]:
        inside = mask == k
        if color is not None and inside.any():
            share = np.where(border & inside, 1.0, TINT)[..., None] * inside[..., None]
            mixed = mixed * (1 - share) + np.array(color, np.float32) * share
    return Image.fromarray(mixed.round().astype(np.uint8))


def displayed(image: np.ndarray) -> np.ndarray:
    """(C, h, w) -> (h, w, 3) uint8: the first three channels, or the first as grey, each stretched if not in 0..1."""
    shown = image[:3] if len(image) >= 3 else image[:1]
    finite = shown[np.isfinite(shown)]
    if finite.size and (finite.min() < 0 or finite.max() > 1):
        shown = np.stack([_stretched(band) for band in shown])
    shown = np.nan_to_num(shown.clip(0, 1), nan=0.0)
    return np.broadcast_to((shown * 255).round().astype(np.uint8).transpose(1, 2, 0), (*shown.shape[1:], 3)).copy()


def _stretched(band: np.ndarray) -> np.ndarray:
    finite = band[np.isfinite(band)]
    low, high = np.percentile(finite, (2, 98)) if finite.size else (0.0, 1.0)
    return (band - low) / max(high - low, 1e-6)
