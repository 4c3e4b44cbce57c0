"""Objects as a table (.csv): a row for each, with DeepForest's columns; one with empty cells for an image without any.

Masks, and objects that are to be ignored, are not written.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import write_table
from visionattn.writers._objects import file_name, objects
from visionattn.writers.table import Table

__all__ = ["TARGET", "open"]

TARGET = "boxes"


class Objects(Table):
    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, ["image_path", "xmin", "ymin", "xmax", "ymax", "label", "score"])
        self.classes = classes

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), boxes = case, objects(predictions)
        scores = [""] * len(boxes) if boxes.scores is None else [f"{score:.6f}" for score in boxes.scores]
        of_objects = zip(boxes.xyxy, boxes.labels, scores, strict=True)
        rows = [[*map(str, box), self.classes[label], score] for box, label, score in of_objects]
        write_table(self.stream, [[file_name(sample), *row] for row in rows or [[""] * len(self.columns[1:])]])


open = Objects
