"""Linear attention in the benchmark: lgvit_96, the stages of flowformer, and the textbook's form of it.

Every candidate is called with q, k, v.
"""

from torch import Tensor

from visionattn.kernels import linear_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def linear_by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products of (B, heads, L, dim), as most networks compute it."""
    shape, tokens = q.shape, q.shape[1] * q.shape[2]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return (q @ (k.mT @ v / tokens)).transpose(1, 2).reshape(shape)


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads and head_dim: of lgvit_96 the layers in the middle, of flowformer its four stages."""
    stages = ((4, 8), (8, 16), (16, 32), (32, 64))  # stride, head_dim
    flow = [
        (f"flowformer stage {i}, {size} px", size // stride, 12, dim, ()) for i, (stride, dim) in enumerate(stages, 1)
    ]
    return [(f"lgvit_96, {size} px", size // 16, 12, 8, ()), *flow]


def macs(side: int, heads: int, dim: int) -> float:
    """Multiply-adds of one image: two products of each channel with those of its head."""
    return 2 * side**2 * heads * dim**2


CANDIDATES = {"matmul": linear_by_matmul, "visionattn": linear_attention}
