"""A table (.csv) with a row for each image."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.files import new_file, refuse_existing
from visionattn.writers import Writer, readable

__all__ = ["open"]


class Table(Writer):
    """Rows `path`, then the columns that `cells` makes of a prediction's value; unreadable images have empty ones."""

    def __init__(self, out: Path, columns: Sequence[str], cells: Callable[[np.ndarray], Sequence[Any]]) -> None:
        refuse_existing(out)
        if out.suffix.lower() not in (".csv", ".tsv", ".txt", ""):
            raise UserError(f"{out}: predictions of classes are written as a table: give an --out that ends with .csv")
        self.columns, self.cells = columns, cells
        self._file = new_file(out)

    def __enter__(self) -> Self:
        self._stream = self._file.__enter__().open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._rows = csv.writer(self._stream)
        self._rows.writerow(["path", *self.columns])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._file.__exit__(kind, error, trace)

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        for prediction in readable(predictions):
            self._rows.writerow([case[prediction.index].name, *self.cells(np.asarray(prediction.value))])

    def leave_out(self, name: str) -> None:
        self._rows.writerow([name, *("" for _ in self.columns)])


open = Table
