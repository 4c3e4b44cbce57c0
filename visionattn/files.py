"""Files and folders that appear whole or not at all, in whichever moment the process is killed or the disk is full.

Each is written under a hidden name of this process beside its place, and renamed at the end; nothing is overwritten
unless it is said so, and an error leaves nothing behind.
"""

import csv
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from visionattn.errors import UserError

__all__ = [
    "Unwritable",
    "as_given",
    "make_folder",
    "new_file",
    "new_folder",
    "read_table",
    "refuse_existing",
    "write_rows",
    "write_table",
    "write_text",
]

FORMULA = re.compile(r"'*[=+@\t\r-]")  # how a cell begins that a spreadsheet runs, or one that has been kept from it
FULL = 2**20  # bytes; writers give up before the last ones


class Unwritable(UserError):
    """A result cannot be written, whatever is wrong with it; the next one could not be either."""


def refuse_existing(out: Path) -> None:
    """Raises Unwritable where `out` exists or its folder does not."""
    if out.exists():
        raise Unwritable(f"{out} exists; results are never overwritten: give another name")
    if not out.parent.is_dir():
        raise Unwritable(f"{out}: the folder {out.parent} does not exist; make it first")


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, where they are not there. Raises Unwritable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(f"{folder}: the folder cannot be made ({error.strerror})") from None


@contextmanager
def new_file(out: Path, replace: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `out` at the end; on an error, whichever, nothing is left of it.

    Args:
        replace: `out` may exist, and is then replaced at once.

    Raises:
        Unwritable: `out` exists, its folder does not, or it could not be written, such as on a full disk.
    """
    if not replace:
        refuse_existing(out)
    with _beside(out) as unfinished:
        yield unfinished
        os.replace(unfinished, out)


@contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """As `new_file`, a folder to write into."""
    if not replace:
        refuse_existing(out)
    with _beside(out) as unfinished:
        unfinished.mkdir()
        yield unfinished
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A free path in a hidden folder beside `out`; errors of the file system while it is used become Unwritable."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            try:
                yield Path(folder, out.name)
            except OSError as error:
                full = shutil.disk_usage(folder).free < FULL
                raise OSError("the disk is full" if full else error.strerror or str(error)) from None
    except OSError as error:
        reason = error.strerror or error
        raise Unwritable(
            f"{out}: could not be written ({reason}); what there was of it has been removed, other files are whole"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace a file's text."""
    with new_file(path, replace=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str] | None = None) -> None:
    """Replace a table; its columns are those of the first row unless they are given."""
    rows = iter(rows)
    first = next(rows, None)
    header = list(columns or first or ())
    filled = rows if first is None else chain([first], rows)
    with new_file(path, replace=True) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        write_table(file, chain([header], ([row.get(column, "") for column in header] for row in filled)))


def write_table(file: TextIO, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows of a .csv; a text that a spreadsheet would run as a formula has an apostrophe before it."""
    csv.writer(file).writerows([_harmless(cell) for cell in row] for row in rows)


def read_table(file: TextIO) -> Iterator[list[str]]:
    """The rows that `write_table` has written, each text as it was given."""
    for row in csv.reader(file):
        yield [as_given(cell) for cell in row]


def as_given(cell: str) -> str:
    """A text of a table as it was before `write_table` kept it from being run."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str) or not FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell  # a number with its sign
