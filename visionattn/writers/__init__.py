"""Predictions as files: a file for each output format.

A writer module has `open(out, ...) -> Writer`, which a task's `open_writer` calls.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
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

    def leave_out(self, name: str) -> None:  # noqa: B027 - not every format can say so
        """Note that a case is not written, since it cannot be read."""


class FilePerCase(Writer):
    """Into a new folder a file for each case, called as the case with `suffix`."""

    suffix: str

    def __init__(self, out: Path) -> None:
        self.out = out
        if out.is_file():
            raise Unwritable(f"{out} is a file; masks are written into a folder: give another --out")

    def path_of(self, case: Sequence[Sample], suffix: str | None = None) -> Path:
        """The file of a case; its folder is made."""
        path = self.out / f"{case[0].case}{suffix or self.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def refuse(self, samples: Sequence[Sample]) -> None:
        there = [path for sample in samples if (path := self.out / f"{sample.case}{self.suffix}").exists()]
        if there:
            raise Unwritable(f"{there[0]} exists; predictions are never overwritten: give another --out")


def readable(predictions: Iterable[Prediction]) -> Iterable[Prediction]:
    """The predictions; raises UserError at one that says that its sample cannot be read."""
    for prediction in predictions:
        if prediction.error is not None:
            raise UserError(prediction.error)
        yield prediction
