"""Neighborhood attention in the benchmark: the stages of NAT and DiNAT, and what their kernel is compared with.

Every candidate is called with q, k, v and the arguments of a case: kernel_size, dilation, stride (1), bias.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from visionattn.kernels import neighborhood_attention

__all__ = ["CANDIDATES", "INFERENCE_CANDIDATES", "cases", "macs"]

KERNEL, HEAD_DIM = 7, 32


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: the stages of nat_mini, and each with DiNAT's largest dilation."""
    found = []
    for stage, (step, heads) in enumerate(((4, 2), (8, 4), (16, 8), (32, 16)), 1):
        side = -(-size // step)
        bias = torch.randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, generator=torch.Generator().manual_seed(0))
        for dilation in sorted({1, side // KERNEL} - {0}):
            name = f"stage {stage}, {size} px, dilation {dilation}"
            found.append((name, side, heads, HEAD_DIM, (KERNEL, dilation, 1, bias)))
    return found


def macs(side: int, heads: int, dim: int, kernel_size: int, dilation: int, stride: int, bias: Tensor) -> float:
    """Multiply-adds of one image: two products of each query with its window."""
    return 2 * side**2 * heads * dim * kernel_size**2


def _starts(length: int, kernel: int, dilation: int, device: torch.device | str) -> Tensor:
    """First key of each position of an axis."""
    position = torch.arange(length, device=device)
    residue, place = position % dilation, position // dilation
    last = (length - 1 - residue) // dilation + 1 - kernel
    return residue + dilation * torch.minimum((place - kernel // 2).clamp(min=0), last)


def neighborhood_by_gather(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, stride: int, bias: Tensor
) -> Tensor:
    """As the textbook writes it: the keys and values of each query's window copied out, here by indexing, the fastest
    of four ways to write it on a CPU."""
    h, w, heads, dim = q.shape[1:]
    bias = bias.to(q)
    steps = torch.arange(kernel_size, device=q.device)
    keys, places = [], []
    for length in (h, w):
        axis = _starts(length, kernel_size, dilation, q.device)[:, None] + dilation * steps
        keys.append(axis)
        places.append((axis - torch.arange(length, device=q.device)[:, None]) // dilation + kernel_size - 1)
    index = (keys[0][:, None, :, None] * w + keys[1][None, :, None, :]).reshape(h * w, -1)
    table = bias[:, places[0][:, None, :, None], places[1][None, :, None, :]].reshape(heads, h * w, -1)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    logits = (q.unsqueeze(-2) * dim**-0.5 @ k[:, :, index].mT).squeeze(-2) + table
    output = (logits.softmax(-1).unsqueeze(-2) @ v[:, :, index]).squeeze(-2)
    return output.transpose(1, 2).unflatten(1, (h, w))


@functools.lru_cache(maxsize=16)
def _block_mask(h: int, w: int, kernel_size: int, dilation: int, device: torch.device) -> BlockMask:
    y, x = (_starts(length, kernel_size, dilation, device) for length in (h, w))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = key // w - y[query // w], key % w - x[query % w]
        reach = kernel_size * dilation
        inside = (rows >= 0) & (rows < reach) & (columns >= 0) & (columns < reach)
        return inside & (rows % dilation == 0) & (columns % dilation == 0)

    return create_block_mask(seen, None, None, h * w, h * w, device=str(device))


def neighborhood_by_flex(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, stride: int, bias: Tensor
) -> Tensor:
    """Compiled FlexAttention with the same mask and bias."""
    h, w = q.shape[1:3]
    bias = bias.to(q)

    most = 2 * kernel_size - 2  # pairs that the mask leaves out lie beyond the table
    position = torch.arange(h * w, device=q.device)
    rows, columns = position // w, position % w

    def biased(logit: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = (rows[key] - rows[query] + kernel_size * dilation) // dilation - 1
        column = (columns[key] - columns[query] + kernel_size * dilation) // dilation - 1
        return logit + bias[head, row.clamp(0, most), column.clamp(0, most)]

    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    mask = _block_mask(h, w, kernel_size, dilation, q.device)
    return _compiled_flex()(q, k, v, score_mod=biased, block_mask=mask).transpose(1, 2).unflatten(1, (h, w))


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # dynamic=False: with dynamic sizes the C++ code that torch 2.15 makes for it on a CPU does not compile.
    return torch.compile(flex_attention, dynamic=False)


def neighborhood_by_natten(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, stride: int, bias: Tensor
) -> Tensor:
    """NATTEN from 0.20 on: it has no bias, so it does less than the others."""
    import natten

    return natten.na2d(q.contiguous(), k.contiguous(), v.contiguous(), kernel_size=kernel_size, dilation=dilation)


CANDIDATES = {"gather": neighborhood_by_gather, "visionattn": neighborhood_attention}
# On a CPU neither has a backward pass.
INFERENCE_CANDIDATES = {"FlexAttention": neighborhood_by_flex}
if importlib.util.find_spec("natten") is not None:
    INFERENCE_CANDIDATES["NATTEN, no bias"] = neighborhood_by_natten
