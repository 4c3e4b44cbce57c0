"""Losses of segmentation over labelled pixels, for one output or for all outputs of a decoder.

Each takes logits (B, K, H, W), or a list of such from `forward_deep`, and labels (B, H, W) of class numbers. Pixels
that are labelled `ignore_index` are taken out before anything is computed: neither the loss nor a gradient depends on
them. Where no pixel is labelled the loss is 0. Region losses count a class over the whole batch, and only if it has
pixels there.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.data.sample import IGNORE
from visionattn.errors import UserError, nearest

__all__ = ["LOSSES", "SegmentationLoss", "balanced_weights", "make_loss"]


class SegmentationLoss(nn.Module):
    """The sum of a loss over the outputs of a decoder.

    A subclass has `pixel_loss`, which sees labelled pixels only.

    Args:
        ignore_index: number of unlabelled pixels.
        class_weights: (K,) or None.
    """

    class_weights: Tensor | None
    pixel_loss: Callable[..., Tensor]  # logits (P, K) and `targets` of P > 0 pixels -> a scalar

    def __init__(self, ignore_index: int = IGNORE, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            outputs: logits (B, K, H, W), one tensor or several.
            labels: (B, H, W), whole numbers: 0 to K - 1 or ignore_index.
        """
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        for logits in outputs:
            if logits.ndim != 4 or (logits.shape[0], *logits.shape[2:]) != tuple(labels.shape):
                raise ValueError(
                    f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: "
                    "expected (B, K, H, W) and (B, H, W)"
                )
        labelled = labels != self.ignore_index
        pixels = [logits.movedim(1, -1)[labelled] for logits in outputs]
        pixels = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in pixels]
        if not len(pixels[0]):
            return torch.cat(pixels).sum()
        targets = self.targets(labels.long(), labelled)
        first, *others = (self.pixel_loss(logits, *targets) for logits in self.combine(pixels))
        return sum(others, first)

    def combine(self, outputs: list[Tensor]) -> list[Tensor]:
        """The logits to be supervised, of the outputs' logits."""
        return outputs

    def targets(self, labels: Tensor, labelled: Tensor) -> tuple[Tensor, ...]:
        """What `pixel_loss` gets beside logits: the labels (P,) of labelled pixels first."""
        return (labels[labelled],)

    def weights(self, logits: Tensor) -> Tensor | None:
        """The class weights in the type of the logits, whatever the model around this was cast to."""
        return None if self.class_weights is None else self.class_weights.to(logits)


class CrossEntropy(SegmentationLoss):
    """Cross-entropy, the mean over pixels weighted by the weight of their class."""

    def pixel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, self.weights(logits))


class Focal(SegmentationLoss):
    """Cross-entropy times (1 - p)^gamma, p the softmax probability of the label (Lin et al. 2017, arXiv 1708.02002)."""

    def __init__(self, gamma: float = 2.0, **common) -> None:
        super().__init__(**common)
        self.gamma = gamma

    def pixel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, labels, reduction="none")
        focal = (-torch.expm1(-entropy)).clamp_min(1e-7) ** self.gamma * entropy  # 0 ** gamma may have no gradient
        if self.class_weights is None:
            return focal.mean()
        weights = self.class_weights[labels]
        return (focal * weights).sum() / weights.sum()


class Tversky(SegmentationLoss):
    """1 - TP / (TP + alpha FP + (1 - alpha) FN) of softmax probabilities, the mean over the classes.

    Salehi et al. 2017, arXiv 1706.05721; with alpha 0.5 it is the Dice loss (Milletari et al. 2016). Class weights
    weigh the mean over the classes.
    """

    def __init__(self, alpha: float = 0.5, **common) -> None:
        super().__init__(**common)
        self.tversky = smp.TverskyLoss("multiclass", alpha=alpha, beta=1 - alpha, class_weights=self.class_weights)

    def pixel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.tversky(logits.T[None], labels[None]) * _all_over_present(logits, labels, self.weights(logits))


class Lovasz(SegmentationLoss):
    """The Lovasz-softmax loss, a surrogate of the Jaccard index (Berman et al. 2018, arXiv 1705.08790)."""

    def __init__(self, **common) -> None:
        super().__init__(**common)
        self.lovasz = smp.LovaszLoss("multiclass")

    def pixel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.lovasz(logits.float().T[None, :, :, None], labels[None, :, None])  # theirs is for float32 only


class DiceCrossEntropy(SegmentationLoss):
    """ce_weight x cross-entropy + dice_weight x Dice loss; class weights are those of the cross-entropy."""

    def __init__(self, ce_weight: float = 1.0, dice_weight: float = 1.0, **common) -> None:
        super().__init__(**common)
        self.ce_weight, self.dice_weight = ce_weight, dice_weight
        self.dice = smp.DiceLoss("multiclass")

    def pixel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, labels, self.weights(logits))
        dice = self.dice(logits.T[None], labels[None]) * _all_over_present(logits, labels)
        return self.ce_weight * entropy + self.dice_weight * dice


