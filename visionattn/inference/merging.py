"""Objects of overlapping tiles as those of the scene, row of tiles by row, so that memory does not grow with it.

A box is cut where it ends at a border of its tile that is not one of the scene. Whole boxes go through non-maximum
suppression by IoU. A cut box stays only if no whole box covers half of it; cut boxes that show the same where both
tiles see are joined, so that objects larger than the overlap, or than a tile, come out whole.
What is decided depends on scores and places alone, never on the order of tiles in a row or of boxes in a tile.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.data.sample import Window

__all__ = ["merge", "rows_of_tiles"]

EDGE = 2.0  # pixels from the border of a tile, or
EDGE_SHARE = 0.05  # of the box's side: how near to it a cut box ends
COVERED = 0.5  # of a cut box by a whole one
SAME = 0.5  # IoU of what two cut boxes show of the ground that both tiles see


def rows_of_tiles(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> list[list[Window]]:
    """Tiles (h, w) that cover a scene (H, W), the last ones moved inwards; smaller where the scene is.

    Args:
        overlap: least share of a tile that the next one covers again, from 0 to below 1.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected 0 to below 1")
    down, across = (_along(length, min(side, length), overlap) for length, side in zip(size, tile, strict=True))
    return [[(rows, columns) for columns in across] for rows in down]


def _along(length: int, side: int, overlap: float) -> list[slice]:
    step = max(1, side - int(np.ceil(side * overlap)))
    return [slice(start, start + side) for start in (*range(0, length - side, step), length - side)]


def merge(
    rows: Iterable[Sequence[tuple[Window, Boxes]]], size: tuple[int, int], iou: float = 0.5, agnostic: bool = False
) -> Iterator[Boxes]:
    """The objects of a scene, in its pixels, as soon as no further tile can show anything of them.

    Args:
        rows: from top to bottom, of each row of tiles their windows and what is predicted there, with scores, counted
            from the corner of the tile.
        size: (H, W) of the scene.
        iou: from which two whole boxes are one object.
        agnostic: boxes of different classes are one object too, of the class with the higher score.
    """
    waiting = _Parts.of((), size)
    for row in rows:
        top = min((window[0].start for window, _ in row), default=0)
        done = _finished(waiting, top, iou, agnostic)
        if done.any():
            yield _merged(waiting[done], iou, agnostic)
        waiting = _Parts.joined([waiting[~done], _Parts.of(row, size)])
    if len(waiting):
        yield _merged(waiting, iou, agnostic)


@dataclass(frozen=True, eq=False)
class _Parts:
    """What tiles show, in pixels of the scene.

    Attributes:
        boxes: N.
        tiles: (N, 4) left, top, right and bottom of the tile that each is from.
        cut: (N,) bool.
    """

    boxes: Boxes
    tiles: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, row: Iterable[tuple[Window, Boxes]], size: tuple[int, int]) -> Self:
        placed, tiles = [], []
        for (rows, columns), boxes in row:
            placed.append(boxes.of_window((rows, columns)))
            tiles.append(np.tile([columns.start, rows.start, columns.stop, rows.stop], (len(boxes), 1)))
        boxes = Boxes.joined(placed)
        borders = np.concatenate([np.zeros((0, 4), np.int64), *tiles])
        sides = np.tile(boxes.xyxy[:, 2:] - boxes.xyxy[:, :2], 2)
        near = np.abs(boxes.xyxy - borders) <= np.maximum(EDGE, EDGE_SHARE * sides)
        inner = (borders > 0) & (borders < [*size[::-1], *size[::-1]])
        return cls(boxes, borders, (near & inner).any(1))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        boxes = Boxes.joined([part.boxes for part in parts])
        return cls(boxes, np.concatenate([p.tiles for p in parts]), np.concatenate([p.cut for p in parts]))

    def __getitem__(self, chosen: np.ndarray) -> Self:
        return type(self)(self.boxes[chosen], self.tiles[chosen], self.cut[chosen])

    def __len__(self) -> int:
        return len(self.boxes)


def _finished(parts: _Parts, top: int, iou: float, agnostic: bool) -> np.ndarray:
    """(N,) bool: what is connected with it, directly or not, ends above this row."""
    group = _groups(len(parts), _related(parts, iou, agnostic))
    lowest = np.full(len(parts), -np.inf)
    np.maximum.at(lowest, group, parts.boxes.xyxy[:, 3])
    return lowest[group] <= top


