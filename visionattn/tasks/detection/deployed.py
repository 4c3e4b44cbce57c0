"""predict.py of an exported detector: the table of objects that `visionattn predict` writes, of image files."""

import math
from typing import Any

import numpy as np

from visionattn.data.boxes import Boxes
from visionattn.data.images import named_files
from visionattn.files import new_file, write_table
from visionattn.inference.deployed import Model, filled, framed, opened, parsed, resized
from visionattn.inference.merging import merge, rows_of_tiles

__all__ = ["found", "main"]


def main() -> int:
    arguments = parsed("table to write (.csv)")
    model, unread = Model(arguments.model), 0
    names = {path: name + path.suffix for name, path in named_files(arguments.images).items()}
    columns = ["image_path", "xmin", "ymin", "xmax", "ymax", "label", "score"]
    with new_file(arguments.out) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as stream:
        write_table(stream, [columns])
        for path, image in opened(names, model.about):
            if image is None:
                unread += 1
                continue
            boxes = found(model, filled(image, model.about))
            assert boxes.scores is not None
            rows = [
                [*map(str, box), model.about["classes"][label], f"{score:.6f}"]
                for box, label, score in zip(boxes.xyxy, boxes.labels, boxes.scores, strict=True)
            ]
            write_table(stream, [[names[path], *row] for row in rows or [[""] * (len(columns) - 1)]])
    print(f"{len(names) - unread} predicted, {unread} unreadable: {arguments.out}")
    return 1 if unread else 0


def found(model: Model, image: np.ndarray) -> Boxes:
    """The objects of an image (C, H, W) of any size, in its own pixels, that reach the score of their class."""
    about, size = model.about, (image.shape[1], image.shape[2])
    if about["resize"] == "none":
        tiles = rows_of_tiles(size, tuple(about["tile"]), about["overlap"])
        rows = [[(window, _of_tile(model, image[:, *window])) for window in row] for row in tiles]
        several = len(tiles) * len(tiles[0]) > 1
        boxes = Boxes.joined([rows[0][0][1][np.zeros(0, int)], *merge(rows, size, agnostic=about["agnostic"])])
        boxes = boxes if several else rows[0][0][1]
    else:
        frame = about["size"] or about["tile"]
        factor = min(max(frame) / max(size), min(frame) / min(size))
        if about["size"]:  # which does not turn with the image
            factor = min(side / own for side, own in zip(frame, size, strict=True))
        boxes = _of_tile(model, image, factor)
    assert boxes.scores is not None
    return boxes[boxes.scores >= np.array(about["score"])[boxes.labels]]


def _of_tile(model: Model, image: np.ndarray, factor: float = 1.0) -> Boxes:
    """What is found in an image or tile that the network sees scaled by this factor, in the pixels of `image`."""
    about, size = model.about, [max(1, round(side * factor)) for side in image.shape[1:]]
    canvas = about["size"] or [max(32, math.ceil(side / 32) * 32) for side in size]
    outputs = model(framed(resized(image, size), canvas, about)[None])
    scores, boxes = outputs["probabilities"][0], outputs["boxes"][0]
    order = np.argsort(-scores, axis=None, kind="stable")[: max(about["candidates"], 5 * about["limit"])]
    order = order[scores.flat[order] > about["floor"]]
    place, labels = np.unravel_index(order, scores.shape)
    xyxy = boxes[place].clip(0, [size[1], size[0]] * 2)
    there = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
    xyxy, labels, sure = xyxy[there], labels[there], scores.flat[order[there]]
    kept = _without_duplicates(xyxy, labels, about)[: about["limit"]]
    scale = np.array([image.shape[2] / size[1], image.shape[1] / size[0]] * 2, np.float32)
    return Boxes(xyxy[kept] * scale, labels[kept], np.zeros(len(kept), bool), sure[kept])


def _without_duplicates(xyxy: np.ndarray, labels: np.ndarray, about: dict[str, Any]) -> list[int]:
    """The surest of the boxes that show the same, the surest first."""
    areas, kept = (xyxy[:, 2:] - xyxy[:, :2]).prod(1), list[int]()
    for i in range(len(xyxy)):
        low, high = np.maximum(xyxy[i, :2], xyxy[kept, :2]), np.minimum(xyxy[i, 2:], xyxy[kept, 2:])
        shared = (high - low).clip(0).prod(1)
        same = shared > about["nms"] * (areas[i] + areas[kept] - shared)
        if not (same & (about["agnostic"] | (labels[kept] == labels[i]))).any():
            kept.append(i)
    return kept
