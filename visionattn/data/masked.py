"""Images with masks: from a recipe's `data:` section to the splits of a segmentation data set.

A split is a folder's name (train, val, test and their usual spellings), a line in a list file, or drawn: whole groups
with a seed, or one of k folds. Before training every image and mask is read once (`survey`).
"""

import hashlib
import importlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from visionattn.data import splits as drawing
from visionattn.data.images import listed
from visionattn.data.labelled import OTHER_NAMES, SPLITS
from visionattn.data.sample import IGNORE, Item, Window
from visionattn.data.survey import SECONDS_BEFORE_PROGRESS
from visionattn.errors import UserError
from visionattn.recipe import Lists, SegmentationData

__all__ = [
    *("ItemSplit", "Look", "SegmentationImages", "blocks", "find", "find_labelled", "prepare", "same_ground", "scan"),
    "survey",
]

FORMATS = {
    "image_mask": "image_mask",
    "nifti": "_volumes",
    "dicom": "_volumes",
    "geotiff": "geotiff",
    "builtin": "builtin_scenes",
}
BLOCK = 2048  # pixels of a side: larger scenes are read in blocks
SHARED = 0.01  # of a scene's ground: less is the rounding of tiles that lie side by side
PLACES = 64  # positions kept of each class and image, for crops around rare classes


@dataclass(frozen=True)
class Look:
    """What reading one image with its mask through has shown.

    Attributes:
        error: why it cannot be used.
        counts: (classes + 1,) pixels of each class, and last those without label.
        mean, square: (C,) mean of the values and of their squares, missing ones left out.
        missing: share of the pixels without any value.
        image, pair: digests of the image's values, and of these with the mask's.
        places: (row, column) of up to PLACES pixels of each class.
    """

    error: str | None = None
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    mean: np.ndarray | None = None
    square: np.ndarray | None = None
    missing: float = 0.0
    image: bytes = b""
    pair: bytes = b""
    places: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemSplit:
    """Items of one split; `looks` are about the same items, once they have been read."""

    items: list[Item]
    looks: list[Look] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.items]

    @property
    def cases(self) -> dict[str, list[int]]:
        """The items of each case, by their position."""
        found: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            found.setdefault(item.case, []).append(i)
        return found

    @property
    def counts(self) -> np.ndarray:
        """(N, classes + 1) pixels of each item's classes, and last those without label."""
        return np.stack([look.counts for look in self.looks])

    def digest(self) -> bytes:
        """Of names, images and masks."""
        digest = hashlib.sha256("".join(self.names).encode())
        for look in self.looks:
            digest.update(look.pair)
        return digest.digest()


@dataclass(frozen=True)
class SegmentationImages:
    """A segmentation data set: `splits` has train, val and, where there are test images, test."""

    classes: list[str]
    splits: dict[str, ItemSplit]
    skipped: Sequence[str] = ()
    warnings: Sequence[str] = ()

    @property
    def channels(self) -> int:
        """Of every image."""
        return next(item.channels for split in self.splits.values() for item in split.items)


def scan(data: SegmentationData) -> tuple[list[Item], list[str]]:
    """Items of a data section and what is wrong with it, a line each; by the module of its format.

    Raises:
        UserError: folders are missing, or a package that reads the format is.
    """
    try:
        module = importlib.import_module(f"visionattn.data.formats.{FORMATS[data.format]}")
    except ModuleNotFoundError as error:
        extra = {"_volumes": "medical", "geotiff": "geo"}[FORMATS[data.format]]
        raise UserError(f"data.format {data.format} needs {error.name}: pip install 'visionattn[{extra}]'") from None
    return module.scan(data)


def find(data: SegmentationData) -> tuple[SegmentationImages, list[str]]:
    """The splits of a data section, and problems; only headers of files are read.

    Raises:
        UserError: there is nothing to split, or it cannot be split as asked.
    """
    items, problems = scan(data)
    if not items:
        raise UserError("\n".join(["data: no image with a mask that can be used", *problems[:20]]))
    problems += _mixed_channels(items)
    splits, unlisted = _draw_missing(_given_splits(items, data), data)
    problems += unlisted + _crossing(splits)
    return SegmentationImages(data.class_names, {name: ItemSplit(part) for name, part in splits.items()}), problems


