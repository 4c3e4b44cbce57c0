"""From images with masks to what the network sees, and back: crops for training, parts for everything else.

One geometry for all of `data.resize`: an image is scaled by (rows, columns) factors and covered by windows of
`data.image_size`.

- squash: both sides become the size, so the only window is the whole image.
- shorter: one factor for both sides, the shorter one becomes the size.
- none: native pixels.

A training crop is a random window, zoomed by `augment.scale`; where it reaches outside the image there is no label.
Bands are normalised before they are resized, so that missing values (NaN) are the mean.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from visionattn.data.loaders import seeded
from visionattn.data.sample import IGNORE, Reading, Sample, Window, blocks, unit_range
from visionattn.tasks.augmentation import BandDropout, GainAndOffset, QuarterTurns
from visionattn.tasks.segmentation.recipe import Augment, Data

__all__ = ["TrainingCrops", "WholeImages", "augmentation", "collate", "factors", "network_input"]

PART = 2048  # native pixels of a side: larger scenes are evaluated in parts, each with some of its surroundings


def factors(size: tuple[int, int], data: Data) -> tuple[float, float]:
    """By what an image of (H, W) pixels is scaled before the network sees it."""
    height, width = data.side
    if data.resize == "squash":
        return height / size[0], width / size[1]
    factor = min(height, width) / min(size) if data.resize == "shorter" else 1.0
    return factor, factor


def network_input(image: np.ndarray, data: Data, scaled: tuple[float, float]) -> Tensor:
    """(C, h, w) as a sample gives it -> normalised and scaled, NaN at the mean."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (data.mean, data.std))
    pixels = ((torch.from_numpy(np.ascontiguousarray(unit_range(image))) - mean) / std).nan_to_num_(0.0)
    size = [max(1, round(side * factor)) for side, factor in zip(image.shape[1:], scaled, strict=True)]
    return _resized(pixels, size)


def _resized(image: Tensor, size: list[int]) -> Tensor:
    if list(image.shape[1:]) == size:
        return image
    return v2.functional.resize(image, size, InterpolationMode.BILINEAR, antialias=True)


