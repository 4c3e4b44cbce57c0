"""How far a classifier can be trusted: what is fitted on held-out images, and what is said of others."""

from collections.abc import Sequence

import numpy as np
import torch

from visionattn.data.sample import Sample
from visionattn.inference.uncertainty import (
    DISAGREEMENT,
    fit_temperature,
    least_of_sets,
    one_of_each_group,
)
from visionattn.recipe.sections import Fitted
from visionattn.tasks.base import Evidence
from visionattn.tasks.classification.recipe import Evaluate

__all__ = ["completed", "doubts_of", "set_of", "temperature"]

FAMILIAR = 0.95  # share of the validation images that count as like those trained on


def temperature(evidence: Sequence[Evidence]) -> float:
    """Of the least log loss."""
    targets = torch.cat([seen.targets for seen in evidence])
    return fit_temperature(torch.cat([seen.probabilities for seen in evidence]), targets, targets.ndim == 2)


def completed(fitted: Fitted, evidence: Sequence[Evidence], samples: Sequence[Sample], evaluate: Evaluate) -> Fitted:
    """With what calibrated probabilities (and distances) say, one image of each group."""
    drawn = one_of_each_group([samples[seen.index].group for seen in evidence])
    kept = [evidence[i] for i in drawn]
    more: dict[str, float] = {}
    if evaluate.conformal is not None:
        believed = np.array([seen.probabilities[0, int(seen.targets[0])].item() for seen in kept])
        more["least"] = least_of_sets(believed, evaluate.conformal)
    if evaluate.ood is not None:
        more["unfamiliar"] = float(np.quantile([seen.distance or 0.0 for seen in kept], FAMILIAR))
    return fitted.model_copy(update=more | {"images": len(kept)})


def doubts_of(evaluate: Evaluate, looks: int) -> list[str]:
    """What the doubts of a prediction are called.

    Args:
        looks: the number of predictions that its probabilities are the mean of.
    """
    known = evaluate.fitted is not None and evaluate.fitted.unfamiliar is not None
    return [*(DISAGREEMENT if looks > 1 else ()), *(("distance", "unfamiliar") if known else ())]


def set_of(probabilities: np.ndarray, classes: Sequence[str], evaluate: Evaluate) -> list[str] | None:
    """The classes that an image may be of, the likeliest first; None where nothing was promised of such sets."""
    if evaluate.fitted is None or evaluate.fitted.least is None:
        return None
    kept = np.flatnonzero(probabilities >= evaluate.fitted.least)
    return [classes[k] for k in kept[np.argsort(-probabilities[kept], kind="stable")]]
