"""`format: shards`: tar files of images with their labels, as webdataset has them.

A sample is the files of one name up to its first dot, such as `0042.jpg` and `0042.cls`. The tar files are looked
through once for where each image lies, which is kept (`visionattn.data.kept`); images are then read in any order,
shuffled and shared out as single files are.
"""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

from pydantic import Field, field_validator

from visionattn.data.formats import Found, Kind
from visionattn.data.images import SUFFIXES, EncodedImage, files_below, image_samples
from visionattn.data.kept import keep, key_of, recall
from visionattn.data.labels import ClassSection, class_order
from visionattn.data.sample import Sample
from visionattn.data.splits import split_of_file
from visionattn.data.threads import in_order
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath

KIND = Kind("class", endings=("", ".tar"))
LONGEST_LABEL = 2**20  # bytes


class Section(ClassSection):
    """Tar files, or a folder of them; their names say the split, such as train-000.tar, val/000.tar, x-train-0.tar."""

    format: Literal["shards"]
    root: FilePath = Field(description="a .tar file, or the folder that .tar files lie in")
    image: str | None = Field(None, description="ending of the image's file where there are several, such as rgb.png")
    label: str = Field("cls", description="ending of the file that holds the label: a class number, a name, or JSON")
    label_key: str | None = Field(None, description="where the label is in JSON, such as label or annotation.class")
    group_key: str | None = Field(None, description="where a group (patient, scene) is in JSON, never split apart")

    @field_validator("image", "label")
    @classmethod
    def _endings_are_spelt_alike(cls, ending: str | None) -> str | None:
        return ending and ending.lower().removeprefix(".")


@dataclass(frozen=True)
class InTar(EncodedImage):
    """An image file at `place` in a tar file, of `length` bytes."""

    path: Path = Path()
    place: int = 0
    length: int = 0

    def content(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.place)
                return file.read(self.length)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)


class _Entry(NamedTuple):
    """What a tar file has of one sample."""

    key: str
    images: list[tuple[str, int, int]]  # ending, place, length
    label: bytes | None
    extra: bytes | None


class _Labelled(NamedTuple):
    """A sample with one image and its label; no group: it is one by itself."""

    key: str
    place: int
    length: int
    label: str
    group: str | None


def find(section: Section) -> Found:
    """The images in the order of the tar files and of what is in them; no image is opened."""
    root = section.root
    if not root.exists():
        raise UserError(f"data.root: {root}: no such file or folder")
    shards = [root] if root.is_file() else list(files_below(root, {".tar"}))
    if not shards:
        raise UserError(f"data.root: {root}: no .tar files in this folder")
    names = {path: path.relative_to(root.parent if root.is_file() else root) for path in shards}
    content, problems = _contents(names, section)
    found = {entry.label for entries in content.values() for entry in entries}
    classes, numbers = _classes(found, section)
    samples: list[Sample] = []
    for path, entries in content.items():
        split, start = split_of_file(names[path]), names[path].as_posix()
        for key, place, length, label, group in entries:
            title = f"{start}/{key}"
            where: dict[str, Any] = {"path": path, "place": place, "length": length}
            group = title if group is None else group
            samples.append(InTar(title, title, group, section.channels, split=split, label=numbers[label], **where))
    return Found(samples, classes, problems)


def _contents(names: dict[Path, Path], section: Section) -> tuple[dict[Path, list[_Labelled]], list[str]]:
    """The samples of each tar file, from what is kept where it has not changed since, and what is wrong with others."""
    asked = section.image, section.label, section.label_key, section.group_key
    keys = {path: key_of([path], "tar", *asked) for path in names}
    kept = recall(keys.values(), lambda text: [_Labelled(*entry) for entry in json.loads(text)])
    known = {path: kept[key] for path, key in keys.items() if key in kept}
    unknown = [path for path in names if path not in known]
    wrong: list[str] = []
    fresh: dict[bytes, list[_Labelled]] = {}
    read = in_order(lambda path: _labelled(path, names[path].as_posix(), section), unknown)
    for path, (entries, problems) in zip(unknown, read, strict=True):
        known[path] = entries
        wrong += problems
        if (key := keys[path]) and not problems:
            fresh[key] = entries
    keep(fresh, json.dumps)
    return {path: known[path] for path in names}, wrong


