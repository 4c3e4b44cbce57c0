"""The loss of detection: the weighted sum of what a detector says its predictions cost."""

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["DetectionLoss"]


class DetectionLoss(nn.Module):
    """Losses by name, such as those of `visionattn.models.dense_heads` -> their weighted sum.

    Args:
        class_weight: of `class`.
        box_weight: of all others, which say where the boxes are.
    """

    def __init__(self, class_weight: float = 1.0, box_weight: float = 1.0) -> None:
        super().__init__()
        self.class_weight, self.box_weight = class_weight, box_weight

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        boxes = sum(loss for name, loss in losses.items() if name != "class")
        return self.class_weight * losses["class"] + self.box_weight * boxes
