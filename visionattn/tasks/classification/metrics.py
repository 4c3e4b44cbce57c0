"""Classification metrics, all by torchmetrics: one set for every epoch, a fuller one for held-out images.

Macro means the unweighted mean over classes (or labels). Accuracy is the share of right images; for multi-label data,
of right image-label pairs at the threshold 0.5.
"""

import math
from typing import Any

import torch
import torchmetrics.classification as tm
from torch import Tensor
from torchmetrics import Metric, MetricCollection

__all__ = ["evaluate_predictions", "headline", "overall_metrics"]


def headline(multi_label: bool) -> str:
    """The metric that stands for a run."""
    return "auroc" if multi_label else "accuracy"


class _LabelCalibrationError(tm.BinaryCalibrationError):
    """Calibration error over all image-label pairs; torchmetrics has none for multi-label data."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.flatten(), target.flatten())


def overall_metrics(num_classes: int, multi_label: bool) -> MetricCollection:
    """Metrics of probabilities `(N, num_classes)` against labels: int64 `(N,)`, or int64 0/1 `(N, num_classes)`."""
    if multi_label:
        return MetricCollection(
            {
                "accuracy": tm.MultilabelAccuracy(num_classes, average="micro"),
                "balanced_accuracy": tm.MultilabelRecall(num_classes, average="macro"),
                "f1": tm.MultilabelF1Score(num_classes, average="macro"),
                "auroc": tm.MultilabelAUROC(num_classes, average="macro"),
                "average_precision": tm.MultilabelAveragePrecision(num_classes, average="macro"),
                "calibration_error": _LabelCalibrationError(n_bins=15),
            }
        )
    metrics = {
        "accuracy": tm.MulticlassAccuracy(num_classes, average="micro"),
        "balanced_accuracy": tm.MulticlassAccuracy(num_classes, average="macro"),
        "f1": tm.MulticlassF1Score(num_classes, average="macro"),
        "auroc": tm.MulticlassAUROC(num_classes, average="macro"),
        "average_precision": tm.MulticlassAveragePrecision(num_classes, average="macro"),
        "calibration_error": tm.MulticlassCalibrationError(num_classes, n_bins=15),
    }
    if num_classes > 5:
        metrics["top5"] = tm.MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics)


def evaluate_predictions(probabilities: Tensor, labels: Tensor, classes: list[str], resamples: int) -> dict[str, Any]:
    """Everything reported about predictions on held-out images, as plain data.

    Args:
        probabilities: `(N, classes)` float.
        labels: int64 `(N,)`, or 0/1 `(N, classes)` for multi-label data.
        classes: the class names.
        resamples: bootstrap resamples behind the 95 % interval of the headline metric; 0 gives no interval.

    Returns:
        `overall` (name -> value), `interval`, `per_class` (rows with support; None where a value is undefined, as the
        AUROC of a class without images) and `confusion` (classes x classes counts, a row per true class; for
        multi-label data one [[tn, fp], [fn, tp]] per label).
    """
    multi_label = labels.ndim == 2
    labels = labels.long()
    overall = overall_metrics(len(classes), multi_label)
    scores = {name: value.item() for name, value in overall(probabilities, labels).items()}
    interval = None
    if resamples:
        low, high = _interval(overall[headline(multi_label)], probabilities, labels, resamples)
        interval = {"metric": headline(multi_label), "low": low, "high": high, "level": 0.95, "resamples": resamples}
    return {
        "overall": scores,
        "interval": interval,
        "per_class": _per_class(probabilities, labels, classes),
        "confusion": _confusion(probabilities, labels).tolist(),
    }


def _interval(metric: Metric, probabilities: Tensor, labels: Tensor, resamples: int) -> tuple[float, float]:
    """Percentile bootstrap. torchmetrics' BootStrapper would keep every resample's predictions at once."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(resamples):
        draw = torch.randint(len(labels), (len(labels),), generator=generator)
        metric.reset()
        metric.update(probabilities[draw], labels[draw])
        values.append(metric.compute())
    low, high = torch.stack(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _per_class(probabilities: Tensor, labels: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    multi_label = labels.ndim == 2
    kind, count = ("Multilabel", "num_labels") if multi_label else ("Multiclass", "num_classes")
    names = {
        "precision": "Precision",
        "recall": "Recall",
        "f1": "F1Score",
        "auroc": "AUROC",
        "average_precision": "AveragePrecision",
    }
    metrics = MetricCollection(
        {key: getattr(tm, kind + name)(**{count: len(classes)}, average="none") for key, name in names.items()}
    )
    values = {key: value.tolist() for key, value in metrics(probabilities, labels).items()}
    support = labels.sum(0) if multi_label else labels.bincount(minlength=len(classes))
    rows = []
    for i, name in enumerate(classes):
        row = {"class": name, "support": int(support[i])}
        for key, value in values.items():
            row[key] = value[i] if 0 < support[i] < len(labels) and math.isfinite(value[i]) else None
        rows.append(row)
    return rows


def _confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return tm.MultilabelConfusionMatrix(labels.shape[1])(probabilities, labels)
    return tm.MulticlassConfusionMatrix(probabilities.shape[1])(probabilities, labels)
