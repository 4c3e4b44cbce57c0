"""Decayed attention: what a position gives to another falls with their distance, by rows and columns.

Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024, https://arxiv.org/abs/2309.11523.

The logarithm of the decay is added to the logits. Along one axis it is a small table. Over the whole map it is the sum
of two of them, of rows and of columns, so that no table of all pairs is needed: on a CPU the sums of some rows of
queries are made at a time; elsewhere the two are more channels of q and k, one for each row and column (Wu et al.,
FlashBias, NeurIPS 2025, https://arxiv.org/abs/2505.12044). It has no Triton kernel: all is fused attention already.

Sizes in comments: B images, N tokens of a map H x W, h heads, D channels of a head, L tokens of a row or column.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visionattn.kernels._check import check_alike
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._plain import fused, keep, together

__all__ = ["decayed_attention"]

Along = Literal["map", "rows", "columns"]
Decay = tuple[float, ...]  # of each head

CHUNK = 16 * 2**20  # bytes of decay that are made at a time on a CPU
PRODUCTS = {"map": ("zw", "yxzw"), "rows": ("yz", "yxz"), "columns": ("zx", "yxz")}  # keys of a query at y, x


def _reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, along: Along, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    height, width = q.shape[1:3]
    y, x = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    rows, columns = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    places = y[:, None] * width + x
    if along == "map":
        distances, indices = rows[:, None, :, None] + columns[:, None], None
    else:
        distances, indices = (columns, places[:, None]) if along == "rows" else (rows[:, None], places.T)
    keys, pairs = PRODUCTS[along]
    logits = torch.einsum(f"byxhd,b{keys}hd->bh{pairs}", q * scale, k)
    logits = logits + q.new_tensor(decay).view(-1, *[1] * len(pairs)) * distances
    weights = logits.flatten(4).softmax(-1).flatten(2, 3)  # [B, h, N, keys]
    output = torch.einsum(f"bh{pairs},b{keys}hd->byxhd", weights.view(logits.shape), v)
    if indices is not None:
        indices = indices.expand(height, width, -1).flatten(0, 1).expand(q.shape[0], -1, -1)
    return output, weights, indices


def _plain(q: Tensor, k: Tensor, v: Tensor, decay: Decay, along: Along, scale: float) -> Tensor:
    if along != "map":
        return _along_axis(q, k, v, decay, along, scale)
    height, width = q.shape[1:3]
    q, k, v = together(_tokens, q, k, v)
    here, distances = _factors(q, height, width, q.dtype)
    of_heads = _of_heads(q, decay, q.dtype) * here
    q = torch.cat([q * scale, of_heads.expand(q.shape[0], -1, -1, -1)], -1)
    k = torch.cat([k, distances.expand(*k.shape[:2], -1, -1)], -1)
    return fused(q, k, v, None, 1.0).transpose(1, 2).unflatten(1, (height, width))


def _tokens(x: Tensor) -> Tensor:
    """[B, H, W, P, h, D] -> [P, B, h, N, D]"""
    return x.flatten(1, 2).permute(2, 0, 3, 1, 4)


@keep
def _factors(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Whose product is the distance of all places: [N, H + W], [N, H + W], with zeros up to a multiple of 8."""
    here, distances = [], []
    for axis, length in enumerate((height, width)):
        line = torch.arange(length, device=device)
        steps = (line[:, None] - line).abs()
        steps = steps[:, None].expand(-1, width, -1) if axis == 0 else steps.expand(height, -1, -1)
        steps = steps.flatten(0, 1)
        here.append(steps == 0)
        distances.append(steps)
    missing = (height + width + 7) // 8 * 8 - height - width  # fused attention takes no other numbers of channels
    of_queries, of_keys = (F.pad(torch.cat(x, 1).to(dtype), (0, missing)) for x in (here, distances))
    return of_queries, of_keys


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, decay: Decay, along: Along, scale: float) -> Tensor:
    if along != "map":
        return _along_axis(q, k, v, decay, along, scale)
    height, width = q.shape[1:3]
    rows, columns = (_table(q, length, decay, q.dtype) for length in (height, width))
    k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))

    def attend(q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> Tensor:
        bias = rows[:, first:last, None, :, None] + columns[:, None, :, None]
        q = q[:, first:last].flatten(1, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, bias.flatten(3).flatten(1, 2)[None], scale=scale)

    step = max(1, CHUNK // (len(decay) * height * width**2 * q.element_size()))
    bounds = [(first, min(first + step, height)) for first in range(0, height, step)]
    if len(bounds) == 1:
        output = attend(q, k, v, 0, height)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):  # backward makes the decay again
        output = torch.cat([checkpoint(attend, q, k, v, *part, use_reentrant=False) for part in bounds], 2)
    else:
        output = torch.cat([attend(q, k, v, *part) for part in bounds], 2)
    return output.transpose(1, 2).unflatten(1, (height, width))


def _along_axis(q: Tensor, k: Tensor, v: Tensor, decay: Decay, along: Along, scale: float) -> Tensor:
    if along == "columns":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lines = q.shape[:2]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B H, h, W, D], or of columns [B W, h, H, D]
    bias = _table(q, q.shape[2], decay, q.dtype).expand(q.shape[0], -1, -1, -1)
    output = fused(q, k, v, bias, scale).transpose(1, 2).unflatten(0, lines)
    return output.transpose(1, 2) if along == "columns" else output


@keep
def _table(length: int, decay: Decay, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[h, L, L]"""
    line = torch.arange(length, device=device)
    precise = torch.promote_types(dtype, torch.float32)
    return (_of_heads(line, decay, precise) * (line[:, None] - line).abs()).to(dtype)


@keep
def _of_heads(decay: Decay, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[h, 1, 1], without copying anything to the device, which would wait for it."""
    return torch.stack([torch.full((1, 1), x, dtype=dtype, device=device) for x in decay])


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Sequence[float],
    along: Along = "map",
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + decay * distance) v; the distance of two positions is |rows apart| + |columns apart|.

    q, k, v: maps (B, H, W, heads, head_dim), any strides, of one shape.
    decay: of each head the logarithm of what one step leaves, usually negative.
    along: the keys of a position are the whole `map`, or its own one of the `rows` or `columns`. Attention along rows,
        whose result is v of attention along columns, costs H + W keys where the map costs H * W.
    scale: multiplies the products of q and k; by default `head_dim ** -0.5`.
    backend: "auto", "reference", "torch" or "triton".

    Returns q's shape; q, k and v have gradients.
    Raises ValueError for shapes, dtypes, devices or parameters that do not fit.
    Source: Fan et al., RMT, https://arxiv.org/abs/2309.11523, section 3.2, with the logarithm of the decay added before
    the softmax, as the authors' networks have it.
    """
    check_alike(q, k, v, axes=(2,))
    decay = tuple(decay)
    if len(decay) != q.shape[3]:
        raise ValueError(f"decay has {len(decay)} values: expected one for each of the {q.shape[3]} heads")
    if along not in PRODUCTS:
        raise ValueError(f"along={along!r}: expected one of {', '.join(PRODUCTS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch("decayed", backend, Forms(_reference, _on_cpu, _plain), q, k, v, decay, along, scale)
