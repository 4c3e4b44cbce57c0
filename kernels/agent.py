"""Agent attention: a few agents gather values from all keys by one softmax, and hand them to the queries by another.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024,
https://arxiv.org/abs/2312.08874.

With n agents it costs n products for each query and each key, in place of one for each pair of them. Both steps are
fused attention with a bias; it has no Triton kernel: none was measured against these two.

Sizes in comments: B images, N queries, K keys, n agents, H heads, D channels of a head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from visionattn.kernels import _record
from visionattn.kernels._check import check_map, check_tensor, known, precise
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._plain import fused

__all__ = ["agent_attention"]


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None, None]:
    shape, (q, k, v) = q.shape, (x.flatten(1, -3) for x in (q, k, v))
    gathering = torch.einsum("bnhd,bkhd->bhnk", agents * scale, k)
    handing = torch.einsum("bqhd,bnhd->bhqn", q * scale, agents)
    gathering = (gathering if agent_bias is None else gathering + agent_bias).softmax(-1)
    handing = (handing if query_bias is None else handing + query_bias).softmax(-1)
    if _record._recorder is not None:  # of queries and keys, which otherwise nothing needs
        weights = handing @ gathering
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).view(shape), weights, None
    values = torch.einsum("bhnk,bkhd->bhnd", gathering, v)
    return torch.einsum("bhqn,bhnd->bqhd", handing, values).reshape(shape), None, None


def _strip(
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Iterator[tuple[int, tuple]]:
    for first in range(0, q.shape[1], rows):
        part = q[:, first : first + rows]
        start = first * q.shape[2] if q.ndim == 5 else first
        bias = None if query_bias is None else query_bias[:, start : start + part.shape[1:-2].numel()]
        yield first, (part, k, v, agents, agent_bias, bias, scale)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Tensor:
    if known(q.shape[0] == 0):  # where fused attention would give biases no gradient
        return _by_products(q, k, v, agents, agent_bias, query_bias, scale)
    shape, (q, k, v, agents) = q.shape, (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v, agents))
    of_agents, of_queries = (None if bias is None else bias[None] for bias in (agent_bias, query_bias))
    values = fused(agents, k, v, of_agents, scale)
    return fused(q, agents, values, of_queries, scale).transpose(1, 2).reshape(shape)


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """With gradients by products: fused attention has none for a bias there, and its substitute takes 1.1 to 2.4 times
    as long in the stages of Agent-PVT and Agent-DeiT."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, agents))
    form = _by_products if trained and q.dtype == precise(q) else _plain
    return form(q, k, v, agents, agent_bias, query_bias, scale)


def _by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
) -> Tensor:
    shape, (q, k, v, agents) = q.shape, (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v, agents))
    agents = agents * scale
    gathering, handing = agents @ k.mT, q @ agents.mT
    gathering = gathering if agent_bias is None else gathering + agent_bias
    handing = handing if query_bias is None else handing + query_bias
    return (handing.softmax(-1) @ (gathering.softmax(-1) @ v)).transpose(1, 2).reshape(shape)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q a^T + query_bias) (softmax(scale a k^T + agent_bias) v), a being the agents of an image.

    q: maps (B, H, W, heads, head_dim) or sequences (B, N, heads, head_dim), any strides; N = H W.
    k, v: of one shape, maps or sequences of any number of keys K.
    agents: (B, n, heads, head_dim); in the paper q, averaged over bins of the map.
    agent_bias: (heads, n, K), keys in row-major order; the same for all images.
    query_bias: (heads, N, n), likewise.
    scale: multiplies both products; by default `head_dim ** -0.5`.
    backend: "auto", "reference", "torch" or "triton".

    Returns q's shape; all tensors have gradients. Recorded weights are the products of both softmaxes, (B, heads, N,
    K); their rows sum to 1.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: Han et al., Agent Attention, https://arxiv.org/abs/2312.08874, equation 4 and section 4.2 (biases).
    """
    check_map("q", q, axes=(2, 1))
    check_map("k", k, axes=(2, 1))
    batch, (heads, dim) = q.shape[0], q.shape[-2:]
    check_tensor("k", k, (batch, *k.shape[1:-2], heads, dim), q)
    check_tensor("v", v, k.shape, q)
    check_map("agents", agents, axes=(1,))
    check_tensor("agents", agents, (batch, agents.shape[1], heads, dim), q)
    if agent_bias is not None:
        check_tensor("agent_bias", agent_bias, (heads, agents.shape[1], k.shape[1:-2].numel()), q, agent_bias.dtype)
    if query_bias is not None:
        check_tensor("query_bias", query_bias, (heads, q.shape[1:-2].numel(), agents.shape[1]), q, query_bias.dtype)
    scale = dim**-0.5 if scale is None else scale
    biases = (None if bias is None else bias.to(q.dtype) for bias in (agent_bias, query_bias))
    return dispatch("agent", backend, Forms(_reference, _on_cpu, _plain, strip=_strip), q, k, v, agents, *biases, scale)
