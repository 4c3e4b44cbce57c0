"""`format: instances`: images with a mask for each object: label images, or a folder of masks for each image.

A label image has a number for each object, 0 where there is none. NAME.csv beside it may say the class of each number;
without such tables all objects are of one class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
from pydantic import Field

from visionattn.data.boxes import Boxes, BoxSection, pixels_of
from visionattn.data.formats import Found, Kind, image_mask
from visionattn.data.formats._boxes import class_names
from visionattn.data.formats._tables import read_rows
from visionattn.data.formats.image_mask import read_mask
from visionattn.data.images import SUFFIXES, ImageFile, headers
from visionattn.data.pairs import PairSection, files_by_name, folders
from visionattn.data.sample import Sample, Window
from visionattn.data.splits import split_named
from visionattn.data.unpacked import last_made
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import Positive

KIND = Kind("boxes", writer="boxes_csv", endings=("",))
MASKS = {".png", ".tif", ".tiff", ".bmp", ".gif"}
ONE = "object"  # the class where nothing names one


class Section(PairSection, BoxSection):
    """Image files with label images of the same name, or with folders of that name that hold a mask for each object.

    Where a folder has one image only, the folder of masks beside it may be that of the image.
    """

    format: Literal["instances"]
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")


@dataclass(frozen=True, eq=False)
class InstanceImage(ImageFile):
    """An image file with its instances.

    Attributes:
        numbered: its label image; None where each object has a file.
        masks: the files of the objects.
        classes: of the numbers of the label image, -1 where the object is ignored; None: all are of the first class.
    """

    numbered: Path | None = None
    masks: tuple[Path, ...] = ()
    classes: dict[int, int] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        if self.numbered is None:
            return self.path, *self.masks
        table = [] if self.classes is None else [self.numbered.with_suffix(".csv")]
        return self.path, self.numbered, *table

    def target(self, window: Window | None = None) -> Boxes:
        boxes = last_made(self.files, self._boxes, "instances")
        return boxes if window is None else boxes.within(window)

    def _boxes(self) -> Boxes:
        return self._of_numbers(self.numbered) if self.numbered else self._of_files()

    def _of_numbers(self, path: Path) -> Boxes:
        image = _numbers(path, self.size)
        numbers, xyxy = _boxes_of(image)
        if len(numbers) == {1: 255, 2: 65535}.get(image.dtype.itemsize):
            raise UserError(
                f"{path}: every number that {8 * image.dtype.itemsize} bits hold is used, so that further objects have "
                "had to share them; save label images with more bits"
            )
        if self.classes is not None and (unknown := sorted(set(numbers.tolist()) - set(self.classes))):
            raise UserError(f"{path}: {path.with_suffix('.csv').name} has no class for the numbers {listed(unknown)}")
        labels = np.array([0 if self.classes is None else self.classes[k] for k in numbers.tolist()], np.int64)
        masks = [image[pixels_of(box)] == number for number, box in zip(numbers, xyxy, strict=True)]
        return Boxes(xyxy, labels, labels < 0, masks=masks)

    def _of_files(self) -> Boxes:
        boxes, masks = [np.zeros((0, 4), np.float32)], []
        for path in self.masks:
            mask = _numbers(path, self.size) > 0
            if not mask.any():
                raise UserError(f"{path}: a mask without pixels")
            boxes.append(_boxes_of(mask)[1])
            masks.append(mask[pixels_of(boxes[-1][0])].copy())
        return Boxes(np.concatenate(boxes), np.zeros(len(masks), np.int64), np.zeros(len(masks), bool), masks=masks)


def _numbers(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) of a file, whole numbers from 0 on."""
    image = read_mask(path, colors=False)
    if image.ndim != 2 or image.dtype.kind not in "biu" or image.min(initial=0) < 0:
        raise UserError(f"{path}: expected whole numbers from 0 on, a single channel without colours")
    if image.shape != size:
        raise UserError("{} is {}x{}, but its image {}x{}".format(path, *image.shape, *size))
    return image


