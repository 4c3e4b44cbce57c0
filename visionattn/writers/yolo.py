"""Objects as YOLO's text files, labels/NAME.txt, with data.yaml for the names: class number, box or outline, score.

Values are shares of the image's width and height. An object with a mask has its outline, all parts and holes in one
polygon; others have centre, width and height. What is to be ignored is not written.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import yaml

from visionattn.data.boxes import Boxes
from visionattn.data.outlines import in_one
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import Unwritable, new_file, write_text
from visionattn.writers import FilePerCase
from visionattn.writers._objects import objects, polygons

__all__ = ["TARGET", "open"]

TARGET = "boxes"


class Labels(FilePerCase):
    suffix = ".txt"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out)
        self.names, self.classes = out / "data.yaml", classes

    def files_of(self, case: str) -> list[Path]:
        return [self.out / "labels" / f"{case}.txt"]

    def refuse(self, samples: Sequence[Sample]) -> None:
        super().refuse(samples)
        if self.names.exists() and yaml.safe_load(self.names.read_text(encoding="utf-8")) != self._content:
            raise Unwritable(f"{self.names} exists and names other classes: give another --out")

    @property
    def _content(self) -> dict[str, dict[int, str]]:
        return {"names": dict(enumerate(self.classes))}

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.names, yaml.safe_dump(self._content, allow_unicode=True, sort_keys=False))
        return self

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), boxes = case, objects(predictions)
        scores = [""] * len(boxes) if boxes.scores is None else [f" {score:.6f}" for score in boxes.scores]
        of_objects = zip(boxes.labels, _values(boxes, sample.size), scores, strict=True)
        lines = [f"{label} {' '.join(map(repr, values))}{score}\n" for label, values, score in of_objects]
        (out,) = self.made_for(sample.case)
        with new_file(out) as path:
            path.write_text("".join(lines), encoding="utf-8")


def _values(boxes: Boxes, size: tuple[int, int]) -> Iterator[list[float]]:
    if boxes.masks is None:
        low, high = boxes.xyxy[:, :2].astype(np.float64), boxes.xyxy[:, 2:].astype(np.float64)
        yield from (np.concatenate([(low + high) / 2, high - low], axis=1) / [*size[::-1], *size[::-1]]).tolist()
    else:
        yield from ((in_one(parts) / size[::-1]).ravel().tolist() for parts in polygons(boxes))


open = Labels
