"""`format: csv` without labels: a table of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from visionattn.data.formats import Found, Kind, image_mask
from visionattn.data.formats._tables import read_rows, splits_of
from visionattn.data.images import ImageFile, existing, headers
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath, Positive
from visionattn.recipe.sections import Section as BaseSection

KIND = Kind("", endings=(".csv",))


class Section(BaseSection):
    """A table with a row per image."""

    format: Literal["csv"]
    root: FilePath = Field(description="the .csv file")
    channels: Positive | None = Field(None, description="unset: 1 where all images are grey, else 3")
    images: FilePath | None = Field(None, description="folder that the paths start from; unset: the table's folder")
    path_column: str = "path"
    split_column: str | None = Field(None, description="column that says train, val or test; unset: drawn")
    group_column: str | None = Field(None, description="a group (patient, scene) never goes to different splits")


def find(section: Section) -> Found:
    """The images in the order of the rows; only headers are read."""
    keys = ["path_column", "split_column", "group_column"]
    columns = [(key, column) for key in keys if (column := getattr(section, key)) is not None]
    rows = [row for _, row in read_rows(section.root, columns)]
    names = [row[section.path_column] for row in rows]
    paths = [existing(section.images or section.root.parent, name) for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"data.root: {section.root}: {len(missing)} of {len(paths)} files are missing: {listed(missing)}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise UserError(f"data.root: {section.root}: listed more than once: {listed(twice)}")
    known, wrong = headers(paths)
    if wrong:
        raise UserError(listed(list(wrong.values()), "\n"))
    channels = section.channels or max(1 if it.bands <= 2 else 3 for it in known.values())
    splits = splits_of(section.root, rows, section.split_column)
    groups = [row[section.group_column] if section.group_column else row[section.path_column] for row in rows]
    samples: list[Sample] = [
        ImageFile(name, name, group, channels, known[path].size, split, path=path)
        for name, group, split, path in zip(names, groups, splits, paths, strict=True)
    ]
    return Found(samples, [], [])


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
