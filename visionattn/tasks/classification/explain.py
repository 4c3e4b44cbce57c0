"""What of a classifier's output is explained: the logit of a class."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.classification.recipe import AnyData, Recipe
from visionattn.tasks.classification.task import Classifier
from visionattn.tasks.classification.transforms import eval_transform
from visionattn.tasks.targets import Asked, Box, Seen, class_of

__all__ = ["chosen", "seen"]


def seen(task: Classifier, sample: Sample, spec: Recipe, asked: Asked) -> list[Seen]:
    """The image as it is evaluated, and the class asked for."""
    if asked.region is not None:
        raise UserError("region is for masks and objects: a classifier speaks of the whole image")
    pixels = torch.from_numpy(sample.image().copy())
    image = eval_transform(spec.data)(pixels)
    with torch.no_grad():
        probabilities = task.labelling.probabilities(task(image[None].to(task.device)))[0]
    k = class_of(asked, spec.data.classes, int(probabilities.argmax()), sample.target())

    def logit(images: Tensor) -> Tensor:
        return task(images)[:, k]

    def score(images: Tensor) -> Tensor:
        return task.labelling.probabilities(task(images))[:, k]

    height, width = pixels.shape[1:]
    return [Seen(image, _place((height, width), spec.data), logit, score, spec.data.classes[k])]


def chosen(
    evaluation: Evaluation, predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> dict[str, list[int]]:
    """Samples for the report: those whose label was believed least, and most."""
    belief = []
    for prediction in predictions:
        probabilities, label = np.asarray(prediction.value), samples[prediction.index].label
        several = np.ndim(label) > 0
        right = -np.abs(probabilities - label).max() if several else probabilities[label]
        belief.append((float(right), prediction.index))
    order = [i for _, i in sorted(belief)]
    half = (len(order) + 1) // 2
    return {"worst": order[:half], "best": order[half:][::-1]}


def _place(size: tuple[int, int], data: AnyData) -> Box:
    """What `eval_transform` shows of an image of (H, W), in its pixels."""
    if data.resize == "squash":
        return 0.0, 0.0, float(size[0]), float(size[1])
    factor, sides = 1.0, data.side
    if data.resize == "crop":
        factor = max(side / data.crop_pct / length for side, length in zip(sides, size, strict=True))
    resized = [math.floor(length * factor + 0.5) if factor != 1 else length for length in size]
    first = [round((length - side) / 2) for length, side in zip(resized, sides, strict=True)]
    edges: Any = [
        (start * length / new, (start + side) * length / new)
        for start, side, length, new in zip(first, sides, size, resized, strict=True)
    ]
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]
