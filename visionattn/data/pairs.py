"""Finding images and their masks: by folder and stem, never by order.

Every folder called `data.images` below `data.root` has a sibling called `data.masks`. A pair's name is the image's path
from the root without that folder and without suffixes: images/train/a.png and train/images/a.png are both `train/a`.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from visionattn.data.images import listed
from visionattn.errors import UserError
from visionattn.recipe import MaskFolderData

__all__ = ["Pair", "find_pairs", "group_of"]


class Pair(NamedTuple):
    """An image file and its mask file; `name` is unique."""

    name: str
    image: Path
    mask: Path


def find_pairs(
    data: MaskFolderData, image_endings: Collection[str] | None, mask_endings: Collection[str] | None = None
) -> tuple[list[Pair], list[str]]:
    """The pairs of a data section, sorted by name, and a line for each file that has no partner.

    Args:
        image_endings: lower-case endings of image files, such as {".nii", ".nii.gz"}; others are no images. None: an
            image is a folder of files.
        mask_endings: of mask files; None: the same.

    Raises:
        UserError: no folder of images, or one without a folder of masks beside it.
    """
    pairs, problems = [], []
    for folder in _image_folders(data):
        beside = folder.parents[len(Path(data.images).parts) - 1]
        masks = beside / data.masks
        if not masks.is_dir():
            others = [p.name for p in beside.iterdir() if p.is_dir() and p != folder]
            raise UserError(f"data.masks: {masks} is missing{_near(data.masks, others)}")
        same = data.images == data.masks
        found = _files(folder, image_endings, data.image_suffix, data.mask_suffix if same else "")
        partners = _files(masks, mask_endings or image_endings, data.mask_suffix, data.image_suffix if same else "")
        prefix = beside.relative_to(data.root)
        for key in sorted(found.keys() | partners.keys()):
            images, labels = found.get(key, []), partners.get(key, [])
            if len(images) == len(labels) == 1:
                pairs.append(Pair((prefix / key).as_posix(), images[0], labels[0]))
            elif len(images) > 1 or len(labels) > 1:
                problems.append(f"of one name are {listed([*images, *labels])}; expected an image and a mask")
            elif images:
                problems.append(f"{images[0]}: no mask {masks / key}{data.mask_suffix}.*")
            else:
                wanted = f"{folder / key}{data.image_suffix}"
                problems.append(f"{labels[0]}: no {f'image {wanted}.*' if image_endings else f'folder {wanted}'}")
    if not pairs and not problems:
        kind = f"{listed(sorted(image_endings))} files" if image_endings else "folders with files"
        raise UserError(f"data.root: {data.root}: no {kind} in folders {data.images}")
    return pairs, problems


def group_of(data: MaskFolderData, name: str) -> str:
    """What `data.group` finds in a name: its first bracketed part, else all that it matches; unset: the name itself.

    Raises:
        UserError: it finds nothing.
    """
    if data.group is None:
        return name
    match = re.search(data.group, name)
    if match is None:
        raise UserError(f"{name}: data.group {data.group!r} finds nothing in this name")
    return match[1] if match.groups() else match[0]


def _image_folders(data: MaskFolderData) -> list[Path]:
    if not data.root.is_dir():
        raise UserError(f"data.root: {data.root} is {'a file' if data.root.exists() else 'missing'}, expected a folder")
    parts, found, seen = Path(data.images).parts, [], set()
    for here, folders, _ in os.walk(data.root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen.update(folders)
        if Path(here).relative_to(data.root).parts[-len(parts) :] == parts:
            found.append(Path(here))
            folders.clear()
    if not found:
        raise UserError(f"data.images: no folder called {data.images} below {data.root}{_near(data.images, seen)}")
    return found


def _files(folder: Path, endings: Collection[str] | None, suffix: str, others: str) -> dict[str, list[Path]]:
    """Files by their path without ending and suffix; `others` is the suffix of files that are none of these."""
    found: dict[str, list[Path]] = {}
    for path, stem in _stems(folder, endings):
        if stem.endswith(suffix) and not (others and stem.endswith(others)):
            key = (path.parent / stem.removesuffix(suffix)).relative_to(folder).as_posix()
            found.setdefault(key, []).append(path)
    return found


def _stems(folder: Path, endings: Collection[str] | None) -> Iterator[tuple[Path, str]]:
    """Files with one of the endings, or the folders that hold files, and their names without ending."""
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        if endings is None and files and Path(here) != folder:
            yield Path(here), Path(here).name
        for name in files if endings else ():
            ending = max((e for e in endings if name.lower().endswith(e)), key=len, default=None)
            if ending is not None:
                yield Path(here, name), name[: -len(ending)]


def _near(name: str, others: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1, cutoff=0.5)
    there = f"; there are: {listed(sorted(others), most=8)}" if others else ""
    return f"{there}; did you mean {near[0]}?" if near else there
