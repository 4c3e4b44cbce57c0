"""A table (.csv) with a row for each image."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.files import new_file, read_table, refuse_existing, write_table
from visionattn.writers import Writer, readable

__all__ = ["open"]

SECONDS_BETWEEN_LOOKS = 0.2


class Table(Writer):
    """Rows `path`, then the columns that `cells` makes of a prediction's value; unreadable images have empty ones."""

    def __init__(self, out: Path, columns: Sequence[str], cells: Callable[[np.ndarray], Sequence[Any]]) -> None:
        refuse_existing(out)
        if out.suffix.lower() not in (".csv", ".tsv", ".txt", ""):
            raise UserError(f"{out}: predictions of classes are written as a table: give an --out that ends with .csv")
        self.out, self.columns, self.cells = out, columns, cells

    def __enter__(self) -> Self:
        self._file = new_file(self.out)
        self._stream = self._file.__enter__().open("w", newline="", encoding="utf-8", errors="surrogateescape")
        write_table(self._stream, [["path", *self.columns]])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._file.__exit__(kind, error, trace)

    @contextmanager
    def share(self, process: int, processes: int) -> Iterator[Self]:
        """Each process writes a hidden table of its own; the first one then makes one of all, in order."""
        if processes == 1:
            with self:
                yield self
            return
        whole = self.out
        parts = [whole.with_name(f".{whole.name}.{number}") for number in range(processes)]
        self.out = parts[process]
        with self:
            yield self
        if process == 0:
            _join(parts, whole)

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        for prediction in readable(predictions):
            write_table(self._stream, [[case[prediction.index].name, *self.cells(np.asarray(prediction.value))]])

    def leave_out(self, name: str) -> None:
        write_table(self._stream, [[name, *("" for _ in self.columns)]])


def _join(parts: Sequence[Path], whole: Path) -> None:
    """One table of the parts, which appear whole: a row of each in turn."""
    while not all(part.exists() for part in parts):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    tables = []
    for part in parts:
        with part.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            tables.append(list(read_table(stream)))
    rows = (row for row in chain.from_iterable(zip_longest(*(table[1:] for table in tables))) if row is not None)
    with new_file(whole) as path, path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        write_table(stream, [tables[0][0], *rows])
    for part in parts:
        part.unlink()


open = Table
