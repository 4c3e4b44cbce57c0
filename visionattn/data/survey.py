"""Reading every sample of a data set once: what is unreadable, sizes, equal images, pixel statistics, mask contents.

Memory is that of a few images, or of a few blocks of large scenes.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from visionattn.data.boxes import Boxes
from visionattn.data.ground import same_ground
from visionattn.data.images import match_channels
from visionattn.data.kept import keep, keys_of, reading_as_text, reading_of_text, recall
from visionattn.data.sample import IGNORE, Dataset, Reading, Sample, Window, blocks, unit_range
from visionattn.data.threads import in_order
from visionattn.errors import UserError, listed, plural
from visionattn.progress import progress

__all__ = [
    "across_splits",
    "contradicting",
    "doubts",
    "equal_images",
    "fingerprint",
    "mean_std",
    "not_looked_at",
    "read_through",
    "usable",
]

log = logging.getLogger(__name__)
BLOCK = 2048  # pixels of a side: larger scenes are read in blocks
PLACES = 64  # positions kept of each class and image, for crops around rare classes
TOGETHER = 2000  # readings that are kept at once
SOME = 2000  # samples that are read of a set that is too large to be read whole


def read_through(dataset: Dataset, survey: str = "cached", seed: int = 0) -> Dataset:
    """The same with its `readings`.

    Args:
        survey: as in `data.survey`.
        seed: of the samples that are chosen.
    """
    samples, classes = dataset.samples, len(dataset.classes)
    chosen = _chosen(len(samples), seed) if survey == "sample" else range(len(samples))
    keys = keys_of([samples[i] for i in chosen], classes)
    known = recall(keys, reading_of_text) if survey != "anew" else {}
    readings: dict[int, Reading] = {}
    missing = []
    for i, key in zip(chosen, keys, strict=True):
        if key is not None and key in known:
            readings[i] = known[key]
        else:
            missing.append((i, key))
    fresh: dict[bytes, Reading] = {}
    for (i, key), reading in zip(missing, _read_all([samples[i] for i, _ in missing], classes), strict=True):
        readings[i] = reading
        if key is not None and not reading.error:
            fresh[key] = reading
        if len(fresh) == TOGETHER:
            keep(fresh, reading_as_text)
            fresh = {}
    if fresh:
        keep(fresh, reading_as_text)
    rest = (readings.get(i) or _unread(sample, classes) for i, sample in enumerate(samples))
    return replace(dataset, readings={name: list(islice(rest, len(part))) for name, part in dataset.splits.items()})


def _unread(sample: Sample, classes: int) -> Reading:
    return Reading(size=sample.size, counts=_zeros(sample, classes), unread=True)


def _chosen(count: int, seed: int) -> list[int]:
    """Positions of the samples that are read where not all are."""
    return sorted(np.random.default_rng(seed).permutation(count)[:SOME].tolist())


def _read_all(samples: Sequence[Sample], classes: int) -> Iterator[Reading]:
    def read(sample: Sample) -> Reading:
        try:
            return _read(sample, classes)
        except UserError as error:
            return Reading(str(error), counts=_zeros(sample, classes))

    if samples:
        yield from progress(in_order(read, samples), "reading images", len(samples))


def _zeros(sample: Sample, classes: int) -> np.ndarray:
    """To count with; nothing is counted of an image with one label, or a million of them would need 1000 zeros each."""
    return np.zeros(0 if sample.label is not None else classes + 1, np.int64)


def _read(sample: Sample, classes: int) -> Reading:
    image_digest, pair_digest = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    counts, sums = _zeros(sample, classes), np.zeros((3, 1))
    target: Any = None
    positions: dict[int, np.ndarray] = {}
    size, channels, missing = (0, 0), 0, 0
    for window, image, target in _pieces(sample, classes > 0):
        size = window[0].stop, window[1].stop
        channels = len(image)
        for digest in (image_digest, pair_digest):
            digest.update(f"{image.shape}{image.dtype}".encode())
            digest.update(np.ascontiguousarray(image).data)
        if sample.channels is None:
            channels = {2: 1, 4: 3}.get(channels, channels)
            image = match_channels(image, channels, sample.name)
        here, without = _sums(image)
        sums, missing = sums + here, missing + without
        if target is None or isinstance(target, Boxes):
            continue
        pair_digest.update(np.ascontiguousarray(target).data)
        if sample.label is None:
            counts[:-1] += np.bincount(target[target != IGNORE], minlength=classes)
            counts[-1] += (target == IGNORE).sum()
            _collect_places(positions, target, window)
    boxes = None
    if isinstance(target, Boxes):
        boxes = replace(sample.target(), masks=None)
        counts[:-1] = np.bincount(boxes.labels[~boxes.ignore], minlength=classes)
        counts[-1] = boxes.ignore.sum()
        positions = _centres(boxes)
        for array in (boxes.xyxy, boxes.labels, boxes.ignore):
            pair_digest.update(np.ascontiguousarray(array).data)
    seen = np.maximum(sums[0], 1)
    return Reading(
        size=size,
        channels=channels,
        kind=sample.kind(),
        mean=sums[1] / seen,
        square=sums[2] / seen,
        missing=missing / (size[0] * size[1]),
        image=image_digest.digest(),
        pair=pair_digest.digest(),
        counts=counts,
        places=positions,
        boxes=boxes,
    )


def _sums(image: np.ndarray) -> tuple[np.ndarray, int]:
    """(3, C) number, sum and sum of squares of each channel's values, and how many pixels have none."""
    if image.dtype == np.uint8:
        histograms = np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in image])
        levels = unit_range(np.arange(256, dtype=np.uint8)).astype(np.float64)
        return np.stack([histograms @ power for power in (np.ones(256), levels, levels**2)]), 0
    values = unit_range(image)
    valid = np.isfinite(values)
    values = np.where(valid, values, 0).astype(np.float64)
    sums = np.stack([valid.sum((1, 2)), values.sum((1, 2)), np.square(values).sum((1, 2))])
    return sums, int((~valid.any(0)).sum())


