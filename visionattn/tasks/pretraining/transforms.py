"""From images to what the network sees: random crops to learn from, fixed windows to be measured on.

A crop is a share of the area of the whole image (`data.resize: squash`), or of a window of `data.image_size` native
pixels (`none`), resized to `data.image_size`. Values are normalised first, so that missing ones (NaN) and what lies
outside the image are the mean; `valid` tells them apart. Nothing is clipped: normalised values have no range.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from visionattn.data.loaders import seeded
from visionattn.data.sample import Sample, Window, unit_range
from visionattn.tasks.augmentation import BandDropout
from visionattn.tasks.pretraining.recipe import Augment, Data

__all__ = ["Crops", "Views", "Whole", "Windows", "hidden_cells"]

TRIES = 4  # for a crop that shows something
FLAT = 0.05  # standard deviation, of normalised values, of a crop that shows nothing
SHOWN = 8  # windows whose pictures are shown
WINDOWS = 64  # of an image that is larger than a window
PLACES = 32  # rows and columns of the places that are kept of a view


class Crops(Dataset):
    """Random crops; item (epoch, i) is {"image": (C, H, W), "valid": (1, H, W) bool, "index": image, "item": i}.

    Args:
        samples: to cut from.
        data: the section as `visionattn.tasks.pretraining.task.resolve` leaves it.
        seed: crop i of epoch e depends on (seed, e, i) only.
    """

    weights = None  # every crop is drawn once an epoch

    def __init__(self, samples: Sequence[Sample], data: Data, seed: int) -> None:
        self.samples, self.data, self.seed = samples, data, seed

    def __len__(self) -> int:
        return len(self.samples) * self.data.crops_per_image

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, number = item
        index = number % len(self.samples)
        with seeded(self.seed, epoch, number):
            return self.views(self.samples[index]) | {"index": index, "item": number}

    def views(self, sample: Sample) -> dict[str, Any]:
        """What is seen of a sample."""
        image, valid, _ = self.view(sample)
        return {"image": image, "valid": valid}

    def view(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """A crop (C, H, W), where it is valid (1, H, W), and from where (2, PLACES, PLACES) rows and columns it is."""
        for _ in range(TRIES):
            rows, columns = self._place(sample.size)
            image, valid = _seen(sample, (rows, columns), self.data)
            if valid.float().mean() >= 0.5 and image.std() >= FLAT:
                break
        places = torch.stack(torch.meshgrid(_centres(rows), _centres(columns), indexing="ij"))
        return _augmented(image, valid, places, self.data.augment)

    def _place(self, size: tuple[int, int]) -> Window:
        low, high = self.data.augment.crop_scale or (1.0, 1.0)
        share = math.sqrt(torch.empty(1).uniform_(low, high).item())
        whole = self.data.side if self.data.resize == "none" else size
        shape = [max(1, round(side * share)) for side in whole]
        starts = [_start(side, extent) for side, extent in zip(size, shape, strict=True)]
        rows, columns = (slice(start, start + extent) for start, extent in zip(starts, shape, strict=True))
        return rows, columns


class Views(Crops):
    """Two crops of each image: besides the first one "other", and "places" and "other_places" of both."""

    def views(self, sample: Sample) -> dict[str, Any]:
        image, valid, places = self.view(sample)
        other, _, others = self.view(sample)
        return {"image": image, "valid": valid, "other": other, "places": places, "other_places": others}


class Windows(Dataset):
    """Windows of images as they are measured, without anything random: items as of `Crops`, some of them "shown".

    The whole image, or of one that is not resized at most WINDOWS evenly spread ones.
    """

    def __init__(self, samples: Sequence[Sample], data: Data) -> None:
        self.samples, self.data = samples, data
        self.parts = [(i, window) for i, sample in enumerate(samples) for window in self._windows(sample)]
        self.shown = set(np.linspace(0, len(self.parts) - 1, min(SHOWN, len(self.parts))).round().astype(int).tolist())

    def _windows(self, sample: Sample) -> list[Window]:
        if self.data.resize != "none":
            return [(slice(0, sample.size[0]), slice(0, sample.size[1]))]
        starts = [
            [(side - extent) // 2] if side <= extent else np.linspace(0, side - extent, side // extent).astype(int)
            for side, extent in zip(sample.size, self.data.side, strict=True)
        ]
        (height, width), places = self.data.side, [(int(top), int(left)) for top in starts[0] for left in starts[1]]
        chosen = np.linspace(0, len(places) - 1, min(WINDOWS, len(places))).round().astype(int)
        return [(slice(t, t + height), slice(x, x + width)) for t, x in (places[k] for k in chosen)]

    def __len__(self) -> int:
        return len(self.parts)

    def sample_of(self, number: int) -> int:
        """The sample that an item is a window of."""
        return self.parts[number][0]

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        number = item[1] if isinstance(item, tuple) else item
        index, window = self.parts[number]
        image, valid = _seen(self.samples[index], window, self.data)
        return {"image": image, "valid": valid, "index": index, "item": number, "shown": number in self.shown}


class Whole(Dataset):
    """Whole images, resized to a side and normalised; item i is {"image": (C, H, W), "index": i}."""

    def __init__(self, samples: Sequence[Sample], side: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        self.samples, self.side, self.statistics = samples, side, (mean, std)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = _normalised(self.samples[index].image(), *self.statistics).nan_to_num_(0.0)
        return {"image": _resized(image, self.side), "index": index}


def _start(side: int, extent: int) -> int:
    low, high = sorted((0, side - extent))
    return int(torch.randint(low, high + 1, (1,)).item())


def _centres(part: slice) -> Tensor:
    """PLACES native places inside a part of a side."""
    return part.start + (torch.arange(PLACES) + 0.5) * ((part.stop - part.start) / PLACES)


def _normalised(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    low, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (torch.from_numpy(np.ascontiguousarray(unit_range(image))) - low) / scale


def _seen(sample: Sample, window: Window, data: Any) -> tuple[Tensor, Tensor]:
    """A window, which may reach beyond the image, normalised and resized (C, H, W), and where it is valid (1, H, W)."""
    rows, columns = (
        slice(max(part.start, 0), min(part.stop, side)) for part, side in zip(window, sample.size, strict=True)
    )
    image = _normalised(sample.image((rows, columns)), data.mean, data.std)
    valid = image.isfinite().all(0, keepdim=True)
    image = torch.where(image.isfinite(), image, 0.0)
    edges = [columns.start - window[1].start, window[1].stop - columns.stop]
    edges += [rows.start - window[0].start, window[0].stop - rows.stop]
    if any(edges):
        image, valid = F.pad(image, edges), F.pad(valid, edges)
    if image.shape[1:] == data.side:
        return image, valid
    return _resized(image, data.side), F.interpolate(valid[None].float(), data.side, mode="nearest-exact")[0] > 0.5


def _resized(image: Tensor, side: tuple[int, int]) -> Tensor:
    return v2.functional.resize(image, list(side), InterpolationMode.BILINEAR, antialias=True)


def _augmented(image: Tensor, valid: Tensor, places: Tensor, augment: Augment) -> tuple[Tensor, Tensor, Tensor]:
    """Changed at random: geometry of all three, then the image's values."""
    for chance, axes in ((augment.hflip, [2]), (augment.vflip, [1])):
        if torch.rand(1).item() < chance:
            image, valid, places = (x.flip(axes) for x in (image, valid, places))
    if torch.rand(1).item() < augment.rot90:
        turns = int(torch.randint(1, 4, (1,))) if image.shape[1] == image.shape[2] else 2
        image, valid, places = (x.rot90(turns, (1, 2)) for x in (image, valid, places))
    return torch.where(valid, _values(image, augment), 0.0), valid, places


