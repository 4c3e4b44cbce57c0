"""Masks as PNG, NAME.png: the pixels are the class numbers, a palette shows them in colours; and overlays/NAME.png."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.colors import UNLABELLED, Colors, overlay
from visionattn.data.prediction import Prediction
from visionattn.data.sample import IGNORE, Sample, unit_range
from visionattn.errors import UserError
from visionattn.files import new_file
from visionattn.writers import FilePerCase, readable

__all__ = ["open"]


class Masks(FilePerCase):
    suffix = ".png"

    def __init__(
        self, out: Path, classes: Sequence[str], colors: Colors, leave_out: Sequence[str], polygons: bool
    ) -> None:
        super().__init__(out)
        if polygons:
            raise UserError("--polygons is for scenes, but the model was trained on images")
        self.colors = colors

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,) = case
        mask = np.full(sample.size, IGNORE, np.uint8)
        for prediction in readable(predictions):
            mask[prediction.window or ()] = np.asarray(prediction.value)
        with new_file(self.path_of(case)) as path:
            _with_palette(mask, self.colors).save(path, format="PNG")
        picture = self.out / "overlays" / f"{sample.case}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        with new_file(picture) as path:
            overlay(unit_range(sample.image()), mask, self.colors).save(path, format="PNG")


def _with_palette(mask: np.ndarray, colors: Colors) -> Image.Image:
    palette = np.zeros((IGNORE + 1, 3), dtype=np.uint8)
    palette[IGNORE] = UNLABELLED
    for number, color in enumerate(colors):
        palette[number] = color or 0
    image = Image.fromarray(mask)
    image.putpalette(palette.tobytes())
    return image


open = Masks
