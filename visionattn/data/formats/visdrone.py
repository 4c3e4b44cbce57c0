"""`format: visdrone`: images with VisDrone's annotation files, a line for each object, and regions that are ignored.

A line is left, top, width and height in pixels, 1 or 0 (not counted), the number of the class, truncation, occlusion.
An empty file is an image without objects.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from visionattn.data.boxes import BoxSection
from visionattn.data.formats import Found, Kind, _boxes, image_mask
from visionattn.data.formats._boxes import Entry, split_in
from visionattn.data.images import files_below
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.recipe.sections import FilePath, Positive

KIND = Kind("boxes", writer="boxes_csv", endings=("",))
notes = _boxes.notes
NAMES = (
    "ignored regions",
    "pedestrian",
    "people",
    "bicycle",
    "car",
    "van",
    "truck",
    "tricycle",
    "awning-tricycle",
    "bus",
    "motor",
    "others",
)


class Section(BoxSection):
    """Folders called images with siblings called annotations, as in VisDrone2019-DET-train."""

    format: Literal["visdrone"]
    root: FilePath = Field(description="folder with the images and annotations of all splits, or of one")
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")
    ignored: list[str] = Field(
        ["ignored regions", "others"], description="names that are no classes: nothing is learned or wrong there"
    )


def find(section: Section) -> Found:
    """The images in the order of their names; pixels are not read.

    Raises:
        UserError: no image, or a class that the recipe does not know.
    """
    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    files = {image: _annotations(image) for image in files_below(root)}
    if not files:
        raise UserError(f"data.root: {root}: no image below this folder")
    problems = [
        f"{image}: no file {file}; an image without objects has an empty one"
        for image, file in files.items()
        if not file.is_file()
    ]
    for folder in sorted({file.parent for file in files.values()}):
        others = sorted(set(folder.glob("*.txt")) - set(files.values()))
        problems += [f"{path}: there is no image of this name" for path in others]
    entries = [_entry(section, image, file, problems) for image, file in files.items() if file.is_file()]
    return _boxes.found(entries, section, problems, known=NAMES)


def _annotations(image: Path) -> Path:
    """The text file of an image: in the folder annotations instead of images, else beside it."""
    folder = image.parent.with_name("annotations") if image.parent.name == "images" else image.parent
    return folder / f"{image.stem}.txt"


def _entry(section: Section, image: Path, file: Path, problems: list[str]) -> Entry:
    rows, lines, faults = [], [], []
    for line, text in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not text.strip(" ,"):
            continue
        try:
            row = [float(word) for word in text.strip(" ,").split(",")]
            if len(row) < 6 or row[4] not in (0, 1) or row[5] not in range(len(NAMES)):
                raise ValueError
        except ValueError:
            faults.append(
                f"{file}, line {line}: {text[:80]!r}, expected left, top, width, height, 0 or 1, and a class from 0 to "
                f"{len(NAMES) - 1}"
            )
            continue
        rows.append(row[:6])
        lines.append(f"in line {line}")
    problems += faults
    values = np.array(rows, np.float64).reshape(-1, 6)
    name = image.relative_to(section.root).with_suffix("").as_posix()
    return Entry(
        file,
        str(file),
        image,
        name,
        split_in(name.split("/")[:-1]),
        values[:, :4],
        [NAMES[int(number)] for number in values[:, 5]],
        values[:, 4] == 0,
        ids=lines,
        form="xywh",
        wrong=bool(faults),
    )


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
