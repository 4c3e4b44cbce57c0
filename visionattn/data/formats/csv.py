"""`format: csv`: a table of images and their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self
from unicodedata import normalize

import numpy as np
from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.formats._tables import Row, read_rows, splits_of
from visionattn.data.images import ImageFile, existing, image_samples
from visionattn.data.labels import ClassSection, class_order
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath

KIND = Kind("class", endings=(".csv",))
NOTHING = {"nan", "null", "none", "na", "n/a", "<na>", "nat", "#n/a"}  # what programs write into a cell without a value


class Section(ClassSection):
    """A table with a row per image."""

    format: Literal["csv"]
    root: FilePath = Field(description="the .csv file")
    images: FilePath | None = Field(None, description="folder that the paths start from; unset: the table's folder")
    path_column: str = "path"
    label_column: str = "label"
    label_separator: str | None = Field(None, description="multi-label: what separates the labels of a row")
    split_column: str | None = Field(None, description="column that says train, val or test; unset: drawn")
    group_column: str | None = Field(None, description="a group (patient, scene) never goes to different splits")

    def at(self, root: Path) -> Self:
        other = super().at(root)  # type: ignore[misc]  # of the task's section, which is the next base
        return other.model_copy(update={"images": None, "split_column": None, "group_column": None})


def find(section: Section) -> Found:
    """The images in the order of the rows; none is opened."""
    rows = _rows(section)
    base = section.images or section.root.parent
    paths = [existing(base, row[section.path_column]) for row in rows]
    _refuse_files(rows, paths, section)
    texts = [normalize("NFC", row[section.label_column]) for row in rows]
    if section.label_separator:
        sets = [{x.strip() for x in text.split(section.label_separator)} - {""} for text in texts]
        classes = class_order(set().union(*sets), section.classes)
        labels = list(np.array([[c in s for c in classes] for s in sets], dtype=np.float32))
    else:
        classes = class_order(texts, section.classes)
        index = {c: k for k, c in enumerate(classes)}
        labels = [index[text] for text in texts]
    splits = splits_of(section.root, rows, section.split_column)
    samples: list[Sample] = []
    for row, path, label, split in zip(rows, paths, labels, splits, strict=True):
        name = row[section.path_column]
        group = row[section.group_column] if section.group_column else name
        samples.append(ImageFile(name, name, group, section.channels, split=split, label=label, path=path))
    return Found(samples, classes, [])


def _refuse_files(rows: list[Row], paths: list[Path], section: Section) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"data.root: {section.root}: {len(missing)} of {len(paths)} files are missing: {listed(missing)}"
        )
    first = {path: i for i, path in reversed(list(enumerate(paths)))}
    twice = [row[section.path_column] for i, row in enumerate(rows) if first[paths[i]] != i]
    if twice:
        hint = "" if section.label_separator else "; several labels of an image go into one row (data.label_separator)"
        raise UserError(f"data.root: {section.root}: listed more than once: {listed(sorted(twice))}{hint}")


def _rows(section: Section) -> list[Row]:
    """Rows of the table, with all the columns that the recipe names."""
    keys = ["path_column", "label_column", "split_column", "group_column"]
    columns = [(key, column) for key in keys if (column := getattr(section, key)) is not None]
    rows = read_rows(section.root, columns)
    optional = {section.label_column} if section.label_separator else set()  # an image may have none of the labels
    for column in {column for _, column in columns} - optional:
        empty = [line for line, row in rows if not row[column]]
        if empty:
            raise UserError(f"data.root: {section.root}: {column} is empty in line {listed(empty)}")
    _refuse_nothing(rows, section)
    return [row for _, row in rows]


def _refuse_nothing(rows: list[tuple[int, Row]], section: Section) -> None:
    """Raises UserError for labels and groups that say in a program's words that there are none."""
    for column in filter(None, (section.label_column, section.group_column)):
        labels = column == section.label_column
        mark, classes = (section.label_separator, section.classes or []) if labels else (None, [])
        lines = [
            line
            for line, row in rows
            for text in map(str.strip, row[column].split(mark) if mark else [row[column]])
            if text.lower() in NOTHING and text not in classes
        ]
        if lines:
            hint = ", or name it in data.classes if it is a class" if labels else ""
            raise UserError(
                f"data.root: {section.root}: {column} says that there is none, as programs write a missing value (nan, "
                f"null, None ...), in line {listed(lines)}; remove such rows{hint}"
            )


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_samples(paths, channels)
