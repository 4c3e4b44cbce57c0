"""How far a segmenter can be trusted: what is fitted on held-out images."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from visionattn.data.sample import Sample
from visionattn.inference.uncertainty import (
    DISAGREEMENT,
    fit_temperature,
    one_of_each_group,
    threshold_of_cases,
)
from visionattn.recipe.sections import Fitted
from visionattn.tasks.base import Evidence
from visionattn.tasks.segmentation.recipe import Evaluate

__all__ = [
    "PIXELS",
    "bounds_of",
    "completed",
    "counts_by_belief",
    "doubts_of",
    "missed",
    "temperature",
]

PIXELS = 1000  # of a part of an image
BINS = 1000  # of a probability


def bounds_of(fitted: Fitted | None) -> list[tuple[int, float]]:
    """The classes of which it is known from which probability on a pixel may be of them, and this probability."""
    thresholds = (fitted.thresholds if fitted else None) or []
    return [(k, threshold) for k, threshold in enumerate(thresholds) if threshold is not None]


def doubts_of(classes: Sequence[str], fitted: Fitted | None, looks: int) -> list[str]:
    """What the maps of doubts of a prediction are called, in names of files too.

    Args:
        looks: the number of predictions that its probabilities are the mean of.
    """
    may_be = [f"may_be_{k}_{re.sub(r'[^0-9A-Za-z-]+', '_', classes[k])}" for k, _ in bounds_of(fitted)]
    return [*(DISAGREEMENT if looks > 1 else DISAGREEMENT[:1]), *may_be]


def missed(probabilities: Tensor, truth: Tensor, bounds: Sequence[tuple[int, float]]) -> np.ndarray:
    """(K, 2) int64: of the pixels of each class, those held less probable than its bound, and all.

    Args:
        probabilities: (K, H, W).
        truth: (H, W) class numbers.
        bounds: of some classes, see `bounds_of`.
    """
    counts = np.zeros((len(probabilities), 2), np.int64)
    for k, bound in bounds:
        of_class = probabilities[k][truth == k]
        counts[k] = int((of_class < bound).sum()), of_class.numel()
    return counts


def temperature(evidence: Sequence[Evidence]) -> float:
    """Of the least log loss over the drawn pixels, every part of an image counting by how many were drawn of it."""
    targets = torch.cat([seen.targets for seen in evidence])
    return fit_temperature(torch.cat([seen.probabilities for seen in evidence]), targets, several=False)


def counts_by_belief(probabilities: Tensor, targets: Tensor) -> Tensor:
    """(K, BINS) int64: of the pixels of each class, how many are held that probably to be of it.

    Args:
        probabilities: (N, K).
        targets: (N,) class numbers.
    """
    classes = probabilities.shape[1]
    targets = targets.long()
    believed = probabilities.gather(1, targets[:, None])[:, 0]
    place = (believed * BINS).long().clamp_(0, BINS - 1)
    return torch.bincount(targets * BINS + place, minlength=classes * BINS).reshape(classes, BINS)


def completed(fitted: Fitted, evidence: Sequence[Evidence], samples: Sequence[Sample], evaluate: Evaluate) -> Fitted:
    """With the threshold of each class above which enough of it lies, from one case of each group."""
    if evaluate.conformal is None:
        return fitted
    of_cases: dict[str, Tensor] = {}
    for seen in evidence:
        assert seen.counts is not None
        case = samples[seen.index].case
        of_cases[case] = of_cases[case] + seen.counts if case in of_cases else seen.counts
    groups = {sample.case: sample.group for sample in samples}
    names = list(of_cases)
    kept = [names[i] for i in one_of_each_group([groups[name] for name in names])]
    counts = torch.stack([of_cases[name] for name in kept]).numpy()
    edges = np.arange(BINS) / BINS  # a pixel is at or above an edge, or in a bin below it
    thresholds = []
    for k in range(counts.shape[1]):
        has = counts[counts[:, k].sum(1) > 0, k]
        below = np.cumsum(has, axis=1) - has
        missed = below / np.maximum(has.sum(1, keepdims=True), 1)
        thresholds.append(threshold_of_cases(missed, edges, evaluate.conformal) or None)
    return fitted.model_copy(update={"thresholds": thresholds, "images": len(kept)})
