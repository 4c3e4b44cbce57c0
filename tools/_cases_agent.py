"""Agent attention in the benchmark: stages of agent_pvt_tiny and a layer of agent_deit_tiny, by matmuls and by ours.

Every candidate is called with q, k, v and the arguments of a case: side (of the bins whose means are the agents), and
both biases.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import agent_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def _agents(q: Tensor, side: int) -> Tensor:
    """(B, heads, side * side, head_dim)"""
    bins = F.adaptive_avg_pool2d(q.flatten(3).permute(0, 3, 1, 2), side)
    return bins.flatten(2).unflatten(1, (q.shape[3], -1)).mT


def agent_by_matmul(q: Tensor, k: Tensor, v: Tensor, side: int, agent_bias: Tensor, query_bias: Tensor) -> Tensor:
    """As the paper's equation is written: two softmaxes between matmuls."""
    shape, scale, agents = q.shape, q.shape[-1] ** -0.5, _agents(q, side)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    values = (agents * scale @ k.mT + agent_bias.to(q)).softmax(-1) @ v
    return ((q * scale @ agents.mT + query_bias.to(q)).softmax(-1) @ values).transpose(1, 2).reshape(shape)


def agent(q: Tensor, k: Tensor, v: Tensor, side: int, agent_bias: Tensor, query_bias: Tensor) -> Tensor:
    return agent_attention(q, k, v, _agents(q, side).transpose(1, 2), agent_bias.to(q), query_bias.to(q))


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments."""
    found = []
    layers = (("stage 1", 4, 1, 3), ("stage 2", 8, 2, 4), ("stage 3", 16, 5, 7), ("deit", 16, 3, 7))
    for name, stride, heads, side in layers:
        generator, tokens = torch.Generator().manual_seed(0), (size // stride) ** 2
        biases = torch.randn(2, heads, side**2, tokens, generator=generator)
        found.append((f"{name}, {size} px", size // stride, heads, 64, (side, biases[0], biases[1].mT.contiguous())))
    return found


def macs(side: int, heads: int, dim: int, bins: int, *_: object) -> float:
    """Multiply-adds of one image: two products of each agent with all keys, and two of each query with all agents."""
    return 4 * side**2 * heads * dim * bins**2


CANDIDATES = {"matmul": agent_by_matmul, "visionattn": agent}
