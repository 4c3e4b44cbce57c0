"""What an exported detector computes, and what has to be known to use it."""

import math
from typing import Any

import numpy as np

from visionattn.errors import UserError
from visionattn.models.dense_heads import CANDIDATES, FLOOR
from visionattn.models.networks import arguments_of
from visionattn.tasks.detection.graphs import GRAPHS
from visionattn.tasks.detection.recipe import Recipe
from visionattn.tasks.detection.task import DetectorTask, detector_args
from visionattn.tasks.graph import Graph

__all__ = ["HUB_TASK", "agreement", "contract", "graph", "made_by", "right", "size_of"]

HUB_TASK = "object-detection"  # what Hugging Face calls it


def graph(task: DetectorTask, spec: Recipe, temperature: float) -> Graph:
    """Images -> probabilities (B, N, K) of N places, queries or objects, and their boxes (B, N, 4) in pixels.

    Raises:
        UserError: a detector whose views are fused.
    """
    network: Any = task.network
    if spec.evaluate.tta or spec.evaluate.scales != [1.0]:
        raise UserError(
            "evaluate.tta and evaluate.scales: views of a detector are fused by what is not exported; export a run "
            "without them"
        )
    kind = next(kind for head, kind in GRAPHS.items() if isinstance(network.head, head))
    return kind(network, spec.data.mean, spec.data.std)


def made_by(spec: Recipe) -> tuple[str, dict[str, Any]]:
    """Name and arguments by which timm makes the network."""
    assert isinstance(spec.evaluate.max_objects, int)  # once the recipe is resolved
    return "va_detector", {
        "name": spec.model.name,
        "detector": spec.model.detector,
        "classes": len(spec.data.classes),
        "channels": len(spec.data.mean),
        "args": arguments_of(spec.model, spec.data.side),
        "detector_args": detector_args(spec, spec.evaluate.max_objects),
    }


def size_of(spec: Recipe) -> tuple[int, int]:
    """Height and width of what the network sees at most, whole steps of its coarsest map."""
    coarsest = max(spec.model.detector_args.coarsest or 32, 32)
    height, width = (math.ceil(side / coarsest) * coarsest for side in spec.data.side)
    return height, width


def contract(spec: Recipe, size: tuple[int, int]) -> dict[str, Any]:
    """How an image becomes inputs of the graph, and how places become objects."""
    args, score = spec.model.detector_args, spec.evaluate.score
    return {
        "classes": spec.data.classes,
        "resize": spec.data.resize,
        "interpolation": "bilinear",
        "tile": list(spec.data.side),
        "overlap": spec.data.overlap,
        "floor": FLOOR,
        "candidates": CANDIDATES,
        "limit": spec.evaluate.max_objects,
        "nms": args.nms,
        "agnostic": args.agnostic,
        "score": score if isinstance(score, list) else [0.5 if score == "auto" else score] * len(spec.data.classes),
        "outputs": {
            "probabilities": "(B, places, classes)",
            "boxes": "(B, places, 4): left, top, right, bottom in pixels of the input",
            "logits": "(B, places, classes)",
        },
    }


def agreement(outputs: dict[str, np.ndarray], others: dict[str, np.ndarray], spec: Recipe) -> float:
    """Of the places and classes that either of two graphs reports, the share that both do; 1 without any."""
    least = np.array(contract(spec, (0, 0))["score"])
    one, other = (values["probabilities"] >= least for values in (outputs, others))
    return float((one & other).sum() / (one | other).sum()) if (one | other).any() else 1.0


def right(outputs: dict[str, np.ndarray], item: dict[str, Any], spec: Recipe) -> None:
    """What is right is not a matter of single places: detections are compared by `agreement` alone."""
