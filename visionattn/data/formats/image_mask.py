"""`format: image_mask`: image files with mask files, of class numbers, palettes or colours.

A palette mask is read by its numbers, not its colours, unless `data.colors` is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.images import SUFFIXES, ImageFile, headers, named_files
from visionattn.data.labels import ColouredMaskSection, Labels
from visionattn.data.pairs import PairSection, find_pairs
from visionattn.data.remarks import names_its_file
from visionattn.data.sample import Sample, Window
from visionattn.data.unpacked import read_part
from visionattn.errors import UserError
from visionattn.recipe.sections import Positive

KIND = Kind("mask", endings=("",))


class Section(PairSection, ColouredMaskSection):
    """Image files with mask files: class numbers, palettes or colours."""

    format: Literal["image_mask"]
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")


@dataclass(frozen=True)
class ImageMask(ImageFile):
    """An image file with its mask file, or without."""

    mask_path: Path | None = None
    labels: Labels | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,) if self.mask_path is None else (self.path, self.mask_path)

    def target(self, window: Window | None = None) -> np.ndarray | None:
        if self.mask_path is None or self.labels is None:
            return None
        mask = read_part(self.mask_path, window, self.size, read_mask, self.labels.colors is not None)
        return self.labels.of_mask(mask, self.mask_path)


@names_its_file
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


def find(section: Section) -> Found:
    """The pairs by name; problems are missing partners, unreadable headers and sizes that differ.

    Raises:
        UserError: a folder is missing, or a name without a group.
    """
    pairs, problems = find_pairs(section, SUFFIXES)
    labels = Labels.of(section)
    known, wrong = headers(path for pair in pairs for path in (pair.image, pair.mask))
    readable = []
    for pair in pairs:
        if error := wrong.get(pair.image) or wrong.get(pair.mask):
            problems.append(error)
        elif (size := known[pair.image].size) != (other := known[pair.mask].size):
            problems.append("{} is {}x{}, but {} is {}x{}".format(pair.image, *size, pair.mask, *other))
        else:
            readable.append((pair, size))
    channels = section.channels or max((known[pair.image].channels for pair, _ in readable), default=1)
    samples: list[Sample] = [
        ImageMask(
            name=pair.name,
            case=pair.name,
            group=pair.group,
            channels=channels,
            size=size,
            split=pair.split,
            path=pair.image,
            mask_path=pair.mask,
            labels=labels,
        )
        for pair, size in readable
    ]
    return Found(samples, section.class_names, problems)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return mask_samples(paths, channels)


def mask_samples(paths: Sequence[Path], channels: int) -> tuple[list[Sample], list[str]]:
    """Image files without masks, called by their path below the given folder without its ending."""
    files = named_files(paths)
    known, wrong = headers(files.values())
    samples: list[Sample] = []
    for name, path in files.items():
        if path in known:
            samples.append(ImageMask(name, name, name, channels, known[path].size, path=path))
    return samples, list(wrong.values())
