"""`format: yolo`: images with text files of boxes or polygons, in shares of the image's width and height.

A line is a class number, then x and y of the centre, width and height, or x and y of three or more corners; a score may
follow. An empty file is an image without objects.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import yaml
from pydantic import Field

from visionattn.data.boxes import BoxSection
from visionattn.data.formats import Found, Kind, _boxes, image_mask
from visionattn.data.formats._boxes import Entry, split_in
from visionattn.data.images import files_below
from visionattn.data.object_masks import Polygons
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath, Positive

KIND = Kind("boxes", writer="boxes_csv", endings=("",))
notes = _boxes.notes
NAMES = ("classes.txt", "obj.names")
OVER = 0.01  # of a side: what rounding puts a border outside


class Section(BoxSection):
    """Folders called images with siblings called labels, or .txt files beside the images; names in data.yaml."""

    format: Literal["yolo"]
    root: FilePath = Field(description="folder with data.yaml, or classes.txt, and the images and labels")
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")


def find(section: Section) -> Found:
    """The images in the order of their names; pixels are not read.

    Raises:
        UserError: no image, no names of the classes, or a class that the recipe does not know.
    """
    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    names, source = _names(section)
    labels = {path: _labels(path) for path in files_below(root)}
    missing = [(image, file) for image, file in labels.items() if not file.is_file()]
    problems = [f"{image}: no file {file}; an image without objects has one without a line" for image, file in missing]
    problems += _without_image(set(labels.values()))
    entries = [_entry(section, path, file, names, source, problems) for path, file in labels.items() if file.is_file()]
    return _boxes.found(entries, section, problems, known=names)


def _names(section: Section) -> tuple[list[str], str]:
    """The names of the class numbers, and where they are from."""
    for path in sorted([*section.root.glob("*.yaml"), *section.root.glob("*.yml")]):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
        if isinstance(content, dict) and "names" in content:
            return _distinct(_in_order(content["names"], path), path), str(path)
    for path in (section.root / folder / name for name in NAMES for folder in ("", "labels")):
        if path.is_file():
            return _distinct(path.read_text(encoding="utf-8-sig").splitlines(), path), str(path)
    if section.classes is None:
        raise UserError(
            f"data.root: {section.root}: nothing says what the class numbers are called; add data.yaml with `names`, "
            "or give them in order as data.classes"
        )
    return section.classes, "data.classes"


def _in_order(names: object, path: Path) -> list[str]:
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        return [str(names[k]) for k in range(len(names))]
    if isinstance(names, list):
        return [str(name) for name in names]
    raise UserError(f"{path}: names are {names!r}, expected a list, or names of the numbers from 0 on")


def _distinct(names: Sequence[str], path: Path) -> list[str]:
    names = [normalize("NFC", name.strip()) for name in names if name.strip()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two classes are called {listed(twice)}")
    return names


def _labels(image: Path) -> Path:
    """The text file of an image: in the folder labels instead of images, else beside it."""
    parts = list(image.parts)
    folders = [k for k, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _without_image(labels: set[Path]) -> Iterator[str]:
    for folder in sorted({path.parent for path in labels}):
        for path in sorted(folder.glob("*.txt")):
            if path not in labels and path.name not in NAMES:
                yield f"{path}: there is no image of this name"


def _entry(section: Section, image: Path, file: Path, names: Sequence[str], source: str, problems: list[str]) -> Entry:
    values, numbers, shapes, lines, faults = [], [], [], [], []
    for line, text in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        try:
            number, box, polygon = _object(text.split())
            if number >= len(names):
                last = f"{source} has names for 0 to {len(names) - 1} ({listed(names, most=8)})"
                raise ValueError(f"class number {number}, but {last}")
        except ValueError as error:
            faults.append(f"{file}, line {line}: {error}")
            continue
        except IndexError:
            continue
        values.append(box)
        numbers.append(number)
        shapes.append(polygon)
        lines.append(f"in line {line}")
    problems += faults
    name = image.relative_to(section.root).with_suffix("").as_posix()
    return Entry(
        file,
        str(file),
        image,
        name,
        split_in(name.split("/")[:-1]),
        np.array(values),
        [names[number] for number in numbers],
        np.zeros(len(numbers), bool),
        shapes if any(shapes) else [],
        ids=lines,
        wrong=bool(faults),
        relative=True,
    )


def _object(words: Sequence[str]) -> tuple[int, list[float], Polygons | None]:
    """Class number, corners of the box, polygon. Raises ValueError, and IndexError for no words."""
    first, *rest = words[0], *map(float, words[1:])
    number, values = float(first), np.array(rest, np.float64)
    if number != int(number) or number < 0:
        raise ValueError(f"class number {first}, expected a whole number from 0 on")
    score = len(values) % 2 == 1
    values = values[: len(values) - score]
    if len(values) < 4:
        raise ValueError(f"{len(words)} values, expected a class number, x, y, width, height or corners of a polygon")
    if not ((values >= -OVER) & (values <= 1 + OVER)).all():
        raise ValueError(f"values of {values.min():g} to {values.max():g}, expected shares of the image from 0 to 1")
    if len(values) == 4:
        centre, side = values[:2], values[2:]
        return int(number), [*(centre - side / 2), *(centre + side / 2)], None
    points = values.reshape(-1, 2)
    return int(number), [*points.min(0), *points.max(0)], Polygons((points,))


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
