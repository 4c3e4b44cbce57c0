"""How far predictions can be trusted: temperature, conformal sets and thresholds, disagreement, familiarity.

What is fitted here is fitted on images that no network has learned from, and is plain numbers.

- Temperature: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, https://arxiv.org/abs/1706.04599.
- Sets: split conformal prediction with the least ambiguous sets of Sadinle et al., JASA 2019,
  https://arxiv.org/abs/1609.00451.
- Thresholds of masks: conformal risk control, Angelopoulos et al., ICLR 2024, https://arxiv.org/abs/2208.02814.
- Familiarity: distance to the nearest training images, Sun et al., ICML 2022, https://arxiv.org/abs/2204.06507.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from visionattn.errors import UserError

__all__ = [
    "DISAGREEMENT",
    "cases_needed",
    "disagreement",
    "distance_to",
    "entropy",
    "fit_temperature",
    "least_of_sets",
    "one_of_each_group",
    "risk_coverage",
    "tempered",
    "threshold_of_cases",
]

LEAST = 1e-12  # probability
HOTTEST = 20.0  # temperature, and the coldest is its inverse
NEIGHBOURS = 10
DISAGREEMENT = ("entropy", "mutual_information")  # what is told of predictions that are means


def tempered(probabilities: Tensor, temperature: float, several: bool, dim: int = 1) -> Tensor:
    """Probabilities as they are with their logits divided by a temperature.

    Args:
        probabilities: classes along `dim`; means over views or networks too.
        several: of labels, each for itself, and not of classes that exclude each other.
    """
    if temperature == 1:
        return probabilities
    if several:
        return (probabilities.logit(LEAST) / temperature).sigmoid()
    return (probabilities.clamp_min(LEAST).log() / temperature).softmax(dim)


def fit_temperature(probabilities: Tensor, targets: Tensor, several: bool) -> float:
    """The temperature of the least log loss; 1 where none is better.

    Args:
        probabilities: (N, K), of temperature 1.
        targets: (N,) class numbers, or (N, K) of 0 and 1.
    """
    probabilities = probabilities.double()

    def loss(log_temperature: float) -> float:
        warm = tempered(probabilities, math.exp(log_temperature), several)
        if several:
            return F.binary_cross_entropy(warm, targets.double()).item()
        return F.nll_loss(warm.clamp_min(LEAST).log(), targets).item()

    limit = math.log(HOTTEST)
    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def cases_needed(error: float) -> int:
    """The fewest images from which anything can be promised for all but a share `error` of others."""
    return math.ceil((1 - error) / error)


def one_of_each_group(groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """An index from each group, drawn: only then does one image say of another group's what it says of its own."""
    order = np.random.default_rng(seed).permutation(len(groups))
    return np.sort(order[np.unique(np.asarray(groups)[order], return_index=True)[1]])


def least_of_sets(believed: np.ndarray, error: float) -> float:
    """The least probability that puts a class into the set of an image, so that sets lack the true class seldom.

    Args:
        believed: (N,) the probability of the true class of images of different groups.
        error: share of further images, from 0 to 1, whose set may lack it.

    Raises:
        UserError: too few images.
    """
    rank = math.ceil((len(believed) + 1) * (1 - error))
    if rank > len(believed):
        raise UserError(
            f"evaluate.conformal is {error:g}: for that {cases_needed(error)} images of different groups are needed, "
            f"but there are {len(believed)}"
        )
    return float(np.sort(believed)[len(believed) - rank])


def threshold_of_cases(missed: np.ndarray, thresholds: np.ndarray, error: float) -> float | None:
    """The highest threshold at which so little of a class is missed, in the mean over further cases.

    Args:
        missed: (cases, T) share of the pixels of the class below each threshold, growing along T.
        thresholds: (T,) growing.
        error: the share that may be missed.

    Returns:
        None where no threshold keeps that with so few cases.
    """
    cases = len(missed)
    kept = np.flatnonzero((missed.sum(0) + 1) / (cases + 1) <= error)
    return float(thresholds[kept[-1]]) if len(kept) else None


def entropy(probabilities: Tensor, several: bool, dim: int = 1) -> Tensor:
    """In nats, of classes along `dim`; of several labels the sum over these."""
    terms = torch.special.entr(probabilities)
    return (terms + torch.special.entr(1 - probabilities) if several else terms).sum(dim)


def disagreement(seen: Tensor, several: bool) -> Tensor:
    """(B, ...) the part of the entropy of the mean of predictions that none of them has; 0 where all say the same.

    It is the mutual information of prediction and network (or view), in nats.

    Args:
        seen: (M, B, K, ...) probabilities of M networks and views.
    """
    return (entropy(seen.mean(0), several) - entropy(seen, several, 2).mean(0)).clamp_min(0)


def distance_to(bank: Tensor, features: Tensor) -> Tensor:
    """(B,) cosine distance, from 0 to 2, of features (B, D) to their tenth nearest ones in a bank (N, D)."""
    near = F.normalize(features.float(), dim=1) @ F.normalize(bank.to(features.device).float(), dim=1).T
    return 1 - near.topk(min(NEIGHBOURS, len(bank)), dim=1).values[:, -1]


def risk_coverage(confidence: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The share of wrong predictions among the surest ones, as further ones are taken in.

    Returns:
        coverage (N,), risk (N,) and the area under them (AURC; Geifman et al., ICLR 2019), lower being better.
    """
    order = np.argsort(-confidence, kind="stable")
    taken = np.arange(1, len(order) + 1)
    risk = np.cumsum(wrong[order]) / taken
    return taken / len(order), risk, float(risk.mean())
