"""`format: folder`: a folder of images for each class."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.images import ImageFile, files_below, identities, image_samples, is_data
from visionattn.data.labels import ClassSection, class_order
from visionattn.data.sample import SPLITS, Sample
from visionattn.data.splits import OTHER_NAMES
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath

KIND = Kind("class", endings=("",))


class Section(ClassSection):
    """A folder per class, inside train/, val/ and optionally test/, or in one folder that is split here."""

    format: Literal["folder"]
    root: FilePath = Field(description="folder of train/, val/, test/, or folder of one folder per class")


def find(section: Section) -> Found:
    """The images by split, class and path; no image is opened."""
    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    if any(_folders(root / name) for name in SPLITS):
        misnamed = [f"{p.name} (expected {OTHER_NAMES[p.name]})" for p in _folders(root) if p.name in OTHER_NAMES]
        if misnamed:
            raise UserError(f"data.root: {root}: rename {listed(misnamed)}")
        parents = {name: root / name for name in SPLITS if (root / name).is_dir()}
    else:
        parents = {"": root}
    inside = {split: _folders(parent) for split, parent in parents.items()}
    walked = identities([root, *parents.values(), *chain(*inside.values())])
    files: dict[str, dict[str, list[Path]]] = {split: {} for split in parents}
    for split, part in inside.items():
        for folder in part:
            files[split].setdefault(normalize("NFC", folder.name), []).extend(files_below(folder, others=walked))
    empty = [f"{parents[split] / c}" for split, content in files.items() for c, paths in content.items() if not paths]
    empty += [str(parents[split]) for split, content in files.items() if not content]
    if empty:
        raise UserError(f"data.root: no images in {listed(empty)}")
    classes = class_order((c for content in files.values() for c in content), section.classes)
    samples: list[Sample] = []
    start = f"{root.as_posix()}/"
    for split, content in files.items():
        for k, name in enumerate(classes):
            for path in content.get(name, []):
                title = path.as_posix().removeprefix(start)
                samples.append(ImageFile(title, title, title, section.channels, split=split, label=k, path=path))
    return Found(samples, classes, [])


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and is_data(p.name)) if path.is_dir() else []


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_samples(paths, channels)
