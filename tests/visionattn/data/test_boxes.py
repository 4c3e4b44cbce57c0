"""What a crop shows of objects, against their pixels painted one by one."""

import numpy as np
import pytest

from visionattn.data.boxes import Boxes, pixels_of


def painted(rng, count=40, size=64):
    """Boxes of whole pixels with random masks, and each mask on a canvas of its own."""
    corners, sides = rng.integers(0, size - 20, (count, 2)), rng.integers(1, 20, (count, 2))
    xyxy = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    masks = [rng.random((h, w)) < 0.5 for w, h in sides]
    for mask in masks:  # which reach the sides of their boxes
        mask[0], mask[-1], mask[:, 0], mask[:, -1] = True, True, True, True
    canvases = np.zeros((count, size, size), bool)
    for canvas, box, mask in zip(canvases, xyxy, masks, strict=True):
        canvas[pixels_of(box)] = mask
    boxes = Boxes(xyxy, np.arange(count), rng.random(count) < 0.2, masks=masks)
    return boxes, canvases


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_keeps_what_is_visible(seed):
    rng = np.random.default_rng(seed)
    boxes, canvases = painted(rng)
    window = slice(10, 41), slice(23, 50)
    cut = boxes.within(window)
    share = canvases[:, *window].sum((1, 2)) / canvases.sum((1, 2))
    kept = np.where(boxes.ignore, share > 0, share >= 0.25)
    assert cut.labels.tolist() == np.flatnonzero(kept).tolist()
    assert cut.ignore.tolist() == (boxes.ignore | (share < 0.5))[kept].tolist()
    for label, box, mask in zip(cut.labels, cut.xyxy, cut.masks, strict=True):
        crop = canvases[label][window]
        ys, xs = np.nonzero(crop)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.array_equal(crop[pixels_of(box)], mask)


def test_boxes_without_masks_are_clipped():
    boxes = Boxes(np.array([[-4.0, 2, 6, 8.5], [0, 0, 100, 100], [90, 90, 99, 99]], np.float32), np.arange(3))
    boxes = Boxes(boxes.xyxy, boxes.labels, np.array([False, True, False]))
    cut = boxes.within((slice(0, 10), slice(0, 10)))
    assert cut.xyxy.tolist() == [[0, 2, 6, 8.5], [0, 0, 10, 10]]
    assert cut.labels.tolist() == [0, 1]
    assert cut.ignore.tolist() == [False, True]


def test_nothing_is_cropped_to_nothing():
    assert len(Boxes().within((slice(0, 5), slice(0, 5)))) == 0


def test_objects_of_a_window_stay_on_their_pixels():
    """Where rounding to float32, of which numbers around 15000 are a thousandth apart, would move them."""
    rng = np.random.default_rng(0)
    near = np.float32(1e-7) * rng.integers(-3, 4, (500, 4)).astype(np.float32)
    local = np.array([5, 7, 20, 30], np.float32) + near * 20
    window = slice(15_001, 15_100), slice(14_003, 14_100)
    moved = Boxes(local, np.zeros(500, int), np.zeros(500, bool)).of_window(window)
    assert moved.xyxy.dtype == np.float32
    np.testing.assert_allclose(moved.xyxy, local + [14_003, 15_001] * 2, atol=2e-3)
    for box, placed in zip(local, moved.xyxy, strict=True):
        for side, there, start in zip(pixels_of(box), pixels_of(placed), (15_001, 14_003), strict=True):
            assert (side.start + start, side.stop + start) == (there.start, there.stop)
