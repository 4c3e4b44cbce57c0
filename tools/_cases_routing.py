"""Routing attention in the benchmark: the stages of biformer_tiny, and what its kernel is compared with.

Every candidate is called with q, k, v and the arguments of a case: regions, topk, scale.
"""

import torch
from torch import Tensor

from visionattn.errors import UserError
from visionattn.kernels import routing_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def routing_by_gather(q: Tensor, k: Tensor, v: Tensor, regions: int, topk: int, scale: float) -> Tensor:
    """Routing attention as the textbook writes it: keys and values of the routed regions copied out by torch.gather."""
    b, h, w, heads, dim = q.shape
    count, tokens = regions * regions, h * w // regions**2

    def by_region(x: Tensor) -> Tensor:
        x = x.reshape(b, regions, h // regions, regions, w // regions, heads * dim)
        return x.transpose(2, 3).reshape(b, count, tokens, heads * dim)

    q, k, v = by_region(q), by_region(k), by_region(v)
    with torch.no_grad():
        routes = (q.mean(2) * scale @ k.mean(2).mT).topk(topk).indices
    routes = routes[..., None, None].expand(-1, -1, -1, tokens, heads * dim)
    k, v = (x[:, None].expand(-1, count, -1, -1, -1).gather(2, routes) for x in (k, v))
    q, k, v = (x.reshape(b, count, -1, heads, dim).transpose(2, 3) for x in (q, k, v))
    output = ((q * scale) @ k.mT).softmax(-1) @ v
    output = output.view(b, regions, regions, heads, h // regions, w // regions, dim)
    return output.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, w, heads, dim)


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: stages 1 to 3 of biformer_tiny.

    Regions are 7 x 7, or 8 x 8 where the maps do not divide by 7.
    """
    regions = next((n for n in (7, 8) if size % (16 * n) == 0), None)
    if regions is None:
        raise UserError(f"--sizes {size}: routing needs a multiple of 112 (7 regions a side) or of 128 (8)")
    stages = ((4, 2, 1), (8, 4, 4), (16, 8, 16))  # stride, heads, topk
    return [
        (f"stage {i}, {size} px", size // stride, heads, 32, (regions, topk, (32 * heads) ** -0.5))
        for i, (stride, heads, topk) in enumerate(stages, 1)
    ]


def macs(side: int, heads: int, dim: int, regions: int, topk: int, scale: float) -> float:
    """Multiply-adds of one image: two products of each query with the tokens of topk regions."""
    return 2 * side**2 * heads * dim * topk * (side / regions) ** 2


CANDIDATES = {"gather": routing_by_gather, "visionattn": routing_attention}
