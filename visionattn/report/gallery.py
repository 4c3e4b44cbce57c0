"""Pictures of segmentations for people: an image beside its truth and its prediction, volumes as rows of slices."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from visionattn.data.masked import blocks
from visionattn.data.sample import IGNORE, Item
from visionattn.recipe import SegmentationData

__all__ = ["case_picture", "class_colors", "overlay", "thumbnail"]

PALETTE = [
    *("0072b2", "d55e00", "00805c", "e69f00", "a8538a", "56b4e9"),
    *("c44536", "7b9e3b", "6f5aa8", "00a6a6", "f0e442", "8c564b"),
]
SIDE = 224  # pixels of a panel's longer side
SLICES = 6  # of a volume
TINT = 0.45
GAP = 4
UNLABELLED = (128, 128, 128)


def class_colors(data: SegmentationData, shown: Sequence[int]) -> list[tuple[int, int, int] | None]:
    """RGB of each class, those of the recipe where it has them; None for classes that are not shown."""
    given = getattr(data, "colors", None) or {}
    found = []
    for k, name in enumerate(data.class_names):
        text = given.get(name, PALETTE[k % len(PALETTE)]).lstrip("#")
        found.append(tuple(bytes.fromhex(text)) if k in shown else None)
    return found


def overlay(image: np.ndarray, mask: np.ndarray | None, colors: Sequence[tuple[int, int, int] | None]) -> Image.Image:
    """An image (C, h, w) with the classes of a mask (h, w) as tints with solid borders; None shows the image alone."""
    pixels = _displayed(image)
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


def _displayed(image: np.ndarray) -> np.ndarray:
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


def thumbnail(item: Item, side: int = SIDE) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Every n-th pixel of an item's image (C, h, w) and mask, so that h and w are at most about `side`; and n."""
    step = max(1, math.ceil(max(item.size) / side))
    shape = [math.ceil(extent / step) for extent in item.size]
    image, mask = np.empty((item.channels, *shape), np.float32), np.empty(shape, np.int64)
    for window in blocks(item.size, 2048 // step * step):
        there = tuple(slice(part.start // step, math.ceil(part.stop / step)) for part in window)
        image[:, there[0], there[1]] = item.image(window)[:, ::step, ::step]
        truth = item.mask(window)
        if truth is None:
            mask = None
        elif mask is not None:
            mask[there] = truth[::step, ::step]
    return image, mask, step


def case_picture(
    items: Sequence[Item], predictions: Sequence[np.ndarray], colors: Sequence[tuple[int, int, int] | None]
) -> Image.Image:
    """Of an image or scene: itself, truth, prediction side by side; of a volume: some slices, truth above prediction.

    Args:
        items: the case's, in order.
        predictions: (H, W) class numbers of each.
    """
    panels = [_panels(items[i], predictions[i], colors) for i in _chosen(predictions, colors)]
    rows = panels if len(panels) == 1 else list(zip(*(panel[1:] for panel in panels), strict=True))
    width, height = (max(panel[0].size[axis] for panel in panels) + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) - GAP), "white")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            sheet.paste(panel, (c * width, r * height))
    return sheet


def _panels(
    item: Item, prediction: np.ndarray, colors: Sequence[tuple[int, int, int] | None]
) -> tuple[Image.Image, Image.Image, Image.Image]:
    image, truth, step = thumbnail(item)
    prediction = prediction[::step, ::step]
    if truth is not None:
        prediction = np.where(truth == IGNORE, IGNORE, prediction)
    panels = [overlay(image, mask, colors) for mask in (None, truth, prediction)]
    scale = SIDE / max(panels[0].size)
    size = [max(1, round(side * scale)) for side in panels[0].size]
    return tuple(panel.resize(size, Image.Resampling.NEAREST) for panel in panels)


def _chosen(predictions: Sequence[np.ndarray], colors: Sequence[tuple[int, int, int] | None]) -> list[int]:
    """Slices to show, evenly among those with a shown class in the prediction, or among all."""
    shown = [k for k, color in enumerate(colors) if color is not None]
    filled = [i for i, prediction in enumerate(predictions) if np.isin(prediction, shown).any()]
    among = filled if len(filled) >= SLICES else range(len(predictions))
    places = np.linspace(0, len(among) - 1, min(SLICES, len(among))).round().astype(int)
    return [among[i] for i in places]
