"""`format: npz`: a file of arrays as MedMNIST has them."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.images import ImageArray, image_samples
from visionattn.data.labels import ClassSection
from visionattn.data.sample import SPLITS, Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath

KIND = Kind("class", endings=(".npz",))


class Section(ClassSection):
    """A MedMNIST file: {train,val,test}_images (N, H, W[, 3]) and {train,val,test}_labels (N, 1 or labels)."""

    format: Literal["npz"]
    root: FilePath = Field(description="the .npz file")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of train drawn where there is no val"
    )


def find(section: Section) -> Found:
    """The images in the order of the arrays."""
    root = section.root
    if not root.is_file():
        raise UserError(f"data.root: {root}: no such file")
    try:
        with np.load(root, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key.endswith(("_images", "_labels"))}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"data.root: {root}: not readable as .npz of plain arrays ({error})") from None
    splits = [name for name in SPLITS if {f"{name}_images", f"{name}_labels"} & arrays.keys()] or ["train", "val"]
    missing = [key for name in splits for key in (f"{name}_images", f"{name}_labels") if key not in arrays]
    if missing:
        raise UserError(f"data.root: {root}: missing {listed(missing)}; it has {listed(sorted(arrays)) or 'none'}")
    _refuse_shapes({name: arrays[f"{name}_images"].shape for name in splits}, section)
    labels = {name: _labels(arrays[f"{name}_labels"], len(arrays[f"{name}_images"]), name, section) for name in splits}
    classes = _classes(labels, section)
    samples: list[Sample] = []
    for split in splits:
        images = arrays[f"{split}_images"]
        for i, (pixels, label) in enumerate(zip(images, labels[split], strict=True)):
            name = f"{split}[{i}]"
            samples.append(ImageArray(name, name, name, section.channels, pixels.shape[:2], split, label, pixels))
    return Found(samples, classes, [])


def _refuse_shapes(shapes: dict[str, tuple[int, ...]], section: Section) -> None:
    if any(len(shape) not in (3, 4) for shape in shapes.values()) or len({s[1:] for s in shapes.values()}) > 1:
        raise UserError(
            f"data.root: {section.root}: image shapes are {shapes}, expected (N, H, W) or (N, H, W, C) alike"
        )
    _, height, width, channels = (*next(iter(shapes.values())), 1)[:4]
    if section.channels is None and height == width == channels:
        raise UserError(
            f"data.root: {section.root}: {height}x{width}x{channels} are volumes, as in MedMNIST's 3-D files; expected "
            f"pictures (N, H, W) or (N, H, W, C); data.channels={channels} takes the last axis as channels"
        )
    if section.channels is None and height <= 4 < min(width, channels):
        raise UserError(
            f"data.root: {section.root}: image shapes are {shapes}: channels come last, (N, H, W, C); move the axis of "
            f"{height}, or set data.channels={channels} if it is the height"
        )
    convertible = {1, 3} if channels in (1, 3) else {channels}
    if section.channels not in (None, channels, *convertible):
        raise UserError(f"data.channels is {section.channels}, but the images of {section.root} have {channels}")


def _labels(labels: np.ndarray, images: int, name: str, section: Section) -> np.ndarray:
    """(N,) int64 class indices, or (N, classes) float32 of 0 and 1."""
    where = f"data.root: {section.root}: {name}_labels"
    if labels.ndim not in (1, 2) or len(labels) != images:
        raise UserError(f"{where} has shape {labels.shape} for {images} images, expected (N,), (N, 1) or (N, labels)")
    if labels.dtype.kind not in "biuf" or not np.array_equal(labels, labels.astype(np.int64)) or (labels < 0).any():
        raise UserError(f"{where} has {labels.dtype} values, expected class numbers from 0, or 0 and 1 for every label")
    if labels.ndim == 2 and labels.shape[1] > 1:
        if (labels > 1).any():
            raise UserError(f"{where} has {labels.shape[1]} columns with values to {labels.max()}, expected 0 and 1")
        return labels.astype(np.float32)
    return labels.reshape(-1).astype(np.int64)


def _classes(labels: dict[str, np.ndarray], section: Section) -> list[str]:
    widths = {x.shape[1:] for x in labels.values()}
    if len(widths) > 1:
        raise UserError(f"data.root: {section.root}: label shapes differ: {sorted(widths)} beside the number of images")
    several = widths != {()}
    count = max(widths)[0] if several else max(int(x.max(initial=-1)) for x in labels.values()) + 1
    classes = section.classes or [str(k) for k in range(count)]
    if count > len(classes) or (several and count < len(classes)):
        raise UserError(f"data.classes has {len(classes)} names, but {section.root} has {count} classes")
    return classes


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_samples(paths, channels)
