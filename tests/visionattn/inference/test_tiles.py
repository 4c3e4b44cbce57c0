"""Objects of a scene through a detector of tiles, here one that sees bright rectangles."""

import numpy as np
import pytest
import torch

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Window
from visionattn.inference.tiles import detect

SIZE = (300, 500)


def bright(images: torch.Tensor) -> list[Boxes]:
    """The rectangles of each value that an image has besides 0, which are one object each."""
    found = []
    for image in images[:, 0].numpy():
        values = np.unique(image[image > 0])
        places = [np.argwhere(image == value) for value in values]
        xyxy = [[*p.min(0)[::-1], *(p.max(0)[::-1] + 1)] for p in places]
        scores = np.array([len(p) for p in places], np.float32) / 1e5
        xyxy = np.array(xyxy, np.float32).reshape(-1, 4)
        found.append(Boxes(xyxy, np.zeros(len(xyxy), np.int64), np.zeros(len(xyxy), bool), scores))
    return found


@pytest.fixture
def scene() -> tuple[np.ndarray, list[list[float]]]:
    """(1, H, W), and its objects: some on seams, one larger than a tile."""
    boxes = [[10, 10, 30, 40], [60, 20, 110, 60], [90, 90, 140, 130], [200, 50, 480, 200], [0, 280, 500, 300]]
    pixels = np.zeros((1, *SIZE), np.float32)
    for value, (left, top, right, bottom) in enumerate(boxes, start=1):
        pixels[0, top:bottom, left:right] = value
    return pixels, boxes


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("tile", [(64, 64), (96, 128), (1000, 1000)])
def test_objects_are_found_whole_whatever_the_tiles_and_batches(scene, tile, batch_size):
    pixels, boxes = scene
    found = detect(bright, lambda window: pixels[:, *window], SIZE, tile, 0.25, batch_size)
    assert sorted(Boxes.joined(list(found)).xyxy.tolist()) == sorted(boxes)


def test_windows_without_anything_are_left_out(scene):
    pixels, boxes = scene
    seen = []

    def read(window: Window) -> np.ndarray | None:
        return pixels[:, *window] if pixels[:, *window].any() else None

    def predict(images: torch.Tensor) -> list[Boxes]:
        seen.append(len(images))
        assert images.flatten(1).any(1).all()
        return bright(images)

    found = Boxes.joined(list(detect(predict, read, SIZE, (64, 64), 0.25, 4)))
    assert sorted(found.xyxy.tolist()) == sorted(boxes)
    assert list(detect(predict, lambda window: None, SIZE, (64, 64), 0.25)) == []


def test_what_fails_to_be_read_ends_it(scene):
    def read(window: Window) -> np.ndarray:
        raise OSError("damaged")

    with pytest.raises(OSError, match="damaged"):
        list(detect(bright, read, SIZE, (64, 64), 0.25))
