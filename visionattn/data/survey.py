"""Reading through all images of a split once: what is unreadable, sizes, kinds, content hashes, pixel statistics."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from visionattn.data.images import LUMINANCE, array_to_image, decode, match_channels, unit_range
from visionattn.errors import UserError

__all__ = ["Scan", "mean_std", "scan"]

SECONDS_BEFORE_PROGRESS = 2.0


@dataclass(frozen=True)
class Scan:
    """What is known of N images; entry i is about image i, and zero or empty where that one is unreadable.

    Attributes:
        unreadable: reasons by index.
        sizes: (N, 2) height and width.
        channels: (N,) 1 for grey, 3 for colour, transparency not counted.
        kinds: (N,) Pillow's mode of a file, the type of an array.
        hashes: (N,) of the decoded pixels: equal for equal images, whatever the files are called.
        mean, square: (N, C) mean of the values and of their squares in each image, of values in 0..1.
    """

    sizes: np.ndarray
    channels: np.ndarray
    kinds: list[str]
    hashes: list[bytes]
    mean: np.ndarray
    square: np.ndarray
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kinds)


def scan(images: Sequence[Path] | np.ndarray, channels: int | None = None) -> Scan:
    """Decode each image once; memory is that of a few images, whatever their number.

    Args:
        images: files, or an array (N, H, W) or (N, H, W, C).
        channels: what the images will be turned into; unset: as they are, grey repeated among colour.
    """
    return _scan_array(images, channels) if isinstance(images, np.ndarray) else _scan_files(images, channels)


def _scan_files(paths: Sequence[Path], channels: int | None) -> Scan:
    count, width = len(paths), channels or 3
    found = Scan(
        sizes=np.zeros((count, 2), dtype=np.int64),
        channels=np.zeros(count, dtype=np.int64),
        kinds=[""] * count,
        hashes=[b""] * count,
        mean=np.zeros((count, width)),
        square=np.zeros((count, width)),
    )

    def look(i: int) -> None:
        try:
            array, kind = decode(paths[i])
            image = array_to_image(array, paths[i])
            natural = {2: 1, 4: 3}.get(image.shape[0], image.shape[0])
            values = _in_unit_range(match_channels(image, channels or natural, paths[i]).numpy())
        except UserError as error:
            found.unreadable[i] = str(error)
            return
        found.sizes[i], found.channels[i], found.kinds[i] = array.shape[:2], natural, kind
        found.hashes[i] = _digest(array)
        found.mean[i] = values.mean((1, 2), dtype=np.float64)
        found.square[i] = np.square(values).mean((1, 2), dtype=np.float64)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        done = pool.map(look, range(count))
        for _ in tqdm(done, "reading images", count, leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None):
            pass
    return found


def _scan_array(images: np.ndarray, channels: int | None) -> Scan:
    count, height, width = images.shape[:3]
    natural = images.shape[3] if images.ndim == 4 else 1
    moments = np.zeros((2, count, channels or natural))
    block = max(1, 2**22 // max(1, height * width * natural))
    for start in range(0, count, block):
        values = unit_range(images[start : start + block].reshape(-1, height * width, natural), "images")
        if (natural, channels) == (3, 1):
            values = _luminance(values)
        values = _in_unit_range(values)
        moments[0, start : start + block] = values.mean(1, dtype=np.float64)
        moments[1, start : start + block] = np.square(values).mean(1, dtype=np.float64)
    return Scan(
        sizes=np.full((count, 2), (height, width)),
        channels=np.full(count, natural),
        kinds=[str(images.dtype)] * count,
        hashes=[_digest(image) for image in images],
        mean=moments[0],
        square=moments[1],
    )


def _luminance(values: np.ndarray) -> np.ndarray:
    grey = values @ np.array(LUMINANCE, dtype=np.float32)[:, None]
    return grey.round().astype(np.uint8) if values.dtype == np.uint8 else grey


def _in_unit_range(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) / 255 if values.dtype == np.uint8 else values


def _digest(array: np.ndarray) -> bytes:
    digest = hashlib.blake2b(f"{array.shape}{array.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array))
    return digest.digest()


def mean_std(found: Scan, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, every readable image counting equally whatever its size.

    A channel without any variation has the standard deviation 1, so that it can be divided by.
    """
    readable = found.channels > 0
    mean, square = found.mean[readable, :channels].mean(0), found.square[readable, :channels].mean(0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.round(6).tolist(), np.where(std < 1e-6, 1.0, std).round(6).tolist()
