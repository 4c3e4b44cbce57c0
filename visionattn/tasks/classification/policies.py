"""Augmentation policies: torchvision's by name, and timm's by the strings that papers and their code give them."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torchvision.transforms import v2

from visionattn.errors import UserError

__all__ = ["policy_of", "refuse_policy"]

OF_TORCHVISION = {
    "randaugment": v2.RandAugment,
    "autoaugment": v2.AutoAugment,
    "trivialaugment": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}
MOVED, MIXED_MOVED = 0.45, 0.3  # largest translations, in images, as timm's own training has them


def refuse_policy(policy: str, channels: int) -> None:
    """Raises UserError where a policy is not for so many channels."""
    if policy in OF_TORCHVISION:
        if channels not in (1, 3):
            raise UserError(
                f"data.augment.policy is {policy}, but changes of colour are defined for 1 or 3 channels; the images "
                f"have {channels}"
            )
        return
    if channels != 3:
        raise UserError(
            f"data.augment.policy is {policy}, timm's, which is for 3 channels; the images have {channels}: take one "
            f"of {', '.join(OF_TORCHVISION)}, or data.channels=3 for grey images"
        )


def policy_of(policy: str, side: int, mean: Sequence[float]) -> v2.Transform:
    """Of (C, H, W) uint8 images.

    Args:
        side: the shorter side of the images, in pixels.
        mean: of each channel in 0..1, which fills what is moved in.
    """
    return OF_TORCHVISION[policy]() if policy in OF_TORCHVISION else _Timm(_by_timm(policy, side, mean))


def _by_timm(policy: str, side: int, mean: Sequence[float]) -> Any:
    filled = tuple(min(255, round(255 * value)) for value in mean)
    settings: dict[str, Any] = {"translate_const": int(side * MOVED), "img_mean": filled}
    if policy.startswith("rand-"):
        return rand_augment_transform(policy, settings)
    if policy.startswith("augmix-"):
        return augment_and_mix_transform(policy, settings | {"translate_pct": MIXED_MOVED})
    return auto_augment_transform(policy, settings)


class _Timm(v2.Transform):
    """timm's transforms work on Pillow's images and draw from other generators than torch's."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.with_pillow = transform

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        if image.dtype != torch.uint8:
            raise UserError("data.augment.policy: timm's policies are for images of 8 bits; take one of torchvision's")
        with _seeded_by_torch():
            changed = self.with_pillow(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@contextmanager
def _seeded_by_torch() -> Iterator[None]:
    """Python's and numpy's generators seeded by torch's, and as they were afterwards."""
    seed = int(torch.randint(2**32, ()))
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
