"""Losses of pretraining."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.models.extras import imported

__all__ = ["VICReg", "masked_error", "of_cells"]

NEAREST = 20  # pairs of places of two views that the local term is taken of
EPSILON = 1e-6


def masked_error(predicted: Tensor, image: Tensor, hidden: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (B,) over hidden valid pixels: |predicted - image|, |image|, and how many values these are.

    The second one is the error of predicting zero, the mean.

    Args:
        predicted, image: (B, C, H, W).
        hidden, valid: (B, 1, H, W) bool.
    """
    counted = (hidden & valid).to(torch.float32)
    predicted, image = predicted.float(), image.float()
    sums = [(x.abs() * counted).flatten(1).sum(1) for x in (predicted - image, image)]
    return sums[0], sums[1], counted.flatten(1).sum(1) * image.shape[1]


def of_cells(image: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, C, H, W) of the cell that each pixel of images (B, C, H, W) is in."""
    size = image.shape[2:]
    mean, square = (F.avg_pool2d(x, cell, ceil_mode=True, count_include_pad=False) for x in (image, image**2))
    mean, square = (x.repeat_interleave(cell, 2).repeat_interleave(cell, 3) for x in (mean, square))
    mean, square = (x[..., : size[0], : size[1]] for x in (mean, square))
    return mean, ((square - mean**2).clamp_min(0) + EPSILON).sqrt()


class VICReg(nn.Module):
    """VICReg (arXiv 2105.04906) of two views' features, and of the places that both see (VICRegL, arXiv 2210.01571).

    Computed by lightly (MIT) in float32, over the batches of all processes.

    Args:
        local: weight of the local term; that of the global one is the rest.

    Raises:
        UserError: lightly is not installed.
    """

    def __init__(self, local: float) -> None:
        super().__init__()
        lightly = imported("lightly.loss", "ssl", "objective.name vicreg")
        # the mean over both views' terms, which are summed in the paper
        self.loss: Any = lightly.VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0, gather_distributed=True)
        self.local = local

    def forward(
        self, views: tuple[Tensor, Tensor], maps: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The loss.

        Args:
            views: (B, D) of both.
            maps: (B, P, D) of both, at P places.
            places: (B, P, 2) of both, where these are in the image.
        """
        loss = self.loss(*(view.float() for view in views))
        if not self.local:
            return loss
        pairs = matched(*places)
        taken = [
            x.float().gather(1, pair[..., None].expand(-1, -1, x.shape[2])) for x, pair in zip(maps, pairs, strict=True)
        ]
        return (1 - self.local) * loss + self.local * self.loss(*(x.flatten(0, 1) for x in taken))


def matched(places: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) places of either view (B, P, 2) that are nearest to each other in the image."""
    distance = torch.cdist(places, others)
    nearest, other = distance.min(2)
    first = nearest.topk(min(NEAREST, places.shape[1]), 1, largest=False).indices
    return first, other.gather(1, first)
