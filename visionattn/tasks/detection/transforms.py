"""From images with objects to what the network sees: random crops for training, whole images for everything else.

An image is scaled by one factor (`data.resize`) and keeps its shape:

- fit: it fits into `data.image_size`, whichever way round.
- none: native pixels.

Larger images than `image_size` are then looked at tile by tile, and what the tiles show is merged.

A training crop is a random window of what `image_size` frames, zoomed by `augment.scale`. Of crops without an object
only some stay (`empty_crops`); in place of others stands one around an object, of another image where this has none.
Bands are normalised before they are resized, so that missing values (NaN) are the mean.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.data.loaders import seeded
from visionattn.data.sample import Reading, Sample, Window, unit_range
from visionattn.inference.merging import merge, rows_of_tiles
from visionattn.models.detectors import Objects
from visionattn.tasks.augmentation import BandDropout, GainAndOffset, QuarterTurns
from visionattn.tasks.detection.pasting import paste, window_of
from visionattn.tasks.detection.recipe import Augment, Data

__all__ = [
    "TrainingCrops",
    "WholeImages",
    "augmentation",
    "clipped",
    "collate",
    "factor_of",
    "frame",
    "merged",
    "network_input",
    "tiles_of",
]

COUNTED = 1000  # crops that tell how many are without an object
LEAST = 1e-3  # pixels of a side: what a border leaves less of is ignored


def factor_of(size: tuple[int, int], data: Data) -> float:
    """By what an image of (H, W) pixels is scaled before the network sees it."""
    if data.resize == "none":
        return 1.0
    return min(max(data.side) / max(size), min(data.side) / min(size))


def frame(size: tuple[int, int], data: Data) -> tuple[int, int]:
    """Height and width of what the network sees at most of an image of (H, W) pixels."""
    factor = factor_of(size, data)
    sides = data.side
    if data.resize == "fit" and (size[0] > size[1]) != (sides[0] > sides[1]):
        sides = sides[::-1]
    height, width = (max(1, min(round(own * factor), side)) for own, side in zip(size, sides, strict=True))
    return height, width


def network_input(image: np.ndarray, data: Data, size: Sequence[int]) -> Tensor:
    """(C, h, w) as a sample gives it -> normalised, (C, *size), NaN at the mean."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (data.mean, data.std))
    pixels = ((torch.from_numpy(np.ascontiguousarray(unit_range(image))) - mean) / std).nan_to_num_(0.0)
    if tuple(pixels.shape[1:]) == tuple(size):
        return pixels
    return v2.functional.resize(pixels, list(size), InterpolationMode.BILINEAR, antialias=True)


def clipped(boxes: Boxes, size: Sequence[int]) -> Boxes:
    """Inside an image of (h, w) pixels, without masks; what the border leaves nearly nothing of is ignored."""
    xyxy = boxes.xyxy.clip(0, [size[1], size[0]] * 2).astype(np.float32)
    cut = (xyxy[:, 2:] - xyxy[:, :2] < LEAST).any(1)
    return replace(boxes, xyxy=xyxy, ignore=boxes.ignore | cut, masks=None)


def objects_of(boxes: Boxes, old: Sequence[int], new: Sequence[int], masks: bool = False) -> Objects:
    """Objects of an image of `old` (h, w) as they are when it is resized to `new`, clipped to it."""
    inside = clipped(boxes, old)
    scale = np.array([new[1] / old[1], new[0] / old[0]] * 2, np.float32)
    objects = Objects(*map(torch.from_numpy, (inside.xyxy * scale, inside.labels, inside.ignore)))
    return objects._replace(masks=_painted(boxes, old, new)) if masks else objects


