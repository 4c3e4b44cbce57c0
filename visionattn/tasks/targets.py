"""What a prediction is asked to be explained for: a class, a region of a mask, a found object; as every task sees it.

The file `explain` of a task has `seen(task, sample, spec, asked) -> list[Seen]`: what the network is shown of a sample,
and which number of its output is explained; it raises UserError for what cannot be asked. And `chosen(evaluation,
predictions, samples) -> {"worst": sample numbers, "best": ...}`, which the report shows.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from visionattn.errors import UserError, nearest

__all__ = ["Asked", "Box", "Seen", "box_of", "class_of", "mask_of"]

Box = tuple[float, float, float, float]  # top, left, bottom, right
Region = str | os.PathLike[str] | np.ndarray | None


class Asked(NamedTuple):
    """What a user wants explained.

    Attributes:
        target: "predicted", "label", or the name or number of a class.
        region: of a mask where, of objects which one: a pixel "X,Y" or box "X,Y,X2,Y2" of the file; of a mask also
            "predicted", or an image or array (H, W) that is not zero there. None: where the class is predicted, the
            surest object.
    """

    target: str | int = "predicted"
    region: Region = None


class Seen(NamedTuple):
    """What the network is shown of a sample, and what of its output is explained.

    Attributes:
        image: (C, h, w), normalised, so that 0 is the mean of the data.
        place: what it shows, in pixels of the file.
        logit: images (B, C, h, w) -> (B,), the number that is explained, with gradient.
        score: images -> (B,) in 0..1, what people read of it.
        target: in words.
        region: (h, w) bool, where the number is of; None: of the whole image.
    """

    image: Tensor
    place: Box
    logit: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    target: str
    region: Tensor | None = None


def class_of(asked: Asked, classes: Sequence[str], predicted: int, label: Any) -> int:
    """The class that is asked for, where `predicted` is the network's own.

    Raises:
        UserError: no such class, or an image without a label.
    """
    target = asked.target
    if target == "predicted":
        return predicted
    if target == "label":
        if label is None:
            raise UserError("target is label, but the image has none: name a class, or take predicted")
        return int(np.argmax(label)) if np.ndim(label) else int(label)
    if target in classes:
        return list(classes).index(str(target))
    if str(target).isdecimal() and int(target) < len(classes):
        return int(target)
    known = f"a class name, its number 0 to {len(classes) - 1}, predicted or label"
    raise UserError(f"target is {target}, expected {known}{nearest(str(target), classes)}")


def box_of(region: Region) -> Box | None:
    """The box that a text says, one pixel of a pixel; None where it says none.

    Raises:
        UserError: numbers that are no box.
    """
    parts = str(region).split(",") if isinstance(region, str) else []
    if len(parts) not in (2, 4):
        return None
    try:
        left, top, *corner = [float(part) for part in parts]
    except ValueError:
        return None
    right, bottom = corner or (left + 1, top + 1)
    if not (0 <= left < right and 0 <= top < bottom):
        raise UserError(f"region is {region}: expected X,Y or X,Y,X2,Y2 with X < X2 and Y < Y2, in pixels of the file")
    return top, left, bottom, right


def mask_of(region: Region, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) bool of an image of this size; None where the region is what is predicted.

    Raises:
        UserError: no region, one outside of the image, or a mask of another size.
    """
    if region is None or (isinstance(region, str) and region == "predicted"):
        return None
    if (box := box_of(region)) is not None:
        top, left, bottom, right = (round(edge) for edge in box)
        mask = np.zeros(size, bool)
        mask[top:bottom, left:right] = True
    elif isinstance(region, np.ndarray):
        mask = region != 0
    else:
        path = Path(os.fspath(region))
        if not path.is_file():
            raise UserError(f"region is {region}: expected predicted, X,Y, X,Y,X2,Y2 or the file of a mask")
        with Image.open(path) as picture:
            mask = np.asarray(picture) != 0
    if mask.shape != size:
        raise UserError(f"region has {' x '.join(map(str, mask.shape))} pixels, the image {size[0]} x {size[1]}")
    if not mask.any():
        raise UserError(
            f"region {region if isinstance(region, str) else ''} has no pixel of the image of {size[0]} x {size[1]}"
        )
    return mask
