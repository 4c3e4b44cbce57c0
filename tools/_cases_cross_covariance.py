"""Cross-covariance attention in the benchmark: XCiT with patches of 16 and 8 pixels, and timm's two forms of it.

Every candidate is called with q, k, v and the arguments of a case: temperature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import cross_covariance_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def _channels_first(*maps: Tensor) -> list[Tensor]:
    return [x.flatten(1, 2).permute(0, 2, 3, 1) for x in maps]  # (B, heads, dim, L)


def cross_covariance_by_sdpa(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Cross-covariance attention as timm's XCA computes it between its projections, with fused attention."""
    shape = q.shape
    q, k, v = _channels_first(q, k, v)
    q = F.normalize(q, dim=-1) * temperature.to(q.device)
    output = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, scale=1.0)
    return output.permute(0, 3, 1, 2).reshape(shape)


def cross_covariance_by_matmul(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Cross-covariance attention as timm's XCA computes it without fused attention (its default)."""
    shape = q.shape
    q, k, v = _channels_first(q, k, v)
    logits = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * temperature.to(q.device)
    return (logits.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(shape)


def cross_covariance(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return cross_covariance_attention(q, k, v, temperature.to(q.device))


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: xcit_small with patches of 16 and of 8 pixels."""
    return [(f"patch {patch}, {size} px", size // patch, 8, 48, (torch.ones(8, 1, 1),)) for patch in (16, 8)]


def macs(side: int, heads: int, dim: int, temperature: Tensor) -> float:
    """Multiply-adds of one image: two products of each channel with those of its head."""
    return 2 * side**2 * heads * dim**2


CANDIDATES = {
    "timm": cross_covariance_by_matmul,
    "timm, fused": cross_covariance_by_sdpa,
    "visionattn": cross_covariance,
}
