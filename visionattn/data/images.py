"""Images in files and arrays: finding them, and decoding any of them into a tensor or saying why not.

Eight-bit images stay uint8. Deeper ones become float32 in 0..1 by a rule that is the same for every image of a set, so
that brightness stays comparable: 16-bit integers are divided by 65535; other integers have to lie in 0..65535 and are
divided by 65535; floats have to lie in 0..1. What lies outside is refused, never clipped.
Of files with several frames the first is read. Of 16-bit colour files Pillow gives the upper 8 bits only.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from visionattn.errors import UserError

__all__ = ["array_to_image", "decode", "image_files", "listed", "match_channels", "read_image", "unit_range", "walk"]

SUFFIXES = {".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def read_image(path: str | Path, channels: int | None = None) -> Tensor:
    """Decode an image file, turned upright as its EXIF orientation says.

    Args:
        channels: unset: as in the file (1 grey, 3 colour, one more with transparency); see `match_channels`.

    Returns:
        (channels, H, W), uint8 for 8-bit files, else float32 in 0..1 (see the module).

    Raises:
        UserError: missing, not an image, damaged, pixel values outside the rules, or channels that do not match.
    """
    return match_channels(array_to_image(decode(path)[0], path), channels, path)


def decode(path: str | Path) -> tuple[np.ndarray, str]:
    """Pixels (H, W) or (H, W, C) of an image file in its own depth, and its kind: Pillow's mode, or such as RGB;16.

    Palettes and CMYK become RGB, one-bit images 0 and 255; transparency is kept as a last channel.
    Raises UserError with the file and the reason.
    """
    try:
        with Image.open(path) as image:
            kind = _kind(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_without_palette(image)), kind
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or of a kind that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large to decode safely; cut it into tiles ({error})") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{path}: damaged image ({str(error) or type(error).__name__})") from None


def _kind(image: Image.Image) -> str:
    """The mode; that of 16-bit colour, which Pillow reduces, is marked."""
    stored = image.tile[0][3] if image.tile else ""
    stored = stored if isinstance(stored, str) else str(stored[0])
    return f"{image.mode};16" if ";16" in stored and not image.mode.startswith("I") else image.mode


def _without_palette(image: Image.Image) -> Image.Image:
    """One of the modes L, LA, RGB, RGBA, or a deep grey one as it is."""
    if image.mode.startswith(("I", "F")):
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB")


def unit_range(array: np.ndarray, name: str | Path) -> np.ndarray:
    """Pixel values as uint8, or as float32 in 0..1 by the rules of this module; `name` is for the message."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise UserError(f"{name}: pixels are {array.dtype}, expected integers or floats")
    top = 1 if array.dtype.kind == "f" else 65535
    if array.dtype != np.uint16 and array.size and not (array.min() >= 0 and array.max() <= top):
        raise UserError(
            f"{name}: {array.dtype} pixels from {array.min()} to {array.max()}, expected 0 to {top}; "
            "rescale all images of the set alike"
        )
    return (array / np.float32(top)).astype(np.float32)


def array_to_image(array: np.ndarray, name: str | Path = "image") -> Tensor:
    """(H, W) or (H, W, C) -> (C, H, W), uint8 or float32 in 0..1; `name` is for messages."""
    array = unit_range(array, name)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return torch.from_numpy(np.ascontiguousarray(array))


def match_channels(image: Tensor, channels: int | None, name: str | Path) -> Tensor:
    """(C, H, W) -> (channels, H, W): transparency is laid over white, grey repeated, colour weighed to luminance.

    To 4 channels grey is repeated and transparency kept. Raises UserError for any other mismatch.
    """
    found = image.shape[0]
    if channels is None or found == channels:
        return image
    if found in (2, 4) and channels in (1, 3):
        image, found = _over_white(image), found - 1
    if found == channels:
        return image
    if (found, channels) == (1, 3):
        return image.expand(3, -1, -1).contiguous()
    if (found, channels) == (2, 4):
        return image[[0, 0, 0, 1]]
    if (found, channels) == (3, 1):
        grey = (image * torch.tensor(LUMINANCE)[:, None, None]).sum(0, keepdim=True)
        return grey if image.is_floating_point() else grey.round().to(image.dtype)
    raise UserError(
        f"{name}: {found} channels, expected {channels} (data.channels); "
        "only 1 and 3 channels, with or without transparency, are turned into each other"
    )


def _over_white(image: Tensor) -> Tensor:
    white = 1.0 if image.is_floating_point() else 255.0
    colour, alpha = image[:-1].float(), image[-1:].float() / white
    mixed = colour * alpha + white * (1 - alpha)
    return mixed if image.is_floating_point() else mixed.round().to(image.dtype)


def image_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Image files among the given files and, recursively and sorted, below the given folders.

    All given paths are looked at before the first file comes; folders are then walked as the files are asked for.

    Raises:
        UserError: a given path that is missing, a given file that is no image, a given folder without any.
    """
    paths = [Path(p) for p in paths]
    wrong = [complaint for path in paths if (complaint := _complaint(path))]
    if wrong:
        raise UserError(listed(wrong, "\n"))
    return (file for path in paths for file in (walk(path) if path.is_dir() else [path]))


def _complaint(path: Path) -> str | None:
    if path.is_dir():
        return None if any(True for _ in walk(path)) else f"{path}: no images in this folder"
    try:
        with Image.open(path):
            return None
    except FileNotFoundError:
        return f"{path}: no such file or folder"
    except Exception:
        return f"{path}: not an image, or of a kind that Pillow cannot read"


def walk(folder: str | Path) -> Iterator[Path]:
    """Image files below a folder, told by their suffix, in a fixed order; hidden ones are left out."""
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(here, name)


def listed(items: Sequence, separator: str = ", ", most: int = 20) -> str:
    """The items for a message: the first ones, and how many more."""
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*map(str, items[:most]), *rest])
