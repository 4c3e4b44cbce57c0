"""Classification metrics, the same for every epoch and for held-out images, quick for 1000 classes too.

Means over classes (or labels) are unweighted, over those that the images at hand can measure: recall, F1 and average
precision need images that have the class, AUROC images that have it and images that have not. A metric that no class
allows is None. Accuracy is the share of right images; for multi-label data, of right image-label pairs at the
threshold 0.5.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchmetrics.functional.classification as tm
from torch import Tensor
from torchmetrics import Metric as EpochMetric
from torchmetrics.utilities import dim_zero_cat

from visionattn.report.evaluation import LOSS, Metric
from visionattn.tasks.classification.labels import Labelling

__all__ = ["BINS", "METRICS", "Scores", "binned", "interval", "measurable", "of_classes", "overall", "per_class"]

BINS = 15
METRICS = {
    "accuracy": Metric("accuracy", "images classified correctly", True),
    "top5": Metric("top-5 accuracy", "images whose class is among the five most probable", True),
    "balanced_accuracy": Metric("balanced accuracy", "mean recall of the classes", True),
    "f1": Metric("F1", "mean over the classes"),
    "auroc": Metric("AUROC", "mean over the classes, each against the rest"),
    "average_precision": Metric("average precision", "mean over the classes, each against the rest"),
    "calibration_error": Metric("calibration error", "mean distance of confidence from accuracy, in 15 bins", True),
    "aurc": Metric("AURC", "area under risk over coverage: mistakes among the surest images, lower is better"),
} | LOSS
OF_CLASSES = ("precision", "recall", "f1", "auroc", "average_precision")
SORTED = 2e7  # probabilities that are sorted at the end of every epoch; of more, only if that is what is monitored
AT_ONCE = 2**22  # weights of a chunk of resamples


def measurable(targets: Tensor, classes: int) -> dict[str, Tensor]:
    """(K,) bool: which classes each mean over classes can be taken over."""
    has = _has(targets, classes)
    positive, negative = has.any(0), (~has).any(0)
    return dict.fromkeys(("balanced_accuracy", "f1", "average_precision"), positive) | {"auroc": positive & negative}


def _has(targets: Tensor, classes: int) -> Tensor:
    """(N, K) bool: which image has which class."""
    return targets > 0 if targets.ndim == 2 else targets[:, None] == torch.arange(classes, device=targets.device)


def of_classes(probabilities: Tensor, targets: Tensor, ranked: bool = True) -> dict[str, Tensor]:
    """(K,) each metric of OF_CLASSES for each class; without `ranked` those that need no sorting."""
    kind, classes = "multilabel" if targets.ndim == 2 else "multiclass", probabilities.shape[1]
    scores = {
        name: getattr(tm, f"{kind}_{'f1_score' if name == 'f1' else name}")(
            probabilities, targets.long(), classes, average="none"
        )
        for name in ("precision", "recall", "f1")
    }
    if not ranked:
        return scores
    columns, has = probabilities.cpu().numpy().T, _has(targets, classes).cpu().numpy().T
    areas = torch.tensor([_areas(*pair) for pair in zip(columns, has, strict=True)], device=probabilities.device)
    return scores | {"auroc": areas[:, 0], "average_precision": areas[:, 1]}


def _areas(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Areas under the ROC curve and, by steps, the precision-recall curve, of (N,) images; NaN where there is none.

    Images of equal scores are passed at once (as in scikit-learn).
    """
    order, ends = _ranking(scores)
    true, seen = np.cumsum(positive[order])[ends], ends + 1
    rises, falses = np.diff(true, prepend=0), np.diff(seen - true, prepend=0)
    with np.errstate(invalid="ignore"):
        roc = np.divide(falses @ (true - rises / 2), true[-1] * (seen - true)[-1])
        return float(roc), float(np.divide(rises @ (true / seen), true[-1]))