def _painted(boxes: Boxes, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """(N, *new) uint8, the mask of each object of an image of `old` (h, w); of objects without one the box."""
    canvas = np.zeros((len(boxes), *old), np.uint8)
    for k, picture in enumerate(canvas):
        rows, columns = pixels_of(boxes.xyxy[k])
        top, left = max(rows.start, 0), max(columns.start, 0)
        here = picture[top : max(rows.stop, 0), left : max(columns.stop, 0)]
        mask = np.ones((rows.stop - rows.start, columns.stop - columns.start), bool)
        mask = mask if boxes.masks is None else boxes.masks[k]
        here[:] = mask[top - rows.start :, left - columns.start :][: here.shape[0], : here.shape[1]]
    painted = torch.from_numpy(canvas)
    return painted if tuple(old) == tuple(new) else F.interpolate(painted[None], tuple(new), mode="nearest-exact")[0]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: lists, since images differ in size; `index` a tensor, as in every batch."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    return batch | {"index": torch.tensor(batch["index"])}


class TrainingCrops(Dataset):
    """Random crops with their objects; item (epoch, i) is {"image": (C, h, w), "objects": `Objects`, "index": image}.

    Args:
        samples: to cut from.
        readings: of the samples, with the places of their objects.
        data: the section as `visionattn.tasks.detection.task.resolve` leaves it.
        seed: crop i of epoch e depends on (seed, e, i) only.

    Attributes:
        weights: chances to draw each crop, None where all are drawn once an epoch.
        kept: chance of a crop without an object to stay, so that `empty_crops` of an epoch are such at most.
    """

    collate = staticmethod(collate)

    def __init__(self, samples: Sequence[Sample], readings: Sequence[Reading], data: Data, seed: int) -> None:
        self.samples, self.data, self.seed = samples, data, seed
        self.places = [reading.places for reading in readings]
        self.boxes = [reading.boxes for reading in readings]
        self.with_objects = [i for i, places in enumerate(self.places) if places]
        self.of_class = _members(self.boxes)
        self.augmentation = augmentation(data.augment)
        balanced = data.balanced_sampling and readings
        self.weights = _chances(readings).repeat(data.crops_per_image) if balanced else None
        self.kept = self._kept() if self.with_objects else 1.0

    def __len__(self) -> int:
        return len(self.samples) * self.data.crops_per_image

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, crop = item
        with seeded(self.seed, epoch, crop):
            index, window, scale = self._drawn(crop % len(self.samples))
            image, objects = self._seen(index, window, scale)
            if (chance := self.data.augment.copy_paste) and torch.rand(1).item() < chance:
                image, objects = self._pasted(image, objects)
            seen = {
                "image": tv_tensors.Image(image),
                "boxes": tv_tensors.BoundingBoxes(objects.xyxy, format="XYXY", canvas_size=tuple(image.shape[1:])),
            }
            if objects.masks is not None:
                seen["masks"] = tv_tensors.Mask(objects.masks)
            seen = self.augmentation(seen)
        xyxy = seen["boxes"].as_subclass(Tensor)
        flat = ~(xyxy[:, 2:] > xyxy[:, :2]).all(1)  # turned out of the picture
        masks = seen["masks"].as_subclass(Tensor)[~flat] if "masks" in seen else None
        objects = Objects(xyxy[~flat], objects.labels[~flat], objects.ignore[~flat], masks)
        return {"image": seen["image"].as_subclass(Tensor), "objects": objects, "index": index}

    def _drawn(self, index: int) -> tuple[int, Window, float]:
        """An image, this one unless its crop would be one too many without an object, a window of it, and its scale."""
        window, scale = self._window(index, self.data.object_crops)
        if self.kept < 1 and not self._shows(index, window) and torch.rand(1).item() >= self.kept:
            if not self.places[index]:
                index = self.with_objects[int(torch.randint(len(self.with_objects), (1,)))]
            window, scale = self._window(index, 1.0)
        return index, window, scale

    def _kept(self) -> float:
        """See `kept`; from the crops of an epoch, or some."""
        with seeded(self.seed, -1):
            crops = torch.randperm(len(self))[:COUNTED].tolist()
        empty = 0
        for crop in crops:
            with seeded(self.seed, -1, crop):
                index = crop % len(self.samples)
                window, _ = self._window(index, self.data.object_crops)
                empty += not self._shows(index, window)
        return min(1.0, self.data.empty_crops * len(crops) / max(1, empty))

    def _shows(self, index: int, window: Window) -> bool:
        """Whether an object is to be learned there; what has not been read counts as such."""
        boxes = self.boxes[index] if self.boxes else None
        return boxes is None or not boxes.within(window).ignore.all()

    def _scale(self, index: int) -> float:
        low, high = self.data.augment.scale
        zoom = math.exp(torch.empty(1).uniform_(math.log(low), math.log(high)).item())
        return factor_of(self.samples[index].size, self.data) * zoom

    def _window(self, index: int, chance: float) -> tuple[Window, float]:
        """What of an image becomes a crop, with this chance around an object, and by what it is scaled."""
        size, scale = self.samples[index].size, self._scale(index)
        extents = [
            max(1, min(round(side / scale), own)) for side, own in zip(frame(size, self.data), size, strict=True)
        ]
        centre = self._object(index, chance) or (None, None)
        starts = [_start(*sides) for sides in zip(size, extents, centre, strict=True)]
        rows, columns = (slice(start, start + extent) for start, extent in zip(starts, extents, strict=True))
        return (rows, columns), scale

    def _seen(self, index: int, window: Window, scale: float) -> tuple[Tensor, Objects]:
        """The pixels and objects of a window."""
        sample, old = self.samples[index], [side.stop - side.start for side in window]
        new = [max(1, round(extent * scale)) for extent in old]
        pixels, boxes = sample.read(window)
        return network_input(pixels, self.data, new), objects_of(boxes, old, new, self.data.instances == "masks")

    def _object(self, index: int, chance: float) -> tuple[int, int] | None:
        """With this chance the centre of one of the image's objects, each class as likely."""
        if not self.places or torch.rand(1).item() >= chance or not self.places[index]:
            return None
        of_sample = self.places[index]
        of_class = of_sample[sorted(of_sample)[int(torch.randint(len(of_sample), (1,)))]]
        row, column = of_class[int(torch.randint(len(of_class), (1,)))]
        return int(row), int(column)

    def _pasted(self, image: Tensor, objects: Objects) -> tuple[Tensor, Objects]:
        """With an object of another image, each class as likely, where it fits."""
        if not self.of_class:
            return image, objects
        members = self.of_class[int(torch.randint(len(self.of_class), (1,)))]
        if not len(members):
            return image, objects
        index, k = members[int(torch.randint(len(members), (1,)))].tolist()
        sample, boxes = self.samples[index], self.boxes[index]
        assert boxes is not None  # of which k is one
        window, scale = window_of(boxes.xyxy[k], sample.size), self._scale(index)
        patch, theirs = self._seen(index, window, scale)
        rooms = [side - own for side, own in zip(image.shape[1:], patch.shape[1:], strict=True)]
        if min(rooms) < 0:
            return image, objects
        corner = [int(torch.randint(room + 1, (1,))) for room in rooms]
        whole = sample.target()[[k]]
        shape = None
        if whole.masks is not None:
            own = [side.stop - side.start for side in window]
            theirs = objects_of(whole.within(window), own, patch.shape[1:], masks=True)
            assert theirs.masks is not None
            shape = theirs.masks[0].bool()
            theirs = theirs if objects.masks is not None else theirs._replace(masks=None)
        return paste(image, objects, patch, theirs, (corner[0], corner[1]), shape)


def _members(boxes: Sequence[Boxes | None]) -> list[np.ndarray]:
    """(N, 2) image and number in it of the objects of each class that has any."""
    known = [(i, b) for i, b in enumerate(boxes) if b is not None]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(_numbered(i, b) for i, b in known)])
    labels = np.concatenate([np.zeros(0, np.int64), *(b.labels[~b.ignore] for _, b in known)])
    return [pairs[labels == label] for label in np.unique(labels)]


