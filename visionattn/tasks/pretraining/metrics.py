"""What is measured of features without labels, and of features with a few: signs of collapse, neighbours, probes.

Features are (N, D) float32, a row for each image.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.report.evaluation import Metric

__all__ = ["METRICS", "collapsed", "colour_numbers", "knn", "linear", "nearest", "score", "signs"]

NEIGHBOURS = 20
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREAD, COSINE, RATIO = 0.1, 0.95, 0.95  # beyond these something is wrong
METRICS = {
    "linear": Metric("linear probe", "right with logistic regression on the last features", True),
    "linear_all": Metric("linear probe, all stages", "the same on the features of all stages together", True),
    "knn": Metric(
        "nearest neighbours", f"right by the {NEIGHBOURS} labelled images with the nearest last features", True
    ),
    "knn_all": Metric("nearest neighbours, all stages", "the same by the features of all stages together", True),
    "ratio": Metric("share of the mean's error", "error of hidden pixels over that of predicting the mean"),
    "loss": Metric("loss", "error of hidden pixels, in standard deviations of the data"),
    "spread": Metric("spread", f"of the features on the sphere, 1 where they fill it; below {SPREAD} they collapse"),
    "cosine": Metric("mean cosine", f"between the features of two images; above {COSINE} all look alike"),
    "rankme": Metric("effective rank", "of the features (RankMe), to be compared within a run"),
    "epoch": Metric("epoch", "the last one is taken, since the loss of two views tells nothing"),
}


def signs(features: Tensor) -> dict[str, float]:
    """Spread sqrt(D) mean_d std(f_d / |f|), mean cosine between images, effective rank (RankMe, arXiv 2210.02885)."""
    features = features.double()
    unit = F.normalize(features, dim=1)
    count = len(unit)
    spread = math.sqrt(unit.shape[1]) * unit.std(0, unbiased=False).mean().item()
    cosine = (unit.sum(0).square().sum().item() - unit.square().sum().item()) / max(count * (count - 1), 1)
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp_min(1e-12) + 1e-12
    return {"spread": spread, "cosine": cosine, "rankme": (-(shares * shares.log()).sum()).exp().item()}


def collapsed(values: dict[str, float | None], trained: float) -> list[str]:
    """What is wrong with features whose signs these are, a line each.

    Args:
        values: by the names of METRICS; a missing one says nothing.
        trained: share of the epochs.
    """
    spread, cosine, ratio = (values.get(name) for name in ("spread", "cosine", "ratio"))
    lines = []
    if spread is not None and spread < SPREAD:
        lines.append(f"the features hardly differ: spread {spread:.3f}, expected at least {SPREAD}")
    if cosine is not None and cosine > COSINE:
        lines.append(f"all images look alike to the network: mean cosine {cosine:.3f}, expected at most {COSINE}")
    if ratio is not None and ratio > RATIO and trained >= 0.1:
        lines.append(
            f"hidden pixels are hardly predicted: {ratio:.2f} of the error of the mean, expected below {RATIO}"
        )
    return lines


def nearest(features: Tensor, queries: list[int], count: int) -> list[list[int]]:
    """Of each query the images whose features are nearest by their cosine, without itself."""
    unit = F.normalize(features.float(), dim=1)
    cosine = unit[queries] @ unit.T
    cosine[torch.arange(len(queries)), queries] = -math.inf
    return cosine.topk(min(count, len(unit) - 1), 1).indices.tolist()


def knn(bank: Tensor, labels: np.ndarray, features: Tensor) -> np.ndarray:
    """(N, K) shares of the classes among the NEIGHBOURS nearest bank images by cosine; equal shares by similarity.

    Args:
        bank: (M, D), with labels (M, K) of 0 and 1.
        features: (N, D).
    """
    cosine = F.normalize(features.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    near, places = cosine.topk(min(NEIGHBOURS, len(bank)), 1)
    weights = 1 + 1e-6 * near
    return (weights[..., None] * torch.from_numpy(labels).double()[places]).mean(1).numpy()


def linear(bank: Tensor, labels: np.ndarray, features: Tensor) -> np.ndarray:
    """(N, K) probabilities of a logistic regression on standardised features; arguments as of `knn`."""
    from sklearn.linear_model import LogisticRegression

    mean, std = bank.double().mean(0), bank.double().std(0, unbiased=False)
    seen, new = (((x.double() - mean) / (std + 1e-6)).numpy() for x in (bank, features))
    if (labels.sum(1) == 1).all():
        known = labels.argmax(1)
        if len(np.unique(known)) == 1:
            return np.tile(labels[:1].astype(float), (len(new), 1))
        model = LogisticRegression(max_iter=500).fit(seen, known)
        result = np.zeros((len(new), labels.shape[1]))
        result[:, model.classes_] = model.predict_proba(new)
        return result
    columns = [
        LogisticRegression(max_iter=500).fit(seen, column).predict_proba(new)[:, 1]
        if 0 < column.sum() < len(column)
        else np.full(len(new), column.mean())
        for column in labels.T
    ]
    return np.stack(columns, 1)


def score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy where images have one class each, else the mean AUROC of the labels that some have and some lack."""
    if (labels.sum(1) == 1).all():
        return float((probabilities.argmax(1) == labels.argmax(1)).mean())
    from sklearn.metrics import roc_auc_score

    rated = [k for k, column in enumerate(labels.T) if 0 < column.sum() < len(column)]
    return float(np.mean([roc_auc_score(labels[:, k], probabilities[:, k]) for k in rated])) if rated else math.nan


def colour_numbers(images: Tensor) -> Tensor:
    """(B, 7 C) of images (B, C, H, W): mean, standard deviation and five quantiles of each channel."""
    values = images.flatten(2)
    quantiles = torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64, device=images.device), 2)
    return torch.cat([values.mean(2), values.std(2), *quantiles.float()], 1)
