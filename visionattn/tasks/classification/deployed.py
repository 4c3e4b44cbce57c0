"""predict.py of an exported classifier: the table that `visionattn predict` writes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from visionattn.data.images import given_files
from visionattn.data.sample import unit_range
from visionattn.files import new_file, write_table
from visionattn.inference.deployed import Model, averaged, opened, parsed, resized
from visionattn.tasks.classification.labels import THRESHOLD, probability_cells

__all__ = ["main", "seen"]


def main() -> int:
    arguments = parsed("table to write (.csv)")
    model = Model(arguments.model)
    classes, unread = model.about["classes"], 0
    columns = probability_cells(classes, np.zeros(len(classes)))
    files = [path for _, path in given_files(arguments.images)]
    with new_file(arguments.out) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as stream:
        write_table(stream, [["path", "predicted", *columns]])
        for path, image in opened(files, model.about):
            if image is None:
                unread += 1
                write_table(stream, [[str(path), *("" for _ in range(1 + len(columns)))]])
                continue
            probabilities = averaged(model, seen(image, model.about)[None])[0]
            cells = probability_cells(classes, probabilities).values()
            write_table(stream, [[str(path), _label(probabilities, model.about), *cells]])
    print(f"{len(files) - unread} predicted, {unread} unreadable: {arguments.out}")
    return 1 if unread else 0


def _label(probabilities: np.ndarray, about: dict[str, Any]) -> str:
    """The likeliest class, or the labels that are likelier than not, joined by ;."""
    if about["several_labels"]:
        return ";".join(about["classes"][k] for k in np.flatnonzero(probabilities >= THRESHOLD))
    return about["classes"][probabilities.argmax()]


def seen(image: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """An image (C, H, W) as it is stored -> the model's input (C, height, width) float32."""
    size = about["size"]
    if about["resize"] == "squash":
        image = resized(image, size, about["interpolation"])
    elif about["resize"] == "crop":
        factor = max(side / about["crop_pct"] / own for side, own in zip(size, image.shape[1:], strict=True))
        image = resized(image, [math.floor(side * factor + 0.5) for side in image.shape[1:]], about["interpolation"])
    return unit_range(_centre(image, size))


def _centre(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The centre of this size; where the image is smaller, in black."""
    room = [max(side - own, 0) for side, own in zip(size, image.shape[1:], strict=True)]
    image = np.pad(image, [(0, 0), *((more // 2, (more + 1) // 2) for more in room)])
    top, left = (round((own - side) / 2) for own, side in zip(image.shape[1:], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]
