"""Halo attention in Triton: blocks of queries, keys from the block and a halo around it, logits from relative tables.

It does not fit the loop of `_attention_triton.py`. A tile holds queries of one block, which all attend to the same
window of keys: a step takes whole rows of it, padded to COLUMNS. The products of queries with the tables of relative
rows and columns are one matmul before, and have gradients of their own; a logit adds the one of its row, which a step
reads once for a query, and the one of its column, which stays in registers. Keys outside of the map are zeros that take
part. Backward computes each weight once: what a tile gives to the gradients of its keys is stored apart, and
`_sum_parts` adds up what the windows over a key have for it, in a fixed order.

Names as in `_attention_triton.py`; BLOCK_M queries, BLOCK_N keys at a time.
"""

import itertools
import math
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
    blocks_of,
    ceil_div,
    constant,
    contiguous_map,
    fit,
    flat,
    load,
    lse_offsets,
    new_output,
    precision_of,
    store,
    unsuited_map,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps
from visionattn.kernels.halo import _step, _tables


class Sizes(NamedTuple):
    heads: Any
    height: Any  # of the map of queries
    width: Any
    key_height: Any
    key_width: Any
    tiles: Any  # of one head of one image


class Constants(NamedTuple):
    block: Any  # keys of a block on a side, without the halo
    halo: Any
    side: Any  # queries of a block on a side
    window: Any  # block + 2 * halo
    DIM: Any
    DIM_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    Q_ROWS: Any  # of queries at a time
    Q_COLUMNS: Any
    ROWS: Any  # of keys at a time
    COLUMNS: Any
    AROUND: Any  # windows at most, on each axis, that a key is in
    ALIGN: Any  # all strides are multiples of it
    precision: Any


RUNTIME = [*Sizes._fields, "images", *(f"{x}_{stride}" for x in ("q", "k", "v", "do") for stride in "byxh")]


class Tile(NamedTuple):
    """Queries of a block, and their window."""

    batch: Any
    head: Any
    queries: Any  # `Tokens`
    row: Any  # of a query in its block [BLOCK_M]
    column: Any
    first_y: Any  # of the window in the map of keys
    first_x: Any
    products: Any  # offsets of the products of a query in (B, H, W, heads, 2, 2 * window - 1), contiguous


@triton.jit
def _parts(c):
    """Tiles of a block, on each axis."""
    return (c.side + c.Q_ROWS - 1) // c.Q_ROWS, (c.side + c.Q_COLUMNS - 1) // c.Q_COLUMNS