def _merged(parts: _Parts, iou: float, agnostic: bool) -> Boxes:
    """The objects that parts are of."""
    pairs, cut, boxes = _related(parts, iou, agnostic), parts.cut, parts.boxes
    scores = np.zeros(len(parts)) if boxes.scores is None else boxes.scores
    rank = np.argsort(np.lexsort([*parts.tiles.T, boxes.labels, *boxes.xyxy.T, -scores]))
    kept = ~cut
    for better, worse in _by_rank(pairs[~cut[pairs].any(1)], rank):
        if kept[better]:
            kept[worse] = False
    mixed = pairs[cut[pairs].sum(1) == 1]
    whole, part = np.take_along_axis(mixed, cut[mixed].argsort(1), axis=1).T
    stays = cut.copy()
    stays[part[kept[whole]]] = False
    group = _groups(len(parts), pairs[stays[pairs].all(1)])
    kept |= stays
    return _united(boxes[kept], group[kept], rank[kept])


def _by_rank(pairs: np.ndarray, rank: np.ndarray) -> list[list[int]]:
    """The better of each pair first, and pairs by it."""
    pairs = np.take_along_axis(pairs, rank[pairs].argsort(1), axis=1)
    return pairs[np.lexsort(rank[pairs].T[::-1])].tolist()


def _united(boxes: Boxes, group: np.ndarray, rank: np.ndarray) -> Boxes:
    """One box for each group: around all, of the class and with the score of the best, with all of their masks."""
    order = np.lexsort([rank, group])
    boxes = boxes[order]
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    low = np.minimum.reduceat(boxes.xyxy[:, :2], first)
    high = np.maximum.reduceat(boxes.xyxy[:, 2:], first)
    united = replace(replace(boxes, masks=None)[first], xyxy=np.concatenate([low, high], axis=1))
    if boxes.masks is not None:
        members = np.split(np.arange(len(boxes)), first[1:])
        united = replace(united, masks=[_union(boxes[of], box) for of, box in zip(members, united.xyxy, strict=True)])
    return united[np.lexsort(united.xyxy.T)]


def _union(boxes: Boxes, around: np.ndarray) -> np.ndarray:
    """All masks as one of this box."""
    assert boxes.masks is not None
    if len(boxes) == 1:
        return boxes.masks[0]
    rows, columns = pixels_of(around)
    union = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
    for box, mask in zip(boxes.xyxy, boxes.masks, strict=True):
        top, left = (side.start - whole.start for side, whole in zip(pixels_of(box), (rows, columns), strict=True))
        union[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask
    return union


def _related(parts: _Parts, iou: float, agnostic: bool) -> np.ndarray:
    """(P, 2) positions of parts that may be of one object."""
    xyxy = parts.boxes.xyxy.astype(np.float64)
    pairs = _overlapping(xyxy)
    if not agnostic:
        pairs = pairs[parts.boxes.labels[pairs[:, 0]] == parts.boxes.labels[pairs[:, 1]]]
    a, b = xyxy[pairs].transpose(1, 0, 2)
    shared, cut = _area(_common(a, b)), parts.cut[pairs]
    tiles = parts.tiles[pairs]
    both = _common(tiles[:, 0], tiles[:, 1])
    seen_a, seen_b = _common(a, both), _common(b, both)
    of_cut = np.where(cut[:, 0], _area(a), _area(b))
    whole_ones = shared >= iou * (_area(a) + _area(b) - shared)
    covered = shared >= COVERED * of_cut
    same = _area(_common(seen_a, seen_b))
    joined = (same > 0) & (same >= SAME * (_area(seen_a) + _area(seen_b) - same)) & (tiles[:, 0] != tiles[:, 1]).any(1)
    return pairs[np.choose(cut.sum(1), [whole_ones, covered, joined])]


def _overlapping(xyxy: np.ndarray) -> np.ndarray:
    """(P, 2) positions of boxes that share some area."""
    order = np.argsort(xyxy[:, 0], kind="stable")
    ends = np.searchsorted(xyxy[order, 0], xyxy[order, 2], side="left")
    following = np.maximum(ends - np.arange(len(order)) - 1, 0)
    first = np.repeat(np.arange(len(order)), following)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(following) - following, following)
    pairs = np.stack([order[first], order[second]], axis=1)
    return pairs[_area(_common(*xyxy[pairs].transpose(1, 0, 2))) > 0]


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], axis=1)


def _area(xyxy: np.ndarray) -> np.ndarray:
    return (xyxy[:, 2:] - xyxy[:, :2]).clip(0).prod(1)


def _groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """(N,) the first position of those that are connected by pairs."""
    group = np.arange(count)
    while True:
        low = group[pairs].min(1, initial=count)
        before = group.copy()
        for side in pairs.T:
            np.minimum.at(group, side, low)
        if np.array_equal(before, group):
            return group
