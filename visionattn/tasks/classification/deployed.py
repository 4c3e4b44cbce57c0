"""predict.py of an exported classifier: the table that `visionattn predict` writes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from visionattn.data.images import given_files
from visionattn.data.sample import unit_range
from visionattn.files import new_file, write_table
from visionattn.inference.deployed import Model, looks, opened, parsed, resized
from visionattn.tasks.classification.labels import THRESHOLD, probability_cells

__all__ = ["main", "seen"]


def main() -> int:
    arguments = parsed("table to write (.csv)")
    model, unread = Model(arguments.model), 0
    blank = np.zeros(len(model.about["classes"]))
    columns = list(_cells(blank, np.stack([blank] * len(model.about["views"])), model.about))
    files = [path for _, path in given_files(arguments.images)]
    with new_file(arguments.out) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as stream:
        write_table(stream, [["path", *columns]])
        for path, image in opened(files, model.about):
            if image is None:
                unread += 1
                write_table(stream, [[str(path), *("" for _ in columns)]])
                continue
            probabilities, each = looks(model, seen(image, model.about)[None])
            write_table(stream, [[str(path), *_cells(probabilities[0], each[:, 0], model.about).values()]])
    print(f"{len(files) - unread} predicted, {unread} unreadable: {arguments.out}")
    return 1 if unread else 0


def _cells(probabilities: np.ndarray, each: np.ndarray, about: dict[str, Any]) -> dict[str, Any]:
    """A row: the class or labels, probabilities (K,), what was promised of sets, what views (views, K) disagree on."""
    classes, several, trust = about["classes"], about["several_labels"], about["uncertainty"] or {}
    decided = np.flatnonzero(probabilities >= THRESHOLD) if several else [probabilities.argmax()]
    cells: dict[str, Any] = {"predicted": ";".join(classes[k] for k in decided)}
    cells |= probability_cells(classes, probabilities)
    if trust.get("least") is not None:
        kept = np.flatnonzero(probabilities >= trust["least"])
        kept = kept[np.argsort(-probabilities[kept], kind="stable")]
        cells |= {"set": ";".join(classes[k] for k in kept), "set_size": len(kept)}
    if len(each) > 1:
        common = _entropy(each.mean(0), several) - _entropy(each, several).mean()
        cells |= {"entropy": f"{_entropy(probabilities, several):.6g}", "mutual_information": f"{max(common, 0):.6g}"}
    return cells


def _entropy(probabilities: np.ndarray, several: bool) -> np.ndarray:
    """In nats, of classes (..., K); of several labels the sum over these."""
    sides = [probabilities, 1 - probabilities] if several else [probabilities]
    return -sum((p * np.log(np.where(p > 0, p, 1))).sum(-1) for p in sides)


def seen(image: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """An image (C, H, W) as it is stored -> the model's input (C, height, width) float32."""
    size = about["size"] or about["trained_at"]
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
