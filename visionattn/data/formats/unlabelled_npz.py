"""`format: npz` without labels: images in one file of arrays."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from visionattn.data.formats import Found, Kind, image_mask
from visionattn.data.images import ImageArray
from visionattn.data.sample import SPLITS, Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath
from visionattn.recipe.sections import Section as BaseSection

KIND = Kind("", endings=(".npz", ".npy"))


class Section(BaseSection):
    """Arrays (N, H, W) or (N, H, W, C): an .npz with `images`, or {train,val,test}_images as MedMNIST; or an .npy."""

    format: Literal["npz"]
    root: FilePath = Field(description="the .npz or .npy file")


def find(section: Section) -> Found:
    """The images in the order of the arrays."""
    samples: list[Sample] = []
    shapes = set()
    for split, images in _arrays(section.root).items():
        if images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(f"data.root: {section.root}: images are {images.shape}, expected (N, H, W) or (N, H, W, C)")
        shapes.add(images.shape[1:])
        channels = 1 if images.ndim == 3 else images.shape[3]
        for i, pixels in enumerate(images):
            name = f"{split or 'images'}[{i}]"
            samples.append(ImageArray(name, name, name, channels, pixels.shape[:2], split, pixels=pixels))
    if len(shapes) > 1:
        raise UserError(f"data.root: {section.root}: image shapes differ: {listed(sorted(shapes))}")
    return Found(samples, [], [])


def _arrays(root: Path) -> dict[str, np.ndarray]:
    """By split; "" where none is said."""
    if not root.is_file():
        raise UserError(f"data.root: {root}: no such file")
    try:
        file = np.load(root, allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {"": file}
        with file:
            named = {split: f"{split}_images" for split in SPLITS} | {"": "images"}
            found = {split: file[key] for split, key in named.items() if key in file.files}
            there = list(file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"data.root: {root}: not readable as plain arrays ({error})") from None
    if not found:
        raise UserError(
            f"data.root: {root}: expected images or train_images in it; it has {listed(sorted(there)) or 'none'}"
        )
    return found


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
