"""`format: voc`: images with PASCAL VOC's annotation files (.xml), in which difficult objects are ignored."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize
from xml.etree import ElementTree

import numpy as np
from pydantic import Field

from visionattn.data.boxes import BoxSection
from visionattn.data.formats import Found, Kind, _boxes, image_mask
from visionattn.data.formats._boxes import Entry, split_in
from visionattn.data.images import files_below
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath, Positive

KIND = Kind("boxes", writer="boxes_csv", endings=("",))
notes = _boxes.notes
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Section(BoxSection):
    """Images with an .xml each, beside them or in another folder; the splits are folders, list files or drawn."""

    format: Literal["voc"]
    root: FilePath = Field(description="folder with the images and the .xml files")
    first_pixel: Literal[0, 1] = Field(
        0, description="where pixels are counted from: 0 as most programs have it, 1 in PASCAL VOC's own files"
    )
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")


def find(section: Section) -> Found:
    """The images in the order of their annotation files; pixels are not read.

    Raises:
        UserError: no annotation file, or a class that the recipe does not know.
    """
    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    files = list(files_below(root, {".xml"}))
    if not files:
        raise UserError(f"data.root: {root}: no .xml file below this folder")
    named = defaultdict(list)
    for path in files_below(root):
        named[normalize("NFC", path.name)].append(path)
        named[normalize("NFC", path.stem)].append(path)
    problems: list[str] = []
    entries = [entry for path in files if (entry := _entry(section, path, named, problems)) is not None]
    return _boxes.found(entries, section, [*problems, *_boxes.without_entry(entries)])


def _entry(section: Section, file: Path, images: Mapping[str, list[Path]], problems: list[str]) -> Entry | None:
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        problems.append(f"{file}: not whole XML ({error}); was it cut off?")
        return None
    if tree.tag != "annotation":
        problems.append(f"{file}: <{tree.tag}>, expected PASCAL VOC's <annotation>")
        return None
    path = _image(file, tree.findtext("filename", "").strip(), images, problems)
    if path is None:
        return None
    values, names, difficult = [], [], []
    faults = []
    for k, item in enumerate(tree.findall("object")):
        try:
            values.append([float(item.findtext(f"bndbox/{key}", "")) for key in CORNERS])
        except ValueError:
            faults.append(f"{file}: object {k + 1}: no bndbox with numbers {listed(CORNERS)}")
            continue
        names.append(normalize("NFC", item.findtext("name", "").strip()))
        difficult.append(item.findtext("difficult", "0").strip() == "1")
        if not names[-1]:
            faults.append(f"{file}: object {k + 1}: no name")
    problems += faults
    name = path.relative_to(section.root).with_suffix("").as_posix()
    boxes = np.array(values, np.float64).reshape(-1, 4) - [section.first_pixel, section.first_pixel, 0, 0]
    split = split_in(name.split("/")[:-1])
    return Entry(
        file, str(file), path, name, split, boxes, names, np.array(difficult), size=_size(tree), wrong=bool(faults)
    )


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """None where the file says nothing, or 0 as some programs write."""
    try:
        height, width = (int(float(tree.findtext(f"size/{key}", "0"))) for key in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height and width else None


def _image(file: Path, name: str, images: Mapping[str, list[Path]], problems: list[str]) -> Path | None:
    """The image of this name, or else called as the annotation file; of several the one that is nearest in the tree."""
    name = normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])
    found = images.get(name) or images.get(normalize("NFC", file.stem), [])
    near = [len([1 for a, b in zip(path.parts, file.parts, strict=False) if a == b]) for path in found]
    nearest = [path for path, shared in zip(found, near, strict=True) if shared == max(near)]
    if len(nearest) != 1:
        problems.append(
            f"{file}: its image could be any of {listed(nearest)}" if nearest else f"{file}: there is no image {name}"
        )
        return None
    return nearest[0]


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