def _pieces(sample: Sample, labelled: bool) -> Iterator[tuple[Window, np.ndarray, Any]]:
    """Windows that cover the sample, with image and target there: the whole unless it is large and read by windows."""
    windows: Iterable[Window | None] = blocks(sample.size, BLOCK) if sample.windowed else [None]
    for window in windows:
        image, target = sample.read(window) if labelled else (sample.image(window), None)
        if labelled and target is None:
            raise UserError(f"{sample.name}: no label")
        yield window or (slice(0, image.shape[1]), slice(0, image.shape[2])), image, target


def _collect_places(positions: dict[int, np.ndarray], mask: np.ndarray, window: Window) -> None:
    """Evenly spread positions of each class; those of an earlier block are thinned out."""
    for k in np.unique(mask[mask != IGNORE]).tolist():
        here = np.argwhere(mask == k) + [side.start for side in window]
        merged = np.concatenate([positions[k], _spread(here)]) if k in positions else here
        positions[k] = _spread(merged).astype(np.int32)


def _centres(boxes: Boxes) -> dict[int, np.ndarray]:
    """Of some objects of each class, as (row, column)."""
    centres = ((boxes.xyxy[:, :2] + boxes.xyxy[:, 2:]) / 2)[:, ::-1].astype(np.int32)
    known = np.unique(boxes.labels[~boxes.ignore]).tolist()
    return {k: _spread(centres[(boxes.labels == k) & ~boxes.ignore]) for k in known}


def _spread(positions: np.ndarray) -> np.ndarray:
    return positions[np.linspace(0, len(positions) - 1, min(PLACES, len(positions))).round().astype(int)]


