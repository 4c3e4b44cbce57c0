"""Outlook attention in Triton: every place of the map gathers what the windows over it mix for it.

It does not fit the loop of `_attention_triton.py`: logits are given, not products of queries and keys. A row of logits
(window, place i of it) belongs to one place of the map, so that a tile of places reads and writes its own rows, each
number once, and holds them in registers. A tile holds places of one residue of the stride: the same i have a window for
all of them, at the same distance, so that addresses differ by one sum. No kernel uses atomics.

Names as in `_attention_triton.py`; BLOCK_M places of the map at a time; K = kernel_size ** 2 places of a window,
BLOCK_K of them padded to a power of two. Numbers of rows are one vector for each of the K, without a reduction across
threads; rows of 9 or 25 numbers start at no multiple of a vector's width.
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
    aligned_map,
    ceil_div,
    constant,
    contiguous_map,
    flat,
    load,
    pointers,
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


class Places(NamedTuple):
    """Those of a tile, all of one residue of the stride; vectors are [BLOCK_M]."""

    batch: Any
    head: Any
    y: Any
    x: Any
    valid: Any
    residue_y: Any
    residue_x: Any
    row: Any  # y // stride
    column: Any


class Windows(NamedTuple):
    """For each place of a tile one that it is in."""

    first_y: Any  # of the window's first place, relative to the place
    first_x: Any
    number: Any  # in its image
    valid: Any  # whether there is one


@triton.jit
def _places(n, c):
    program = tl.program_id(0)
    tile = program // n.heads % n.tiles
    residue = program // n.heads // n.tiles % (c.stride * c.stride)
    batch = (program // n.heads // n.tiles // (c.stride * c.stride)).to(tl.int64)
    i = tile * c.BLOCK_M + tl.arange(0, c.BLOCK_M)
    columns = ceil_div(n.width, c.stride)
    residue_y, residue_x = residue // c.stride, residue % c.stride
    row, column = i // columns, i % columns
    y, x = row * c.stride + residue_y, column * c.stride + residue_x
    valid = (y < n.height) & (x < n.width)
    return Places(batch, program % n.heads, y, x, valid, residue_y, residue_x, row, column)


@triton.jit
def _first(c, residue):
    """The first row (or column) of windows that has places of this residue; the stride leads to the next."""
    return (residue + c.padding) % c.stride


@triton.jit
def _windows(n, c, places, down, across):
    """Those in whose row `down` and column `across` the places are."""
    down_by = (places.residue_y + c.padding - down) // c.stride
    right_by = (places.residue_x + c.padding - across) // c.stride
    row, column = places.row + down_by, places.column + right_by
    valid = places.valid & (row >= 0) & (row < n.rows) & (column >= 0) & (column < n.columns)
    number = places.row * n.columns + places.column + (down_by * n.columns + right_by)
    return Windows(-down, -across, number, valid)


@triton.jit
def _rows(pointer, n, c, places, windows, K: tl.constexpr):
    """To the first of the K numbers of each window in a contiguous (B, h, w, heads, K) tensor."""
    image = (places.batch * n.rows * n.columns * n.heads + places.head) * K
    return pointer + image + windows.number * (n.heads * K)


@triton.jit
def _load(tensor, n, c, places, p_places, windows, i: tl.constexpr):
    """The i-th places of windows, zero outside of the map [BLOCK_M, BLOCK_D], and whether they are in it."""
    down, across = windows.first_y + i // c.kernel, windows.first_x + (i - i // c.kernel * c.kernel)
    inside = windows.valid & (places.y >= -down) & (places.y < n.height - down)
    inside = inside & (places.x >= -across) & (places.x < n.width - across)
    mask = inside[:, None]
    if c.DIM < c.BLOCK_D:
        mask = mask & (tl.arange(0, c.BLOCK_D) < c.DIM)[None, :]
    p_tensor = p_places + (down * tensor.stride_y + across * tensor.stride_x)
    return tl.load(p_tensor, mask=mask, other=0.0).to(tl.float32), inside


@triton.jit
def _weights(p_row, c, scale, valid):
    """Softmax of rows of logits: for each of the K a vector [BLOCK_M], and the log-sum-exp, in base 2."""
    b_s: tl.tuple = ()
    b_m = tl.full([c.BLOCK_M], float("-inf"), tl.float32)
    for j in tl.static_range(c.K):
        b_s += (tl.load(p_row + j, mask=valid, other=0.0).to(tl.float32) * (scale * LOG2E),)
        b_m = tl.maximum(b_m, b_s[j])
    b_e: tl.tuple = ()
    b_l = tl.zeros([c.BLOCK_M], tl.float32)
    for j in tl.static_range(c.K):
        b_e += (tl.exp2(b_s[j] - b_m),)
        b_l += b_e[j]
    b_p: tl.tuple = ()
    share = 1.0 / b_l
    for j in tl.static_range(c.K):
        b_p += (b_e[j] * share,)
    return b_p, b_m + tl.log2(b_l)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(logits, v, v_b, v_y, v_x, v_h, heads, height, width, rows, columns, tiles, scale, output, c):
    n = Sizes(heads, height, width, rows, columns, tiles)
    v, output = aligned_map(v, v_b, v_y, v_x, v_h, c), contiguous_map(output, n, height, width, c.DIM)
    places = _places(n, c)
    p_v = pointers(v, places.batch, places.head, places, tl.arange(0, c.BLOCK_D))
    b_o = tl.zeros([c.BLOCK_M, c.BLOCK_D], tl.float32)
    for down in range(_first(c, places.residue_y), c.kernel, c.stride):
        for across in range(_first(c, places.residue_x), c.kernel, c.stride):
            windows = _windows(n, c, places, down, across)
            p_row = _rows(logits, n, c, places, windows, c.K * c.K) + (down * c.kernel + across) * c.K
            b_p, _ = _weights(p_row, c, scale, windows.valid)
            for j in tl.static_range(c.K):
                b_o += b_p[j][:, None] * _load(v, n, c, places, p_v, windows, j)[0]
    store(output, b_o, places.batch, places.head, places, c.DIM, c.BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_logits(
    logits, v, v_b, v_y, v_x, v_h, heads, height, width, rows, columns, tiles, scale, do, do_b, do_y, do_x, do_h,
    grad_logits, p_lse, c,
):  # fmt: skip
    """Gradients of the rows of logits that belong to places of the map; also stores their log-sum-exp, in base 2."""
    n = Sizes(heads, height, width, rows, columns, tiles)
    v, do = aligned_map(v, v_b, v_y, v_x, v_h, c), aligned_map(do, do_b, do_y, do_x, do_h, c)
    places = _places(n, c)
    o_j = tl.arange(0, c.BLOCK_K)
    p_v = pointers(v, places.batch, places.head, places, tl.arange(0, c.BLOCK_D))
    b_do = load(do, places.batch, places.head, places, c.DIM, c.BLOCK_D).to(tl.float32)
    for down in range(_first(c, places.residue_y), c.kernel, c.stride):
        for across in range(_first(c, places.residue_x), c.kernel, c.stride):
            windows = _windows(n, c, places, down, across)
            i = down * c.kernel + across
            b_p, b_lse = _weights(_rows(logits, n, c, places, windows, c.K * c.K) + i * c.K, c, scale, windows.valid)
            tl.store(_rows(p_lse, n, c, places, windows, c.K) + i, b_lse, mask=windows.valid)
            b_dp: tl.tuple = ()
            b_delta = tl.zeros([c.BLOCK_M], tl.float32)
            for j in tl.static_range(c.K):
                b_dp += (tl.sum(b_do * _load(v, n, c, places, p_v, windows, j)[0], 1),)
                b_delta += b_p[j] * b_dp[j]
            b_ds = tl.zeros([c.BLOCK_M, c.BLOCK_K], tl.float32)
            for j in tl.static_range(c.K):
                b_ds = tl.where(o_j == j, (b_p[j] * (b_dp[j] - b_delta) * scale)[:, None], b_ds)
            p_row = _rows(grad_logits, n, c, places, windows, c.K * c.K) + i * c.K
            mask = windows.valid[:, None] & (o_j < c.K)
            tl.store(p_row[:, None] + o_j, b_ds.to(grad_logits.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_v(
    logits, v, v_b, v_y, v_x, v_h, heads, height, width, rows, columns, tiles, scale, do, do_b, do_y, do_x, do_h,
    dv, p_lse, c,
):  # fmt: skip
    n = Sizes(heads, height, width, rows, columns, tiles)
    do, dv = aligned_map(do, do_b, do_y, do_x, do_h, c), contiguous_map(dv, n, height, width, c.DIM)
    places = _places(n, c)
    p_do = pointers(do, places.batch, places.head, places, tl.arange(0, c.BLOCK_D))
    b_dv = tl.zeros([c.BLOCK_M, c.BLOCK_D], tl.float32)
    for down in range(_first(c, places.residue_y), c.kernel, c.stride):
        for across in range(_first(c, places.residue_x), c.kernel, c.stride):
            windows = _windows(n, c, places, down, across)
            p_column = _rows(logits, n, c, places, windows, c.K * c.K) + down * c.kernel + across
            p_lses = _rows(p_lse, n, c, places, windows, c.K)
            for i in tl.static_range(c.K):
                b_do, inside = _load(do, n, c, places, p_do, windows, i)
                b_s = tl.load(p_column + i * c.K, mask=inside, other=0.0).to(tl.float32) * (scale * LOG2E)
                b_dv += tl.exp2(b_s - tl.load(p_lses + i, mask=inside, other=0.0))[:, None] * b_do
    store(dv, b_dv, places.batch, places.head, places, c.DIM, c.BLOCK_D)


def unsupported(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> str | None:
    if kernel_size > 5:
        return f"kernel_size is {kernel_size}, at most 5 is supported"
    if logits[:1].numel() >= 2**31:
        return f"an image has {logits[:1].numel()} logits, fewer than 2 ** 31 are supported"
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
    return _operator(logits, v, kernel_size, stride, padding, scale)


@torch.library.custom_op("visionattn::outlook_attention", mutates_args=())
def _operator(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    output = _operator_fake(logits, v, kernel_size, stride, padding, scale)
    _launch(_forward, logits, v, (kernel_size, stride, padding), scale, None, output)
    return output


@_operator.register_fake
def _operator_fake(logits, v, kernel_size, stride, padding, scale):
    return v.new_empty(v.shape)


@torch.library.custom_op("visionattn::outlook_attention_backward", mutates_args=())
def _operator_backward(
    grad_output: Tensor, logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    grad_logits, dv = logits.new_zeros(logits.shape), v.new_empty(v.shape)  # rows of no place in the map stay zero
    lse = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    rest = logits, v, (kernel_size, stride, padding), scale, grad_output
    _launch(_backward_logits, *rest, grad_logits, lse)
    _launch(_backward_v, *rest, dv, lse)
    return grad_logits, dv


@_operator_backward.register_fake
def _operator_backward_fake(grad_output, logits, v, kernel_size, stride, padding, scale):
    return logits.new_empty(logits.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits, v, *ctx.rest = inputs
    ctx.save_for_backward(logits, v)


def _gradients(ctx, grad_output: Tensor) -> tuple:
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
    block_m = max(16, 1024 // padded)  # 8 registers of a sum for each of 128 threads
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
