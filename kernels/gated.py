"""Gated positional attention: a gate of each head mixes attention by content with attention by position alone.

d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, ICML 2021,
https://arxiv.org/abs/2103.10697.

Both attentions have rows that sum to 1, so their mixture needs no matrix of its own: the result is the mixture of the
two results. Content is fused attention; position is the same for all images of a batch, so it is one matmul a head over
the batch's values side by side, or one for each axis. It has no Triton kernel: none was measured against these two.

Sizes in comments: B images, N tokens, H heads, D channels of a head.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import check_alike, check_tensor, precise
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._function import Function

__all__ = ["gated_positional_attention"]

BUDGET = 64 * 2**20  # bytes of position weights at a time
SMALL = 2**14  # weights of a batch, up to which what takes a CPU time are operators, not what they do


def _reference(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, columns: Tensor | None, gate: Tensor, scale: float
) -> tuple[Tensor, Tensor, None]:
    logits = _joined(logits, columns)
    content = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).softmax(-1)
    gate = gate.sigmoid().to(content.dtype)[:, None, None]
    weights = (1 - gate) * content + gate * logits.softmax(-1).to(content.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), weights, None


def _joined(logits: Tensor, columns: Tensor | None) -> Tensor:
    """[H, N, N]"""
    if columns is None:
        return logits
    return (logits[:, :, None, :, None] + columns[:, None, :, None]).flatten(3).flatten(1, 2)


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, columns: Tensor | None, gate: Tensor, scale: float
) -> Tensor:
    """The plain body, or where there are few weights, these mixed, by half as many operators."""
    if q.shape[0] * q.shape[1] ** 2 * q.shape[2] > SMALL:
        return _plain(q, k, v, logits, columns, gate, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    content, position = (q * scale @ k.mT).softmax(-1), _joined(logits, columns).softmax(-1)
    weights = torch.lerp(content, position.to(v.dtype), gate.sigmoid().to(v.dtype)[:, None, None])
    return (weights @ v).transpose(1, 2)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, columns: Tensor | None, gate: Tensor, scale: float
) -> Tensor:
    maps = [x.transpose(1, 2) for x in (q, k, v)]
    content = F.scaled_dot_product_attention(maps[0], maps[1], maps[2], scale=scale).transpose(1, 2)
    position = _attend_by_position(logits, v) if columns is None else _attend_by_axis(logits, columns, v)
    return torch.lerp(content, position, gate.sigmoid().to(v.dtype)[:, None])


def _attend_by_axis(rows: Tensor, columns: Tensor, v: Tensor) -> Tensor:
    """[H, Y, Y], [H, X, X], [B, N, H, D] -> [B, N, H, D]: the softmax of a sum is the product of two softmaxes."""
    values = v.unflatten(1, (rows.shape[1], columns.shape[1])).permute(0, 1, 3, 2, 4)  # [B, Y, H, X, D]
    mixed = columns.softmax(-1).to(v.dtype) @ values
    mixed = rows.softmax(-1).to(v.dtype) @ mixed.permute(0, 2, 1, 3, 4).flatten(3)  # [B, H, Y, X * D]
    return mixed.unflatten(3, (columns.shape[1], -1)).flatten(2, 3).transpose(1, 2)


def _attend_by_position(logits: Tensor, v: Tensor) -> Tensor:
    """[H, N, N], [B, N, H, D] -> [B, N, H, D]"""
    b, _, _, dim = v.shape
    values = v.permute(2, 1, 0, 3).flatten(2)  # [H, N, B D]
    if torch.compiler.is_compiling() or logits.numel() * logits.element_size() <= BUDGET:
        mixed = logits.softmax(-1).to(v.dtype) @ values
    else:
        mixed = _ByPosition.run(logits, values)
    return mixed.unflatten(2, (b, dim)).permute(2, 1, 0, 3)


class _ByPosition(Function):
    """softmax(logits) @ values, some rows at a time, in backward again: [H, N, N], [H, N, C] -> [H, N, C]"""

    @staticmethod
    def forward(logits: Tensor, values: Tensor) -> Tensor:
        mixed = torch.empty_like(values)
        for rows in _rows(logits):
            mixed[:, rows] = _weights(logits[:, rows]).to(values.dtype) @ values
        return mixed

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        logits, values = ctx.saved_tensors
        grad_logits, grad_values = torch.empty_like(logits), torch.zeros_like(values)
        for rows in _rows(logits):
            weights = _weights(logits[:, rows])
            grad_values += weights.mT.to(grad.dtype) @ grad[:, rows]
            grad_weights = grad[:, rows] @ values.mT
            grad_logits[:, rows] = torch._softmax_backward_data(
                grad_weights.to(weights.dtype), weights, -1, weights.dtype
            )
        return grad_logits, grad_values


def _weights(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=precise(logits))


def _rows(logits: Tensor) -> Iterator[slice]:
    heads, tokens, _ = logits.shape
    step = max(1, BUDGET // 4 // max(1, heads * tokens * logits.element_size()))  # several such tensors live at once
    return (slice(start, start + step) for start in range(0, tokens, step))


def gated_positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_logits: Tensor | tuple[Tensor, Tensor],
    gate: Tensor,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """(1 - g) softmax(scale q k^T) v + g softmax(position_logits) v, with g = sigmoid(gate) of each head.

    q, k, v: maps (B, H, W, heads, head_dim) or sequences (B, N, heads, head_dim), any strides, of one shape; N = H W.
    position_logits: (heads, N, N) or (1, heads, N, N), queries and keys in row-major order; the same for all images.
        Where those of two places are a sum over the axes, as in ConViT, pass the summands, (heads, H, H) and (heads, W,
        W), with maps: the cost by position then grows with N (H + W), not with N ** 2.
    gate: (heads,), before the sigmoid.
    scale: multiplies the products of q and k; by default `head_dim ** -0.5`.
    backend: "auto", "reference", "torch" or "triton".

    Returns q's shape; q, k, v, position_logits and gate have gradients.
    A row of logits that is -inf throughout gives NaN.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: d'Ascoli et al., ConViT, https://arxiv.org/abs/2103.10697, equations 7 and 8.
    """
    check_alike(q, k, v, axes=(2, 1))
    heads, dim = q.shape[-2:]
    columns = None
    if isinstance(position_logits, Tensor):
        logits = position_logits[0] if position_logits.ndim == 4 and len(position_logits) == 1 else position_logits
        tokens = q.shape[1:-2].numel()
        check_tensor("position_logits", logits, (heads, tokens, tokens), q, logits.dtype)
    else:
        if q.ndim != 5 or len(position_logits) != 2:
            raise ValueError(f"position_logits in {len(position_logits)} parts: expected two, with q of (B, H, W, ...)")
        logits, columns = position_logits
        for axis, summand in ((1, logits), (2, columns)):
            check_tensor("position_logits", summand, (heads, q.shape[axis], q.shape[axis]), q, summand.dtype)
    check_tensor("gate", gate, (heads,), q, gate.dtype)
    scale = dim**-0.5 if scale is None else scale
    maps = (x.flatten(1, -3) for x in (q, k, v))
    output = dispatch("gated", backend, Forms(_reference, _on_cpu, _plain), *maps, logits, columns, gate, scale)
    return output.reshape(q.shape)