def _numbered(image: int, boxes: Boxes) -> np.ndarray:
    places = np.flatnonzero(~boxes.ignore)
    return np.stack([np.full_like(places, image), places], axis=1)


def _chances(readings: Sequence[Reading]) -> Tensor:
    """Of images to be drawn: one over the root of the share of images that have its rarest class (LVIS, 1908.03195)."""
    there = np.stack([reading.counts[:-1] > 0 for reading in readings])
    rarity = 1 / np.sqrt(np.maximum(there.mean(0), 1 / len(there)))
    return torch.from_numpy(np.where(there, rarity, 1.0).max(1))


def _start(side: int, extent: int, centre: int | None) -> int:
    """Where a window of this extent begins: anywhere inside, or so that it shows a place."""
    low, high = 0, side - extent
    if centre is not None:
        margin = extent // 4
        low, high = (min(max(edge, 0), high) for edge in (centre - extent + margin, centre - margin))
    return int(torch.randint(low, high + 1, (1,)).item())


def tiles_of(size: tuple[int, int], data: Data) -> list[Window]:
    """What is looked at of an image of (H, W) pixels, row by row: all of it, or tiles of native pixels."""
    tile = data.side if data.resize == "none" else size
    return [window for row in rows_of_tiles(size, tile, data.overlap) for window in row]


