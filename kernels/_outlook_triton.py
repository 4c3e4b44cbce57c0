"""Outlook attention in Triton: every place of the map gathers what the windows over it mix for it.

It does not fit the walk of `_attention_triton.py`: weights are given, not products of queries and keys. A row of logits
(window, place i of it) belongs to one place of the map, so that a tile of places reads and writes its own rows. A tile
holds places of one residue of the stride: the same i have a window for all of them. No kernel uses atomics.

Letters in comments: M places of a tile, K = kernel_size ** 2 places of a window (J: padded to a power of two), D dims
of a head, padded to a power of two.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import LOG2E, MIN_TILE, OPTIONS, constant, tensor_map, unsupported_tensors


class Windows(NamedTuple):
    """A (B, h, w, heads, K, K) tensor and its strides."""

    pointer: Any
    batch: Any
    row: Any
    column: Any
    head: Any
    place: Any
    value: Any


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
    D: Any
    M: Any
    J: Any


@triton.jit
def _places(s):
    """Batch, head and (y, x, valid) of the places of this program's tile, and their residues of the stride."""
    program = tl.program_id(0)
    head = program % s.heads
    tile = program // s.heads % s.tiles
    residue = program // s.heads // s.tiles % (s.stride * s.stride)
    batch = (program // s.heads // s.tiles // (s.stride * s.stride)).to(tl.int64)
    n = tile * s.M + tl.arange(0, s.M)
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
def _of_window(tensor, s, batch, head, row, column, found, j):
    """What the j-th places of windows hold in a map, zero outside: [M, D]"""
    y, x = row * s.stride - s.padding + j // s.kernel, column * s.stride - s.padding + j % s.kernel
    inside = found & (y >= 0) & (y < s.height) & (x >= 0) & (x < s.width)
    return _load(tensor, s, batch, head, y, x, inside)


@triton.jit
def _load(tensor, s, batch, head, y, x, valid):
    dims = tl.arange(0, s.D)
    offsets = y.to(tl.int64) * tensor.row + x.to(tl.int64) * tensor.column
    pointers = tensor.pointer + batch * tensor.batch + head * tensor.head + offsets[:, None] + dims * tensor.dim
    return tl.load(pointers, mask=valid[:, None] & (dims < s.dim), other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, s, values, batch, head, y, x, valid):
    dims = tl.arange(0, s.D)
    offsets = y.to(tl.int64) * tensor.row + x.to(tl.int64) * tensor.column
    pointers = tensor.pointer + batch * tensor.batch + head * tensor.head + offsets[:, None] + dims * tensor.dim
    tl.store(pointers, values.to(tensor.pointer.dtype.element_ty), mask=valid[:, None] & (dims < s.dim))


@triton.jit
def _row(logits, batch, head, row, column, i):
    """Pointers to rows of logits: [M]"""
    offsets = row.to(tl.int64) * logits.row + column.to(tl.int64) * logits.column
    return logits.pointer + batch * logits.batch + head * logits.head + offsets + i * logits.place


@triton.jit
def _statistic(s, batch, head, row, column, i):
    """Offsets in a contiguous (B, h, w, heads, K) tensor."""
    window = (batch * s.rows + row) * s.columns + column
    return (window * s.heads + head) * (s.kernel * s.kernel) + i


@triton.jit
def _forward(logits, v, output, lse, s):
    """Also stores the log-sum-exp of each row of logits that is used, in base 2."""
    batch, head, y, x, valid, residue = _places(s)
    values = tl.arange(0, s.J)
    b_o = tl.zeros([s.M, s.D], tl.float32)
    for i in range(s.kernel * s.kernel):
        if _has_windows(s, residue, i):
            row, column, found = _windows(s, y, x, valid, i)
            rows = _row(logits, batch, head, row, column, i)
            mask = found[:, None] & (values < s.kernel * s.kernel)
            b_l = tl.load(rows[:, None] + values * logits.value, mask=mask, other=float("-inf"))  # [M, J]
            b_l = tl.where(found[:, None], b_l.to(tl.float32) * (s.scale * LOG2E), 0.0)
            top = tl.max(b_l, 1)
            b_lse = top + tl.log2(tl.sum(tl.exp2(b_l - top[:, None]), 1))
            tl.store(lse + _statistic(s, batch, head, row, column, i), b_lse, mask=found)
            for j in range(s.kernel * s.kernel):
                b_w = tl.load(rows + j * logits.value, mask=found, other=float("-inf")).to(tl.float32)
                b_w = tl.exp2(b_w * (s.scale * LOG2E) - b_lse)
                b_o += b_w[:, None] * _of_window(v, s, batch, head, row, column, found, j)
    _store(output, s, b_o, batch, head, y, x, valid)


@triton.jit
def _backward_logits(logits, v, grad_output, grad_logits, lse, s):
    """Gradients of the rows of logits that belong to places of the map."""
    batch, head, y, x, valid, residue = _places(s)
    values = tl.arange(0, s.J)
    b_do = _load(grad_output, s, batch, head, y, x, valid)
    for i in range(s.kernel * s.kernel):
        if _has_windows(s, residue, i):
            row, column, found = _windows(s, y, x, valid, i)
            b_dp = tl.zeros([s.M, s.J], tl.float32)
            for j in range(s.kernel * s.kernel):
                product = tl.sum(b_do * _of_window(v, s, batch, head, row, column, found, j), 1)
                b_dp += tl.where(values == j, product[:, None], 0.0)
            mask = found[:, None] & (values < s.kernel * s.kernel)
            rows = _row(logits, batch, head, row, column, i)[:, None] + values * logits.value
            b_l = tl.load(rows, mask=mask, other=float("-inf")).to(tl.float32) * (s.scale * LOG2E)
            statistic = _statistic(s, batch, head, row, column, i)
            b_p = tl.exp2(b_l - tl.load(lse + statistic, mask=found, other=0.0)[:, None])
            b_dl = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * s.scale
            rows = _row(grad_logits, batch, head, row, column, i)[:, None] + values * grad_logits.value
            tl.store(rows, b_dl.to(grad_logits.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _backward_v(logits, grad_output, dv, lse, s):
    batch, head, y, x, valid, residue = _places(s)
    b_dv = tl.zeros([s.M, s.D], tl.float32)
    for j in range(s.kernel * s.kernel):
        if _has_windows(s, residue, j):
            row, column, found = _windows(s, y, x, valid, j)
            for i in range(s.kernel * s.kernel):
                above, left = row * s.stride - s.padding + i // s.kernel, column * s.stride - s.padding + i % s.kernel
                used = found & (above >= 0) & (above < s.height) & (left >= 0) & (left < s.width)
                rows = _row(logits, batch, head, row, column, i)
                b_w = tl.load(rows + j * logits.value, mask=used, other=float("-inf")).to(tl.float32)
                statistic = _statistic(s, batch, head, row, column, i)
                b_w = tl.exp2(b_w * (s.scale * LOG2E) - tl.load(lse + statistic, mask=used, other=0.0))
                b_dv += b_w[:, None] * _load(grad_output, s, batch, head, above, left, used)
    _store(dv, s, b_dv, batch, head, y, x, valid)


def unsupported(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> str | None:
    if kernel_size > 7:
        return f"kernel_size is {kernel_size}, at most 7 is supported"
    return unsupported_tensors(logits, v)


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
    kernel_size, stride, _ = windows
    padded = max(MIN_TILE, triton.next_power_of_2(dim))
    places = max(16, 2048 // padded)  # 16 registers of a sum for each of 128 threads
    class_height, class_width = triton.cdiv(height, stride), triton.cdiv(width, stride)
    tiles = triton.cdiv(class_height * class_width, places)
    constants = map(constant, (dim, padded, places, triton.next_power_of_2(kernel_size**2)))
    sizes = Sizes(height, width, *logits.shape[1:3], heads, tiles, class_width, scale, *windows, *constants)
    programs = b * heads * tiles * stride**2
    if programs:
        with torch.cuda.device_of(v):
            kernel[(programs,)](*tensors, sizes, **OPTIONS, num_warps=4)
