"""Gates: attention of a map to itself by few weights, which keeps its shape; decoders put them on the maps they take.

Triplet attention: Misra et al., Rotate to Attend, WACV 2021, https://arxiv.org/abs/2010.03045; same function as the
authors' code, https://github.com/LandskapeAI/triplet-attention (MIT). Efficient local attention: Xu and Wan, ELA, 2024,
https://arxiv.org/abs/2403.01123, from the paper alone: its authors published no code.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

__all__ = ["ELA", "TripletAttention"]


class _Gate(nn.Module):
    """A map (B, P, X, Y) times a gate (B, 1, X, Y) of the greatest and the mean of its P."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.conv = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(1)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()


class TripletAttention(nn.Module):
    """The mean of a map (B, C, H, W) gated by C x W, by H x C and by H x W, each after pooling the third axis.

    spatial: gate by H x W too.
    """

    def __init__(self, spatial: bool = True) -> None:
        super().__init__()
        self.cw, self.hc = _Gate(), _Gate()
        self.hw = _Gate() if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        gated = [self.cw(x.transpose(1, 2)).transpose(1, 2), self.hc(x.transpose(1, 3)).transpose(1, 3)]
        if self.hw is not None:
            gated.append(self.hw(x))
        return sum(gated[1:], gated[0]) / len(gated)


class ELA(nn.Module):
    """A map (B, C, H, W) gated by its rows and by its columns, by one convolution along both.

    By default the paper's B: T has kernels of 5 and 32 groups of norm, S and L those of T and B and C / 8 groups of
    channels, with 16 of norm.
    """

    def __init__(self, dim: int, kernel_size: int = 7, groups: int | None = None, norm_groups: int = 16) -> None:
        super().__init__()
        if dim % norm_groups:
            raise ValueError(f"ela: {dim} channels: expected a multiple of {norm_groups}, its groups of norm")
        groups = dim if groups is None else groups
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.gn = nn.GroupNorm(norm_groups, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.gn(self.conv(x.mean(axis))).sigmoid() for axis in (3, 2))
        return x * rows[..., None] * columns[..., None, :]
