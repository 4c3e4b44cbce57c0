"""Masks as PNG, NAME.png, with a palette that shows classes in colours; and overlays/NAME.png.

Maps of what makes them doubtful are NAME_MAP.tif, one band of float32.

The pixels are what the recipe's own masks say: numbers, or indices of a palette of their colours. Numbers of more than
8 bits have no palette, and those that no PNG can hold are written as NAME.tif.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.colors import UNLABELLED, Colors, overlay
from visionattn.data.labels import MaskCode
from visionattn.data.prediction import Prediction
from visionattn.data.sample import IGNORE, Sample, unit_range
from visionattn.errors import UserError
from visionattn.files import new_file
from visionattn.writers import FilePerCase, readable

__all__ = ["open"]


class Masks(FilePerCase):
    suffix, map_suffix = ".png", ".tif"

    def __init__(
        self,
        out: Path,
        code: MaskCode,
        colors: Colors,
        leave_out: Sequence[str],
        polygons: bool,
        maps: Sequence[str] = (),
    ) -> None:
        super().__init__(out, maps)
        if polygons:
            raise UserError("--polygons is for scenes, but the model was trained on images")
        self.code, self.colors = code, colors
        if code.kind not in (np.uint8, np.uint16):
            self.suffix = ".tif"

    def files_of(self, case: str) -> list[Path]:
        return [*super().files_of(case), self.out / "overlays" / f"{case}.png"]

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,) = case
        mask = np.full(sample.size, IGNORE, np.uint8)
        maps = {name: np.zeros(sample.size, np.float32) for name in self.maps}
        for prediction in readable(predictions):
            mask[prediction.window or ()] = np.asarray(prediction.value)
            for name, values in maps.items():
                values[prediction.window or ()] = prediction.doubts[name]
        out, shown = self.made_for(sample.case)
        with new_file(out) as path, new_file(shown) as picture:
            _picture(mask, self.code, self.colors).save(path, format="PNG" if self.suffix == ".png" else "TIFF")
            overlay(unit_range(sample.image()), mask, self.colors).save(picture, format="PNG")
        for name, file in self.map_files_of(sample.case).items():
            with new_file(file) as path:
                Image.fromarray(maps[name]).save(path, format="TIFF")


def _picture(mask: np.ndarray, code: MaskCode, colors: Colors) -> Image.Image:
    values = code.written(mask)
    if values.dtype != np.uint8:
        return Image.fromarray(values if values.dtype == np.uint16 else values.astype(np.int32))
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[[*code.values, code.unlabelled]] = code.colors or [*(color or (0, 0, 0) for color in colors), UNLABELLED]
    image = Image.fromarray(values)
    image.putpalette(palette.tobytes())
    return image


open = Masks
