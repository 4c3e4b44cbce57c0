"""The classification task: one step for training and validation, the losses, and prediction with views averaged."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from visionattn import recipe
from visionattn.data.datamodule import ClassificationDataModule
from visionattn.data.labelled import LabelledImages, find_labelled, prepare
from visionattn.errors import UserError
from visionattn.recipe import ClassificationRecipe
from visionattn.tasks.base import Task, make_network, own_statistics
from visionattn.tasks.classification.evaluation import evaluate_split
from visionattn.tasks.classification.metrics import headline, overall_metrics

__all__ = ["ClassificationLoss", "Classifier", "build", "evaluate_split", "labelled", "restore"]


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


def build(
    spec: ClassificationRecipe,
) -> tuple[ClassificationRecipe, LabelledImages, ClassificationDataModule, Classifier]:
    """The resolved recipe, its images, their loaders and the task, for `visionattn.fit`.

    Raises:
        UserError: anything that cannot be trained.
    """
    images, data = prepare(spec.data)
    seed_everything(spec.train.seed, verbose=False)
    size = data.image_size if isinstance(data.image_size, list) else [data.image_size] * 2
    network = make_network(spec.model, len(images.classes), data.channels, (size[0], size[1]))
    _check_takes(network, spec.model.name, (data.channels, *size))
    data = data.model_copy(update={"classes": images.classes} | own_statistics(spec, network, data.channels))
    spec = spec.model_copy(update={"data": data})
    loss = spec.loss.name or ("bce" if images.multi_label else "cross_entropy")
    if loss == "cross_entropy" and images.multi_label:
        raise UserError("loss.name is cross_entropy, but the images have several labels each; allowed: bce, focal")
    task = Classifier(
        network,
        ClassificationLoss(
            loss, len(images.classes), spec.loss.label_smoothing, _class_weights(spec, images, loss), spec.loss.gamma
        ),
        images.classes,
        images.multi_label,
        spec.evaluate.tta,
        optim=spec.optim,
        train=spec.train,
        freeze=spec.model.freeze,
        monitored=f"val/{spec.train.monitor or headline(images.multi_label)}",
        names=images.splits["train"].names.__getitem__,
        provenance={"format": 1, "recipe": recipe.dump(spec), "multi_label": images.multi_label},
    )
    return spec, images, ClassificationDataModule(images, data, spec.train.seed), task


def _check_takes(network: nn.Module, name: str, image: tuple[int, int, int]) -> None:
    """Refuse, before anything is trained, a network that fails on an image of this shape."""
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *image))
    except Exception as error:  # each model raises its own
        reason = str(error) or type(error).__name__
        shape = " x ".join(map(str, image))
        raise UserError(
            f"model {name} cannot take images of {shape} (data.channels, data.image_size): {reason}"
        ) from None
    network.train()


def restore(spec: ClassificationRecipe, about: dict[str, Any]) -> Classifier:
    """The task of a checkpoint without its weights, to evaluate and predict with."""
    start = spec.model.model_copy(update={"pretrained": False, "checkpoint": None})
    size = spec.data.image_size if isinstance(spec.data.image_size, list) else [spec.data.image_size] * 2
    classes = spec.data.classes
    return Classifier(
        make_network(start, len(classes), spec.data.channels, (size[0], size[1])),
        ClassificationLoss("bce" if about["multi_label"] else "cross_entropy", len(classes)),
        classes,
        about["multi_label"],
        spec.evaluate.tta,
        optim=spec.optim,
        train=spec.train.model_copy(update={"grad_checkpointing": False}),
        freeze=None,
        monitored="val/loss",
        names=str,
        provenance=about,
    )


def labelled(task: Classifier, spec: ClassificationRecipe, other: Path | None) -> ClassificationDataModule:
    """Images to evaluate on: the recipe's own, or others.

    Raises:
        UserError: they are not labelled as the recipe's.
    """
    images = find_labelled(spec.data, other)
    if images.multi_label != task.multi_label:
        kinds = {True: "several labels an image", False: "one class an image"}
        raise UserError(f"{other}: has {kinds[images.multi_label]}, the model gives {kinds[task.multi_label]}")
    return ClassificationDataModule(images, spec.data)


def _class_weights(spec: ClassificationRecipe, images: LabelledImages, loss: str) -> Tensor | None:
    """Given weights, or balanced ones: inverse frequency (cross-entropy, focal), negatives per positive (bce)."""
    wanted, labels = spec.loss.class_weights, images.splits["train"].labels
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = labels.sum(0) if images.multi_label else np.bincount(labels, minlength=len(images.classes))
        weights = (len(labels) - counts) / counts if loss == "bce" else counts.sum() / (len(counts) * counts)
        return torch.as_tensor(weights, dtype=torch.float32)
    if len(wanted) != len(images.classes):
        raise UserError(
            f"loss.class_weights has {len(wanted)} numbers, expected one for each of {len(images.classes)} classes"
        )
    return torch.tensor(wanted)