def find_labelled(data: SegmentationData, other: Path | None = None) -> SegmentationImages:
    """Images with masks, of which only headers are read: the section's own, or those of another root with its layout.

    Raises:
        UserError: anything wrong with them, all at once.
    """
    if other is None:
        found, problems = find(data)
    elif data.format == "builtin":
        raise UserError("--data: the model was trained on built-in scenes; there are no others of their kind")
    else:
        data = data.model_copy(update={"root": other, "fold": None, "lists": Lists()})
        items, problems = scan(data)
        splits, _ = _given_splits(items, data)
        found = SegmentationImages(data.class_names, {name: ItemSplit(part) for name, part in splits.items()})
    _refuse(problems)
    return found


def prepare(found: SegmentationImages, data: SegmentationData) -> tuple[SegmentationImages, SegmentationData]:
    """Read through all images and masks, refuse what cannot be trained on, fill what the recipe leaves open.

    Args:
        found: of `find_labelled`.
        data: the section that they were found by.

    Returns:
        the images, and the data section with `classes` as a list and `mean` and `std` set: the given ones, else as
        measured over the training split, every image counting equally.

    Raises:
        UserError: everything that is wrong, with file names.
    """
    _refuse_untrainable(found, data)
    found = look_through(found, places=data.rare_crops > 0)
    _refuse([look.error for split in found.splits.values() for look in split.looks if look.error])
    if not found.splits["train"].counts[:, :-1].any():
        raise UserError("data: no training mask has a labelled pixel")
    found = replace(found, warnings=_doubts(found))
    mean, std = mean_std(found.splits["train"].looks)
    given = {"classes": found.classes, "mean": data.mean or mean, "std": data.std or std}
    return found, data.model_copy(update=given)


def look_through(found: SegmentationImages, places: bool = False) -> SegmentationImages:
    """The same with the looks of every split."""
    splits = {n: ItemSplit(s.items, survey(s.items, len(found.classes), places)) for n, s in found.splits.items()}
    return replace(found, splits=splits)


def survey(items: Sequence[Item], classes: int, places: bool = False) -> list[Look]:
    """Read each image and mask once; memory is that of a few images, or of a few blocks of large scenes."""

    def look(item: Item) -> Look:
        try:
            return _look(item, classes, places)
        except UserError as error:
            return Look(str(error), np.zeros(classes + 1, np.int64))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        done = pool.map(look, items)
        return list(tqdm(done, "reading images", len(items), leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None))


def _look(item: Item, classes: int, places: bool) -> Look:
    counts, sums, digests = np.zeros(classes + 1, np.int64), np.zeros((3, item.channels)), [hashlib.blake2b(), None]
    missing, found = 0, {}
    for window in blocks(item.size):
        image, mask = item.image(window), item.mask(window)
        if mask is None:
            raise UserError(f"{item.name}: no mask")
        counts[:-1] += np.bincount(mask[mask != IGNORE], minlength=classes)
        counts[-1] += (mask == IGNORE).sum()
        valid = np.isfinite(image)
        values = np.where(valid, image, 0).astype(np.float64)
        sums += valid.sum((1, 2)), values.sum((1, 2)), np.square(values).sum((1, 2))
        missing += int((~valid.any(0)).sum())
        digests[0].update(np.ascontiguousarray(image))
        digests[1] = digests[0].copy()
        digests[1].update(np.ascontiguousarray(mask))
        if places:
            _collect_places(found, mask, window)
    seen = np.maximum(sums[0], 1)
    return Look(
        counts=counts,
        mean=sums[1] / seen,
        square=sums[2] / seen,
        missing=missing / (item.size[0] * item.size[1]),
        image=digests[0].digest()[:16],
        pair=digests[1].digest()[:16],
        places=found,
    )


def blocks(size: tuple[int, int], side: int = BLOCK) -> Iterator[Window]:
    """Windows of at most `side` pixels that cover (H, W)."""
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            yield slice(top, min(top + side, size[0])), slice(left, min(left + side, size[1]))


def _collect_places(found: dict[int, np.ndarray], mask: np.ndarray, window: Window) -> None:
    """Evenly spread positions of each class; those of an earlier block are thinned out."""
    for k in np.unique(mask[mask != IGNORE]).tolist():
        positions = np.argwhere(mask == k) + [part.start for part in window]
        merged = np.concatenate([found[k], _spread(positions)]) if k in found else positions
        found[k] = _spread(merged).astype(np.int32)