@triton.jit
def _tile(n, c):
    program = tl.program_id(0)
    batch, head, tile = (program // n.heads // n.tiles).to(tl.int64), program % n.heads, program // n.heads % n.tiles
    down, across = _parts(c)
    block, part = tile // (down * across), tile % (down * across)
    columns = ceil_div(n.width, c.side)
    block_y, block_x = block // columns, block % columns
    i = tl.arange(0, c.Q_ROWS * c.Q_COLUMNS)
    row, column = part // across * c.Q_ROWS + i // c.Q_COLUMNS, part % across * c.Q_COLUMNS + i % c.Q_COLUMNS
    y, x = block_y * c.side + row, block_x * c.side + column
    valid = (row < c.side) & (column < c.side) & (y < n.height) & (x < n.width)
    products = (((batch * n.height + y) * n.width + x) * n.heads + head) * (4 * c.window - 2)
    first_y, first_x = block_y * c.block - c.halo, block_x * c.block - c.halo
    return Tile(batch, head, Tokens(y, x, valid, None), row, column, first_y, first_x, products)


@triton.jit
def _in_step(c):
    """Of its keys the row and column."""
    i = tl.arange(0, c.ROWS * c.COLUMNS)
    return i // c.COLUMNS, i % c.COLUMNS


@triton.jit
def _keys(n, c, tile, first):
    row, column = _in_step(c)
    row += first
    y, x = tile.first_y + row, tile.first_x + column
    valid = (row < c.window) & (column < c.window) & (y >= 0) & (y < n.key_height) & (x >= 0) & (x < n.key_width)
    return Tokens(y, x, valid, row * c.window + column)


@triton.jit
def _across(products, c, tile):
    """What the columns of keys add to logits, times LOG2E, -inf beyond the window: [BLOCK_M, BLOCK_N]"""
    column = _in_step(c)[1][None, :]
    b_x = tl.zeros([c.Q_ROWS * c.Q_COLUMNS, c.ROWS * c.COLUMNS], tl.float32)
    if products is not None:
        o_x = tile.products[:, None] + (3 * c.window - 2 + column - tile.column[:, None])
        mask = tile.queries.valid[:, None] & (column < c.window)
        b_x += tl.load(products + o_x, mask=mask, other=0.0).to(tl.float32) * LOG2E
    return tl.where(column < c.window, b_x, float("-inf"))


@triton.jit
def _logits(products, c, scale, tile, b_q, b_k, b_x, first):
    """Times LOG2E [BLOCK_M, BLOCK_N]"""
    b_s = tl.dot(b_q, b_k.T, input_precision=c.precision) * (scale * LOG2E) + b_x
    row = _in_step(c)[0][None, :]
    if products is not None:
        for i in tl.static_range(c.ROWS):
            o_y, mask = _of_row(c, tile, first + i)
            b_y = tl.load(products + o_y, mask=mask, other=0.0).to(tl.float32) * LOG2E
            b_s += tl.where(row == i, b_y[:, None], 0.0)
    if c.window % c.ROWS > 0:
        b_s = tl.where(row + first < c.window, b_s, float("-inf"))
    return b_s


@triton.jit
def _of_row(c, tile, row):
    """Offsets of the queries' products for a row of keys, and whether there are such."""
    return tile.products + (c.window - 1 + row - tile.row), tile.queries.valid & (row < c.window)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, products, output, p_lse, c,
):  # fmt: skip
    n = Sizes(heads, height, width, key_height, key_width, tiles)
    q, k = aligned_map(q, q_b, q_y, q_x, q_h, c), aligned_map(k, k_b, k_y, k_x, k_h, c)
    v, output = aligned_map(v, v_b, v_y, v_x, v_h, c), contiguous_map(output, n, height, width, c.DIM_V)
    tile = _tile(n, c)
    b_q = load(q, tile.batch, tile.head, tile.queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_x = _across(products, c, tile)
    b_m = tl.full([c.Q_ROWS * c.Q_COLUMNS], float("-inf"), tl.float32)
    b_l = tl.zeros([c.Q_ROWS * c.Q_COLUMNS], tl.float32)
    b_o = tl.zeros([c.Q_ROWS * c.Q_COLUMNS, c.BLOCK_DV], tl.float32)
    for first in range(0, c.window, c.ROWS):
        keys = _keys(n, c, tile, first)
        b_k = load(k, tile.batch, tile.head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load(v, tile.batch, tile.head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_s = _logits(products, c, scale, tile, b_q, b_k, b_x, first)
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))  # finite: each step has a key
        b_p = tl.exp2(b_s - b_m_new[:, None])
        alpha = tl.exp2(b_m - b_m_new)
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * alpha[:, None], input_precision=c.precision)
        b_m = b_m_new
    store(output, b_o / b_l[:, None], tile.batch, tile.head, tile.queries, c.DIM_V, c.BLOCK_DV)
    o_lse = lse_offsets(n, tile.batch, tile.head, tile.queries)
    tl.store(p_lse + o_lse, (b_m + tl.log2(b_l)) / LOG2E, mask=tile.queries.valid)


