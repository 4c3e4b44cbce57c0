"""Masks of single objects: polygons and run lengths, drawn on the pixels of a box when they are wanted.

A pixel belongs to a polygon if its centre does. Turning is that of EXIF orientations, 1 to 8.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np

from visionattn.data.boxes import pixels_of
from visionattn.data.sample import Window

__all__ = ["Drawn", "Polygons", "Runs", "Shape", "turn_boxes", "turn_points"]


class Shape(ABC):
    """What an object covers."""

    @abstractmethod
    def on(self, window: Window) -> np.ndarray:
        """Bool (h, w) of these pixels of the image."""

    @property
    @abstractmethod
    def bounds(self) -> np.ndarray | None:
        """Left, top, right and bottom in pixels; None where it covers no pixel."""

    @abstractmethod
    def turned(self, orientation: int, size: tuple[int, int]) -> "Shape":
        """The same in the image (H, W) turned upright."""


@dataclass(frozen=True, eq=False)
class Polygons(Shape):
    """The union of polygons, each (n, 2) x and y; one that crosses itself covers what is inside an odd number of times.

    A hole is a part of its polygon: the way there and back covers nothing.
    """

    parts: tuple[np.ndarray, ...]

    @classmethod
    def of_box(cls, box: np.ndarray) -> Self:
        """All of a box (4,)."""
        return cls((box[[[0, 1], [2, 1], [2, 3], [0, 3]]],))

    def on(self, window: Window) -> np.ndarray:
        return np.logical_or.reduce([_filled(part, window) for part in self.parts])

    @property
    def bounds(self) -> np.ndarray | None:
        points = np.concatenate(self.parts)
        box = np.concatenate([points.min(0), points.max(0)])
        return box if any(map(_thick, self.parts)) or self.on(pixels_of(box)).any() else None

    def turned(self, orientation: int, size: tuple[int, int]) -> Self:
        return type(self)(tuple(turn_points(part, orientation, size) for part in self.parts))


def _thick(polygon: np.ndarray) -> bool:
    """Whether it surely holds a pixel's centre: what holds none has an area of little more than half its length."""
    polygon = polygon.astype(np.float64)
    edges = np.roll(polygon, -1, axis=0) - polygon
    area = abs((polygon[:, 0] * edges[:, 1] - polygon[:, 1] * edges[:, 0]).sum()) / 2
    return bool(area > np.sqrt(np.square(edges).sum(1)).sum())


def _filled(polygon: np.ndarray, window: Window) -> np.ndarray:
    """Every edge switches, in each row whose centre line it crosses, all pixels to the right of the crossing."""
    rows, columns = window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    corners = polygon.astype(np.float64) - (columns.start + 0.5, rows.start + 0.5)
    edges = np.stack([corners, np.roll(corners, -1, axis=0)], axis=1)
    edges[edges[:, 0, 1] > edges[:, 1, 1]] = edges[edges[:, 0, 1] > edges[:, 1, 1], ::-1]  # from the upper to the lower
    first, end = np.ceil(edges[..., 1]).clip(0, height).astype(int).T
    edge = np.repeat(np.arange(len(edges)), end - first)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(end - first) - end, end - first)
    (x, y), (to_x, to_y) = edges[edge].transpose(1, 2, 0)
    crossing = x + (row - y) * (to_x - x) / (to_y - y)
    switches = np.zeros((height, width + 1), np.int64)
    np.add.at(switches, (row, np.ceil(crossing).clip(0, width).astype(int)), 1)
    return switches[:, :-1].cumsum(1) % 2 == 1


