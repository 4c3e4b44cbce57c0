"""What every data set is made of: samples, read when they are needed.

A sample is picklable, so that loading processes can have it, and holds no open file.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from visionattn.errors import UserError

if TYPE_CHECKING:
    from visionattn.data.boxes import Boxes

__all__ = ["IGNORE", "SPLITS", "Dataset", "Reading", "Sample", "Window", "blocks", "cases", "unit_range"]

IGNORE = 255  # the number of unlabelled pixels in every mask, whatever number the files have
SPLITS = ("train", "val", "test")
LOOKED_AT = 30  # images, where not all have been read
Window = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Sample:
    """One 2-D image with its target: an image file, a slice of a volume, a scene.

    Attributes:
        name: unique in its data set, shown to users.
        case: a row of the results: image, volume or scene. Samples of a case are in order (slices from first to last).
        group: what is never split apart: patient, scene.
        channels: that `image` gives; None: those of the file, grey 1 and colour 3, one more with transparency.
        size: (H, W) in pixels; (0, 0) where only reading tells.
        split: train, val or test where the source says so, else "".
        label: class index, or (K,) float32 of 0 and 1, of the whole image; None where a mask or nothing labels it.
        windowed: (of the class) a window is read without reading the whole image.
        in_memory: (of the class) nothing has to be read from files.
    """

    name: str
    case: str
    group: str
    channels: int | None = None
    size: tuple[int, int] = (0, 0)
    split: str = ""
    label: Any = None

    windowed: ClassVar[bool] = False
    in_memory: ClassVar[bool] = False

    def image(self, window: Window | None = None) -> np.ndarray:
        """(C, h, w) of the window, or of the whole image: uint8, or float32.

        uint8 stands for 0..1, see `unit_range`. Deeper image files are scaled to 0..1, volumes by their window and
        level to 0..1; rasters keep their values, NaN where there are no data.

        Raises:
            UserError: the file is missing, damaged, or not what its header said.
        """
        raise NotImplementedError

    def target(self, window: Window | None = None) -> Any:
        """What the image is labelled with, None without a label.

        An int64 class index, a (K,) float32 vector of 0 and 1 where an image has several labels, a mask (h, w) int64
        of class numbers, IGNORE where unlabelled, or the `Boxes` that the window shows, counted from its corner.
        """
        return self.label

    def read(self, window: Window | None = None) -> tuple[np.ndarray, Any]:
        """`image` and `target` of a window together, with nothing read twice."""
        return self.image(window), self.target(window)

    def kind(self) -> str:
        """How the pixels are stored: Pillow's mode of a file, the type of an array; "" where it does not matter."""
        return ""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a pixel as (rows, columns), of slices as (slice distance, rows, columns), in `unit`."""
        return (1.0, 1.0)

    @property
    def unit(self) -> str:
        """Of `spacing`."""
        return "pixels"

    @property
    def present(self) -> np.ndarray | None:
        """Class indices of its objects, where they are known before it is read; splits are stratified by them."""
        return None

    @property
    def files(self) -> tuple[Path, ...]:
        """That it is read from, its target too; none in memory."""
        return ()

    @property
    def ground(self) -> tuple[str, tuple[tuple[float, float], ...]] | None:
        """Of a scene the CRS and its corners (x, y) there, one after the other; None where unknown."""
        return None


@dataclass(frozen=True)
class Reading:
    """What reading one sample through has shown; see `visionattn.data.survey`.

    Attributes:
        error: why it cannot be used.
        size: (H, W).
        channels: as stored, transparency not counted.
        kind: see `Sample.kind`.
        mean, square: (C,) mean of the values and of their squares, missing ones left out.
        missing: share of the pixels without any value.
        image, pair: digests of the image, and of it with its target.
        counts: (classes + 1,) pixels of each class in a mask, or objects of each; last what has no label or is ignored;
            (0,) of an image that is labelled as a whole.
        places: (row, column) of some pixels of each class in a mask, or of the centres of some objects of each.
        boxes: the objects, without their masks.
        unread: the sample has not been looked at; only its `size` is what its header says.
    """

    error: str | None = None
    size: tuple[int, int] = (0, 0)
    channels: int = 0
    kind: str = ""
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    missing: float = 0.0
    image: bytes = b""
    pair: bytes = b""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    places: dict[int, np.ndarray] = field(default_factory=dict)
    boxes: "Boxes | None" = None
    unread: bool = False

    @property
    def sound(self) -> bool:
        """The sample has been read, and can be used."""
        return not self.error and not self.unread


@dataclass(frozen=True)
class Dataset:
    """Labelled samples in splits.

    Attributes:
        classes: their names, in order.
        splits: train, val and, where there is one, test; of data that are only evaluated, perhaps one called "all".
        readings: of each split what reading its samples through has shown; empty before that.
        skipped: why samples were left out (`data.skip_bad`).
        warnings: what makes results doubtful.
    """

    classes: list[str]
    splits: dict[str, list[Sample]]
    readings: dict[str, list[Reading]] = field(default_factory=dict)
    skipped: Sequence[str] = ()
    warnings: Sequence[str] = ()

    @property
    def samples(self) -> list[Sample]:
        """Those of all splits."""
        return [sample for split in self.splits.values() for sample in split]

    @property
    def channels(self) -> int:
        """The most that images have as stored, transparency not counted: of all that were read, else of a few."""
        if self.readings:
            return max(reading.channels for readings in self.readings.values() for reading in readings)
        stored = {1}
        for sample in self.samples[:: max(1, len(self.samples) // LOOKED_AT)]:
            if sample.channels:
                return sample.channels
            with suppress(UserError):
                stored.add(len(sample.image()))
        return max({2: 1, 4: 3}.get(channels, channels) for channels in stored)

    def with_channels(self, channels: int) -> Self:
        """The same with images of this many channels."""
        splits = {
            name: [s if s.channels == channels else replace(s, channels=channels) for s in samples]
            for name, samples in self.splits.items()
        }
        return replace(self, splits=splits)


def cases(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """The positions of each case's samples, in order."""
    members: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        members.setdefault(sample.case, []).append(i)
    return members


def blocks(size: tuple[int, int], side: int) -> Iterator[Window]:
    """Windows of at most `side` pixels that cover (H, W)."""
    for top in range(0, size[0], side):
        for left in range(0, size[1], side):
            yield slice(top, min(top + side, size[0])), slice(left, min(left + side, size[1]))


def unit_range(image: np.ndarray) -> np.ndarray:
    """The float32 values that a sample's image stands for."""
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