def _boxes_of(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of an image (H, W) besides 0, and the box (N, 4) of each: by runs along rows, which are few."""
    width = image.shape[1] + 1
    pixels = np.pad(image, ((0, 0), (0, 1))).ravel()
    starts = np.flatnonzero(np.diff(pixels, prepend=0))
    ends = np.append(starts[1:], len(pixels))
    starts, ends = starts[pixels[starts] != 0], ends[pixels[starts] != 0]
    order = np.argsort(pixels[starts], kind="stable")
    starts, ends = starts[order], ends[order]
    numbers, first = np.unique(pixels[starts], return_index=True)
    if not len(numbers):
        return numbers, np.zeros((0, 4), np.float32)
    rows, left = np.divmod(starts, width)
    low = [np.minimum.reduceat(side, first) for side in (left, rows)]
    high = [np.maximum.reduceat(side, first) for side in (ends - rows * width, rows + 1)]
    return numbers, np.stack([*low, *high], axis=1).astype(np.float32)


def find(section: Section) -> Found:
    """The images by name; of masks only headers are read.

    Raises:
        UserError: a folder is missing, classes that are not known, or several classes without tables.
    """
    problems: list[str] = []
    images = _checked(list(_images(section, problems)), problems)
    tables = {image.name: _table(image.numbered) for image in images if image.numbered}
    names = {name: image for image, table in tables.items() if table for name in table.values()}
    untold = [image for image in images if tables.get(image.name) is None]
    if names:
        problems += [f"{image.numbered or image.path}: no .csv beside its masks, as others have" for image in untold]
        images = [image for image in images if image not in untold]
    elif untold and len(section.classes or [ONE]) > 1:
        where = (untold[0].numbered or untold[0].path).with_suffix(".csv")
        raise UserError(
            f"data.classes are {listed(section.classes or [])}, but nothing says of which class an object is, as in "
            f"{where}; expected columns number and class"
        )
    classes = class_names(names, section) if names else section.classes or [ONE]
    number = {name: k for k, name in enumerate(classes)} | dict.fromkeys(section.ignored, -1)
    channels = section.channels or max((image.channels or 1 for image in images), default=1)
    samples: list[Sample] = []
    for image in images:
        table = tables.get(image.name)
        of_numbers = None if table is None else {k: number[name] for k, name in table.items()}
        samples.append(replace(image, channels=channels, classes=of_numbers))
    return Found(samples, classes, problems)


def _images(section: Section, problems: list[str]) -> Iterator[InstanceImage]:
    """Images with the files of their masks, which are not opened."""
    places, walked = folders(section)
    others = section.mask_suffix if section.images == section.masks else ""
    for beside, images, masks in places:
        named = files_by_name(images, SUFFIXES, section.image_suffix, others, walked)
        numbered = files_by_name(masks, MASKS, section.mask_suffix, "", walked)
        only = len(named) == 1 and not numbered.keys() & named.keys()
        used: set[Path] = set()
        for key, paths in sorted(named.items()):
            folder = masks / key if (masks / key).is_dir() else masks if only else None
            name = (beside.relative_to(section.root) / key).as_posix()
            files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in MASKS] if folder else []
            of_image = [] if folder else numbered.get(key, [])
            used.update(files, of_image)
            if len(paths) > 1 or len(of_image) > 1:
                problems.append(f"of one name are {listed([*paths, *of_image])}; expected an image and a label image")
            elif folder is None and not of_image:
                problems.append(f"{paths[0]}: no label image {masks / key}{section.mask_suffix}.*, no folder of masks")
            else:
                split, group = split_named(name.split("/")[:-1]), section.group_of(name)
                label_image = of_image[0] if of_image else None
                yield InstanceImage(
                    name, name, group, split=split, path=paths[0], numbered=label_image, masks=tuple(files)
                )
        unused = [path for paths in numbered.values() for path in paths if path not in used]
        problems += [f"{path}: there is no image for it in {images}" for path in unused]


def _checked(images: Sequence[InstanceImage], problems: list[str]) -> list[InstanceImage]:
    """With their sizes and channels."""
    labels = [(image.numbered,) if image.numbered else image.masks[:1] for image in images]
    known, wrong = headers([*(image.path for image in images), *chain.from_iterable(labels)])
    right = []
    for image, of_it in zip(images, labels, strict=True):
        if errors := [wrong[path] for path in (image.path, *of_it) if path in wrong]:
            problems.append(errors[0])
            continue
        mine = known[image.path]
        if differ := [path for path in of_it if known[path].size != mine.size]:
            size = known[differ[0]].size
            problems.append("{} is {}x{}, but {} is {}x{}".format(image.path, *mine.size, differ[0], *size))
        else:
            right.append(replace(image, size=mine.size, channels=mine.channels))
    return right


def _table(numbered: Path) -> dict[int, str] | None:
    """Class of each number, where there is a table beside the label image."""
    path = numbered.with_suffix(".csv")
    if not path.is_file():
        return None
    rows = read_rows(path, [("root", "number"), ("root", "class")], least=0)
    try:
        return {int(row["number"]): normalize("NFC", row["class"]) for _, row in rows}
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected whole numbers") from None


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
