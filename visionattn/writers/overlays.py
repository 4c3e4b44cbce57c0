"""Objects as a folder to look at: objects.csv, counts.csv with their number in each image, and overlays/NAME.png."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np

from visionattn.data.drawing import box_colors, draw_boxes
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import Unwritable, new_file, write_table
from visionattn.writers import Writer, boxes_csv
from visionattn.writers._objects import file_name, objects
from visionattn.writers.table import Table

__all__ = ["TARGET", "open"]

TARGET = "boxes"
SIDE = 640  # pixels that the longer side of a small picture is enlarged to


class Counts(Table):
    """A row per image, a column per class."""

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, ["image_path", *classes])

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        counts = np.bincount(objects(predictions).labels, minlength=len(self.columns) - 1)
        write_table(self.stream, [[file_name(case[0]), *map(str, counts.tolist())]])


TABLES = {"objects.csv": boxes_csv.open, "counts.csv": Counts}


class Overlays(Writer):
    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        if out.is_file():
            raise Unwritable(f"{out} is a file; tables and pictures are written into a folder: give another --out")
        self.out, self.classes = out, classes
        self.tables: tuple[Table, ...] = ()

    def refuse(self, samples: Sequence[Sample]) -> None:
        tables = [self.out / name for name in TABLES]
        there = [path for path in (*tables, *map(self._picture, samples)) if path.exists()]
        if there:
            raise Unwritable(f"{there[0]} exists; predictions are never overwritten: give another --out")

    @contextmanager
    def share(self, process: int, processes: int) -> Iterator[Self]:
        self.out.mkdir(exist_ok=True)
        with ExitStack() as stack:
            self.tables = tuple(make(self.out / name, self.classes) for name, make in TABLES.items())
            for table in self.tables:
                stack.enter_context(table.share(process, processes))
            yield self

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), found = case, list(predictions)
        boxes = objects(found)
        for table in self.tables:
            table.write(case, found)
        scale = max(1, SIDE // max(sample.size))
        picture = draw_boxes(sample.image(), boxes, box_colors(len(self.classes)), scale, self.classes)
        self._picture(sample).parent.mkdir(parents=True, exist_ok=True)
        with new_file(self._picture(sample)) as path:
            picture.save(path, format="PNG")

    def _picture(self, sample: Sample) -> Path:
        return self.out / "overlays" / f"{sample.case}.png"


open = Overlays
