"""Losses of segmentation over labelled pixels, for one output or for all outputs of a decoder.

Each takes logits (B, K, H, W), or a list of such from `forward_deep`, and labels (B, H, W) of class numbers. Pixels
that are labelled `ignore_index` have no weight, whatever their logits are: neither the loss nor a gradient depends on
them. Where no pixel is labelled the loss is 0. Region losses count a class over the whole batch, and only if it has
pixels there. Nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.data.sample import IGNORE
from visionattn.errors import UserError, nearest

__all__ = ["LOSSES", "SegmentationLoss", "balanced_weights", "make_loss"]


class SegmentationLoss(nn.Module):
    """The sum of a loss over the outputs of a decoder.

    A subclass has `pixel_loss` of logits (B, K, H, W), labels (B, H, W), 0 where there are none, and `targets`.

    Args:
        ignore_index: number of unlabelled pixels.
        class_weights: (K,) or None.
    """

    class_weights: Tensor | None
    pixel_loss: Callable[..., Tensor]

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
        labels = torch.where(labelled, labels.long(), 0)
        outputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs]
        outputs = self.combine([torch.where(labelled[:, None], x, 0.0) for x in outputs])
        targets = self.targets(labels, labelled.to(outputs[0].dtype), outputs[0].shape[1])
        first, *others = (self.pixel_loss(logits, labels, *targets) for logits in outputs)
        return sum(others, first)

    def combine(self, outputs: list[Tensor]) -> list[Tensor]:
        """The logits to be supervised, of the outputs' logits."""
        return outputs

    def targets(self, labels: Tensor, labelled: Tensor, classes: int) -> tuple[Tensor, ...]:
        """What `pixel_loss` gets beside logits and labels: where there are labels, (B, H, W) of 1 and 0, first."""
        return (labelled,)

    def weights(self, logits: Tensor) -> Tensor | None:
        """The class weights in the type of the logits, whatever the model around this was cast to."""
        return None if self.class_weights is None else self.class_weights.to(logits)

    def entropy(self, logits: Tensor, labels: Tensor, pixels: Tensor, gamma: float = 0.0) -> Tensor:
        """Cross-entropy times (1 - p)^gamma, the mean weighted by `pixels` (B, H, W) and by the weights of classes."""
        entropy = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]  # F.cross_entropy is not deterministic
        weights = self.weights(logits)
        if gamma:
            entropy = (-torch.expm1(-entropy)).clamp_min(1e-7) ** gamma * entropy  # 0 ** gamma may have no gradient
        return _mean(entropy, pixels if weights is None else pixels * weights[labels])


class CrossEntropy(SegmentationLoss):
    """Cross-entropy, the mean over pixels weighted by the weight of their class."""

    def pixel_loss(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        return self.entropy(logits, labels, labelled)


class Focal(SegmentationLoss):
    """Cross-entropy times (1 - p)^gamma, p the softmax probability of the label (Lin et al. 2017, arXiv 1708.02002)."""

    def __init__(self, gamma: float = 2.0, **common) -> None:
        super().__init__(**common)
        self.gamma = gamma

    def pixel_loss(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        return self.entropy(logits, labels, labelled, self.gamma)


class Tversky(SegmentationLoss):
    """1 - TP / (TP + alpha FP + (1 - alpha) FN) of softmax probabilities, the mean over the classes.

    Salehi et al. 2017, arXiv 1706.05721; with alpha 0.5 it is the Dice loss (Milletari et al. 2016). Class weights
    weigh the mean over the classes.
    """

    def __init__(self, alpha: float = 0.5, **common) -> None:
        super().__init__(**common)
        self.alpha = alpha

    def pixel_loss(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        return _tversky(logits, labels, labelled, self.alpha, self.weights(logits))


class Lovasz(SegmentationLoss):
    """The Lovasz-softmax loss, a surrogate of the Jaccard index (Berman et al. 2018, arXiv 1705.08790)."""

    def pixel_loss(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        """Errors of each class, largest first, times what each adds to 1 - the Jaccard index (their algorithm 1)."""
        truth = (_one_hot(labels, logits.shape[1]) * labelled[:, None]).transpose(0, 1).flatten(1)
        errors = (truth - logits.softmax(1).transpose(0, 1).flatten(1)).abs()
        errors, order = torch.where(labelled.flatten() > 0, errors, -1.0).sort(1, descending=True)
        truth = truth.gather(1, order)
        count, found = truth.sum(1, keepdim=True), truth.cumsum(1)
        rank = torch.arange(1, truth.shape[1] + 1, device=truth.device)
        jaccard = 1 - (count - found) / (count + rank - found)
        steps = torch.diff(jaccard, prepend=torch.zeros_like(count))
        return _mean((errors.clamp_min(0) * steps).sum(1), (count[:, 0] > 0).to(errors.dtype))


class DiceCrossEntropy(SegmentationLoss):
    """ce_weight x cross-entropy + dice_weight x Dice loss; class weights are those of the cross-entropy."""

    def __init__(self, ce_weight: float = 1.0, dice_weight: float = 1.0, **common) -> None:
        super().__init__(**common)
        self.ce_weight, self.dice_weight = ce_weight, dice_weight

    def pixel_loss(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        dice = _tversky(logits, labels, labelled, 0.5)
        return self.ce_weight * self.entropy(logits, labels, labelled) + self.dice_weight * dice


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

    def targets(self, labels: Tensor, labelled: Tensor, classes: int) -> tuple[Tensor, ...]:
        maps = _one_hot(labels, classes) * labelled[:, None]
        near = F.avg_pool2d(maps, (31, 1), 1, (15, 0))
        near = F.avg_pool2d(near, (1, 31), 1, (0, 15))
        same = (near * maps).sum(1) / near.sum(1).clamp_min(_TINY)
        return (labelled * (1 + 5 * (1 - same)),)

    def pixel_loss(self, logits: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
        probabilities, truth = logits.softmax(1), _one_hot(labels, logits.shape[1])
        overlap, union = (
            (x * pixels[:, None]).sum((0, 2, 3))
            for x in (probabilities * truth, probabilities + truth - probabilities * truth)
        )
        present = ((truth * pixels[:, None]).sum((0, 2, 3)) > 0).to(overlap.dtype)
        return self.entropy(logits, labels, pixels) + _mean(1 - overlap / union.clamp_min(_TINY), present)


_TINY = 1e-30  # in the place of no weight at all


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted; 0 where nothing has a weight."""
    return (values * weights).sum() / weights.sum().clamp_min(_TINY)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, H, W) -> (B, classes, H, W) of 1 and 0; torch's own looks at the values, for which it waits."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)[:, None, None]).to(torch.float32)


def _tversky(logits: Tensor, labels: Tensor, labelled: Tensor, alpha: float, weights: Tensor | None = None) -> Tensor:
    """See `Tversky`."""
    predicted = logits.softmax(1) * labelled[:, None]
    truth = _one_hot(labels, logits.shape[1]) * labelled[:, None]
    right, all_predicted, all_true = (x.sum((0, 2, 3)) for x in (predicted * truth, predicted, truth))
    score = right / (alpha * all_predicted + (1 - alpha) * all_true).clamp_min(_TINY)
    present = (all_true > 0).to(score.dtype)
    return _mean(1 - score, present if weights is None else present * weights)


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
