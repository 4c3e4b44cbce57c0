"""Losses of classification."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

__all__ = ["ClassificationLoss", "distillation"]


class ClassificationLoss(nn.Module):
    """Cross-entropy, binary cross-entropy or focal loss over class indices or (soft) label vectors.

    Args:
        name: "cross_entropy", "bce", or "focal" (Lin et al. 2017, eq. 4, a sigmoid per class).
        num_classes: length of the logits.
        label_smoothing: share of the target spread over the classes, in [0, 1).
        weights: `(num_classes,)` weight of each class, or None.
        gamma: focusing parameter of the focal loss.
    """

    weights: Tensor | None

    def __init__(
        self,
        name: str,
        num_classes: int,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.name, self.num_classes, self.label_smoothing, self.gamma = name, num_classes, label_smoothing, gamma
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits `(B, classes)` against labels int64 `(B,)` or float `(B, classes)`."""
        if self.name == "cross_entropy":
            return F.cross_entropy(logits, labels, weight=self.weights, label_smoothing=self.label_smoothing)
        targets = labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes)
        targets = targets.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        if self.name == "bce":
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weights)
        loss = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=self.gamma)
        return (loss if self.weights is None else loss * self.weights).sum(1).mean()


def distillation(student: Tensor, teacher: Tensor, temperature: float, several: bool) -> Tensor:
    """T^2 KL(teacher / T || student / T), the mean over images (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student, teacher: logits (B, classes).
        temperature: T.
        several: each class is a decision of its own, between it and 0; then the mean over classes too.
    """
    if several:
        student, teacher = (torch.stack([x, torch.zeros_like(x)], -1).flatten(0, 1) for x in (student, teacher))
    student, teacher = (F.log_softmax(x.float() / temperature, 1) for x in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
