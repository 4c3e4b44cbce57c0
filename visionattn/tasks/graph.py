"""What an exported file computes: a trained network from stored values to probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Graph"]


class Graph(nn.Module):
    """Images (B, C, H, W) float32, values as normalised in training -> a tensor for each of `OUTPUTS`.

    Args:
        network: takes normalised images.
        mean, std: of each channel.
        temperature: that logits are divided by before they become probabilities.
    """

    OUTPUTS: tuple[str, ...] = ("probabilities", "logits")
    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.temperature = temperature
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def matched(self, found: list[np.ndarray], expected: list[np.ndarray]) -> list[np.ndarray]:
        """Outputs (B, ...) in the order of others of the same images, which some graphs give in any."""
        return found
