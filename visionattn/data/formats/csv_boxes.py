"""`format: csv` with boxes: a table with a row for each object, as DeepForest has it.

An image without objects has one row whose box is empty, or 0, 0, 0, 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from unicodedata import normalize

import numpy as np
from pydantic import Field

from visionattn.data.boxes import BoxSection
from visionattn.data.formats import Found, Kind, _boxes, image_mask
from visionattn.data.formats._boxes import Entry
from visionattn.data.formats._tables import Row, read_rows, splits_of
from visionattn.data.images import existing
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath, Positive

KIND = Kind("boxes", writer="boxes_csv", endings=(".csv",))
notes = _boxes.notes


class Section(BoxSection):
    """A table with a row for each object."""

    format: Literal["csv"]
    root: FilePath = Field(description="the .csv file")
    images: FilePath | None = Field(None, description="folder that the paths start from; unset: the table's folder")
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")
    path_column: str = "image_path"
    label_column: str = "label"
    box_columns: Annotated[list[str], Field(min_length=4, max_length=4)] = Field(
        ["xmin", "ymin", "xmax", "ymax"], description="two corners in pixels"
    )
    split_column: str | None = Field(None, description="column that says train, val or test; unset: drawn")
    group_column: str | None = Field(None, description="a group (patient, scene) never goes to different splits")

    def at(self, root: Path) -> Self:
        other = super().at(root)  # type: ignore[misc]  # of the task's section, which is the next base
        return other.model_copy(update={"images": None, "split_column": None, "group_column": None})


def find(section: Section) -> Found:
    """The images in the order of the rows; pixels are not read.

    Raises:
        UserError: the table is not as it should be, or a label is not known.
    """
    keys = ["path_column", "label_column", "split_column", "group_column"]
    columns = [(key, column) for key in keys if (column := getattr(section, key)) is not None]
    rows = read_rows(section.root, [*columns, *(("box_columns", column) for column in section.box_columns)])
    members: dict[str, list[tuple[int, Row]]] = {}
    for (line, row), split in zip(
        rows, splits_of(section.root, [r for _, r in rows], section.split_column), strict=True
    ):
        members.setdefault(row[section.path_column], []).append((line, row | {"": split}))
    if nameless := [line for line, _ in members.get("", [])]:
        raise UserError(f"data.root: {section.root}: {section.path_column} is empty in line {listed(nameless)}")
    problems: list[str] = []
    entries = [_entry(section, name, of_image, problems) for name, of_image in members.items()]
    return _boxes.found(entries, section, problems)


def _entry(section: Section, name: str, rows: Sequence[tuple[int, Row]], problems: list[str]) -> Entry:
    where = f"{section.root}: {name}"
    faults = []
    for key, column in (("split", ""), ("group", section.group_column)):
        if column is not None and len(several := {row[column] for _, row in rows}) > 1:
            faults.append(f"{where}: its rows have more than one {key}: {listed(sorted(several))}")
    values, labels, lines = [], [], []
    for line, row in rows:
        try:
            box = [float(row[column] or 0) for column in section.box_columns]
        except ValueError:
            faults.append(f"{where}, line {line}: {[row[c] for c in section.box_columns]} are no numbers")
            continue
        if any(box):
            values.append(box)
            labels.append(normalize("NFC", row[section.label_column]))
            lines.append(line)
    faults += [f"{where}, line {line}: no label" for line, label in zip(lines, labels, strict=True) if not label]
    problems += faults
    first = rows[0][1]
    said: dict[str, Any] = {
        "names": labels,
        "ignore": np.zeros(len(labels), bool),
        "ids": [f"in line {n}" for n in lines],
    }
    said |= {"split": first[""], "group": first[section.group_column] if section.group_column else None}
    path = existing(section.images or section.root.parent, name.replace("\\", "/"))
    stem = Path(name.replace("\\", "/")).with_suffix("").as_posix()
    return Entry(section.root, where, path, stem, values=np.array(values), **said, wrong=bool(faults))


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
