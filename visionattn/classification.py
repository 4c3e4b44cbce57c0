"""The classification task: one step for training and validation, the losses, and prediction with views averaged."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from visionattn.metrics import overall_metrics
from visionattn.task import Task

__all__ = ["ClassificationLoss", "Classifier"]


class ClassificationLoss(nn.Module):
    """Cross-entropy, binary cross-entropy or focal loss over class indices or (soft) label vectors.

    Args:
        name: "cross_entropy", "bce", or "focal" (Lin et al. 2017, eq. 4, a sigmoid per class).
        num_classes: length of the logits.
        label_smoothing: share of the target spread over the classes, in [0, 1).
        weights: `(num_classes,)` weight of each class, or None.
        gamma: focusing parameter of the focal loss.
    """

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


class Classifier(Task):
    """A network that names what is in an image: one class, or any number of labels."""

    def __init__(
        self, network: nn.Module, loss: nn.Module, classes: list[str], multi_label: bool, tta: list[str], **task: Any
    ) -> None:
        super().__init__(network, **task)
        self.loss, self.multi_label, self.tta = loss, multi_label, tta
        self.val_metrics = overall_metrics(len(classes), multi_label).clone(prefix="val/")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch["image"]), batch["label"])
        self.check_finite(loss, batch, batch_idx)
        size = len(batch["image"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["image"])
        size = len(batch["image"])
        self.log("val/loss", self.loss(logits, batch["label"]), prog_bar=True, batch_size=size, sync_dist=True)
        self.val_metrics.update(self.probabilities(logits), batch["label"].long())
        self.log_dict(self.val_metrics, on_step=False, on_epoch=True, batch_size=size)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Probabilities `(B, classes)`, averaged over the views of test-time augmentation."""
        views = _views(batch["image"], self.tta)
        probabilities = torch.stack([self.probabilities(self(view)) for view in views]).mean(0)
        return {"probabilities": probabilities, **{k: v for k, v in batch.items() if k != "image"}}

    def probabilities(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)


def _views(image: Tensor, tta: list[str]) -> list[Tensor]:
    """The image and its mirrored or turned copies, every combination."""
    views = [image]
    for name in tta:
        if name == "rot90":
            views += [torch.rot90(view, k, (2, 3)) for view in views for k in (1, 2, 3)]
        else:
            views += [view.flip(3 if name == "hflip" else 2) for view in views]
    return views
