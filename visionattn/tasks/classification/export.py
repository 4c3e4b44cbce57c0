"""What an exported classifier computes, and what has to be known to use it."""

from typing import Any

import numpy as np
from torch import Tensor

from visionattn.inference.views import views
from visionattn.models.networks import arguments_of
from visionattn.tasks.classification.recipe import Recipe
from visionattn.tasks.classification.task import Classifier
from visionattn.tasks.graph import Graph

__all__ = ["HUB_TASK", "agreement", "contract", "graph", "made_by", "right", "size_of"]

HUB_TASK = "image-classification"  # what Hugging Face calls it


class _Graph(Graph):
    def __init__(self, task: Classifier, spec: Recipe, temperature: float) -> None:
        super().__init__(task.network, spec.data.mean, spec.data.std, temperature)
        self.labelling = task.labelling

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(self.normalised(images))
        return self.labelling.probabilities(logits / self.temperature), logits


def graph(task: Classifier, spec: Recipe, temperature: float) -> Graph:
    """Images -> probabilities (B, K) and logits (B, K)."""
    return _Graph(task, spec, temperature)


def made_by(spec: Recipe) -> tuple[str, dict[str, Any]]:
    """Name and arguments by which timm makes the network."""
    arguments = arguments_of(spec.model, spec.data.side)
    return spec.model.name, arguments | {"num_classes": len(spec.data.classes), "in_chans": spec.data.channels}


def size_of(spec: Recipe) -> tuple[int, int]:
    """Height and width that the network was trained for."""
    return spec.data.side


def contract(spec: Recipe, size: tuple[int, int]) -> dict[str, Any]:
    """How an image becomes the graph's input of this size, and how probabilities become an answer."""
    data = spec.data
    return {
        "classes": data.classes,
        "several_labels": data.multi_label,
        "resize": data.resize,
        "crop_pct": data.crop_pct,
        "interpolation": data.interpolation,
        "views": [[view.turns, list(view.dims)] for view in views(spec.evaluate.tta, size[0] == size[1])],
        "outputs": {"probabilities": "(B, classes)", "logits": "(B, classes), before the temperature"},
    }


def agreement(outputs: dict[str, np.ndarray], others: dict[str, np.ndarray], spec: Recipe) -> float:
    """Share of equal decisions of two graphs on the same images."""
    one, other = (_decided(values["probabilities"], spec) for values in (outputs, others))
    return float((one == other).mean())


def right(outputs: dict[str, np.ndarray], item: dict[str, Any], spec: Recipe) -> float | None:
    """Share of right decisions about one item of the evaluation set; None of one without a label."""
    if "label" not in item:
        return None
    decided = _decided(outputs["probabilities"], spec)[0]
    return float((decided == item["label"].numpy()).mean())


def _decided(probabilities: np.ndarray, spec: Recipe) -> np.ndarray:
    return probabilities >= 0.5 if spec.data.multi_label else probabilities.argmax(1)
