"""Image files with mask files: PNG, JPEG, TIFF of 8 or 16 bits; masks of class numbers, palettes or colours.

A palette mask is read by its numbers, not its colours, unless `data.colors` is given.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from visionattn.data.images import SUFFIXES, read_image
from visionattn.data.labels import Labels
from visionattn.data.pairs import Pair, find_pairs, group_of
from visionattn.data.sample import Item, Window
from visionattn.errors import UserError
from visionattn.recipe import ImageMaskData

__all__ = ["ImageMask", "read_mask", "scan", "unlabelled"]

TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageMask(Item):
    """An image file with its mask file, or without."""

    path: Path
    mask_path: Path | None = None
    labels: Labels | None = None

    def image(self, window: Window | None = None) -> np.ndarray:
        image = read_image(self.path, self.channels).numpy()
        rows, columns = window or (slice(None), slice(None))
        image = image[:, rows, columns]
        return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image

    def mask(self, window: Window | None = None) -> np.ndarray | None:
        if self.mask_path is None:
            return None
        rows, columns = window or (slice(None), slice(None))
        mask = read_mask(self.mask_path, colors=self.labels.colors is not None)
        return self.labels.of_mask(mask[rows, columns], self.mask_path)


def read_mask(path: Path, colors: bool) -> np.ndarray:
    """(H, W) numbers as in the file, or (H, W, 3) uint8 where it has, or `colors` asks for, colours.

    Raises:
        UserError: missing, damaged, or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("RGB", "RGBA") or (colors and image.mode == "P"):
                return np.array(image.convert("RGB"))
            if image.mode in ("LA", "PA"):
                return np.array(image)[..., 0]
            return np.array(image).astype(np.uint8) if image.mode == "1" else np.array(image)
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UserError(f"{path}: not a readable mask ({str(error) or type(error).__name__})") from None


def scan(data: ImageMaskData) -> tuple[list[Item], list[str]]:
    """Items of a data section, and problems: no partner, unreadable, sizes that differ. Pixels are not decoded.

    Raises:
        UserError: a folder is missing, or a name without a group.
    """
    pairs, problems = find_pairs(data, SUFFIXES)
    labels = Labels.of(data)
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(_header, pairs))
    problems += [header for header in headers if isinstance(header, str)]
    read = [(pair, *header) for pair, header in zip(pairs, headers, strict=True) if not isinstance(header, str)]
    natural = max((channels for *_, channels in read), default=1)
    items = [
        ImageMask(
            name=pair.name,
            case=pair.name,
            group=group_of(data, pair.name),
            size=size,
            channels=data.channels or natural,
            path=pair.image,
            mask_path=pair.mask,
            labels=labels,
        )
        for pair, size, _ in read
    ]
    return items, problems


def unlabelled(paths: Mapping[str, Path], channels: int) -> tuple[list[Item], list[str]]:
    """Items of image files by name, turned into this many channels, and a line for each that is unreadable."""
    items, problems = [], []
    for name, path in paths.items():
        try:
            size, _ = _look(path)
        except UserError as error:
            problems.append(str(error))
            continue
        items.append(ImageMask(name=name, case=name, group=name, size=size, channels=channels, path=path))
    return items, problems


def _header(pair: Pair) -> tuple[tuple[int, int], int] | str:
    """(H, W) and channels of an image, 1 for grey and 3 for colour, or what is wrong with the pair."""
    try:
        (size, bands), (mask_size, _) = _look(pair.image), _look(pair.mask)
    except UserError as error:
        return str(error)
    if size != mask_size:
        return f"{pair.image} is {size[0]}x{size[1]}, but {pair.mask} is {mask_size[0]}x{mask_size[1]}"
    return size, 1 if bands <= 2 else 3


def _look(path: Path) -> tuple[tuple[int, int], int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(EXIF_ORIENTATION) in TRANSPOSED:
                width, height = height, width
            return (height, width), 3 if image.mode == "P" else len(image.getbands())
    except Exception as error:
        hint = "; many bands or 16-bit colour: data.format=geotiff" if path.suffix.lower() in (".tif", ".tiff") else ""
        raise UserError(f"{path}: not a readable image ({str(error) or type(error).__name__}){hint}") from None
