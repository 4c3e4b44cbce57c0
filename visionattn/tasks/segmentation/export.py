"""What an exported segmenter computes, and what has to be known to use it."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from visionattn.data.colors import UNLABELLED, class_colors
from visionattn.data.labels import MaskCode
from visionattn.data.sample import IGNORE
from visionattn.inference.views import views
from visionattn.models.networks import arguments_of
from visionattn.tasks.graph import Graph
from visionattn.tasks.segmentation.recipe import Recipe
from visionattn.tasks.segmentation.task import Segmenter, counted

__all__ = ["HUB_TASK", "agreement", "contract", "graph", "made_by", "right", "size_of"]

HUB_TASK = "image-segmentation"  # what Hugging Face calls it


class _Graph(Graph):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(self.normalised(images))
        return (logits.float() / self.temperature).softmax(1), logits


def graph(task: Segmenter, spec: Recipe, temperature: float) -> Graph:
    """Images or tiles -> probabilities (B, K, H, W) and logits of the same shape."""
    return _Graph(task.network, spec.data.mean, spec.data.std, temperature)


def made_by(spec: Recipe) -> tuple[str, dict[str, Any]]:
    """Name and arguments by which timm makes the network."""
    model = spec.model
    return "va_segmenter", {
        "encoder_name": model.name,
        "decoder_name": model.decoder,
        "num_classes": len(spec.data.class_names),
        "in_chans": len(spec.data.mean),
        "encoder_args": arguments_of(model, spec.data.side),
        "decoder_args": model.decoder_args,
    }


def size_of(spec: Recipe) -> tuple[int, int]:
    """Height and width of what the network sees at most."""
    return spec.data.side


def contract(spec: Recipe, size: tuple[int, int]) -> dict[str, Any]:
    """How an image becomes inputs of the graph, and their probabilities a mask with the recipe's own values."""
    code = MaskCode.of(spec.data)
    colors = [color or (0, 0, 0) for color in class_colors(spec.data, counted(spec))]
    return {
        "classes": spec.data.class_names,
        "several_labels": False,
        "resize": spec.data.resize,
        "interpolation": "bilinear",
        "overlap": spec.evaluate.overlap,
        "blending": "Gaussian weights that sum to 1, sigma 1/8 tile; the outer quarter of what tiles share is left out",
        "views": [[view.turns, list(view.dims)] for view in views(spec.evaluate.tta, size[0] == size[1])],
        "mask_values": code.values,
        "palette": [list(color) for color in code.colors or [*colors, UNLABELLED]],
        "outputs": {"probabilities": "(B, classes, H, W)", "logits": "(B, classes, H, W), before the temperature"},
    }


def agreement(outputs: dict[str, np.ndarray], others: dict[str, np.ndarray], spec: Recipe) -> float:
    """Share of pixels to which two graphs give the same class."""
    one, other = (values["probabilities"].argmax(1) for values in (outputs, others))
    return float((one == other).mean())


def right(outputs: dict[str, np.ndarray], item: dict[str, Any], spec: Recipe) -> float | None:
    """Share of the labelled pixels of one item of the evaluation set that have their class, at the network's size.

    None without any, and of images that are cut into tiles.
    """
    found = outputs["probabilities"].argmax(1)[0]
    if spec.data.resize != "squash" or "mask" not in item:
        return None
    mask = F.interpolate(item["mask"][None, None].double(), found.shape, mode="nearest-exact")[0, 0].numpy()
    known = mask != IGNORE
    return float((found == mask)[known].mean()) if known.any() else None
