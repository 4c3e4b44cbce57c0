"""`format: coco`: images with the boxes, polygons or run-length masks of COCO's annotation files.

Numbers of images, annotations and categories may be any; classes are known by name. A crowd is ignored.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from visionattn.data.boxes import BoxSection
from visionattn.data.formats import Found, Kind, _boxes, image_mask
from visionattn.data.formats._boxes import Entry, split_in
from visionattn.data.images import existing, files_below
from visionattn.data.object_masks import Polygons, Runs, Shape
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath, Positive

KIND = Kind("boxes", writer="boxes_csv", endings=("", ".json"))
notes = _boxes.notes


class Section(BoxSection):
    """Images with COCO's annotation files: one for each split (named so, or in a folder named so), or one for all."""

    format: Literal["coco"]
    root: FilePath = Field(description="folder that holds the annotation files and the images, or one .json file")
    annotations: str | None = Field(
        None, description="pattern of the files below root; unset: instances_*.json where there are such, else *.json"
    )
    images: FilePath | None = Field(None, description="folder that file names start from; unset: found")
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")

    def at(self, root: Path) -> Self:
        other = super().at(root)  # type: ignore[misc]  # of the task's section, which is the next base
        return other.model_copy(update={"annotations": None, "images": None})


def find(section: Section) -> Found:
    """All images of the annotation files, which are in their order; pixels are not read.

    Raises:
        UserError: a file is missing or no annotation file; categories that differ between files; a class that the
            recipe does not know.
    """
    files = {path: _content(path) for path in _files(section)}
    categories = {path: _categories(path, content["categories"]) for path, content in files.items()}
    _refuse_other_categories(categories)
    problems: list[str] = []
    entries: list[Entry] = []
    for path, content in files.items():
        entries += _entries(section, path, content, categories[path], problems)
    if section.root.is_dir():
        problems += _boxes.without_entry(entries)
    return _boxes.found(entries, section, problems, known=list(next(iter(categories.values())).values()))


def _files(section: Section) -> list[Path]:
    root = section.root
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"data.root: {root}: no such file or folder")
    if section.annotations is not None:
        files = sorted(path for path in root.glob(section.annotations) if path.is_file())
    else:
        files = list(files_below(root, {".json"}))
        files = [path for path in files if path.name.startswith("instances_")] or files
    if not files:
        pattern = section.annotations or "*.json"
        raise UserError(f"data.root: {root}: no annotation file ({pattern}) below this folder; see data.annotations")
    return files


