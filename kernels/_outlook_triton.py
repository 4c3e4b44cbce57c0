"""Outlook attention in Triton: every place of the map gathers what the windows over it mix for it.

It does not fit the loop of `_attention_triton.py`: logits are given, not products of queries and keys. A row of logits
(window, place i of it) belongs to one place of the map, so that a tile of places reads and writes its own rows. A tile
holds places of one residue of the stride: the same i have a window for all of them. No kernel uses atomics.

Names as in `_attention_triton.py`; BLOCK_M places of the map at a time; K = kernel_size ** 2 places of a window,
BLOCK_K of them padded to a power of two.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import LOG2E, MIN_BLOCK, OPTIONS, constant, tensor_map, unsupported_tensors
from visionattn.kernels._proof import draw


class Windows(NamedTuple):
    """A (B, h, w, heads, K, K) tensor, the last axes i and j, and its strides."""

    pointer: Any
    stride_b: Any
    stride_y: Any
    stride_x: Any
    stride_h: Any
    stride_i: Any
    stride_j: Any


class Sizes(NamedTuple):
    height: Any  # of the map
    width: Any
    rows: Any  # of windows
    columns: Any
    heads: Any
    tiles: Any  # of one residue of the stride
    class_width: Any  # places of one residue in a row of the map
    scale: Any
    kernel: Any
    stride: Any
    padding: Any
    dim: Any
    BLOCK_D: Any
    BLOCK_M: Any
    BLOCK_K: Any


@triton.jit
def _places(s):
    """Batch, head and (y, x, valid) of the places of this program's tile, and their residues of the stride."""
    program = tl.program_id(0)
    head = program % s.heads
    tile = program // s.heads % s.tiles
    residue = program // s.heads // s.tiles % (s.stride * s.stride)
    batch = (program // s.heads // s.tiles // (s.stride * s.stride)).to(tl.int64)
    n = tile * s.BLOCK_M + tl.arange(0, s.BLOCK_M)
    y = n // s.class_width * s.stride + residue // s.stride
    x = n % s.class_width * s.stride + residue % s.stride
    return batch, head, y, x, (y < s.height) & (x < s.width), residue


@triton.jit
def _has_windows(s, residue, i):
    """Whether places of this residue are the i-th place of windows."""
    down = (residue // s.stride + s.padding - i // s.kernel) % s.stride
    return (down == 0) & ((residue % s.stride + s.padding - i % s.kernel) % s.stride == 0)


@triton.jit
def _windows(s, y, x, valid, i):
    """The windows whose i-th place is (y, x): row, column, whether there is one."""
    y, x = y + s.padding - i // s.kernel, x + s.padding - i % s.kernel
    row, column = y // s.stride, x // s.stride
    return row, column, valid & (y >= 0) & (x >= 0) & (row < s.rows) & (column < s.columns)


@triton.jit
def _load_of_window(tensor, s, batch, head, row, column, m_window, j):
    """What the j-th places of windows hold in a map, zero outside: [BLOCK_M, BLOCK_D]"""
    y, x = row * s.stride - s.padding + j // s.kernel, column * s.stride - s.padding + j % s.kernel
    mask = m_window & (y >= 0) & (y < s.height) & (x >= 0) & (x < s.width)
    return _load(tensor, s, batch, head, y, x, mask)


@triton.jit
def _pointers(tensor, batch, head, y, x, o_d):
    o_tokens = y.to(tl.int64) * tensor.stride_y + x.to(tl.int64) * tensor.stride_x
    p_head = tensor.pointer + batch * tensor.stride_b + head * tensor.stride_h
    return p_head + o_tokens[:, None] + o_d * tensor.stride_d


@triton.jit
def _load(tensor, s, batch, head, y, x, valid):
    o_d = tl.arange(0, s.BLOCK_D)
    mask = valid[:, None] & (o_d < s.dim)
    return tl.load(_pointers(tensor, batch, head, y, x, o_d), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, s, values, batch, head, y, x, valid):
    o_d = tl.arange(0, s.BLOCK_D)
    mask = valid[:, None] & (o_d < s.dim)
    tl.store(_pointers(tensor, batch, head, y, x, o_d), values.to(tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _logits_pointers(logits, batch, head, row, column, i):
    """To the rows i of the logits of windows: [BLOCK_M]"""
    o_windows = row.to(tl.int64) * logits.stride_y + column.to(tl.int64) * logits.stride_x
    return logits.pointer + batch * logits.stride_b + head * logits.stride_h + o_windows + i * logits.stride_i


@triton.jit
def _lse_offsets(s, batch, head, row, column, i):
    """In a contiguous (B, h, w, heads, K) tensor."""
    window = (batch * s.rows + row) * s.columns + column
    return (window * s.heads + head) * (s.kernel * s.kernel) + i


@triton.jit
def _forward(logits, v, output, p_lse, s):
    """Also stores the log-sum-exp of each row of logits that is used, in base 2."""
    batch, head, y, x, valid, residue = _places(s)
    o_j = tl.arange(0, s.BLOCK_K)
    b_o = tl.zeros([s.BLOCK_M, s.BLOCK_D], tl.float32)
    for i in range(s.kernel * s.kernel):
        if _has_windows(s, residue, i):
            row, column, m_window = _windows(s, y, x, valid, i)
            p_rows = _logits_pointers(logits, batch, head, row, column, i)
            mask = m_window[:, None] & (o_j < s.kernel * s.kernel)
            b_s = tl.load(p_rows[:, None] + o_j * logits.stride_j, mask=mask, other=float("-inf"))  # [BLOCK_M, BLOCK_K]
            b_s = tl.where(m_window[:, None], b_s.to(tl.float32) * (s.scale * LOG2E), 0.0)
            b_m = tl.max(b_s, 1)
            b_lse = b_m + tl.log2(tl.sum(tl.exp2(b_s - b_m[:, None]), 1))
            tl.store(p_lse + _lse_offsets(s, batch, head, row, column, i), b_lse, mask=m_window)
            for j in range(s.kernel * s.kernel):
                b_p = tl.load(p_rows + j * logits.stride_j, mask=m_window, other=float("-inf")).to(tl.float32)
                b_p = tl.exp2(b_p * (s.scale * LOG2E) - b_lse)
                b_o += b_p[:, None] * _load_of_window(v, s, batch, head, row, column, m_window, j)
    _store(output, s, b_o, batch, head, y, x, valid)


@triton.jit
def _backward_logits(logits, v, grad_output, grad_logits, p_lse, s):
    """Gradients of the rows of logits that belong to places of the map."""
    batch, head, y, x, valid, residue = _places(s)
    o_j = tl.arange(0, s.BLOCK_K)
    b_do = _load(grad_output, s, batch, head, y, x, valid)
    for i in range(s.kernel * s.kernel):
        if _has_windows(s, residue, i):
            row, column, m_window = _windows(s, y, x, valid, i)
            b_dp = tl.zeros([s.BLOCK_M, s.BLOCK_K], tl.float32)
            for j in range(s.kernel * s.kernel):
                b_dp_j = tl.sum(b_do * _load_of_window(v, s, batch, head, row, column, m_window, j), 1)
                b_dp += tl.where(o_j == j, b_dp_j[:, None], 0.0)
            mask = m_window[:, None] & (o_j < s.kernel * s.kernel)
            p_rows = _logits_pointers(logits, batch, head, row, column, i)[:, None] + o_j * logits.stride_j
            b_s = tl.load(p_rows, mask=mask, other=float("-inf")).to(tl.float32) * (s.scale * LOG2E)
            o_lse = _lse_offsets(s, batch, head, row, column, i)
            b_p = tl.exp2(b_s - tl.load(p_lse + o_lse, mask=m_window, other=0.0)[:, None])
            b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * s.scale
            p_rows = _logits_pointers(grad_logits, batch, head, row, column, i)[:, None] + o_j * grad_logits.stride_j
            tl.store(p_rows, b_ds.to(grad_logits.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _backward_v(logits, grad_output, dv, p_lse, s):
    batch, head, y, x, valid, residue = _places(s)
    b_dv = tl.zeros([s.BLOCK_M, s.BLOCK_D], tl.float32)
    for j in range(s.kernel * s.kernel):
        if _has_windows(s, residue, j):
            row, column, m_window = _windows(s, y, x, valid, j)
            for i in range(s.kernel * s.kernel):
                query_y = row * s.stride - s.padding + i // s.kernel
                query_x = column * s.stride - s.padding + i % s.kernel
                mask = m_window & (query_y >= 0) & (query_y < s.height) & (query_x >= 0) & (query_x < s.width)
                p_rows = _logits_pointers(logits, batch, head, row, column, i)
                b_p = tl.load(p_rows + j * logits.stride_j, mask=mask, other=float("-inf")).to(tl.float32)
                o_lse = _lse_offsets(s, batch, head, row, column, i)
                b_p = tl.exp2(b_p * (s.scale * LOG2E) - tl.load(p_lse + o_lse, mask=mask, other=0.0))
                b_dv += b_p[:, None] * _load(grad_output, s, batch, head, query_y, query_x, mask)
    _store(dv, s, b_dv, batch, head, y, x, valid)


def unsupported(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> str | None:
    if kernel_size > 7:
        return f"kernel_size is {kernel_size}, at most 7 is supported"
    return unsupported_tensors(logits, v)


def unsuited(*_: Any) -> str | None:
    return None


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
    _launch(_forward, (Windows(logits, *logits.stride()), tensor_map(v), tensor_map(output), lse),
            logits, v, (kernel_size, stride, padding), scale)  # fmt: skip
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
    windows, grad = Windows(logits, *logits.stride()), tensor_map(grad_output)
    rest = logits, v, (kernel_size, stride, padding), scale
    tensors = (windows, tensor_map(v), grad, Windows(grad_logits, *grad_logits.stride()), lse)
    _launch(_backward_logits, tensors, *rest)
    _launch(_backward_v, (windows, grad, tensor_map(dv), lse), *rest)
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


def _launch(kernel, tensors, logits: Tensor, v: Tensor, windows: tuple[int, int, int], scale: float) -> None:
    b, height, width, heads, dim = v.shape
    _, rows, columns, *_ = logits.shape
    kernel_size, stride, padding = windows
    padded = max(MIN_BLOCK, triton.next_power_of_2(dim))
    block_m = max(16, 2048 // padded)  # 16 registers of a sum for each of 128 threads
    class_height, class_width = triton.cdiv(height, stride), triton.cdiv(width, stride)
    tiles = triton.cdiv(class_height * class_width, block_m)
    constants = map(constant, (dim, padded, block_m, triton.next_power_of_2(kernel_size**2)))
    sizes = Sizes(
        height, width, rows, columns, heads, tiles, class_width, scale, kernel_size, stride, padding, *constants
    )
    programs = b * heads * tiles * stride**2
    if programs:
        with torch.cuda.device_of(v):
            kernel[(programs,)](*tensors, sizes, **OPTIONS, num_warps=4)