def _spread(positions: np.ndarray) -> np.ndarray:
    return positions[np.linspace(0, len(positions) - 1, min(PLACES, len(positions))).round().astype(int)]


def mean_std(looks: Sequence[Look]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, every image counting equally; 1 for a channel without variation."""
    seen = [look for look in looks if look.missing < 1]
    if not seen:
        raise UserError("data: the training images have no values at all")
    mean = np.mean([look.mean for look in seen], axis=0)
    std = np.sqrt(np.maximum(np.mean([look.square for look in seen], axis=0) - mean**2, 0))
    flat = std < 1e-6 * np.maximum(np.abs(mean), 1)
    return [float(f"{m:.7g}") for m in mean], [1.0 if f else float(f"{s:.7g}") for f, s in zip(flat, std, strict=True)]


def _given_splits(items: list[Item], data: SegmentationData) -> tuple[dict[str, list[Item]], list[str]]:
    """The splits that list files or folders name, or one called "all"; and what lists and items lack."""
    lists = {name: path for name in SPLITS if (path := getattr(data.lists, name))}
    if lists:
        return _listed_splits(items, lists)
    spelt = {name: name for name in SPLITS} | OTHER_NAMES
    found: dict[str, list[Item]] = {}
    for item in items:
        parts = [spelt[p] for p in item.name.lower().split("/")[:-1] if p in spelt]
        found.setdefault(parts[0] if parts else "all", []).append(item)
    if "all" in found and len(found) > 1:
        outside = listed([item.name for item in found["all"]], most=5)
        raise UserError(f"data.root: some images are in {listed(sorted(set(found) - {'all'}))}, but not {outside}")
    return {name: found[name] for name in (*SPLITS, "all") if name in found}, []


def _listed_splits(items: list[Item], lists: dict[str, Path]) -> tuple[dict[str, list[Item]], list[str]]:
    known: dict[str, list[Item]] = {}
    for item in items:
        for key in {item.name, item.case, item.case.rsplit("/", 1)[-1]}:
            known.setdefault(key, []).append(item)
    found, problems, homes = {}, [], {}
    for split, path in lists.items():
        if not path.is_file():
            raise UserError(f"data.lists.{split}: {path}: no such file")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        unknown = [line for line in lines if line not in known]
        problems += [f"{path}: no image called {line}" for line in unknown]
        found[split] = [item for line in lines for item in known.get(line, [])]
        for line in lines:
            homes.setdefault(line, []).append(split)
    problems += [f"data.lists: {line} is listed in {listed(where)}" for line, where in homes.items() if len(where) > 1]
    return found, problems


def _draw_missing(
    given: tuple[dict[str, list[Item]], list[str]], data: SegmentationData
) -> tuple[dict[str, list[Item]], list[str]]:
    """Complete the splits: draw test and val where none are given, or take the fold that the recipe asks for."""
    splits, problems = given
    splits, fraction = dict(splits), data.val_fraction
    if "all" in splits:
        splits["train"] = splits.pop("all")
        if fraction + data.test_fraction >= 1:
            raise UserError(
                f"data: val_fraction {fraction} and test_fraction {data.test_fraction} leave nothing to train on"
            )
        if data.test_fraction > 0:
            splits["train"], splits["test"] = _part(splits["train"], data, data.test_fraction)
            fraction /= 1 - data.test_fraction  # both are shares of the whole
    if not splits.get("train"):
        raise UserError(f"data: no training images; there are only: {listed(list(splits))}")
    if data.fold is not None:
        pool = splits["train"] + splits.get("val", [])
        splits["train"], splits["val"] = _chosen(pool, _folds(pool, data))
    elif "val" not in splits:
        if not fraction:
            raise UserError("data: no validation images; add a val split, or set data.val_fraction, for example to 0.2")
        splits["train"], splits["val"] = _part(splits["train"], data, fraction)
    return {name: splits[name] for name in SPLITS if name in splits}, problems


def _part(items: list[Item], data: SegmentationData, fraction: float) -> tuple[list[Item], list[Item]]:
    groups = np.array([item.group for item in items])
    labels = np.zeros(len(items), np.int64)
    return _chosen(items, drawing.draw(labels, ["image"], fraction, data.split_seed, groups))


def _folds(items: list[Item], data: SegmentationData) -> tuple[np.ndarray, np.ndarray]:
    groups = np.array([item.group for item in items])
    labels = np.zeros(len(items), np.int64)
    return drawing.fold(labels, ["image"], data.fold, data.folds, data.split_seed, groups)


def _chosen(items: list[Item], parts: tuple[np.ndarray, np.ndarray]) -> tuple[list[Item], list[Item]]:
    stay, out = ([items[i] for i in np.sort(part)] for part in parts)
    return stay, out


def _mixed_channels(items: list[Item]) -> list[str]:
    kinds: dict[int, list[str]] = {}
    for item in items:
        kinds.setdefault(item.channels, []).append(item.name)
    if len(kinds) == 1:
        return []
    texts = [f"{count} in {listed(names, most=3)}" for count, names in sorted(kinds.items())]
    return [f"the images have different numbers of channels or bands: {'; '.join(texts)}"]


def _crossing(splits: dict[str, list[Item]]) -> list[str]:
    homes: dict[str, set[str]] = {}
    for name, items in splits.items():
        for item in items:
            if item.group != item.case:  # without groups, a name in two folders is two images
                homes.setdefault(item.group, set()).add(name)
    crossing = [f"{group} ({', '.join(sorted(home))})" for group, home in homes.items() if len(home) > 1]
    return [f"data.group: {len(crossing)} groups are in more than one split: {listed(crossing)}"] if crossing else []


def _refuse(problems: list[str]) -> None:
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"the data have {count}:\n{listed(problems, chr(10))}")


def _refuse_untrainable(found: SegmentationImages, data: SegmentationData) -> None:
    """What shows before any image is read through."""
    empty = [name for name, split in found.splits.items() if len(split) == 0]
    if empty:
        raise UserError(f"data: no images in {listed(empty)}")
    images = len(found.splits["train"])
    crops, enough = images * data.crops_per_image, -(-data.batch_size // images)
    if crops < data.batch_size:
        raise UserError(
            f"data.batch_size is {data.batch_size}, but an epoch has only {crops} training crops ({images} images, "
            f"data.crops_per_image {data.crops_per_image}): set data.batch_size to at most {crops}, or "
            f"data.crops_per_image to at least {enough}"
        )
    for key in ("mean", "std"):
        values = getattr(data, key)
        if values is not None and len(values) != found.channels:
            raise UserError(f"data.{key} has {len(values)} values, but the images have {found.channels} channels")


def _doubts(found: SegmentationImages) -> list[str]:
    """What makes results doubtful: equal images in different splits, classes that are never trained."""
    homes: dict[bytes, set[str]] = {}
    for name, split in found.splits.items():
        for look in split.looks:
            homes.setdefault(look.image, set()).add(name)
    leaks = sum(len(home) > 1 for home in homes.values())
    texts = [f"{leaks} images are in more than one split: results on held-out images are too good"] if leaks else []
    texts += same_ground(found)
    absent = np.flatnonzero(found.splits["train"].counts[:, :-1].sum(0) == 0)
    if len(absent):
        texts.append(f"no training mask has a pixel of {listed([found.classes[k] for k in absent])}")
    return texts


def same_ground(found: SegmentationImages) -> list[str]:
    """A line where scenes of different splits overlap on the ground."""
    pairs = []
    for (one, first), (other, second) in combinations(found.splits.items(), 2):
        placed = [item for item in second.items if item.ground]
        systems = np.array([item.ground[0] for item in placed])
        left, bottom, right, top = np.array([item.ground[1] for item in placed]).reshape(-1, 4).T
        for item in first.items:
            if item.ground is None:
                continue
            crs, (west, south, east, north) = item.ground
            width = np.minimum(right, east) - np.maximum(left, west)
            height = np.minimum(top, north) - np.maximum(bottom, south)
            shared = width.clip(0) * height.clip(0) > SHARED * (east - west) * (north - south)
            there = np.flatnonzero(shared & (systems == crs))
            pairs += [f"{one}: {item.name} and {other}: {placed[i].name}" for i in there]
    if not pairs:
        return []
    return [
        "scenes in different splits share ground, so results on held-out scenes are too good: "
        f"{listed(pairs, most=5)}; keep them together by data.group or data.lists"
    ]
