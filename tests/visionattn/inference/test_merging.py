"""Objects of tiles as those of the scene: a simulated detector, large objects, masks, and what must not matter."""

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, nms

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Window
from visionattn.inference.merging import merge, rows_of_tiles

SIDE = 4096
TILE = (512, 512)
Rows = list[list[tuple[Window, Boxes]]]


def boxes_of(xyxy, scores=None, labels=None, masks=None) -> Boxes:
    xyxy = np.asarray(xyxy, np.float32).reshape(-1, 4)
    labels = np.zeros(len(xyxy), np.int64) if labels is None else np.asarray(labels)
    scores = np.full(len(xyxy), 0.5, np.float32) if scores is None else np.asarray(scores, np.float32)
    return Boxes(xyxy, labels, np.zeros(len(xyxy), bool), scores, masks)


def scattered(rng) -> np.ndarray:
    """3000 objects of about 40 pixels anywhere."""
    centres, sides = rng.uniform(0, SIDE, (3000, 2)), np.exp(rng.normal(np.log(40), 0.4, (3000, 1)))
    sides = sides * rng.uniform(0.8, 1.25, (3000, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1).clip(0, SIDE)
    return boxes[((boxes[:, 2:] - boxes[:, :2]) > 4).all(1)]


def in_rows(rng) -> np.ndarray:
    """3000 objects in rows, each touching its neighbours."""
    boxes, y = [], 10.0
    while y < SIDE - 80:
        x, height = rng.uniform(0, 60), rng.uniform(25, 60)
        while x < SIDE - 80:
            width = rng.uniform(20, 60)
            boxes.append([x, y, x + width, y + height])
            x += width
        y += height + rng.uniform(0, 60)
    return np.array(boxes)[rng.permutation(len(boxes))[:3000]]


def seen(objects: np.ndarray, window: Window, least: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of what a tile shows, counted from the scene, and which share of each object it shows."""
    rows, columns = window
    low = np.maximum(objects[:, :2], (columns.start, rows.start))
    high = np.minimum(objects[:, 2:], (columns.stop, rows.stop))
    share = (high - low).clip(0).prod(1) / (objects[:, 2:] - objects[:, :2]).prod(1)
    return np.concatenate([low, high], 1)[share >= least], share[share >= least]


def from_corner(boxes: np.ndarray, window: Window) -> np.ndarray:
    return boxes - [window[1].start, window[0].start] * 2


def imperfect(objects: np.ndarray, window: Window, rng) -> Boxes:
    """Finds 95 % of what is a quarter visible, with sides off by 4 %; scores grow with the visible share."""
    boxes, share = seen(objects, window)
    found = rng.random(len(boxes)) < 0.95
    boxes, share = boxes[found], share[found]
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = from_corner(boxes + rng.normal(0, 0.04, boxes.shape) * sides, window).clip(0, TILE[0])
    real = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
    scores = (0.3 + 0.6 * share + rng.normal(0, 0.05, len(share))).clip(0.01, 1)
    return boxes_of(boxes[real], scores[real])


def perfect(objects: np.ndarray, window: Window, least: float = 0.25) -> Boxes:
    boxes, share = seen(objects, window, least)
    return boxes_of(from_corner(boxes, window), share)


def precision_recall(found: Boxes, objects: np.ndarray) -> tuple[float, float]:
    """At IoU 0.5, the best score first."""
    order = np.argsort(-found.scores)
    boxes, taken = found.xyxy[order], np.zeros(len(objects), bool)
    fits: list[tuple[int, float, int]] = []
    for top in range(0, int(objects.max()), 256):  # band by band, since all pairs are many
        mine = np.flatnonzero((boxes[:, 1] >= top) & (boxes[:, 1] < top + 256))
        near = np.flatnonzero((objects[:, 1] < top + 512) & (objects[:, 3] > top - 256))
        values = box_iou(torch.from_numpy(boxes[mine]).double(), torch.from_numpy(objects[near])).numpy()
        fits += [(mine[i], -values[i, j], near[j]) for i, j in np.argwhere(values >= 0.5)]
    right = set()
    for box, _, k in sorted(fits):
        if box not in right and not taken[k]:
            right.add(box)
            taken[k] = True
    return len(right) / len(found), len(right) / len(objects)


def everything(rows: Rows) -> Boxes:
    """All that tiles show, from the corner of the scene."""
    parts = [(w, b) for row in rows for w, b in row]
    corners = [np.array([w[1].start, w[0].start] * 2) for w, _ in parts]
    xyxy = np.concatenate([b.xyxy + corner for (_, b), corner in zip(parts, corners, strict=True)])
    return boxes_of(xyxy, np.concatenate([b.scores for _, b in parts]))


def suppressed(boxes: Boxes) -> Boxes:
    return boxes[nms(torch.from_numpy(boxes.xyxy), torch.from_numpy(boxes.scores), 0.5).numpy()]


def joined(rows: Sequence, size=(SIDE, SIDE), **keys) -> Boxes:
    return Boxes.joined(list(merge(rows, size, **keys)))


@pytest.mark.parametrize(
    ("objects", "overlap", "count", "precision", "recall"),
    [(scattered, 0.25, 0.03, 0.985, 0.965), (scattered, 0.1, 0.05, 0.985, 0.94), (in_rows, 0.25, 0.03, 0.99, 0.965)],
)
def test_the_rule_counts_better_than_suppression_alone(
    objects: Callable, overlap: float, count: float, precision: float, recall: float
):
    """The simulation of reference/detection.md, section 4; the detector itself finds 95 % a tile."""
    rng = np.random.default_rng(0)
    known = objects(rng)
    windows = rows_of_tiles((SIDE, SIDE), TILE, overlap)
    rows = [[(window, imperfect(known, window, rng)) for window in row] for row in windows]
    rules = {"nothing": everything(rows), "suppression": suppressed(everything(rows)), "ours": joined(rows)}
    error = {name: len(boxes) / len(known) - 1 for name, boxes in rules.items()}
    rates = {name: precision_recall(boxes, known) for name, boxes in rules.items()}
    assert abs(error["ours"]) < count
    assert abs(error["ours"]) < abs(error["suppression"]) + 0.02 < abs(error["nothing"])
    assert rates["ours"][0] > max(precision, rates["suppression"][0], rates["nothing"][0])
    assert rates["ours"][1] > recall
    assert rates["ours"][1] > rates["suppression"][1] - 0.01


def test_a_perfect_detector_s_objects_are_counted_in_a_large_scene():
    size, rng = (16_000, 16_000), np.random.default_rng(0)
    corners = rng.uniform(0, 15_940, (20_000, 2))
    known = np.concatenate([corners, corners + rng.uniform(10, 60, (20_000, 2))], 1)
    order = np.argsort(known[:, 1])
    tops = known[order, 1]

    def rows():
        for row in rows_of_tiles(size, TILE, 0.25):
            band = row[0][0]
            near = known[order[slice(*np.searchsorted(tops, [band.start - 60, band.stop]))]]
            yield [(window, perfect(near, window)) for window in row]

    found = joined(rows(), size)
    assert abs(len(found) / len(known) - 1) < 0.03
    assert precision_recall(found[found.xyxy[:, 3] < 2000], known[known[:, 3] < 2000])[0] > 0.99


def test_objects_larger_than_the_overlap_and_than_a_tile_come_out_whole():
    known = np.array([[100, 100, 600, 400], [700, 50, 1900, 500], [300, 600, 1700, 2000], [2000, 30, 2040, 2000.5]])
    rows = [[(w, perfect(known, w, least=0.001)) for w in row] for row in rows_of_tiles((2048, 2048), TILE, 0.25)]
    found = joined(rows, (2048, 2048))
    assert sorted(found.xyxy.tolist()) == sorted(known.tolist())


def test_touching_neighbours_on_a_seam_stay_apart():
    """A column of objects across the seam between two tiles."""
    known = np.array([[360, y, 536, y + 30] for y in range(0, 480, 30)])
    rows = [[(w, perfect(known, w, least=0.1)) for w in row] for row in rows_of_tiles((512, 900), TILE, 0.25)]
    assert sorted(joined(rows, (512, 900)).xyxy.tolist()) == sorted(known.tolist())


def test_masks_are_united():
    rng, size, tile = np.random.default_rng(0), (120, 200), (60, 60)
    known = np.array([[10, 10, 190, 40], [20, 50, 50, 110], [100, 60, 180, 115]])
    masks = [rng.random((y2 - y1, x2 - x1)) < 0.8 for x1, y1, x2, y2 in known]
    for mask in masks:
        mask[0], mask[-1], mask[:, 0], mask[:, -1] = True, True, True, True

    def shown(window: Window) -> Boxes:
        (rows, columns), crops = window, []
        for box, mask in zip(known, masks, strict=True):
            x1, x2 = np.clip(box[[0, 2]], columns.start, columns.stop)
            y1, y2 = np.clip(box[[1, 3]], rows.start, rows.stop)
            if x2 > x1 and y2 > y1:
                part = mask[y1 - box[1] : y2 - box[1], x1 - box[0] : x2 - box[0]]
                crops.append(boxes_of(from_corner(np.array([x1, y1, x2, y2]), window), masks=[part]))
        return Boxes.joined(crops)

    rows = [[(window, shown(window)) for window in row] for row in rows_of_tiles(size, tile, 0.3)]
    found = joined(rows, size)
    assert len(found) == len(known)
    for box, mask in zip(found.xyxy, found.masks, strict=True):
        (k,) = np.flatnonzero((known == box).all(1))
        assert np.array_equal(mask, masks[k])


def test_neither_the_order_of_tiles_nor_of_boxes_matters():
    rng = np.random.default_rng(1)
    known = scattered(rng)
    windows = rows_of_tiles((SIDE, SIDE), TILE, 0.25)
    rows = [[(window, imperfect(known, window, rng)) for window in row] for row in windows]
    for row in rows:  # with many ties
        for _, boxes in row:
            boxes.scores[:] = boxes.scores.round(1)
    mixed = [
        [(row[k][0], row[k][1][rng.permutation(len(row[k][1]))]) for k in rng.permutation(len(row))] for row in rows
    ]
    for one, other in zip(merge(rows, (SIDE, SIDE)), merge(mixed, (SIDE, SIDE)), strict=True):
        assert one.xyxy.tolist() == other.xyxy.tolist()
        assert one.scores.tolist() == other.scores.tolist()


def test_row_by_row_is_the_same_as_all_at_once():
    rng = np.random.default_rng(2)
    known = in_rows(rng)
    windows = rows_of_tiles((SIDE, SIDE), TILE, 0.25)
    rows = [[(window, imperfect(known, window, rng)) for window in row] for row in windows]
    by_row, at_once = joined(rows), joined([[tile for row in rows for tile in row]])
    assert sorted(by_row.xyxy.tolist()) == sorted(at_once.xyxy.tolist())


@pytest.mark.parametrize("agnostic", [False, True])
def test_classes_are_apart_unless_they_are_not_to_be(agnostic):
    boxes = boxes_of([[10, 10, 50, 50], [11, 10, 50, 50], [100, 100, 120, 120]], [0.4, 0.6, 0.5], [0, 1, 1])
    found = joined([[((slice(0, 200), slice(0, 200)), boxes)]], (200, 200), agnostic=agnostic)
    assert sorted(found.labels.tolist()) == ([1, 1] if agnostic else [0, 1, 1])


def test_memory_does_not_grow_with_the_scene():
    def peak(height: int) -> int:
        size = (height, 1024)

        def rows():
            for row in rows_of_tiles(size, TILE, 0.25):
                rng = np.random.default_rng(row[0][0].start)
                corners = rng.uniform(0, 460, (3, 100, 2))
                yield [
                    (w, boxes_of(np.concatenate([c, c + 40], 1), rng.random(100)))
                    for w, c in zip(row, corners, strict=True)
                ]

        tracemalloc.start()
        count = sum(len(found) for found in merge(rows(), size))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count > 0
        return peak

    peak(512)
    assert peak(512 + 62 * 384) < 1.2 * peak(512 + 7 * 384)


def test_scenes_without_objects_or_smaller_than_a_tile():
    windows = rows_of_tiles((100, 70), TILE, 0.25)
    assert windows == [[(slice(0, 100), slice(0, 70))]]
    boxes = boxes_of([[0, 0, 100, 60], [5, 5, 20, 20]])
    assert len(joined([[(windows[0][0], boxes)]], (100, 70))) == 2
    assert len(joined([[(windows[0][0], Boxes())]], (100, 70))) == 0


@pytest.mark.parametrize(("size", "overlap"), [((700, 1300), 0.25), ((512, 512), 0.5), ((513, 2000), 0)])
def test_tiles_cover_the_scene(size, overlap):
    covered = np.zeros(size, int)
    for row in rows_of_tiles(size, TILE, overlap):
        assert len({window[0].start for window in row}) == 1
        for window in row:
            covered[window] += 1
            assert all(side.stop - side.start == 512 for side in window)
    assert covered.min() == 1


def test_an_overlap_out_of_range_is_refused():
    with pytest.raises(ValueError, match="overlap is 1, expected 0 to below 1"):
        rows_of_tiles((10, 10), TILE, 1)
