"""Channel attention in the benchmark: the stages of davit_tiny, and timm's form of it.

Every candidate is called with q, k, v and the arguments of a case: groups, scale.
"""

from torch import Tensor

from visionattn.kernels import channel_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def channel_by_matmul(q: Tensor, k: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
    """Channel attention as timm's ChannelAttentionV2 computes it between its projections."""
    shape = q.shape
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # (B, groups, L, dim)
    weights = ((q * scale).mT @ k).softmax(-1)
    return (weights @ v.mT).mT.transpose(1, 2).reshape(shape)


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: the four stages of davit_tiny."""
    stages = ((4, 3), (8, 6), (16, 12), (32, 24))  # stride, groups
    return [
        (f"stage {i}, {size} px", size // stride, groups, 32, (groups, 32**-0.5))
        for i, (stride, groups) in enumerate(stages, 1)
    ]


def macs(side: int, heads: int, dim: int, groups: int, scale: float) -> float:
    """Multiply-adds of one image: two products of each channel with those of its group."""
    return 2 * side**2 * (heads * dim) ** 2 / groups


CANDIDATES = {"timm": channel_by_matmul, "visionattn": channel_attention}
