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

    def files_of(self, case: str) -> list[Path]:
        return [*super().files_of(case), self.out / "overlays" / f"{case}.png"]

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,) = case
        mask = np.full(sample.size, IGNORE, np.uint8)
        for prediction in readable(predictions):
            mask[prediction.window or ()] = np.asarray(prediction.value)
        out, shown = self.made_for(sample.case)
        with new_file(out) as path, new_file(shown) as picture:
            _with_palette(mask, self.colors).save(path, format="PNG")
            overlay(unit_range(sample.image()), mask, self.colors).save(picture, format="PNG")


def _with_palette(mask: np.ndarray, colors: Colors) -> Image.Image:
    palette = np.zeros((IGNORE + 1, 3), dtype=np.uint8)
    palette[IGNORE] = UNLABELLED
    for number, color in enumerate(colors):
        palette[number] = color or 0
    image = Image.fromarray(mask)
    image.putpalette(palette.tobytes())
    return image


open = Masks
