"""Outlook attention in Triton: every place of the map gathers what the windows over it mix for it.

It does not fit the loop of `_attention_triton.py`: logits are given, not products of queries and keys. A row of logits
(window, place i of it) belongs to one place of the map, so that a tile of places reads and writes its own rows. A tile
holds places of one residue of the stride: the same i have a window for all of them. No kernel uses atomics.

Names as in `_attention_triton.py`; BLOCK_M places of the map at a time; K = kernel_size ** 2 places of a window,
BLOCK_K of them padded to a power of two.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    LOG2E,
    MIN_BLOCK,
    OPTIONS,
    Tokens,
    aligned_map,
    ceil_div,
    constant,
    contiguous_map,
    flat,
    load,
    store,
    unsuited_map,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw


class Sizes(NamedTuple):
    heads: Any
    height: Any  # of the map
    width: Any
    rows: Any  # of windows
    columns: Any
    tiles: Any  # of one residue of the stride


class Constants(NamedTuple):
    kernel: Any
    stride: Any
    padding: Any
    K: Any
    DIM: Any
    BLOCK_D: Any
    BLOCK_M: Any
    BLOCK_K: Any
    ALIGN: Any  # all strides are multiples of it


RUNTIME = [*Sizes._fields, *(f"{x}_{stride}" for x in ("v", "do") for stride in "byxh")]


@triton.jit
def _places(n, c):
    """Batch, head and (y, x, valid) of the places of this program's tile, and their residues of the stride."""
    program = tl.program_id(0)
    tile = program // n.heads % n.tiles
    residue = program // n.heads // n.tiles % (c.stride * c.stride)
    batch = (program // n.heads // n.tiles // (c.stride * c.stride)).to(tl.int64)
    i = tile * c.BLOCK_M + tl.arange(0, c.BLOCK_M)
    class_width = ceil_div(n.width, c.stride)
    y = i // class_width * c.stride + residue // c.stride
    x = i % class_width * c.stride + residue % c.stride
    return batch, program % n.heads, y, x, (y < n.height) & (x < n.width), residue


@triton.jit
def _place(c, i):
    """Row and column of the i-th place of a window."""
    return i // c.kernel, i - i // c.kernel * c.kernel


@triton.jit
def _has_windows(c, residue, i):
    """Whether places of this residue are the i-th place of windows."""
    row, column = _place(c, i)
    down, across = residue // c.stride + c.padding - row, residue % c.stride + c.padding - column
    return (down % c.stride == 0) & (across % c.stride == 0)


@triton.jit
def _windows(n, c, y, x, valid, i):
    """The windows whose i-th place is (y, x): row, column, whether there is one."""
    down, across = _place(c, i)
    y, x = y + c.padding - down, x + c.padding - across
    row, column = y // c.stride, x // c.stride
    return row, column, valid & (y >= 0) & (x >= 0) & (row < n.rows) & (column < n.columns)


@triton.jit
def _in_window(n, c, row, column, m_window, j):
    """The j-th places of windows: row and column in the map, whether there is such a place."""
    down, across = _place(c, j)
    y, x = row * c.stride - c.padding + down, column * c.stride - c.padding + across
    return y, x, m_window & (y >= 0) & (y < n.height) & (x >= 0) & (x < n.width)


@triton.jit
def _load(tensor, c, batch, head, y, x, valid):
    return load(tensor, batch, head, Tokens(y, x, valid, None), c.DIM, c.BLOCK_D).to(tl.float32)


@triton.jit
def _store(tensor, c, values, batch, head, y, x, valid):
    store(tensor, values, batch, head, Tokens(y, x, valid, None), c.DIM, c.BLOCK_D)


@triton.jit
def _rows(n, c, batch, head, row, column, i):
    """The rows i of windows, in a contiguous (B, h, w, heads, K) tensor: [BLOCK_M]"""
    window = (batch * n.rows + row) * n.columns + column
    return (window * n.heads + head) * c.K + i


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    logits, v, v_b, v_y, v_x, v_h, heads, height, width, rows, columns, tiles, scale, output, p_lse, c
):  # fmt: skip
    """Also stores the log-sum-exp of each row of logits that is used, in base 2."""
    n = Sizes(heads, height, width, rows, columns, tiles)
    v, output = aligned_map(v, v_b, v_y, v_x, v_h, c), contiguous_map(output, n, height, width, c.DIM)
    batch, head, y, x, valid, residue = _places(n, c)
    o_j = tl.arange(0, c.BLOCK_K)
    b_o = tl.zeros([c.BLOCK_M, c.BLOCK_D], tl.float32)
    for i in range(c.K):
        if _has_windows(c, residue, i):
            row, column, m_window = _windows(n, c, y, x, valid, i)
            o_rows = _rows(n, c, batch, head, row, column, i)
            mask = m_window[:, None] & (o_j < c.K)
            b_s = tl.load(logits + o_rows[:, None] * c.K + o_j, mask=mask, other=float("-inf"))  # [BLOCK_M, BLOCK_K]
            b_s = tl.where(m_window[:, None], b_s.to(tl.float32) * (scale * LOG2E), 0.0)
            b_m = tl.max(b_s, 1)
            b_lse = b_m + tl.log2(tl.sum(tl.exp2(b_s - b_m[:, None]), 1))
            tl.store(p_lse + o_rows, b_lse, mask=m_window)
            for j in range(c.K):
                b_p = tl.load(logits + o_rows * c.K + j, mask=m_window, other=float("-inf")).to(tl.float32)
                b_p = tl.exp2(b_p * (scale * LOG2E) - b_lse)
                key_y, key_x, m_key = _in_window(n, c, row, column, m_window, j)
                b_o += b_p[:, None] * _load(v, c, batch, head, key_y, key_x, m_key)
    _store(output, c, b_o, batch, head, y, x, valid)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_logits(
    logits, v, v_b, v_y, v_x, v_h, heads, height, width, rows, columns, tiles, scale, do, do_b, do_y, do_x, do_h,
    grad_logits, p_lse, c,
):  # fmt: skip
    """Gradients of the rows of logits that belong to places of the map."""
    n = Sizes(heads, height, width, rows, columns, tiles)
    v, do = aligned_map(v, v_b, v_y, v_x, v_h, c), aligned_map(do, do_b, do_y, do_x, do_h, c)
    batch, head, y, x, valid, residue = _places(n, c)
    o_j = tl.arange(0, c.BLOCK_K)
    b_do = _load(do, c, batch, head, y, x, valid)
    for i in range(c.K):
        if _has_windows(c, residue, i):
            row, column, m_window = _windows(n, c, y, x, valid, i)
            b_dp = tl.zeros([c.BLOCK_M, c.BLOCK_K], tl.float32)
            for j in range(c.K):
                key_y, key_x, m_key = _in_window(n, c, row, column, m_window, j)
                b_dp_j = tl.sum(b_do * _load(v, c, batch, head, key_y, key_x, m_key), 1)
                b_dp += tl.where(o_j == j, b_dp_j[:, None], 0.0)
            mask = m_window[:, None] & (o_j < c.K)
            o_rows = _rows(n, c, batch, head, row, column, i)
            o_logits = o_rows[:, None] * c.K + o_j
            b_s = tl.load(logits + o_logits, mask=mask, other=float("-inf")).to(tl.float32) * (scale * LOG2E)
            b_p = tl.exp2(b_s - tl.load(p_lse + o_rows, mask=m_window, other=0.0)[:, None])
            b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * scale
            tl.store(grad_logits + o_logits, b_ds.to(grad_logits.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_v(
    logits, v, v_b, v_y, v_x, v_h, heads, height, width, rows, columns, tiles, scale, do, do_b, do_y, do_x, do_h,
    dv, p_lse, c,
):  # fmt: skip
    n = Sizes(heads, height, width, rows, columns, tiles)
    do, dv = aligned_map(do, do_b, do_y, do_x, do_h, c), contiguous_map(dv, n, height, width, c.DIM)
    batch, head, y, x, valid, residue = _places(n, c)
    b_dv = tl.zeros([c.BLOCK_M, c.BLOCK_D], tl.float32)
    for j in range(c.K):
        if _has_windows(c, residue, j):
            row, column, m_window = _windows(n, c, y, x, valid, j)
            for i in range(c.K):
                query_y, query_x, mask = _in_window(n, c, row, column, m_window, i)
                o_rows = _rows(n, c, batch, head, row, column, i)
                b_p = tl.load(logits + o_rows * c.K + j, mask=mask, other=float("-inf")).to(tl.float32)
                b_p = tl.exp2(b_p * (scale * LOG2E) - tl.load(p_lse + o_rows, mask=mask, other=0.0))
                b_dv += b_p[:, None] * _load(do, c, batch, head, query_y, query_x, mask)
    _store(dv, c, b_dv, batch, head, y, x, valid)


def unsupported(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> str | None:
    if kernel_size > 7:
        return f"kernel_size is {kernel_size}, at most 7 is supported"
    return unsupported_tensors(logits, v)


def unsuited(logits: Tensor, v: Tensor, *_: Any) -> str | None:
    return unsuited_map(v)


def problems(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Iterator[tuple]:
    """Maps of a few windows, which do not fill them."""
    for height, width in ((1, 2), (3, 5)):
        size = [(n - 1) * stride + kernel_size - 2 * padding + n % stride for n in (height, width)]
        windows = [(n + 2 * padding - kernel_size) // stride + 1 for n in size]
        small_v = draw(v, 2, *size, 3, v.shape[-1])
        yield draw(logits, 2, *windows, 3, *logits.shape[4:]), small_v, kernel_size, stride, padding, scale


def attention(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    return _operator(logits, v, kernel_size, stride, padding, scale)[0]


@torch.library.custom_op("visionattn::outlook_attention", mutates_args=())
def _operator(
    logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = _operator_fake(logits, v, kernel_size, stride, padding, scale)
    lse.zero_()  # rows of no place in the map are not computed
    _launch(_forward, logits, v, (kernel_size, stride, padding), scale, None, output, lse)
    return output, lse


@_operator.register_fake
def _operator_fake(logits, v, kernel_size, stride, padding, scale):
    return v.new_empty(v.shape), logits.new_empty(logits.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("visionattn::outlook_attention_backward", mutates_args=())
def _operator_backward(
    grad_output: Tensor,
    lse: Tensor,
    logits: Tensor,
    v: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    grad_logits, dv = logits.new_zeros(logits.shape), v.new_empty(v.shape)  # rows of no place in the map stay zero
    rest = logits, v, (kernel_size, stride, padding), scale, grad_output
    _launch(_backward_logits, *rest, grad_logits, lse)
    _launch(_backward_v, *rest, dv, lse)
    return grad_logits, dv


@_operator_backward.register_fake
def _operator_backward_fake(grad_output, lse, logits, v, kernel_size, stride, padding, scale):
    return logits.new_empty(logits.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits, v, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logits, v)


def _gradients(ctx, grad_output: Tensor, grad_lse: Tensor) -> tuple:
    return *_operator_backward(grad_output, *ctx.saved_tensors, *ctx.rest), None, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup_context)


def _launch(
    kernel: Any,
    logits: Tensor,
    v: Tensor,
    windows: tuple[int, int, int],
    scale: float,
    grad_output: Tensor | None,
    *results: Tensor,
) -> None:
    b, height, width, heads, dim = v.shape
    kernel_size, stride, _ = windows
    padded = max(MIN_BLOCK, triton.next_power_of_2(dim))
    block_m = max(16, 2048 // padded)  # 16 registers of a sum for each of 128 threads
    tiles = triton.cdiv(triton.cdiv(height, stride) * triton.cdiv(width, stride), block_m)
    maps, align = flat([v] if grad_output is None else [v, grad_output])
    places = kernel_size**2
    constants = (*windows, places, dim, padded, block_m, triton.next_power_of_2(places), align)
    programs = b * heads * tiles * stride**2
    if programs:
        sizes = heads, height, width, *logits.shape[1:3], tiles
        with torch.cuda.device_of(logits):
            kernel[(programs,)](
                logits.contiguous(), *maps[0], *sizes, scale, *itertools.chain(*maps[1:]), *results,
                Constants(*map(constant, constants)), **OPTIONS, num_warps=4,
            )  # fmt: skip
