"""Decayed attention in the benchmark: the stages of rmt_tiny, and attention with the whole table of decay.

Every candidate is called with q, k, v and the arguments of a case: decay, along.
"""

import torch
from torch import Tensor

from visionattn.kernels import decayed_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def with_table(q: Tensor, k: Tensor, v: Tensor, decay: tuple[float, ...], along: str) -> Tensor:
    """By matrix products, as the networks are described: of the whole map with a table of all pairs of positions."""
    rows, columns = (torch.arange(length, device=q.device) for length in q.shape[1:3])
    of_heads = torch.tensor(decay, dtype=q.dtype, device=q.device)[:, None, None]
    size = q.shape[1:3]
    if along == "map":
        y, x = rows.repeat_interleave(len(columns)), columns.repeat(len(rows))
        distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
        q, k, v = (z.flatten(1, 2).transpose(1, 2) for z in (q, k, v))
    else:
        line, keep = (columns, 1) if along == "rows" else (rows, 2)
        distance = (line[:, None] - line).abs()
        q, k, v = (z.movedim((keep, 3), (1, 2)) for z in (q, k, v))  # (B, lines, heads, L, dim)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT + of_heads * distance).softmax(-1)
    mixed = weights @ v
    return mixed.transpose(1, 2).unflatten(1, size) if along == "map" else mixed.movedim((1, 2), (keep, 3))


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: the four stages of rmt_tiny, the first two of which attend by axis."""
    stages = ((4, 4, 16, "columns"), (8, 4, 32, "rows"), (16, 8, 32, "map"), (32, 16, 32, "map"))
    return [
        (f"stage {i}, {along}, {size} px", size // stride, heads, dim, ((-0.2,) * heads, along))
        for i, (stride, heads, dim, along) in enumerate(stages, 1)
    ]


def macs(side: int, heads: int, dim: int, decay: tuple[float, ...], along: str) -> float:
    """Multiply-adds of one image: two products of each query with its keys."""
    return 2 * side**2 * heads * dim * (side**2 if along == "map" else side)


CANDIDATES = {"table": with_table, "visionattn": decayed_attention}