def mean_std(readings: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of each channel, every readable image counting equally; grey counts as colour.

    A channel without variation has the standard deviation 1, so that it can be divided by. Raises UserError where no
    image has a value.
    """
    seen = [reading for reading in readings if reading.sound and reading.missing < 1]
    if not seen:
        raise UserError("data: the training images have no values at all")
    width = max(len(reading.mean) for reading in seen)
    mean, square = (
        np.mean([values if len(values) == width else np.broadcast_to(values, width) for values in every], axis=0)
        for every in ([reading.mean for reading in seen], [reading.square for reading in seen])
    )
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean, np.where(std < 1e-6 * np.maximum(np.abs(mean), 1), 1.0, std)


def usable(dataset: Dataset, skip_bad: bool) -> Dataset:
    """The same without the cases that cannot be read, where those are to be left out.

    Raises:
        UserError: something cannot be read and is not to be left out.
    """
    errors = [reading.error for readings in dataset.readings.values() for reading in readings if reading.error]
    if not errors:
        return dataset
    if not skip_bad:
        count = f"{len(errors)} of {len(dataset.samples)} images"
        raise UserError(
            f"{count} cannot be used; mend or remove them, or leave them out by data.skip_bad=true:\n"
            f"{listed(errors, chr(10))}"
        )
    log.warning("%s cannot be used and are left out (data.skip_bad)", plural(len(errors), "image"))
    splits, readings = {}, {}
    for name, samples in dataset.splits.items():
        pairs = list(zip(samples, dataset.readings[name], strict=True))
        bad = {sample.case for sample, reading in pairs if reading.error}
        splits[name] = [sample for sample, _ in pairs if sample.case not in bad]
        readings[name] = [reading for sample, reading in pairs if sample.case not in bad]
    return replace(dataset, splits=splits, readings=readings, skipped=errors)


def fingerprint(dataset: Dataset) -> str:
    """Of names, images and targets, in their order."""
    digest = hashlib.sha256()
    for name, samples in sorted(dataset.splits.items()):
        digest.update(name.encode())
        for sample, reading in zip(samples, dataset.readings[name], strict=True):
            digest.update(sample.name.encode("utf-8", "surrogateescape") + reading.pair)
    return digest.hexdigest()[:16]


def equal_images(dataset: Dataset) -> list[list[tuple[str, int]]]:
    """Groups of samples (split, position) with equal images: pixel for pixel, whatever the files are called."""
    places: dict[bytes, list[tuple[str, int]]] = {}
    for name, readings in dataset.readings.items():
        for i, reading in enumerate(readings):
            if reading.sound:
                places.setdefault(reading.image, []).append((name, i))
    return [group for group in places.values() if len(group) > 1]


def doubts(dataset: Dataset) -> list[str]:
    """What makes results doubtful, whatever is learned: a line each."""
    equal = equal_images(dataset)
    counts = {
        "images are in more than one split: results on held-out images are too good": sum(map(across_splits, equal)),
        "images have contradicting labels": sum(contradicting(dataset, group) for group in equal),
    }
    texts = [f"{count} {text} (visionattn check names them)" for text, count in counts.items() if count]
    return texts + not_looked_at(dataset) + same_ground(dataset)


def not_looked_at(dataset: Dataset) -> list[str]:
    """A line where only some samples have been read."""
    unread = sum(reading.unread for part in dataset.readings.values() for reading in part)
    count = f"{unread:,} of {len(dataset.samples):,} images"
    text = f"{count} were not looked at (data.survey: sample): whether they can be read, and are there only once"
    return [text] if unread else []


def across_splits(group: list[tuple[str, int]]) -> bool:
    """Whether equal images are in different splits."""
    return len({split for split, _ in group}) > 1


def contradicting(dataset: Dataset, group: list[tuple[str, int]]) -> bool:
    """Whether equal images have different targets."""
    return len({dataset.readings[split][i].pair for split, i in group}) > 1