@triton.jit(do_not_specialize=RUNTIME)
def _backward(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, do, do_b, do_y, do_x, do_h,
    products, output, p_lse, p_grad_lse, dq, dproducts, p_parts, c,
):  # fmt: skip
    """Gradients of q and of the products, and in p_parts (programs, window ** 2, DIM + DIM_V) shares of those of k, v.

    dproducts: zeros, of which a query's own are written.
    """
    n = Sizes(heads, height, width, key_height, key_width, tiles)
    q, k = aligned_map(q, q_b, q_y, q_x, q_h, c), aligned_map(k, k_b, k_y, k_x, k_h, c)
    v, do = aligned_map(v, v_b, v_y, v_x, v_h, c), aligned_map(do, do_b, do_y, do_x, do_h, c)
    output, dq = contiguous_map(output, n, height, width, c.DIM_V), contiguous_map(dq, n, height, width, c.DIM)
    tile = _tile(n, c)
    valid = tile.queries.valid
    b_q = load(q, tile.batch, tile.head, tile.queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load(do, tile.batch, tile.head, tile.queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    b_o = load(output, tile.batch, tile.head, tile.queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    o_lse = lse_offsets(n, tile.batch, tile.head, tile.queries)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=valid, other=0.0)
    b_lse = tl.load(p_lse + o_lse, mask=valid, other=float("inf")) * LOG2E
    b_x = _across(products, c, tile) - b_lse[:, None]
    b_dq = tl.zeros([c.Q_ROWS * c.Q_COLUMNS, c.BLOCK_D], tl.float32)
    b_dx = tl.zeros([c.Q_ROWS * c.Q_COLUMNS, c.ROWS * c.COLUMNS], tl.float32)
    p_parts += tl.program_id(0).to(tl.int64) * (c.window * c.window * (c.DIM + c.DIM_V))
    for first in range(0, c.window, c.ROWS):
        keys = _keys(n, c, tile, first)
        b_k = load(k, tile.batch, tile.head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load(v, tile.batch, tile.head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_p = tl.exp2(_logits(products, c, scale, tile, b_q, b_k, b_x, first))
        b_ds = b_p * (tl.dot(b_do, b_v.T, input_precision=c.precision) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=c.precision)
        b_dk = tl.dot(b_ds.to(b_q.dtype).T, b_q, input_precision=c.precision) * scale
        b_dv = tl.dot(b_p.to(b_do.dtype).T, b_do, input_precision=c.precision)
        _store_part(p_parts, b_dk, keys, c, c.DIM, c.BLOCK_D)
        _store_part(p_parts + c.DIM, b_dv, keys, c, c.DIM_V, c.BLOCK_DV)
        if products is not None:
            b_dx += b_ds
            for i in tl.static_range(c.ROWS):
                o_y, mask = _of_row(c, tile, first + i)
                b_dy = tl.sum(tl.where(_in_step(c)[0][None, :] == i, b_ds, 0.0), 1)
                tl.store(dproducts + o_y, b_dy.to(dproducts.dtype.element_ty), mask=mask)
    store(dq, b_dq * scale, tile.batch, tile.head, tile.queries, c.DIM, c.BLOCK_D)
    if products is not None:
        b_dx = tl.sum(tl.reshape(b_dx, [c.Q_ROWS * c.Q_COLUMNS, c.ROWS, c.COLUMNS]), 1)
        column = tl.arange(0, c.COLUMNS)[None, :]
        o_x = tile.products[:, None] + (3 * c.window - 2 + column - tile.column[:, None])
        tl.store(dproducts + o_x, b_dx.to(dproducts.dtype.element_ty), mask=valid[:, None] & (column < c.window))


@triton.jit
def _store_part(p_parts, values, keys, c, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)[None, :]
    p_keys = p_parts + keys.place[:, None] * (c.DIM + c.DIM_V) + o_d
    tl.store(p_keys, values.to(p_parts.dtype.element_ty), mask=keys.valid[:, None] & (o_d < DIM))


@triton.jit(do_not_specialize=RUNTIME)
def _sum_parts(heads, height, width, key_height, key_width, tiles, images, p_parts, dk, dv, c, BLOCK_T: tl.constexpr):
    """Gradients of BLOCK_T keys of one head, from the windows that they are in."""
    program = tl.program_id(0)
    i, head = program // heads * BLOCK_T + tl.arange(0, BLOCK_T), program % heads
    y, x, batch = i // key_width % key_height, i % key_width, (i // (key_height * key_width)).to(tl.int64)
    rows, columns = ceil_div(height, c.side), ceil_div(width, c.side)
    down, across = _parts(c)
    o_d, o_dv = tl.arange(0, c.BLOCK_D)[None, :], tl.arange(0, c.BLOCK_DV)[None, :]
    b_dk = tl.zeros([BLOCK_T, c.BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_T, c.BLOCK_DV], tl.float32)
    for next_y in range(c.AROUND):
        for next_x in range(c.AROUND):
            block_y = tl.maximum(y - c.halo, 0) // c.block + next_y
            block_x = tl.maximum(x - c.halo, 0) // c.block + next_x
            row, column = y + c.halo - block_y * c.block, x + c.halo - block_x * c.block
            mask = (batch < images) & (block_y < rows) & (row >= 0) & (block_x < columns) & (column >= 0)
            for part in range(down * across):
                tile = (batch * tiles + (block_y * columns + block_x) * (down * across) + part) * heads + head
                p_part = p_parts + ((tile * c.window + row) * c.window + column)[:, None] * (c.DIM + c.DIM_V)
                b_dk += tl.load(p_part + o_d, mask=mask[:, None] & (o_d < c.DIM), other=0.0).to(tl.float32)
                b_dv += tl.load(p_part + c.DIM + o_dv, mask=mask[:, None] & (o_dv < c.DIM_V), other=0.0).to(tl.float32)
    o_keys, mask = (i.to(tl.int64) * heads + head)[:, None], (batch < images)[:, None]
    tl.store(dk + o_keys * c.DIM + o_d, b_dk.to(dk.dtype.element_ty), mask=mask & (o_d < c.DIM))
    tl.store(dv + o_keys * c.DIM_V + o_dv, b_dv.to(dv.dtype.element_ty), mask=mask & (o_dv < c.DIM_V))


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    *_: Any,
) -> str | None:
    if block_size + 2 * halo_size > 32:
        return f"block_size + 2 * halo_size is {block_size + 2 * halo_size}, at most 32 is supported"
    return unsupported_tensors(q, k, v)


def unsuited(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    *_: Any,
) -> str | None:
    whole = block_size >= max(k.shape[1:3])
    return "one block is the whole map, for which PyTorch has its own kernel" if whole else unsuited_map(q)


def problems(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    *rest: Any,
) -> Iterator[tuple]:
    """Blocks that the map does not fill."""
    step = _step(q.shape[1:3], k.shape[1:3], block_size)
    for size in ((block_size + 1, 2 * block_size - 1), (2 * block_size + 1, 3)):
        small_q, small_k, small_v = draw_maps(q, v, size)
        tables = (None if x is None else draw(x, *x.shape) * x.shape[1] ** -0.5 for x in (rel_height, rel_width))
        yield small_q[:, ::step, ::step], small_k, small_v, *tables, block_size, *rest


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    tables, products = _tables(rel_height, rel_width), None
    if tables is not None:
        products = q @ tables.flatten(0, 1).to(q.dtype).T
    output, lse = _operator(q, k, v, products, block_size, halo_size, scale)
    return (output, lse) if return_lse else output


@torch.library.custom_op("visionattn::halo_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, products: Tensor | None, block_size: int, halo_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """products: (B, H, W, heads, 2 * (2 * window - 1)), what the distances to a query's keys add to its logits."""
    output, lse = new_output(q, v)
    call = _Call("forward", q, k, v, block_size, halo_size)
    call.launch(_forward, call.programs, *call.maps, *call.sizes, scale, _contiguous(products), output, lse)
    return output, lse


@_operator.register_fake
def _operator_fake(q, k, v, products, block_size, halo_size, scale):
    return new_output(q, v)


@torch.library.custom_op("visionattn::halo_attention_backward", mutates_args=())
def _operator_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    products: Tensor | None,
    block_size: int,
    halo_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and products; the last is empty without products."""
    dq, dk, dv = _operator_backward_fake(
        grad_output, grad_lse, output, lse, q, k, v, None, block_size, halo_size, scale
    )[:3]
    dproducts = q.new_zeros(0 if products is None else products.shape)
    call = _Call("tile", q, k, v, block_size, halo_size, grad_output)
    parts = q.new_empty(call.programs, (block_size + 2 * halo_size) ** 2, q.shape[-1] + v.shape[-1])
    given = _contiguous(products), output, lse, grad_lse
    call.launch(
        _backward, call.programs, *call.maps[:15], *call.sizes, scale, *call.maps[15:], *given, dq, dproducts, parts
    )
    tokens = max(16, 2048 // call.constants.BLOCK_D.value)
    programs = triton.cdiv(math.prod(k.shape[:3]), tokens) * k.shape[3]
    call.launch(_sum_parts, programs, *call.sizes, len(q), parts, dk, dv, BLOCK_T=tokens)
    return dq, dk, dv, dproducts


@_operator_backward.register_fake
def _operator_backward_fake(grad_output, grad_lse, output, lse, q, k, v, products, block_size, halo_size, scale):
    shapes = [*(x.shape for x in (q, k, v)), (0,) if products is None else products.shape]
    return tuple(q.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, products, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, products)


def _gradients(ctx, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:
    output, *tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    *gradients, dproducts = _operator_backward(grad_output, _contiguous(grad_lse), output, *tensors, *ctx.rest)
    return *gradients, None if tensors[-1] is None else dproducts, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup_context)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _Call:
    """What the kernels of a call get."""

    def __init__(
        self,
        kernel: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: int,
        halo: int,
        grad_output: Tensor | None = None,
    ):
        block_m, block_n, warps, stages = blocks_of("halo", kernel, q, v)
        side, window = block // _step(q.shape[1:3], k.shape[1:3], block), block + 2 * halo
        maps, align = flat([q, k, v] if grad_output is None else [q, k, v, grad_output])
        queries, columns = fit(side, side, block_m), triton.next_power_of_2(window)
        rows = max(1, max(MIN_BLOCK, block_n) // columns)
        parts = math.prod(triton.cdiv(side, n.value) for n in queries[:2])
        tiles = math.prod(triton.cdiv(length, side) for length in q.shape[1:3]) * parts
        dims = q.shape[-1], v.shape[-1]
        padded = (max(MIN_BLOCK, triton.next_power_of_2(x)) for x in dims)
        around = (2 * halo + block - 1) // block + 1
        constants = block, halo, side, window, *dims, *padded, *(x.value for x in queries[:2]), rows, columns, around
        self.constants = Constants(*map(constant, (*constants, align, precision_of(q))))
        self.maps, self.sizes = [*itertools.chain(*maps)], (q.shape[3], *q.shape[1:3], *k.shape[1:3], tiles)
        self.programs, self.q = len(q) * q.shape[3] * tiles, q
        self.options = {**OPTIONS, "num_warps": warps, "num_stages": stages}

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
        if programs:
            with torch.cuda.device_of(self.q):
                kernel[(programs,)](*arguments, self.constants, **constants, **self.options)