@dataclass(frozen=True, eq=False)
class Runs(Shape):
    """Run lengths down the columns of an image (H, W), off and on in turn, as COCO has them."""

    counts: np.ndarray
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: np.ndarray, window: Window, size: tuple[int, int]) -> Self:
        """Of the pixels (h, w) of a window of an image (H, W)."""
        columns, rows = np.nonzero(mask.T)
        on = (columns + window[1].start) * size[0] + rows + window[0].start
        starts = on[np.diff(on, prepend=-2) > 1]
        ends = on[np.diff(on, append=-2) != 1] + 1
        borders = np.stack([starts, ends], 1).ravel()
        counts = np.diff(borders, prepend=0, append=size[0] * size[1])
        return cls(counts[:-1] if counts[-1] == 0 else counts, size)

    @classmethod
    def from_text(cls, text: str, size: tuple[int, int]) -> Self:
        """COCO's compressed form: differences to the run before the last one, in groups of five bits from the lowest.

        Raises:
            ValueError: it is not of this form.
        """
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
        if codes.size == 0 or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
            raise ValueError("not in COCO's compressed form")
        last = codes & 32 == 0
        start = np.flatnonzero(np.concatenate([[True], last[:-1]]))
        digit = np.arange(len(codes)) - np.repeat(start, np.diff(start, append=len(codes)))
        values = np.add.reduceat((codes & 31) << 5 * digit, start)
        negative = codes[last] & 16 != 0
        values = np.where(negative, values - (1 << 5 * (digit[last] + 1)), values)
        values[2::2] = values[2::2].cumsum()
        values[1::2] = values[1::2].cumsum()
        return cls(values, size)

    @property
    def text(self) -> str:
        """COCO's compressed form."""
        values = self.counts.copy()
        values[3:] -= self.counts[1:-2]
        letters = []
        for value in values.tolist():
            more = True
            while more:
                digit, value = value & 31, value >> 5
                more = value != (-1 if digit & 16 else 0)
                letters.append(chr(48 + digit + 32 * more))
        return "".join(letters)

    def on(self, window: Window) -> np.ndarray:
        rows, columns = window
        first, last = columns.start * self.size[0], columns.stop * self.size[0]
        ends = np.cumsum(self.counts).clip(first, last)
        on = np.arange(len(ends)) % 2 == 1
        return np.repeat(on, np.diff(ends, prepend=first)).reshape(-1, self.size[0]).T[rows]

    @property
    def bounds(self) -> np.ndarray | None:
        ends = np.cumsum(self.counts)
        used = self.counts[1::2] > 0
        start, last = ends[0::2][: len(used)][used], ends[1::2][used] - 1
        if not len(start):
            return None
        height = self.size[0]
        left, right = start // height, last // height
        tops, bottoms = np.where(left == right, (start % height, last % height), ((0,), (height - 1,)))
        return np.array([left.min(), tops.min(), right.max() + 1, bottoms.max() + 1], np.float64)

    def turned(self, orientation: int, size: tuple[int, int]) -> Self:
        mask = self.on((slice(0, size[0]), slice(0, size[1])))
        swapped, flips = _turn(orientation)
        mask = mask.T if swapped else mask
        mask = mask[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        height, width = mask.shape
        return self.of(mask, (slice(0, height), slice(0, width)), (height, width))


class Drawn(Sequence[np.ndarray]):
    """Masks (h, w) of the shapes on the pixels of their boxes, drawn each time that they are asked for."""

    def __init__(self, shapes: Sequence[Shape], xyxy: np.ndarray) -> None:
        self.shapes, self.xyxy = shapes, xyxy

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> "Drawn": ...
    def __getitem__(self, place: int | slice) -> "np.ndarray | Drawn":
        if isinstance(place, slice):
            return Drawn(self.shapes[place], self.xyxy[place])
        return self.shapes[place].on(pixels_of(self.xyxy[place]))


def turn_points(points: np.ndarray, orientation: int, size: tuple[int, int]) -> np.ndarray:
    """(..., 2) x and y in an image (H, W) as it is stored -> in the image turned upright."""
    swapped, flips = _turn(orientation)
    extent = np.array(size if swapped else size[::-1])
    points = points[..., ::-1] if swapped else points
    return np.where(flips, extent - points, points)


def turn_boxes(xyxy: np.ndarray, orientation: int, size: tuple[int, int]) -> np.ndarray:
    """The same of boxes (N, 4)."""
    corners = turn_points(xyxy.reshape(-1, 2, 2), orientation, size)
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def _turn(orientation: int) -> tuple[bool, tuple[bool, bool]]:
    """Whether rows and columns are swapped, and whether x and y are then mirrored (EXIF 2.3, tag 274)."""
    return orientation >= 5, (orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8))
