"""One class an image, or any number of labels: what the two kinds of classifier do differently, in one place."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.data.sample import Sample
from visionattn.errors import UserError

__all__ = ["WIDEST", "Labelling", "MultiLabel", "SingleLabel", "labelling_of", "probability_cells", "targets_of"]

THRESHOLD = 0.5  # of a label's probability
WIDEST = 100  # classes that a table has columns for
LIKELIEST = 5


class Labelling(ABC):
    """How logits become probabilities, probabilities decisions, and decisions names.

    Attributes:
        headline: the metric that stands for a run.
        loss: the training loss unless a recipe says otherwise.
        noun: of a thing that is decided, for reports.
        words: what an image has.
    """

    headline: str
    loss: str
    noun: str
    words: str

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) logits -> (B, K) probabilities."""

    @abstractmethod
    def decided(self, probabilities: np.ndarray) -> np.ndarray:
        """(..., K) probabilities -> targets as a data set has them."""

    @abstractmethod
    def name(self, target: np.ndarray | int) -> str:
        """The names of a target."""

    @abstractmethod
    def one_hot(self, targets: np.ndarray) -> np.ndarray:
        """(N, K) bool: which classes each of N targets has."""

    @abstractmethod
    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log likelihood."""

    @abstractmethod
    def surprise(self, probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) how sure each wrong prediction was, 0 of right ones, and what was believed of the truth."""

    def counts(self, samples: Sequence[Sample]) -> np.ndarray:
        """(K,) samples of each class."""
        return self.one_hot(np.array([sample.label for sample in samples])).sum(0)


class SingleLabel(Labelling):
    """One class an image."""

    headline, loss, noun, words = "accuracy", "cross_entropy", "image", "one class an image"

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)

    def decided(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(-1)

    def name(self, target: np.ndarray | int) -> str:
        return self.classes[int(target)]

    def one_hot(self, targets: np.ndarray) -> np.ndarray:
        return targets.reshape(-1, 1) == np.arange(len(self.classes))

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return -probabilities.gather(1, targets[:, None]).clamp_min(1e-12).log().mean()

    def surprise(self, probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wrong = probabilities.argmax(1) != targets
        return np.where(wrong, probabilities.max(1), 0), np.take_along_axis(probabilities, targets[:, None], 1)[:, 0]


class MultiLabel(Labelling):
    """Any number of labels an image."""

    headline, loss, noun, words = "auroc", "bce", "image-label pair", "several labels an image"

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def decided(self, probabilities: np.ndarray) -> np.ndarray:
        return (probabilities >= THRESHOLD).astype(np.float32)

    def name(self, target: np.ndarray | int) -> str:
        return ";".join(self.classes[i] for i in np.flatnonzero(target))

    def one_hot(self, targets: np.ndarray) -> np.ndarray:
        return targets > 0

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy(probabilities, targets)

    def surprise(self, probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wrong = np.abs(probabilities - targets).max(1)
        return np.where(wrong > THRESHOLD, wrong, 0), 1 - wrong


def labelling_of(classes: Sequence[str], several: bool) -> Labelling:
    """For images with several labels each, or with one class.

    Raises:
        UserError: a single class to tell apart.
    """
    if several:
        return MultiLabel(classes)
    if len(classes) < 2:
        raise UserError(f"data: only one class ({classes[0]}), at least 2 are needed to tell apart")
    return SingleLabel(classes)


def targets_of(samples: Sequence[Sample]) -> Tensor:
    """(N,) int64 class indices, or (N, K) float32 of 0 and 1."""
    labels = np.array([sample.label for sample in samples])
    return torch.from_numpy(labels if labels.ndim == 2 else labels.astype(np.int64))


def probability_cells(classes: Sequence[str], row: np.ndarray) -> dict[str, str]:
    """Cells with the probability of each class, or of more than `WIDEST` classes with the likeliest ones and theirs."""
    if len(row) <= WIDEST:
        return {f"p:{name}": f"{p:.6f}" for name, p in zip(classes, row, strict=True)}
    likeliest = np.argpartition(-row, LIKELIEST)[:LIKELIEST]
    ranked = likeliest[np.argsort(-row[likeliest], kind="stable")]
    cells = {f"top{n}": classes[k] for n, k in enumerate(ranked, 1)}
    return cells | {f"p{n}": f"{row[k]:.6f}" for n, k in enumerate(ranked, 1)}
