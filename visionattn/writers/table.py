"""A table (.csv) with a row for each image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import new_file, read_table, refuse_existing, write_table
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
    """Columns `path` and those that `cells` makes of a prediction; unreadable images have empty ones.

    Args:
        length: of values that are too long for a table: then an .npy file beside it, float32 (rows, length), has all of
            them, with NaN for unreadable images.
    """

    def __init__(
        self, out: Path, columns: Sequence[str], cells: Callable[[Prediction], Sequence[Any]], length: int = 0
    ) -> None:
        super().__init__(out, ["path", *columns])
        self.cells, self.length = cells, length
        if length:
            refuse_existing(_array_of(out))

    def __enter__(self) -> Self:
        super().__enter__()
        with ExitStack() as stack:
            stack.push(self._open)
            if self.length:
                self.values = stack.enter_context(_growing(_array_of(self.out), self.length))
            self._open = stack.pop_all()
        return self

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        for prediction in readable(predictions):
            self._keep(np.asarray(prediction.value))
            write_table(self.stream, [[case[prediction.index].name, *self.cells(prediction)]])

    def leave_out(self, name: str) -> None:
        self._keep(np.full(self.length, np.nan))
        write_table(self.stream, [[name, *("" for _ in self.columns[1:])]])

    def _keep(self, value: np.ndarray) -> None:
        if self.length:
            self.values.write(value.astype("<f4").tobytes())

    def join(self, parts: Sequence[Path], whole: Path) -> None:
        super().join(parts, whole)
        if self.length:
            arrays = [np.load(_array_of(part), mmap_mode="r") for part in parts]
            with _growing(_array_of(whole), self.length) as values:
                for row in in_turn(arrays):
                    values.write(row.tobytes())
            for part in parts:
                _array_of(part).unlink()


def _array_of(table: Path) -> Path:
    return table.with_name(f"{table.name.removesuffix('.csv')}.npy")


@contextmanager
def _growing(out: Path, length: int) -> Iterator[BinaryIO]:
    """An .npy file of float32 rows, whose number its header says once all of them are written."""
    with new_file(out) as path, path.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, length)}  # as long as any
        np.lib.format.write_array_header_1_0(stream, header)
        begin = stream.tell()
        yield stream
        rows = (stream.tell() - begin) // (4 * length)
        stream.seek(0)
        np.lib.format.write_array_header_1_0(stream, header | {"shape": (rows, length)})


open = Rows
