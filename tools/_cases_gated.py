"""Gated positional attention in the benchmark: the layers of ConViT, and timm's form of it.

Every candidate is called with q, k, v and the arguments of a case: weight (heads, 3), of the layer that makes position
logits of the distances along x, along y, and squared; gate.
"""

import functools

import torch
from torch import Tensor

from visionattn.kernels import gated_positional_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def gated_by_matmul(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """Gated positional attention as timm's GPSA computes it between its projections, its distances being at hand."""
    shape, distances = q.shape, _distances(q.shape[1]).to(q.device)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    position = (distances.expand(len(q), -1, -1, -1) @ weight.to(q.device).T).permute(0, 3, 1, 2)
    content = ((q @ k.mT) * shape[-1] ** -0.5).softmax(-1)
    gate = gate.to(q.device).view(1, -1, 1, 1)
    weights = (1 - gate.sigmoid()) * content + gate.sigmoid() * position.softmax(-1)
    weights /= weights.sum(-1).unsqueeze(-1)
    return (weights @ v).transpose(1, 2).reshape(shape)


@functools.cache
def _distances(side: int) -> Tensor:
    """[1, N, N, 3]: of each key from each query, along x, along y, and squared"""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    x, y = (axis - axis[:, None] for axis in (x, y))
    return torch.stack([x, y, x * x + y * y], -1)[None].float()


def gated(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """As our ConViT calls it: with position logits by axis."""
    places = torch.arange(q.shape[1], device=q.device)
    step = (places - places[:, None]).to(q.dtype)
    x, y, squared = weight.to(q.device).view(-1, 3, 1, 1).unbind(1)
    logits = y * step + squared * step.square(), x * step + squared * step.square()
    return gated_positional_attention(q, k, v, logits, gate.to(q.device))


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: convit_tiny, _small and _base; each head looks another way."""
    weight = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)) - torch.tensor([0, 0, 1.0])
    return [
        (f"{name}, {size} px", size // 16, heads, 48, (weight[:heads], torch.ones(heads)))
        for name, heads in (("tiny", 4), ("small", 9), ("base", 16))
    ]


def macs(side: int, heads: int, dim: int, weight: Tensor, gate: Tensor) -> float:
    """Multiply-adds of one image: two products of each query with all tokens."""
    return 2 * side**4 * heads * dim


CANDIDATES = {"timm": gated_by_matmul, "visionattn": gated}
