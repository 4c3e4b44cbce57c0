"""Pictures of segmentations for people: an image beside its truth and its prediction, volumes as rows of slices."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from visionattn.data.colors import Colors, overlay
from visionattn.data.sample import IGNORE, Sample, blocks, unit_range

__all__ = ["case_picture", "thumbnail"]

SIDE = 224  # pixels of a panel's longer side
SLICES = 6  # of a volume
GAP = 4


def thumbnail(sample: Sample, side: int = SIDE) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Every n-th pixel of a sample's image (C, h, w) and mask, so that h and w are at most about `side`; and n."""
    step = max(1, math.ceil(max(sample.size) / side))
    if not sample.windowed:
        pixels, mask = sample.read()
        return unit_range(pixels)[:, ::step, ::step], None if mask is None else mask[::step, ::step], step
    assert sample.channels is not None  # known of what is read by windows
    shape = [math.ceil(extent / step) for extent in sample.size]
    image, mask = np.empty((sample.channels, *shape), np.float32), np.full(shape, IGNORE, np.int64)
    labelled = True
    for window in blocks(sample.size, 2048 // step * step):
        rows, columns = (slice(side.start // step, math.ceil(side.stop / step)) for side in window)
        pixels, truth = sample.read(window)
        image[:, rows, columns] = unit_range(pixels)[:, ::step, ::step]
        labelled = truth is not None
        if labelled:
            mask[rows, columns] = truth[::step, ::step]
    return image, mask if labelled else None, step


def case_picture(samples: Sequence[Sample], predictions: Sequence[np.ndarray], colors: Colors) -> Image.Image:
    """Of an image or scene: itself, truth, prediction side by side; of a volume: some slices, truth above prediction.

    Args:
        samples: the case's, in order.
        predictions: (H, W) class numbers of each.
    """
    panels = [_panels(samples[i], predictions[i], colors) for i in _chosen(predictions, colors)]
    rows = panels if len(panels) == 1 else list(zip(*(panel[1:] for panel in panels), strict=True))
    width, height = (max(panel[0].size[axis] for panel in panels) + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) - GAP), "white")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            sheet.paste(panel, (c * width, r * height))
    return sheet


def _panels(sample: Sample, prediction: np.ndarray, colors: Colors) -> list[Image.Image]:
    image, truth, step = thumbnail(sample)
    prediction = prediction[::step, ::step]
    if truth is not None:
        prediction = np.where(truth == IGNORE, IGNORE, prediction)
    panels = [overlay(image, mask, colors) for mask in (None, truth, prediction)]
    scale = SIDE / max(panels[0].size)
    size = [max(1, round(side * scale)) for side in panels[0].size]
    return [panel.resize(size, Image.Resampling.NEAREST) for panel in panels]


def _chosen(predictions: Sequence[np.ndarray], colors: Colors) -> list[int]:
    """Slices to show, evenly among those with a shown class in the prediction, or among all."""
    shown = [k for k, color in enumerate(colors) if color is not None]
    filled = [i for i, prediction in enumerate(predictions) if np.isin(prediction, shown).any()]
    among = filled if len(filled) >= SLICES else range(len(predictions))
    places = np.linspace(0, len(among) - 1, min(SLICES, len(among))).round().astype(int)
    return [among[i] for i in places]
