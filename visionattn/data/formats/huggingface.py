"""`format: huggingface`: a folder that Hugging Face's `datasets` has saved, or its parquet files as the hub has them.

Read by their package (extra `huggingface`), which maps the files into memory; parquet files it turns into such once, in
its own cache. Nothing is fetched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.images import EncodedImage, files_below, image_samples
from visionattn.data.labels import ClassSection, class_order
from visionattn.data.sample import Sample
from visionattn.data.splits import split_named, split_of_file
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath

ENDINGS = {".arrow", ".parquet"}
KIND = Kind("class", needs=("datasets",), extra="huggingface")


class Section(ClassSection):
    """A folder made by `save_to_disk`, or a folder of parquet files; with columns of images and of labels."""

    format: Literal["huggingface"]
    root: FilePath = Field(description="folder made by save_to_disk, or folder of .parquet files")
    image_column: str = "image"
    label_column: str = Field("label", description="a class, or a list of classes where an image has several labels")
    group_column: str | None = Field(None, description="a group (patient, scene) never goes to different splits")


@dataclass(frozen=True)
class Row(EncodedImage):
    """The image of a row of a part of a data set."""

    root: Path = Path()
    written: int = 0
    part: str = ""
    column: str = ""
    row: int = 0

    def content(self) -> bytes:
        stored = _opened(self.root, self.written)[self.part].select_columns([self.column])[self.row][self.column]
        if stored is None:
            raise UserError(f"{self.name}: no image in this row")
        if stored["bytes"] is not None:
            return stored["bytes"]
        try:
            return Path(stored["path"]).read_bytes()
        except OSError as error:
            raise UserError(f"{self.name}: {stored['path']}: {error.strerror}") from None

    @property
    def files(self) -> tuple[Path, ...]:
        return _files(self.root, self.written)


@lru_cache(maxsize=8)
def _files(root: Path, written: int) -> tuple[Path, ...]:
    return tuple(files_below(root, ENDINGS))


@lru_cache(maxsize=8)
def _opened(root: Path, written: int) -> dict[str, Any]:
    """Each part by name, its images as they are stored; opened once in a process, and again where it was `written`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            found = datasets.load_from_disk(str(root))
        else:
            parts: dict[str, list[str]] = {}
            for file in files_below(root, {".parquet"}):
                parts.setdefault(split_of_file(file.relative_to(root)) or "all", []).append(str(file))
            found = datasets.load_dataset("parquet", data_files=parts) if parts else None
    except Exception as error:  # each file format raises its own
        raise UserError(f"data.root: {root}: cannot be read by datasets ({error})") from None
    if found is None:
        raise UserError(f"data.root: {root}: neither a folder of save_to_disk nor one of .parquet files")
    parts_of = dict(found.items()) if isinstance(found, dict) else {"": found}
    return {name: _as_stored(part) for name, part in parts_of.items()}


def _as_stored(part: Any) -> Any:
    import datasets

    for name, kind in part.features.items():
        if isinstance(kind, datasets.Image):
            part = part.cast_column(name, datasets.Image(decode=False))
    return part


def find(section: Section) -> Found:
    """The images in the order of the rows; none is opened."""
    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    written = max((file.stat().st_mtime_ns for file in files_below(root, ENDINGS)), default=0)
    parts = _opened(root, written)
    for part in parts.values():
        _refuse_columns(part, section)
    texts = {name: _labels(part, section) for name, part in parts.items()}
    several = any(isinstance(label, list) for labels in texts.values() for label in labels)
    known = {text for labels in texts.values() for label in labels for text in (label if several else [label])}
    classes = class_order(known, section.classes)
    number = {name: k for k, name in enumerate(classes)}
    samples: list[Sample] = []
    for name, part in parts.items():
        groups = part[section.group_column] if section.group_column else None
        for row, label in enumerate(texts[name]):
            title = f"{name}[{row}]"
            target = np.array([c in label for c in classes], np.float32) if several else number[label]
            group, split = str(groups[row]) if groups else title, split_named([name])
            place: dict[str, Any] = {"root": root, "written": written, "part": name, "column": section.image_column}
            samples.append(Row(title, title, group, section.channels, split=split, label=target, row=row, **place))
    return Found(samples, classes, [])


def _refuse_columns(part: Any, section: Section) -> None:
    import datasets

    for option in ("image_column", "label_column", "group_column"):
        column = getattr(section, option)
        if column is not None and column not in part.features:
            raise UserError(f"data.{option} is {column!r}, but {section.root} has {listed(list(part.features))}")
    kind = part.features[section.image_column]
    if not isinstance(kind, datasets.Image):
        raise UserError(f"data.image_column is {section.image_column!r}, which holds {kind}, expected images")


def _labels(part: Any, section: Section) -> list[Any]:
    """The class name of each row, or a list of such."""
    feature, column = part.features[section.label_column], part[section.label_column]
    inner = getattr(feature, "feature", feature)  # of a list
    names = getattr(inner, "names", None)

    def name(value: Any) -> str:
        if value is None or (names is not None and value < 0):
            raise UserError(f"data.label_column: {section.root}: some rows have no {section.label_column}")
        return normalize("NFC", names[value] if names else str(value))

    return [[name(one) for one in value] if isinstance(value, list) else name(value) for value in column]


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_samples(paths, channels)
