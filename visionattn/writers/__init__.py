"""Predictions as files: a file for each output format.

A writer module has `open(out, ...) -> Writer`, which a task's `open_writer` calls; one of objects, of which there are
several to choose from, has `TARGET = "boxes"` and `open(out, classes)`.
"""

import importlib
import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self, TypeVar

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, cases
from visionattn.errors import UserError
from visionattn.files import Unwritable, make_folder, refuse_existing

__all__ = ["FilePerCase", "OneFile", "Writer", "in_turn", "of_objects", "readable"]

SECONDS_BETWEEN_LOOKS = 0.2
T = TypeVar("T")


def of_objects() -> dict[str, ModuleType]:
    """The formats that objects can be written in, by name."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {n.removeprefix("boxes_"): m for n, m in modules.items() if getattr(m, "TARGET", None) == "boxes"}


class Writer(ABC):
    """Writes predictions case by case; what it has written is whole once it is left without an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def refuse(self, samples: Sequence[Sample]) -> None:  # noqa: B027 - not every writer has something to refuse
        """Raises UserError, before any work, for what could only fail later."""

    @abstractmethod
    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        """Write what is predicted of the samples of a case; the index of a prediction counts from the first of them.

        Raises:
            UserError: a prediction says that its sample cannot be read; nothing of the case is then written.
            Unwritable: the file cannot be written.
        """

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that a command which did not end has left to be written.

        Raises:
            UserError: what this writes appears at once, at the end.
        """
        raise UserError(
            "--continue is for what has a file for each image: one file for all appears at once, at the end, so there "
            "is nothing to go on with"
        )

    @contextmanager
    def share(self, process: int, processes: int) -> Iterator[Self]:
        """This writer for the share that one of several processes predicts, every n-th case from its own number on."""
        with self:
            yield self

    def leave_out(self, name: str) -> None:  # noqa: B027 - not every format can say so
        """Note that a case is not written, since it cannot be read."""


class OneFile(Writer):
    """Into one file, which appears at the end."""

    endings: tuple[str, ...]

    def __init__(self, out: Path) -> None:
        refuse_existing(out)
        if out.suffix.lower() not in self.endings:
            raise UserError(
                f"{out}: all predictions are written into one file: give an --out that ends with {self.endings[0]}"
            )
        self.out = out

    @contextmanager
    def share(self, process: int, processes: int) -> Iterator[Self]:
        """Each process writes a hidden file of its own; the first one then makes one of all, in order."""
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
            while not all(part.exists() for part in parts):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            self.join(parts, whole)
            for part in parts:
                part.unlink()

    @abstractmethod
    def join(self, parts: Sequence[Path], whole: Path) -> None:
        """Write what the files of all processes have, a case of each in turn."""


def in_turn(parts: Iterable[Sequence[T]]) -> Iterator[T]:
    """The first of each part, then the second of each ..."""
    return (item for item in chain.from_iterable(zip_longest(*parts)) if item is not None)


class FilePerCase(Writer):
    """Into a folder a file for each case, called as the case with `suffix`, and what a subclass writes beside it.

    Args:
        maps: names of the doubts of a prediction that are written too, float32 NAME_MAP with `map_suffix`.
    """

    suffix: str
    map_suffix: str

    def __init__(self, out: Path, maps: Sequence[str] = ()) -> None:
        self.out, self.maps = out, maps
        if out.is_file():
            raise Unwritable(f"{out} is a file; a file for each image is written into a folder: give another --out")

    def files_of(self, case: str) -> list[Path]:
        """Every file of a case, the main one first."""
        return [self.out / f"{case}{self.suffix}"]

    def map_files_of(self, case: str) -> dict[str, Path]:
        """Those of the maps, by name."""
        return {name: self.out / f"{case}_{name}{self.map_suffix}" for name in self.maps}

    def _all_of(self, case: str) -> list[Path]:
        return [*self.files_of(case), *self.map_files_of(case).values()]

    def made_for(self, case: str) -> list[Path]:
        """The same, once their folders are there."""
        for path in self.files_of(case):
            make_folder(path.parent)
        return self.files_of(case)

    def _refuse_same(self, samples: Sequence[Sample]) -> None:
        """Raises UserError where files of two cases would have one name, such as an overlay and a mask."""
        written: dict[Path, str] = {}
        for case in cases(samples):
            for path in self._all_of(case):
                if written.setdefault(path, case) != case:
                    raise UserError(f"{written[path]} and {case} would both be written as {path}: predict them apart")

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        self._refuse_same(samples)
        whole = {case for case in cases(samples) if all(path.exists() for path in self._all_of(case))}
        for case in cases(samples).keys() - whole:
            for path in self._all_of(case):  # of a case that is not whole
                path.unlink(missing_ok=True)
        return [sample for sample in samples if sample.case not in whole]

    def refuse(self, samples: Sequence[Sample]) -> None:
        self._refuse_same(samples)
        there = [path for case in cases(samples) for path in self._all_of(case) if path.exists()]
        if there:
            raise Unwritable(f"{there[0]} exists; predictions are never overwritten: give another --out")


def readable(predictions: Iterable[Prediction]) -> Iterable[Prediction]:
    """The predictions; raises UserError at one that says that its sample cannot be read."""
    for prediction in predictions:
        if prediction.error is not None:
            raise UserError(prediction.error)
        yield prediction
