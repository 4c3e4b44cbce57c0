"""Masks of objects: polygons against matplotlib's test of points, run lengths against faster-coco-eval."""

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco
from matplotlib.path import Path
from PIL import Image, ImageOps

from visionattn.data.boxes import pixels_of
from visionattn.data.object_masks import Drawn, Polygons, Runs, turn_boxes

SIZE = (37, 53)
ALL = slice(0, SIZE[0]), slice(0, SIZE[1])


def star(rng, corners=9) -> np.ndarray:
    """A polygon without crossings that reaches over the image's border."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    return rng.uniform(5, 30, (corners, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.uniform(10, 30, 2)


def centres(window=ALL) -> np.ndarray:
    rows, columns = np.mgrid[window]
    return np.stack([columns, rows], -1).reshape(-1, 2) + 0.5


@pytest.mark.parametrize("seed", range(10))
def test_a_polygon_covers_the_pixels_whose_centres_it_holds(seed):
    parts = [star(np.random.default_rng((seed, k))) for k in range(2)]
    expected = np.any([Path(part, closed=False).contains_points(centres()) for part in parts], axis=0).reshape(SIZE)
    shape = Polygons(tuple(parts))
    assert np.array_equal(shape.on(ALL), expected)
    window = slice(8, 21), slice(11, 40)
    assert np.array_equal(shape.on(window), expected[window])


def test_a_rectangle_covers_its_pixels_and_a_sliver_none():
    rectangle = Polygons((np.array([[3, 4], [9, 4], [9, 6], [3, 6]]),))
    assert np.argwhere(rectangle.on(ALL)).tolist() == [[y, x] for y in (4, 5) for x in range(3, 9)]
    assert rectangle.bounds.tolist() == [3, 4, 9, 6]
    assert Polygons((np.array([[3, 4.6], [9, 4.6], [9, 5.4], [3, 5.4]]),)).bounds is None


def test_polygons_without_pixels_are_known():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(500):
        polygon = rng.uniform(3, 6, 2) + rng.uniform(0.2, 4, 2) * rng.uniform(0, 1, (5, 2))
        shape = Polygons((polygon,))
        found.append(shape.on(ALL).any())
        assert (shape.bounds is not None) == found[-1]
    assert 100 < sum(found) < 400


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_run_lengths_are_coco_s(share):
    mask = np.random.default_rng(1).random(SIZE) < share
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = Runs.from_text(encoded["counts"].decode(), SIZE)
    assert np.array_equal(runs.on(ALL), mask)
    window = slice(4, 30), slice(7, 8)
    assert np.array_equal(runs.on(window), mask[window])
    ours = Runs.of(mask[5:, 9:], (slice(5, SIZE[0]), slice(9, SIZE[1])), SIZE)
    there = np.zeros(SIZE, bool)
    there[5:, 9:] = mask[5:, 9:]
    assert np.array_equal(coco.decode({"size": SIZE, "counts": ours.text.encode()}), there)
    assert Runs.of(mask, ALL, SIZE).text == encoded["counts"].decode()
    if share:
        left, top, width, height = coco.toBbox(encoded)
        assert runs.bounds.tolist() == [left, top, left + width, top + height]
    else:
        assert runs.bounds is None


def test_run_lengths_of_large_images():
    size = (4000, 3000)
    window = slice(1000, 3900), slice(20, 2900)
    mask = np.random.default_rng(0).random((2900, 2880)) < 0.001
    runs = Runs.of(mask, window, size)
    assert np.array_equal(Runs.from_text(runs.text, size).on(window), mask)
    assert coco.area({"size": size, "counts": runs.text.encode()}) == mask.sum()


@pytest.mark.parametrize("text", ["", "abc~", "X"])
def test_what_is_no_text_of_runs_is_refused(text):
    with pytest.raises(ValueError, match="compressed"):
        Runs.from_text(text, SIZE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_shapes_turn_as_pictures_do(orientation):
    rng = np.random.default_rng(orientation)
    polygons = Polygons((star(rng), star(rng)))
    stored = polygons.on(ALL)
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    upright = np.array(ImageOps.exif_transpose(image))
    window = slice(0, upright.shape[0]), slice(0, upright.shape[1])
    assert np.array_equal(polygons.turned(orientation, SIZE).on(window), upright)
    assert np.array_equal(Runs.of(stored, ALL, SIZE).turned(orientation, SIZE).on(window), upright)
    box = Runs.of(stored, ALL, SIZE).bounds
    assert (
        turn_boxes(box[None], orientation, SIZE)[0].tolist() == Runs.of(upright, window, upright.shape).bounds.tolist()
    )


def test_masks_are_drawn_on_the_pixels_of_their_boxes():
    xyxy = np.array([[2.5, 3, 7, 9.2], [10, 10, 20, 20]], np.float32)
    shapes = [Polygons((star(np.random.default_rng(k)),)) for k in range(2)]
    masks = Drawn(shapes, xyxy)
    assert [mask.shape for mask in masks] == [(7, 5), (10, 10)]
    assert np.array_equal(masks[1], shapes[1].on(ALL)[pixels_of(xyxy[1])])
    assert len(masks[1:]) == 1