def _labelled(path: Path, name: str, section: Section) -> tuple[list[_Labelled], list[str]]:
    """The samples of a tar file, and a line for each that cannot be used."""
    wanted = {section.label, "json"} if section.group_key or section.label_key else {section.label}
    found: list[_Labelled] = []
    problems: list[str] = []
    for entry in _entries(path, wanted, section.label):
        title = f"{name}/{entry.key}"
        try:
            image = _image(entry, section, title)
            found.append(_Labelled(entry.key, *image, _label(entry, section, title), _group(entry, section, title)))
        except UserError as error:
            problems.append(str(error))
    return found, problems


def _entries(path: Path, wanted: set[str], label: str) -> list[_Entry]:
    """The samples of a tar file in its order. Raises UserError where it cannot be read, or not at any place."""
    found: dict[str, dict[str, Any]] = {}  # of each key
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile() or Path(member.name).name.startswith((".", "__")):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                entry = found.setdefault(f"{folder}/{stem}" if folder else stem, {"images": []})
                ending = ending.lower()
                if f".{ending.rpartition('.')[2]}" in SUFFIXES:
                    entry["images"].append((ending, member.offset_data, member.size))
                elif ending in wanted and member.size <= LONGEST_LABEL:
                    stream = archive.extractfile(member)
                    assert stream is not None  # of a file
                    entry[ending] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: no tar file that can be read, or a compressed one: unpack it ({error})") from None
    return [
        _Entry(key, entry["images"], entry.get(label), entry.get("json"))
        for key, entry in found.items()
        if entry["images"] or len(entry) > 1
    ]


def _image(entry: _Entry, section: Section, title: str) -> tuple[int, int]:
    """Place and length of a sample's image. Raises UserError where there is not one."""
    chosen = [image for image in entry.images if section.image in (None, image[0])]
    if len(chosen) != 1:
        there = listed([f".{ending}" for ending, *_ in entry.images]) or "no image"
        what = "one image" if section.image is None else f"one .{section.image}"
        raise UserError(f"{title}: {there}, expected {what} (data.image chooses among several)")
    return chosen[0][1:]


def _label(entry: _Entry, section: Section, title: str) -> str:
    """The text of a sample's label."""
    if section.label_key is not None:
        return normalize("NFC", str(_in_json(entry, section.label_key, "label_key", title)))
    if entry.label is None:
        raise UserError(f"{title}: no .{section.label} beside the image (data.label)")
    try:
        text = normalize("NFC", entry.label.decode("utf-8").strip())
    except UnicodeDecodeError:
        raise UserError(f"{title}: its .{section.label} is no text; expected a class number or name") from None
    if not text or "\n" in text or text[0] in "{[":
        raise UserError(
            f"{title}: its .{section.label} is {text[:40]!r}, expected a class number or name; "
            "of JSON, data.label_key says where the label is"
        )
    return text


def _group(entry: _Entry, section: Section, title: str) -> str | None:
    return None if section.group_key is None else str(_in_json(entry, section.group_key, "group_key", title))


def _in_json(entry: _Entry, key: str, option: str, title: str) -> Any:
    """What a sample's JSON has under a key, whose parts are separated by dots."""
    if entry.extra is None:
        raise UserError(f"{title}: no .json beside the image (data.{option})")
    try:
        value = json.loads(entry.extra)
        for part in key.split("."):
            value = value[part]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{title}: its .json has no {key} (data.{option})") from None
    if isinstance(value, dict | list) or value is None:
        raise UserError(f"{title}: {key} in its .json is {json.dumps(value)[:40]}, expected a number or a name")
    return value


def _classes(found: set[str], section: Section) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, and which number each label stands for; labels may be numbers of `data.classes`."""
    if section.classes and found - set(section.classes) and all(label.isdecimal() for label in found):
        beyond = [label for label in found if int(label) >= len(section.classes)]
        if beyond:
            raise UserError(
                f"data.classes has {len(section.classes)} names, but there are labels {listed(sorted(beyond, key=int))}"
            )
        return section.classes, {label: int(label) for label in found}
    classes = class_order(found, section.classes)
    return classes, {name: k for k, name in enumerate(classes)}


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    """Image files, and the images inside tar files."""
    inside = {path: list(files_below(path, {".tar"})) if path.is_dir() else [] for path in paths}
    shards = [path for path in paths if path.suffix.lower() == ".tar" and path.is_file()]
    others = [path for path in paths if path not in shards and (not inside[path] or any(files_below(path)))]
    samples, problems = image_samples(others, channels) if others else ([], [])
    for shard in [*shards, *chain.from_iterable(inside.values())]:
        for entry in _entries(shard, set(), ""):
            name = f"{shard}/{entry.key}"
            place, length = _image(entry, section, name)
            samples.append(InTar(name, name, name, channels, path=shard, place=place, length=length))
    return samples, problems
