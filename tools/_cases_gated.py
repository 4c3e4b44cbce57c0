"""Gated positional attention in the benchmark: the layers of ConViT, and timm's form of it.

Every candidate is called with q, k, v and the arguments of a case: position_logits, gate.
"""

import torch
from torch import Tensor

from visionattn.kernels import gated_positional_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def gated_by_matmul(q: Tensor, k: Tensor, v: Tensor, position_logits: Tensor, gate: Tensor) -> Tensor:
    """Gated positional attention as timm's GPSA computes it between its projections."""
    shape = q.shape
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    content = ((q @ k.mT) * shape[-1] ** -0.5).softmax(-1)
    position = position_logits.to(q.device).expand(len(q), -1, -1, -1).softmax(-1)
    gate = gate.to(q.device).view(1, -1, 1, 1)
    weights = (1 - gate.sigmoid()) * content + gate.sigmoid() * position
    weights /= weights.sum(-1).unsqueeze(-1)
    return (weights @ v).transpose(1, 2).reshape(shape)


def gated(q: Tensor, k: Tensor, v: Tensor, position_logits: Tensor, gate: Tensor) -> Tensor:
    return gated_positional_attention(q, k, v, position_logits.to(q.device), gate.to(q.device))


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: convit_tiny, _small and _base with logits as at their start."""
    side = size // 16
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    offsets = torch.stack([y.flatten(), x.flatten()]).float()
    squares = (offsets[:, :, None] - offsets[:, None]).square().sum(0)
    return [
        (f"{name}, {size} px", side, heads, 48, (-squares.expand(heads, -1, -1), torch.ones(heads)))
        for name, heads in (("tiny", 4), ("small", 9), ("base", 16))
    ]


def macs(side: int, heads: int, dim: int, position_logits: Tensor, gate: Tensor) -> float:
    """Multiply-adds of one image: two products of each query with all tokens."""
    return 2 * side**4 * heads * dim


CANDIDATES = {"timm": gated_by_matmul, "visionattn": gated}