def merged(parts: Sequence[tuple[Window, Boxes]], size: tuple[int, int], agnostic: bool = False) -> Boxes:
    """The objects of an image of (H, W) pixels from those of its tiles, in any order."""
    rows: dict[int, list[tuple[Window, Boxes]]] = {}
    for window, boxes in sorted(parts, key=lambda part: (part[0][0].start, part[0][1].start)):
        rows.setdefault(window[0].start, []).append((window, boxes))
    if len(parts) == 1:
        return parts[0][1]
    found = list(merge(rows.values(), size, agnostic=agnostic))
    return Boxes.joined(found) if found else parts[0][1][np.zeros(0, np.int64)]


class WholeImages(Dataset):
    """Images, or their tiles, as they are evaluated; item (epoch, i), or i, is a dict of

    - image: (C, h, w) normalised and scaled;
    - objects: `Objects` in its pixels, absent where there is no label;
    - truth: those of the whole image in native pixels, with its first tile, else None;
    - index: of the image; whole: its native (H, W); size: that of the tile; window: its top, bottom, left and right.
    """

    def __init__(self, samples: Sequence[Sample], data: Data) -> None:
        self.samples, self.data = samples, data
        self.parts = [(i, window) for i, sample in enumerate(samples) for window in tiles_of(sample.size, data)]

    def __len__(self) -> int:
        return len(self.parts)

    def sample_of(self, number: int) -> int:
        """The sample that an item is of."""
        return self.parts[number][0]

    def __getitem__(self, number: tuple[int, int] | int) -> dict[str, Any]:
        index, window = self.parts[number[1] if isinstance(number, tuple) else number]
        sample = self.samples[index]
        pixels, truth = sample.read(window)
        size = pixels.shape[1], pixels.shape[2]
        new = [max(1, round(side * factor_of(sample.size, self.data))) for side in size]
        item = {"image": network_input(pixels, self.data, new), "index": index, "size": size, "whole": sample.size}
        item["window"] = [edge for side in window for edge in (side.start, side.stop)]
        if truth is None:
            return item
        first = window[0].start == window[1].start == 0
        whole = objects_of(sample.target(), sample.size, sample.size) if first else None
        return item | {"objects": objects_of(truth, size, new, self.data.instances == "masks"), "truth": whole}


def augmentation(augment: Augment) -> v2.Transform:
    """{"image": normalised float, "boxes": tv_tensors} -> the same, changed at random and together."""
    steps = [
        v2.RandomHorizontalFlip(augment.hflip) if augment.hflip else None,
        v2.RandomVerticalFlip(augment.vflip) if augment.vflip else None,
        v2.RandomApply([QuarterTurns()], augment.rot90) if augment.rot90 else None,
        v2.RandomRotation(augment.rotate, InterpolationMode.BILINEAR, fill=0.0) if augment.rotate else None,
        v2.ClampBoundingBoxes(),
        GainAndOffset(augment.jitter) if augment.jitter else None,
        BandDropout(augment.band_dropout) if augment.band_dropout else None,
    ]
    return v2.Compose([step for step in steps if step is not None])
