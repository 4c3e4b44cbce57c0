"""What happens to an image between the file and the network, by torchvision's transforms v2.

Geometry first, then colour, then numbers; those of training images are normalised on the device, a batch at once, so
that bytes go there and not floats. `data.resize` decides the geometry:

- crop: in training a random resized crop; else the shorter side to size / crop_pct, then the centre.
- squash: both sides to the size; in training then a random resized crop of that, unless `crop_scale` is [1, 1].
- none: native pixels, a random crop in training, else the centre.

Small images are enlarged. Rotation fills with black.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, v2

from visionattn.data.loaders import seeded
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.tasks.classification.policies import policy_of, refuse_policy
from visionattn.tasks.classification.recipe import AnyData, Augment, Data

__all__ = ["Images", "Normalize", "eval_transform", "mix_transform", "train_transform"]


class Images(TorchDataset):
    """Transformed images; item (epoch, i), or i for epoch 0, is {"image": (C, H, W), "label", "index"}.

    Args:
        samples: labelled or not; then there is no "label".
        transform: of (C, H, W) uint8, or float32 in 0..1.
        seed: what is random in sample i of epoch e depends on (seed, e, i) only; None where nothing is.
        weights: (N,) chances to draw each in training, or None.
        repeats: times that each is drawn in an epoch of training.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Tensor], Tensor],
        seed: int | None = None,
        weights: Tensor | None = None,
        repeats: int = 1,
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self.weights, self.repeats = weights, repeats

    def __len__(self) -> int:
        return len(self.samples)

    def sample_of(self, number: int) -> int:
        """The sample of an item."""
        return number

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        sample = self.samples[index]
        image = torch.from_numpy(np.require(sample.image(), requirements="W"))
        with nullcontext() if self.seed is None else seeded(self.seed, epoch, index):
            entry = {"image": self.transform(image), "index": index}
        label = sample.target()
        return entry if label is None else entry | {"label": torch.as_tensor(label)}

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> Any:
        """A batch; all images are float32 in 0..1 where some are bytes and others are not."""
        if len({item["image"].dtype for item in items}) > 1:
            of_floats = (v2.functional.to_dtype(item["image"], torch.float32, scale=True) for item in items)
            items = [item | {"image": image} for item, image in zip(items, of_floats, strict=True)]
        return default_collate(items)


def train_transform(data: AnyData) -> v2.Compose:
    """(C, H, W) uint8, or float32 in 0..1 -> the same (C, height, width), with the recipe's augmentation.

    `data` has `channels`, `mean` and `std` set (see `visionattn.tasks.classification.task.resolve`).

    Raises:
        UserError: an augmentation that this number of channels cannot take; a crop range that is none.
    """
    augment = data.augment
    _refuse(augment, data.channels)
    steps = [
        *_train_geometry(data),
        v2.RandomHorizontalFlip(augment.hflip) if augment.hflip else None,
        v2.RandomVerticalFlip(augment.vflip) if augment.vflip else None,
        v2.RandomRotation(augment.rotate, InterpolationMode.BILINEAR) if augment.rotate else None,
        v2.ColorJitter(augment.jitter, augment.jitter, augment.jitter) if augment.jitter else None,
        policy_of(augment.policy, min(data.side), data.mean) if augment.policy else None,
        Erasing(augment.erasing, data.mean) if augment.erasing else None,
        Planes(),
    ]
    return v2.Compose([step for step in steps if step is not None])


def eval_transform(data: Data) -> v2.Compose:
    """(C, H, W) uint8, or float32 in 0..1 -> normalised float32 (C, height, width)."""
    size = list(data.side)
    assert data.mean is not None  # of a resolved recipe
    assert data.std is not None
    geometry = {
        "crop": lambda: [CoveringResize([side / data.crop_pct for side in size], _mode(data)), v2.CenterCrop(size)],
        "squash": lambda: [v2.Resize(size, _mode(data), antialias=True)],
        "none": lambda: [v2.CenterCrop(size)],
    }
    return v2.Compose([*geometry[data.resize](), Planes(), Normalize(data.mean, data.std)])


def mix_transform(augment: Augment, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """MixUp, CutMix, or one of both at random for each batch; None where both are off.

    It takes images (B, C, H, W) with labels (B,) int64 or (B, classes) float32 and returns labels (B, classes)
    float32: the shares of the two images in each class. Several labels an image are weighed in the same way.
    """
    mixes = [
        make(alpha=alpha, num_classes=classes)
        for make, alpha in ((v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix))
        if alpha
    ]
    return v2.RandomChoice(mixes) if mixes else None


class Normalize(nn.Module):
    """(..., C, H, W) uint8, or float32 in 0..1 -> (x - mean) / std, in one pass."""

    scale: Tensor
    scale_of_bytes: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        center, spread = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self.register_buffer("scale", (1 / spread).float(), persistent=False)
        self.register_buffer("scale_of_bytes", (1 / (255 * spread)).float(), persistent=False)
        self.register_buffer("shift", (-center / spread).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scale = self.scale_of_bytes if images.dtype == torch.uint8 else self.scale
        return images.to(torch.float32, copy=True).mul_(scale).add_(self.shift)


class Planes(v2.Transform):
    """The same in the order of (C, H, W): bytes are brought there faster than floats, when a batch is made."""

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        return image.contiguous()


class Erasing(v2.Transform):
    """Random erasing (Zhong et al. 2020), by the mean of the data: by 0, once normalised."""

    def __init__(self, probability: float, mean: Sequence[float]) -> None:
        super().__init__()
        self.of_floats = v2.RandomErasing(probability, value=list(mean))
        self.of_bytes = v2.RandomErasing(probability, value=[round(255 * min(max(value, 0), 1)) for value in mean])

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        return (self.of_bytes if image.dtype == torch.uint8 else self.of_floats)(image)


class CoveringResize(v2.Transform):
    """Resize, keeping proportions, to the smallest image that covers (height, width)."""

    def __init__(self, cover: list[float], interpolation: InterpolationMode) -> None:
        super().__init__()
        self.cover, self.interpolation = cover, interpolation

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        height, width = v2.functional.get_size(image)
        factor = max(self.cover[0] / height, self.cover[1] / width)
        size = [math.floor(height * factor + 0.5), math.floor(width * factor + 0.5)]
        return v2.functional.resize(image, size, self.interpolation, antialias=True)


def _train_geometry(data: Data) -> list[v2.Transform]:
    size, augment = list(data.side), data.augment
    if data.resize == "none":
        return [v2.RandomCrop(size)]
    crop = v2.RandomResizedCrop(size, augment.crop_scale, augment.crop_ratio, _mode(data), antialias=True)
    if data.resize == "crop":
        return [crop]
    squash = v2.Resize(size, _mode(data), antialias=True)
    return [squash] if augment.crop_scale == [1, 1] else [squash, crop]


def _mode(data: Data) -> InterpolationMode:
    return InterpolationMode(data.interpolation)


def _refuse(augment: Augment, channels: int) -> None:
    for key, value, top in (("crop_scale", augment.crop_scale, 1), ("crop_ratio", augment.crop_ratio, math.inf)):
        if not 0 < value[0] <= value[1] <= top:
            raise UserError(f"data.augment.{key} is {value}, expected [smallest, largest] within 0 to {top}")
    if augment.policy:
        refuse_policy(augment.policy, channels)
    if channels not in (1, 3) and augment.jitter:
        raise UserError(
            f"data.augment.jitter is {augment.jitter}, but changes of colour are defined for 1 or 3 channels; the "
            f"images have {channels}"
        )