class TrainingCrops(Dataset):
    """Random crops with their masks; item (epoch, i) is {"image": (C, H, W), "mask": (H, W) int64, "index": image}.

    Args:
        samples: to cut from.
        readings: of the samples, with the places of their classes where `data.rare_crops`.
        data: the section as `visionattn.tasks.segmentation.task.resolve` leaves it.
        seed: crop i of epoch e depends on (seed, e, i) only.
    """

    weights = None  # every crop is drawn once an epoch

    def __init__(self, samples: Sequence[Sample], readings: Sequence[Reading], data: Data, seed: int) -> None:
        self.samples, self.data, self.seed = samples, data, seed
        self.places = [reading.places for reading in readings] if data.rare_crops else None
        self.augmentation = augmentation(data.augment)
        self.size = data.side

    def __len__(self) -> int:
        return len(self.samples) * self.data.crops_per_image

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, crop = item
        index = crop % len(self.samples)
        with seeded(self.seed, epoch, crop):
            image, mask = self.augmentation(*self._crop(index))
        return {"image": image.as_subclass(Tensor), "mask": mask.as_subclass(Tensor).long(), "index": index}

    def _crop(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        sample = self.samples[index]
        low, high = self.data.augment.scale
        zoom = math.exp(torch.empty(1).uniform_(math.log(low), math.log(high)).item())
        shape = [
            max(1, round(side / (zoom * factor)))
            for side, factor in zip(self.size, factors(sample.size, self.data), strict=True)
        ]
        centre = self._rare_place(index)
        starts = [_start(*sizes) for sizes in zip(sample.size, shape, centre or (None, None), strict=True)]
        rows, columns = (
            slice(max(start, 0), min(start + extent, side))
            for start, extent, side in zip(starts, shape, sample.size, strict=True)
        )
        inside = rows, columns
        pixels, target = sample.read(inside)
        image = network_input(pixels, self.data, (1.0, 1.0))
        mask = torch.from_numpy(np.ascontiguousarray(target))
        top, left = (side.start - start for side, start in zip(inside, starts, strict=True))
        below, right = shape[0] - top - mask.shape[0], shape[1] - left - mask.shape[1]
        image = _resized(F.pad(image, (left, right, top, below)), list(self.size))
        mask = F.pad(mask, (left, right, top, below), value=IGNORE)
        if mask.shape != self.size:
            mask = F.interpolate(mask[None, None].double(), self.size, mode="nearest-exact")[0, 0]
        return tv_tensors.Image(image), tv_tensors.Mask(mask.to(torch.uint8))

    def _rare_place(self, index: int) -> tuple[int, int] | None:
        """With the chance of `rare_crops` a pixel of one of the image's classes, each class as likely."""
        if self.places is None or torch.rand(1).item() >= self.data.rare_crops or not self.places[index]:
            return None
        of_sample = self.places[index]
        of_class = of_sample[sorted(of_sample)[int(torch.randint(len(of_sample), (1,)))]]
        row, column = of_class[int(torch.randint(len(of_class), (1,)))]
        return int(row), int(column)


def _start(side: int, extent: int, centre: int | None) -> int:
    """Where a window of this extent begins: anywhere inside, around a place, or so that it has the whole side."""
    low, high = sorted((0, side - extent))
    if centre is not None and side > extent:
        middle = centre - extent // 2 + int(torch.randint(-(extent // 4), extent // 4 + 1, (1,)).item())
        return min(max(middle, low), high)
    return int(torch.randint(low, high + 1, (1,)).item())


class WholeImages(Dataset):
    """Images as they are evaluated, scenes in parts; item (epoch, i), or i, is a dict of

    - image: (C, h, w) normalised and scaled;
    - mask: (H, W) int64 of the part in native pixels, absent where there is none;
    - index: of the image; window: the part's (top, bottom, left, right) in it;
    - extent: native (height, width) of what `image` shows; inner: where the part is in it, as `window`.

    Large images are divided, so that the probabilities of all classes fit into memory.
    """

    def __init__(self, samples: Sequence[Sample], data: Data) -> None:
        self.samples, self.data = samples, data
        self.parts = [(i, window) for i, sample in enumerate(samples) for window in self._windows(sample)]

    def _windows(self, sample: Sample) -> list[Window]:
        divided = self.data.resize == "none"
        return list(blocks(sample.size, max(PART, *self.data.side) if divided else max(sample.size)))

    def __len__(self) -> int:
        return len(self.parts)

    def sample_of(self, number: int) -> int:
        """The sample that an item is a part of."""
        return self.parts[number][0]

    def __getitem__(self, number: tuple[int, int] | int) -> dict[str, Any]:
        index, window = self.parts[number[1] if isinstance(number, tuple) else number]
        sample = self.samples[index]
        margins = [side // 2 for side in self.data.side]
        rows, columns = (
            slice(max(inner.start - margin, 0), min(inner.stop + margin, side))
            for inner, margin, side in zip(window, margins, sample.size, strict=True)
        )
        seen = rows, columns
        inner = [
            slice(own.start - around.start, own.stop - around.start) for own, around in zip(window, seen, strict=True)
        ]
        pixels, mask = sample.read(seen)
        part = {
            "image": network_input(pixels, self.data, factors(sample.size, self.data)),
            "index": index,
            "window": [edge for side in window for edge in _edges(side)],
            "extent": tuple(around.stop - around.start for around in seen),
            "inner": [edge for side in inner for edge in _edges(side)],
        }
        return part if mask is None else part | {"mask": torch.from_numpy(np.ascontiguousarray(mask[tuple(inner)]))}


def _edges(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def collate(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of parts: lists, since images differ in size; `index` a tensor, as in every batch."""
    batch = {key: [part[key] for part in parts] for key in parts[0]}
    return batch | {"index": torch.tensor(batch["index"])}


def augmentation(augment: Augment) -> v2.Transform:
    """Image (C, H, W) normalised float and mask (H, W) -> the same, changed at random and together."""
    fill = {tv_tensors.Image: 0.0, tv_tensors.Mask: IGNORE}
    steps = [
        v2.RandomHorizontalFlip(augment.hflip) if augment.hflip else None,
        v2.RandomVerticalFlip(augment.vflip) if augment.vflip else None,
        v2.RandomApply([QuarterTurns()], augment.rot90) if augment.rot90 else None,
        v2.RandomRotation(augment.rotate, InterpolationMode.BILINEAR, fill=fill) if augment.rotate else None,
        GainAndOffset(augment.jitter) if augment.jitter else None,
        BandDropout(augment.band_dropout) if augment.band_dropout else None,
    ]
    return v2.Compose([step for step in steps if step is not None] or [v2.Identity()])
