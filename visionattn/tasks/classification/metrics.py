"""Classification metrics, all by torchmetrics: the same for every epoch and for held-out images.

Means over classes (or labels) are unweighted, over those that the images at hand can measure: recall, F1 and average
precision need images that have the class, AUROC images that have it and images that have not. A metric that no class
allows is None. Accuracy is the share of right images; for multi-label data, of right image-label pairs at the
threshold 0.5.
"""

import warnings
from typing import Any

import numpy as np
import torch
import torchmetrics.functional.classification as tm
from torch import Tensor
from torchmetrics import Metric as EpochMetric
from torchmetrics.utilities import dim_zero_cat

from visionattn.report.evaluation import LOSS, Metric
from visionattn.tasks.classification.labels import Labelling

__all__ = ["BINS", "METRICS", "Scores", "intervals", "measurable", "overall", "per_class"]

BINS = 15
METRICS = {
    "accuracy": Metric("accuracy", "images classified correctly", True),
    "top5": Metric("top-5 accuracy", "images whose class is among the five most probable", True),
    "balanced_accuracy": Metric("balanced accuracy", "mean recall of the classes", True),
    "f1": Metric("F1", "mean over the classes"),
    "auroc": Metric("AUROC", "mean over the classes, each against the rest"),
    "average_precision": Metric("average precision", "mean over the classes, each against the rest"),
    "calibration_error": Metric("calibration error", "mean distance of confidence from accuracy, in 15 bins", True),
} | LOSS
OF_CLASSES = ("precision", "recall", "f1", "auroc", "average_precision")


def measurable(targets: Tensor, classes: int) -> dict[str, Tensor]:
    """(K,) bool: which classes each mean over classes can be taken over."""
    has = targets > 0 if targets.ndim == 2 else targets[:, None] == torch.arange(classes, device=targets.device)
    positive, negative = has.any(0), (~has).any(0)
    return dict.fromkeys(("balanced_accuracy", "f1", "average_precision"), positive) | {"auroc": positive & negative}


def overall(probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Metrics of probabilities (N, K) against targets, int64 (N,) or 0/1 (N, K); NaN where no class allows one."""
    classes, several = probabilities.shape[1], targets.ndim == 2
    targets = targets.long()
    scores = _of_classes(probabilities, targets, ("recall", "f1", "auroc", "average_precision"))
    scores["balanced_accuracy"] = scores.pop("recall")
    measured = measurable(targets, classes)
    metrics = {name: _mean(name, score, measured[name]) for name, score in scores.items()}
    if several:
        metrics["accuracy"] = tm.multilabel_accuracy(probabilities, targets, classes, average="micro")
        pairs = probabilities.flatten(), targets.flatten()
        metrics["calibration_error"] = tm.binary_calibration_error(*pairs, n_bins=BINS)
    else:
        metrics["accuracy"] = tm.multiclass_accuracy(probabilities, targets, classes, average="micro")
        metrics["calibration_error"] = tm.multiclass_calibration_error(probabilities, targets, classes, n_bins=BINS)
        if classes > 5:
            metrics["top5"] = tm.multiclass_accuracy(probabilities, targets, classes, average="micro", top_k=5)
    return dict(sorted(metrics.items()))


def _of_classes(probabilities: Tensor, targets: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """(K,) each of these metrics for each class."""
    kind = "multilabel" if targets.ndim == 2 else "multiclass"
    functions = {name: getattr(tm, f"{kind}_{'f1_score' if name == 'f1' else name}") for name in names}
    with warnings.catch_warnings():  # of torchmetrics about the classes that means leave out
        warnings.filterwarnings(
            "ignore", "No (positive|negative) samples|Average precision score for one or more", UserWarning
        )
        return {
            name: f(probabilities, targets, probabilities.shape[1], average="none") for name, f in functions.items()
        }


def _mean(name: str, scores: Tensor, measured: Tensor) -> Tensor:
    """Over the measured classes, rounded as torchmetrics' own mean over all classes is."""
    if not measured.any():
        return scores.new_tensor(torch.nan)
    if name in ("auroc", "average_precision"):
        return scores[measured].mean()
    return (scores[measured] / measured.sum()).sum()


class Scores(EpochMetric):
    """`overall` of all that was seen in an epoch, by whichever process; `compute` leaves out what is not measured."""

    higher_is_better, full_state_update, is_differentiable = True, False, False
    probabilities: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        self.probabilities.append(probabilities)
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        scores = overall(dim_zero_cat(self.probabilities), dim_zero_cat(self.targets))
        return {name: score for name, score in scores.items() if not score.isnan()}


def per_class(probabilities: Tensor, targets: Tensor, labelling: Labelling) -> list[dict[str, Any]]:
    """A row for each class with its support; None where its images cannot measure a metric."""
    scores = {name: score.tolist() for name, score in _of_classes(probabilities, targets.long(), OF_CLASSES).items()}
    has = labelling.one_hot(targets.numpy())
    rows = []
    for k, name in enumerate(labelling.classes):
        support = int(has[:, k].sum())
        row: dict[str, Any] = {"class": name, "support": support}
        for metric, values in scores.items():
            measured = 0 < support < len(has) if metric == "auroc" else support > 0
            row[metric] = values[k] if measured else None
        rows.append(row)
    return rows


def intervals(
    name: str, probabilities: Tensor, targets: Tensor, groups: list[str], resamples: int
) -> dict[str, list[float]]:
    """The 95 % interval of a metric by the percentile bootstrap, whole groups drawn together.

    Empty without resamples, with a single group, which says nothing about others, and where nothing is measured.
    """
    names, member = np.unique(groups, return_inverse=True)
    if not resamples or len(names) < 2:
        return {}
    order = np.argsort(member, kind="stable")
    parts = [torch.from_numpy(part) for part in np.split(order, np.cumsum(np.bincount(member))[:-1])]
    grouped = len(parts) < len(member)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(resamples):
        drawn = torch.randint(len(parts), (len(parts),), generator=generator)
        rows = torch.cat([parts[g] for g in drawn.tolist()]) if grouped else drawn
        values.append(_one(name, probabilities[rows], targets[rows]))
    sample = torch.stack(values).double().numpy()
    if not np.isfinite(sample).any():
        return {}
    return {name: np.nanquantile(sample, [0.025, 0.975]).tolist()}


def _one(name: str, probabilities: Tensor, targets: Tensor) -> Tensor:
    classes = probabilities.shape[1]
    if name == "accuracy" and targets.ndim == 1:
        return (probabilities.argmax(1) == targets).float().mean()
    if name in ("auroc", "average_precision", "f1", "balanced_accuracy"):
        metric = "recall" if name == "balanced_accuracy" else name
        (score,) = _of_classes(probabilities, targets.long(), (metric,)).values()
        return _mean(name, score, measurable(targets, classes)[name])
    return overall(probabilities, targets)[name]
