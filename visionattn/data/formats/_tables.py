"""Tables (.csv) with a header, as text."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from visionattn.data.sample import SPLITS
from visionattn.errors import UserError, listed, nearest
from visionattn.files import as_given

__all__ = ["Row", "read_rows", "splits_of"]

SEPARATORS = ",;\t"
log = logging.getLogger(__name__)
Row = dict[str, str]  # by column


def read_rows(path: Path, columns: Sequence[tuple[str, str]], least: int = 1) -> list[tuple[int, Row]]:
    """The number of each line that is not empty, and its stripped texts in these columns.

    Args:
        columns: the key of the recipe that names a column, and the column. The separator is what makes the first one a
            column.
        least: so many rows there have to be.

    Raises:
        UserError: not readable, a column is missing or there twice, more or fewer fields than columns, no row.
    """
    header, lines = _table(path, columns[0][1])
    for key, column in columns:
        if column not in header:
            hint = nearest(column, header, cutoff=0.5)
            raise UserError(f"data.{key}: {path} has no column {column!r}; it has {listed(header)}{hint}")
    misfits = [line for line, row in lines if len(row) != len(header)]
    if misfits:
        raise UserError(
            f"data.root: {path}: more or fewer fields than the {len(header)} of the header in line "
            f"{listed(misfits)}; a text that has the separator in it stands in quotes"
        )
    places = {column: header.index(column) for _, column in columns}
    rows = [(line, {column: as_given(row[place].strip()) for column, place in places.items()}) for line, row in lines]
    if len(rows) < least:
        raise UserError(f"data.root: {path}: no rows below the header")
    return rows


def _table(path: Path, known: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each line that is not empty with its number; separated by what makes `known` a column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            fitting = (mark for mark in SEPARATORS if known in next(csv.reader([first], delimiter=mark), []))
            separator = next(fitting, ",")
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            header = next(reader, [])
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.root: {path}: not readable as a table ({reason})") from None
    if separator != ",":
        log.info("%s: its columns are separated by %r", path, separator)
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise UserError(f"data.root: {path}: columns of one name: {listed(twice)}")
    return header, lines


def splits_of(path: Path, rows: Sequence[Row], column: str | None) -> list[str]:
    """The split of each row; "" without such a column. Raises UserError for other words than train, val and test."""
    if column is None:
        return [""] * len(rows)
    splits = [row[column] for row in rows]
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown or "train" not in splits:
        raise UserError(
            f"data.split_column: {path}: {column} has {listed(unknown or sorted(set(splits)))}, "
            f"expected {', '.join(SPLITS)}"
        )
    return splits