def _ranking(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of falling scores, and the last place of each run of equal ones in it."""
    scores = np.ascontiguousarray(scores)
    order = np.argsort(-scores)
    falling = scores[order]
    return order, np.flatnonzero(np.append(falling[1:] != falling[:-1], True))


def overall(probabilities: Tensor, targets: Tensor, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of probabilities (N, K) against targets, int64 (N,) or 0/1 (N, K); NaN where no class allows one.

    Args:
        scores: of the classes, see `of_classes`.
    """
    classes, several = probabilities.shape[1], targets.ndim == 2
    targets = targets.long()
    measured = measurable(targets, classes)
    of_mean = {"balanced_accuracy": "recall"} | {name: name for name in measured if name in scores}
    metrics = {name: _mean(scores[of], measured[name]) for name, of in of_mean.items()}
    if several:
        metrics["accuracy"] = tm.multilabel_accuracy(probabilities, targets, classes, average="micro")
        pairs = probabilities.flatten(), targets.flatten()
        metrics["calibration_error"] = tm.binary_calibration_error(*pairs, n_bins=BINS)
    else:
        metrics["accuracy"] = tm.multiclass_accuracy(probabilities, targets, classes, average="micro")
        metrics["calibration_error"] = tm.multiclass_calibration_error(probabilities, targets, classes, n_bins=BINS)
        if classes > 5:
            metrics["top5"] = (probabilities.topk(5).indices == targets[:, None]).any(1).float().mean()
    return dict(sorted(metrics.items()))


def _mean(scores: Tensor, measured: Tensor) -> Tensor:
    return scores[measured].mean() if measured.any() else scores.new_tensor(torch.nan)


class Scores(EpochMetric):
    """`overall` of all that was seen in an epoch, by whichever process; `compute` leaves out what is not measured.

    Args:
        ranked: AUROC and average precision are wanted, however many images and classes there are.
    """

    higher_is_better, full_state_update, is_differentiable = True, False, False
    probabilities: list[Tensor]
    targets: list[Tensor]

    def __init__(self, ranked: bool = True) -> None:
        super().__init__()
        self.ranked = ranked
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        self.probabilities.append(probabilities)
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        probabilities, targets = dim_zero_cat(self.probabilities), dim_zero_cat(self.targets)
        ranked = self.ranked or probabilities.numel() <= SORTED
        scores = overall(probabilities, targets, of_classes(probabilities, targets, ranked))
        return {name: score for name, score in scores.items() if not score.isnan()}


def binned(right: np.ndarray, belief: np.ndarray) -> np.ndarray:
    """(3, BINS): number, summed probability, and how many came true."""
    place = np.minimum((belief * BINS).astype(int), BINS - 1)
    return np.stack([np.bincount(place, weights, BINS) for weights in (np.ones_like(belief), belief, right)])


def per_class(scores: dict[str, Tensor], targets: Tensor, labelling: Labelling) -> list[dict[str, Any]]:
    """A row for each class with its support; None where its images cannot measure a metric."""
    columns = {name: scores[name].tolist() for name in OF_CLASSES}
    has = labelling.one_hot(targets.numpy())
    rows = []
    for k, (name, support) in enumerate(zip(labelling.classes, has.sum(0).tolist(), strict=True)):
        row: dict[str, Any] = {"class": name, "support": support}
        for metric, values in columns.items():
            measured = 0 < support < len(has) if metric == "auroc" else support > 0
            row[metric] = values[k] if measured else None
        rows.append(row)
    return rows


def interval(probabilities: Tensor, targets: Tensor, groups: Sequence[str], resamples: int) -> list[float] | None:
    """The 95 % interval of accuracy, of several labels of AUROC, by the percentile bootstrap of whole groups.

    None without resamples, with a single group, which says nothing about others, and where nothing is measured.
    """
    names, member = np.unique(groups, return_inverse=True)
    if not resamples or len(names) < 2:
        return None
    rng, several = np.random.default_rng(0), targets.ndim == 2
    value = _weighted_auroc(probabilities, targets) if several else _weighted_accuracy(probabilities, targets)
    step = max(1, AT_ONCE // len(member))
    sample = np.concatenate(
        [value(_drawn(len(names), min(step, resamples - n), rng)[:, member]) for n in range(0, resamples, step)]
    )
    return np.nanquantile(sample, [0.025, 0.975]).tolist() if np.isfinite(sample).any() else None


def _drawn(groups: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, groups) how often each group is drawn, as many as there are, with replacement."""
    return np.stack([np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(resamples)])


def _weighted_accuracy(probabilities: Tensor, targets: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """Of weights (R, N) the accuracies (R,)."""
    right = (probabilities.argmax(1) == targets).double().numpy()
    return lambda weights: (weights @ right) / weights.sum(1)


def _weighted_auroc(probabilities: Tensor, targets: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """Of weights (R, N) the mean AUROC (R,) over the labels that the weighted images can measure."""
    has = targets.numpy().T > 0
    kept = [k for k, positive in enumerate(has) if positive.any() and not positive.all()]
    ranked = [(has[k], *_ranking(probabilities[:, k].numpy())) for k in kept]

    def value(weights: np.ndarray) -> np.ndarray:
        total, labels = np.zeros(len(weights)), np.zeros(len(weights))
        for positive, order, ends in ranked:
            falling = weights[:, order]
            true = np.cumsum(falling * positive[order], axis=1)[:, ends]
            false = np.cumsum(falling, axis=1)[:, ends] - true
            rises, pairs = np.diff(true, prepend=0, axis=1), true[:, -1] * false[:, -1]
            area = (np.diff(false, prepend=0, axis=1) * (true - rises / 2)).sum(1)
            total += np.divide(area, pairs, out=np.zeros(len(pairs)), where=pairs > 0)
            labels += pairs > 0
        return np.divide(total, labels, out=np.full(len(labels), np.nan), where=labels > 0)

    return value
