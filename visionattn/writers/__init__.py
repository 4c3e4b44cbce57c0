"""Predictions as files: a file for each output format.

A writer module has `open(out, ...) -> Writer`, which a task's `open_writer` calls.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, cases
from visionattn.errors import UserError
from visionattn.files import Unwritable

__all__ = ["FilePerCase", "Writer"]


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
            "--continue is for masks: a table appears at once, at the end, so there is nothing to go on with"
        )

    @contextmanager
    def share(self, process: int, processes: int) -> Iterator[Self]:
        """This writer for the share that one of several processes predicts, every n-th case from its own number on."""
        with self:
            yield self

    def leave_out(self, name: str) -> None:  # noqa: B027 - not every format can say so
        """Note that a case is not written, since it cannot be read."""


class FilePerCase(Writer):
    """Into a folder a mask for each case, called as the case with `suffix`, and what a subclass writes beside it."""

    suffix: str

    def __init__(self, out: Path) -> None:
        self.out = out
        if out.is_file():
            raise Unwritable(f"{out} is a file; masks are written into a folder: give another --out")

    def files_of(self, case: str) -> list[Path]:
        """Every file of a case, its mask first."""
        return [self.out / f"{case}{self.suffix}"]

    def made_for(self, case: str) -> list[Path]:
        """The same, once their folders are there."""
        for path in self.files_of(case):
            path.parent.mkdir(parents=True, exist_ok=True)
        return self.files_of(case)

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        whole = {case for case in cases(samples) if all(path.exists() for path in self.files_of(case))}
        for case in cases(samples).keys() - whole:
            for path in self.files_of(case):  # of a case that is not whole
                path.unlink(missing_ok=True)
        return [sample for sample in samples if sample.case not in whole]

    def refuse(self, samples: Sequence[Sample]) -> None:
        there = [path for case in cases(samples) for path in self.files_of(case) if path.exists()]
        if there:
            raise Unwritable(f"{there[0]} exists; predictions are never overwritten: give another --out")


def readable(predictions: Iterable[Prediction]) -> Iterable[Prediction]:
    """The predictions; raises UserError at one that says that its sample cannot be read."""
    for prediction in predictions:
        if prediction.error is not None:
            raise UserError(prediction.error)
        yield prediction
