"""A table (.csv) with a row for each image."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain, groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import new_file, read_table, write_table
from visionattn.writers import OneFile, in_turn, readable

__all__ = ["Table", "open"]


class Table(OneFile):
    """Rows under these columns, of which the first names the image; a subclass writes them to `stream`."""

    endings = (".csv", ".tsv", ".txt", "")

    def __init__(self, out: Path, columns: Sequence[str]) -> None:
        super().__init__(out)
        self.columns = columns

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            path = stack.enter_context(new_file(self.out))
            stream = path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            self.stream = stack.enter_context(stream)
            write_table(self.stream, [self.columns])
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def join(self, parts: Sequence[Path], whole: Path) -> None:
        images = []
        for part in parts:
            with part.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
                header, *rows = read_table(stream)
            images.append([list(of_image) for _, of_image in groupby(rows, key=lambda row: row[0])])
        with new_file(whole) as path, path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            write_table(stream, [header, *chain.from_iterable(in_turn(images))])


class Rows(Table):
    """Columns `path` and those that `cells` makes of a prediction's value; unreadable images have empty ones."""

    def __init__(self, out: Path, columns: Sequence[str], cells: Callable[[np.ndarray], Sequence[Any]]) -> None:
        super().__init__(out, ["path", *columns])
        self.cells = cells

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        for prediction in readable(predictions):
            write_table(self.stream, [[case[prediction.index].name, *self.cells(np.asarray(prediction.value))]])

    def leave_out(self, name: str) -> None:
        write_table(self.stream, [[name, *("" for _ in self.columns[1:])]])


open = Rows