def _content(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not whole JSON ({error}); was it cut off?") from None
    if not isinstance(content, dict):
        what = "a list, as predictions are" if isinstance(content, list) else f"a {type(content).__name__}"
        raise UserError(f"{path}: {what}; expected COCO's images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path}: no list {key}; expected COCO's images, annotations and categories")
    return content


def _categories(path: Path, entries: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """Names by number, in the order of the numbers."""
    names: dict[Any, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if not isinstance(number, int | str) or not isinstance(name, str) or not name:
            raise UserError(f"{path}: category {entry}: expected an id and a name")
        if number in names:
            raise UserError(f"{path}: category id {number} is both {names[number]} and {name}")
        if name in names.values():
            raise UserError(f"{path}: two categories are called {name}; give them different names or one id")
        names[number] = name
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _refuse_other_categories(categories: Mapping[Path, Mapping[Any, str]]) -> None:
    (first, known), *others = categories.items()
    for path, names in others:
        if differ := set(names.values()) ^ set(known.values()):
            raise UserError(
                f"{first} has the categories {listed(list(known.values()), most=8)}, but {path} has "
                f"{listed(list(names.values()), most=8)}; they differ in {listed(sorted(differ), most=8)}"
            )


def _entries(
    section: Section,
    path: Path,
    content: Mapping[str, list[dict[str, Any]]],
    categories: Mapping[Any, str],
    problems: list[str],
) -> Iterator[Entry]:
    """What a file says of each image; what is wrong with it is added to the problems."""
    images = _images(path, content["images"], problems)
    objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        number, image = annotation.get("id"), annotation.get("image_id")
        if isinstance(image, int | str) and image in images:
            objects[image].append(annotation)
        else:
            problems.append(f"{path}: annotation {number} is of an unknown image id: {image!r}")
    base = _base(section, path, list(images.values()))
    parts = path.relative_to(section.root if section.root.is_dir() else path.parent).with_suffix("").parts
    for number, image in images.items():
        where = f"{path}: image {number} ({image['file_name']})"
        boxes, faults = _boxes_of(where, objects[number], _size(image), categories)
        problems += faults
        file = existing(base, image["file_name"])
        split = split_in(parts) or split_in(Path(image["file_name"]).parts[:-1])
        name = _name(section, file, image["file_name"])
        yield Entry(path, where, file, name, split, **boxes, size=_size(image), form="xywh", wrong=bool(faults))


def _images(path: Path, entries: Sequence[dict[str, Any]], problems: list[str]) -> dict[Any, dict[str, Any]]:
    images: dict[Any, dict[str, Any]] = {}
    names = set()
    for entry in entries:
        number, name = entry.get("id"), entry.get("file_name")
        if not isinstance(number, int | str) or not isinstance(name, str) or not name:
            problems.append(f"{path}: image {number!r}: no id or no file_name")
        elif number in images:
            problems.append(f"{path}: image id {number} is both {images[number]['file_name']} and {name}")
        elif name in names:
            problems.append(f"{path}: image {number}: {name} is listed twice")
        else:
            images[number] = entry | {"file_name": name.replace("\\", "/")}
            names.add(name)
    return images


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    return (image["height"], image["width"]) if image.get("height") and image.get("width") else None


def _base(section: Section, path: Path, images: Sequence[Mapping[str, Any]]) -> Path:
    """The folder that file names start from: the first one, of those that are usual, where an image is."""
    if section.images is not None:
        return section.images
    homes = [path.parent, path.parent.parent] + ([section.root] if section.root.is_dir() else [])
    parts = [*re.findall("[a-z]+[0-9]*", path.stem.lower()), ""]
    usual = [home / folder / part for home in homes for folder in ("", "images") for part in parts]
    usual = [folder for folder in dict.fromkeys(usual) if folder.is_dir()]
    there = (folder for image in images for folder in usual if existing(folder, image["file_name"]).is_file())
    return next(there, path.parent)


def _name(section: Section, file: Path, name: str) -> str:
    """The path below the root, or below the folder of images outside of it, without ending."""
    inside = section.root.is_dir() and file.is_relative_to(section.root)
    return (file.relative_to(section.root) if inside else Path(name)).with_suffix("").as_posix()


def _boxes_of(
    where: str, annotations: Sequence[Mapping[str, Any]], size: tuple[int, int] | None, categories: Mapping[Any, str]
) -> tuple[dict[str, Any], list[str]]:
    """What `Entry` wants to know of the objects of an image, and a line for each that is not as COCO has it."""
    right, values, shapes, problems = [], [], [], []
    for annotation in annotations:
        try:
            if annotation.get("category_id") not in categories:
                known = listed(list(categories), most=8)
                raise ValueError(f"category id {annotation.get('category_id')!r} is not among the categories ({known})")
            shape = _shape(annotation.get("segmentation"), size)
            values.append(_box(annotation.get("bbox"), shape))
            shapes.append(shape)
            right.append(annotation)
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"{where}, annotation {annotation.get('id')}: {error}")
    return {
        "values": np.array(values, np.float64),
        "names": [categories[annotation["category_id"]] for annotation in right],
        "ignore": np.array([bool(annotation.get("iscrowd")) for annotation in right], bool),
        "shapes": shapes,
        "ids": [annotation.get("id") for annotation in right],
    }, problems


def _box(bbox: Any, shape: Shape | None) -> list[float]:
    if bbox is None and shape is not None and (bounds := shape.bounds) is not None:
        return [*bounds[:2], *(bounds[2:] - bounds[:2])]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(value, int | float) for value in bbox):
        raise ValueError(f"bbox is {bbox}, expected x, y, width, height")
    return bbox


def _shape(segmentation: Any, size: tuple[int, int] | None) -> Shape | None:
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        return _runs(segmentation, size)
    parts = []
    for part in segmentation:
        if not isinstance(part, list) or len(part) % 2 or len(part) < 6:
            count = f"{len(part) / 2:g} points" if isinstance(part, list) else repr(part)
            raise ValueError(f"a polygon of {count}, expected x and y of at least 3")
        points = np.array(part, np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a polygon with values that are not finite numbers")
        parts.append(points.astype(np.float32))
    return Polygons(tuple(parts))


def _runs(segmentation: Mapping[str, Any], size: tuple[int, int] | None) -> Runs:
    (height, width), counts = segmentation.get("size", (0, 0)), segmentation.get("counts")
    if size is not None and (height, width) != size:
        raise ValueError("run lengths of {}x{} pixels, but the image has {}x{}".format(height, width, *size))
    if isinstance(counts, str):
        runs = Runs.from_text(counts, (height, width))
    else:
        runs = Runs(np.array(counts, np.int64), (height, width))
    if runs.counts.ndim != 1 or (runs.counts < 0).any() or runs.counts.sum() != height * width:
        raise ValueError(f"run lengths that do not add up to {height}x{width} pixels")
    return runs


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
