"""Networks of several runs that are asked together, one after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Ensemble", "Member", "each"]


LEAST = 1e-12  # probability


class Member(NamedTuple):
    """A network with how it wants its images.

    Attributes:
        mean, std: of each channel, that its images are normalised by.
        temperature: that its logits are divided by.
    """

    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    temperature: float


class Ensemble(nn.Module):
    """Members of which each sees the images normalised in its own way; they come as the first one's.

    Args:
        several: of labels, each for itself, and not of classes that exclude each other.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, members: Sequence[Member], several: bool = False) -> None:
        super().__init__()
        self.several = several
        self.members = nn.ModuleList(member.network for member in members)
        self.temperatures = [member.temperature for member in members]
        first = members[0]
        for name, values in (("scale", self._scales(first, members)), ("shift", self._shifts(first, members))):
            self.register_buffer(name, torch.tensor(values)[..., None, None], persistent=False)

    @property
    def count(self) -> int:
        return len(self.members)

    @staticmethod
    def _scales(first: Member, members: Sequence[Member]) -> list[list[float]]:
        return [[a / b for a, b in zip(first.std, member.std, strict=True)] for member in members]

    @staticmethod
    def _shifts(first: Member, members: Sequence[Member]) -> list[list[float]]:
        return [[(a - b) / s for a, b, s in zip(first.mean, m.mean, m.std, strict=True)] for m in members]

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the mean of the members' probabilities."""
        seen = torch.stack([logits.float() for logits in self.each(image)])
        if self.several:
            return seen.sigmoid().mean(0).logit(LEAST)
        return seen.softmax(2).mean(0).clamp_min(LEAST).log()

    def each(self, image: Tensor) -> Iterator[Tensor]:
        """The logits of each member for images (B, C, H, W)."""
        for k, (member, temperature) in enumerate(zip(self.members, self.temperatures, strict=True)):
            yield member(image * self.scale[k] + self.shift[k]) / temperature


def each(network: nn.Module, image: Tensor) -> Iterator[Tensor]:
    """The logits of each network of an ensemble, or of the only one."""
    if isinstance(network, Ensemble):
        yield from network.each(image)
    else:
        yield network(image)