def _values(image: Tensor, augment: Augment) -> Tensor:
    """Gain exp N(0, a) and offset N(0, a) of all bands together, a third of that for each; blur, noise, dropout."""
    strength, bands = augment.jitter or 0.0, len(image)
    if strength:
        gain, offset = strength * (torch.randn(2, 1, 1, 1) + torch.randn(2, bands, 1, 1) / 3)
        image = image * gain.exp() + offset
    if torch.rand(1).item() < augment.blur:
        image = v2.functional.gaussian_blur(image, [5, 5], [torch.empty(1).uniform_(0.1, 2.0).item()])
    if augment.noise:
        image = image + augment.noise * torch.rand(1) * torch.randn_like(image)
    return BandDropout(augment.band_dropout)(image) if augment.band_dropout else image


def hidden_cells(size: tuple[int, int], cell: int, ratio: float, step: int, seeds: Sequence[int]) -> Tensor:
    """(B, 1, H, W) bool, of each seed: a share of the square cells of a grid that is shifted by multiples of `step`."""
    height, width = (math.ceil((side + cell - step) / cell) for side in size)
    count = height * width
    draws = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
    shifts = torch.from_numpy(np.stack([draw.integers(0, cell // step, 2) for draw in draws]) * step)
    order = torch.from_numpy(np.stack([draw.random(count) for draw in draws])).argsort(1)
    cells = (order.argsort(1) < max(1, min(count - 1, round(ratio * count)))).view(-1, height, width)
    rows, columns = ((torch.arange(side) + shifts[:, k, None]) // cell for k, side in enumerate(size))
    places = torch.arange(len(draws))[:, None, None]
    return cells[places, rows[:, :, None], columns[:, None, :]][:, None]
