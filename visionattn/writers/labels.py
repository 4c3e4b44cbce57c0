"""Instance masks as a label image, NAME.tif, and NAME.csv with class, score and box of each number.

A pixel has the number of its object, 0 where there is none; where objects overlap, that of the higher score. 16 bits,
above 65535 objects 32 bits; of a scene a GeoTIFF on its grid. Memory does not grow with the image.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.files import new_file, write_table
from visionattn.writers import FilePerCase
from visionattn.writers._objects import grid, number, objects

__all__ = ["NEEDS_MASKS", "TARGET", "open"]

TARGET = "boxes"
NEEDS_MASKS = True

STRIP = 512  # rows
COLUMNS = ["number", "class", "score", "xmin", "ymin", "xmax", "ymax"]


class Labels(FilePerCase):
    suffix = ".tif"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out)
        self.classes = classes

    def files_of(self, case: str) -> list[Path]:
        return [*super().files_of(case), self.out / f"{case}.csv"]

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), boxes = case, objects(predictions)
        if len(boxes) and boxes.masks is None:
            raise UserError(
                f"{sample.name}: boxes without masks cannot be written as a label image; choose another format"
            )
        kind = np.uint16 if len(boxes) <= np.iinfo(np.uint16).max else np.uint32
        image, table = self.made_for(sample.case)
        with new_file(image) as path, new_file(table) as rows:
            _save(path, sample, _strips(boxes, sample.size, kind), kind)
            with rows.open("w", newline="", encoding="utf-8") as stream:
                write_table(stream, [COLUMNS, *_rows(boxes, self.classes)])


def _rows(boxes: Boxes, classes: Sequence[str]) -> Iterator[list[str]]:
    for k, (box, label) in enumerate(zip(boxes.xyxy, boxes.labels, strict=True)):
        score = "" if boxes.scores is None else f"{boxes.scores[k]:.6f}"
        yield [str(k + 1), classes[label], score, *(str(number(value)) for value in box)]


def _strips(boxes: Boxes, size: tuple[int, int], kind: type[np.unsignedinteger]) -> Iterator[np.ndarray]:
    """Numbers of some rows after the other."""
    upwards = np.arange(len(boxes)) if boxes.scores is None else np.argsort(boxes.scores, kind="stable")
    for top in range(0, size[0], STRIP):
        strip = np.zeros((min(STRIP, size[0] - top), size[1]), kind)
        here = (boxes.xyxy[upwards, 1] < top + len(strip)) & (np.ceil(boxes.xyxy[upwards, 3]) > top)
        for k in upwards[here]:
            rows, columns = pixels_of(boxes.xyxy[k])
            first, end = max(rows.start, top), min(rows.stop, top + len(strip))
            mask = boxes.masks[k][first - rows.start : end - rows.start]  # type: ignore[index]  # there are masks
            strip[first - top : end - top, columns][mask] = k + 1
        yield strip


def _save(path: Path, sample: Sample, strips: Iterator[np.ndarray], kind: type[np.unsignedinteger]) -> None:
    if not (placed := grid(sample)):
        Image.fromarray(np.concatenate(list(strips))).save(path, format="TIFF", compression="tiff_deflate")
        return
    from visionattn.data.formats._rasters import open_quietly

    height, width = sample.size
    profile = {"driver": "GTiff", "count": 1, "height": height, "width": width, "dtype": np.dtype(kind).name}
    profile |= {"tiled": True, "blockxsize": STRIP, "blockysize": STRIP, "compress": "deflate", "bigtiff": "if_safer"}
    with open_quietly(path, "w", **profile, crs=placed[0], transform=placed[1]) as sink:
        for k, strip in enumerate(strips):
            sink.write(strip, 1, window=((k * STRIP, k * STRIP + len(strip)), (0, width)))


open = Labels