class Mutation(DiceCrossEntropy):
    """Dice and cross-entropy of every sum of outputs: EMCAD's loss for several classes (arXiv 2405.06880).

    The logits of each non-empty subset of the outputs are added, and all 2^n - 1 losses are summed: 15 of four heads.
    """

    def combine(self, outputs: list[Tensor]) -> list[Tensor]:
        sizes = range(1, len(outputs) + 1)
        return [sum(subset[1:], subset[0]) for size in sizes for subset in combinations(outputs, size)]


class Boundary(SegmentationLoss):
    """Cross-entropy + IoU loss whose pixels weigh up to six times as much near borders between classes.

    The pixel position aware loss of F3Net (Wei et al. 2020, arXiv 1911.11445), with which EMCAD and other networks for
    polyps are trained, for any number of classes: a pixel's weight is 1 + 5 x (share of another class among the
    labelled pixels of the 31 x 31 around it). Class weights weigh the pixels of the cross-entropy too.
    """

    def targets(self, labels: Tensor, labelled: Tensor) -> tuple[Tensor, ...]:
        numbers = labels[labelled]
        maps = F.one_hot(torch.where(labelled, labels, 0), int(numbers.max()) + 1).movedim(-1, 1)
        maps = maps.float() * labelled[:, None]
        near = F.avg_pool2d(maps, (31, 1), 1, (15, 0))
        near = F.avg_pool2d(near, (1, 31), 1, (0, 15))
        same = (near * maps).sum(1)[labelled] / near.sum(1)[labelled]
        return numbers, 1 + 5 * (1 - same)

    def pixel_loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, labels, reduction="none")
        total = weights if self.class_weights is None else weights * self.class_weights[labels]
        probabilities, truth = logits.softmax(1), F.one_hot(labels, logits.shape[1])
        overlap = (probabilities * truth * weights[:, None]).sum(0)
        union = ((probabilities + truth - probabilities * truth) * weights[:, None]).sum(0)
        iou = (overlap / union)[truth.any(0)]
        return (entropy * total).sum() / total.sum() + 1 - iou.mean()


def _all_over_present(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What turns smp's mean over all classes, where absent ones count 0, into the mean over those that have pixels."""
    weights = logits.new_ones(logits.shape[1]) if weights is None else weights
    return weights.sum() / weights[labels.unique()].sum()


LOSSES = {
    "ce": CrossEntropy,
    "dice": Tversky,
    "dice_ce": DiceCrossEntropy,
    "focal": Focal,
    "tversky": Tversky,
    "lovasz": Lovasz,
    "boundary": Boundary,
    "mutation": Mutation,
}


def make_loss(
    name: str,
    num_classes: int,
    class_weights: Sequence[float] | None = None,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    gamma: float = 2.0,
    alpha: float = 0.3,
    ignore_index: int = IGNORE,
) -> SegmentationLoss:
    """A loss by name; arguments of other losses are not looked at.

    Args:
        name: one of `LOSSES`.
        num_classes: K.
        class_weights: (K,), positive, of the cross-entropy and focal terms, or of the classes in dice and tversky;
            lovasz has none. See `balanced_weights`.
        ce_weight, dice_weight: of dice_ce and mutation.
        gamma: of focal: how much pixels that are right already count less; 0 is cross-entropy.
        alpha: of tversky: weight of false positives; false negatives have 1 - alpha.
        ignore_index: number of unlabelled pixels.

    Raises:
        UserError: an unknown name, or numbers outside their range.
    """
    if name not in LOSSES:
        raise UserError(f"loss {name!r} is unknown{nearest(name, LOSSES)} ({', '.join(LOSSES)})")
    if class_weights is not None:
        if name == "lovasz":
            raise UserError("lovasz takes no class_weights: it counts all classes alike; leave them out")
        if len(class_weights) != num_classes:
            raise UserError(f"class_weights has {len(class_weights)} numbers, expected one for each of {num_classes}")
        if not all(0 < weight < float("inf") for weight in class_weights):
            raise UserError(f"class_weights is {list(class_weights)}: expected positive numbers")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}: expected 0 to 1")
    settings: dict[str, dict[str, float]] = {
        "dice": {"alpha": 0.5},
        "tversky": {"alpha": alpha},
        "focal": {"gamma": gamma},
        "dice_ce": {"ce_weight": ce_weight, "dice_weight": dice_weight},
        "mutation": {"ce_weight": ce_weight, "dice_weight": dice_weight},
    }
    return LOSSES[name](ignore_index=ignore_index, class_weights=class_weights, **settings.get(name, {}))


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Weights of classes, the inverse of their pixels: all pixels / (classes that have pixels x pixels of the class).

    Weighted so, every class counts alike; the mean weight of a pixel is 1. A class without pixels has weight 1.

    Args:
        pixels: labelled pixels of each class in the training data.

    Raises:
        UserError: no class has a pixel.
    """
    present = sum(count > 0 for count in pixels)
    if not present:
        raise UserError("class_weights: balanced needs labelled pixels, and the training masks have none")
    return [sum(pixels) / (present * count) if count else 1.0 for count in pixels]
