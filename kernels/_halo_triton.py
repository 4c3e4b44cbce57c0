"""Halo attention in Triton: blocks of queries, keys from the block and a halo around it, logits from relative tables.

Keys outside the map are zeros that take part. The products of a query with the tables of relative rows and columns are
computed once for a tile and shifted, so that number r belongs to row r (or column r) of the block's keys; a product
with a matrix of zeros and ones then spreads them over the keys, and its transpose collects their gradients.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    LOG2E,
    MIN_BLOCK,
    PATTERNS,
    Block,
    Functions,
    Pattern,
    Plan,
    Relative,
    Tokens,
    across,
    attend,
    ceil_div,
    constant,
    fit,
    in_block,
    unsuited_map,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps
from visionattn.kernels.halo import _step, _tables

KV_TILE = 4, 8  # height and width; a smaller kv_tile is attended to by fewer blocks


class Geometry(NamedTuple):
    q: Any
    k: Any
    tables: Any  # (2, 2 * window - 1, dim), contiguous, or None: rel_height and rel_width
    block: Any  # keys of a block on a side, without the halo
    side: Any  # queries of a block on a side
    halo: Any
    window: Any  # block + 2 * halo
    P: Any  # rows of a table, padded to a power of two
    R: Any  # window, padded to a power of two


@triton.jit
def _queries(g, n, block_y, block_x, row, column):
    """Logits see of a query its place in its block, and the first key of that."""
    _, rows, columns = in_block(g.q)
    place_y, place_x = rows + row, columns + column
    y, x = block_y * g.side + place_y, block_x * g.side + place_x
    valid = (place_y < g.side) & (place_x < g.side) & (y < n.height) & (x < n.width)
    return Tokens(y, x, valid, (place_y, place_x, block_y * g.block - g.halo, block_x * g.block - g.halo))


@triton.jit
def _keys(g, n, y, x):
    return Tokens(y, x, (y >= 0) & (y < n.key_height) & (x >= 0) & (x < n.key_width), (y, x))


@triton.jit
def _q_tile(g, n, batch, tile):
    across: tl.constexpr = (g.side + g.q.columns - 1) // g.q.columns
    tiles: tl.constexpr = (g.side + g.q.rows - 1) // g.q.rows * across
    block, part = tile // tiles, tile % tiles
    columns = ceil_div(n.width, g.side)
    row, column = part // across * g.q.rows, part % across * g.q.columns
    queries = _queries(g, n, block // columns, block % columns, row, column)
    _, _, first_y, first_x = queries.place
    return queries, (1, g.window, g.window, first_y, first_x)


@triton.jit
def _kv_at(g, n, batch, walk, box, row, column):
    _, rows, columns = in_block(g.k)
    rows, columns = rows + row, columns + column
    keys = _keys(g, n, walk[3] + rows, walk[4] + columns)
    return Tokens(keys.y, keys.x, keys.valid & (rows < g.window) & (columns < g.window), keys.place)


@triton.jit
def _blocks(g, first, TILE: tl.constexpr, length):
    """First block, and number of blocks, along an axis, with a key of a tile that starts at `first`."""
    start = tl.maximum(first - g.halo, 0) // g.block
    return start, tl.minimum((first + TILE - 1 + g.halo) // g.block, ceil_div(length, g.side) - 1) - start + 1


@triton.jit
def _kv_tile(g, n, batch, tile):
    tiles = ceil_div(n.key_width, g.k.columns)
    first_y, first_x = tile // tiles * g.k.rows, tile % tiles * g.k.columns
    block_y, rows = _blocks(g, first_y, g.k.rows, n.height)
    block_x, columns = _blocks(g, first_x, g.k.columns, n.width)
    _, row, column = in_block(g.k)
    return _keys(g, n, row + first_y, column + first_x), (rows * columns, g.side, g.side, block_y, block_x, columns)


@triton.jit
def _q_at(g, n, batch, walk, box, row, column):
    return _queries(g, n, walk[3] + box // walk[5], walk[4] + box % walk[5], row, column)


@triton.jit
def _logits(g, b_s, head, queries, keys, BY_KEY: tl.constexpr):
    _, _, first_y, first_x = queries.place
    y, x = keys.place
    within = (y >= first_y) & (y < first_y + g.window) & (x >= first_x) & (x < first_x + g.window)
    return tl.where(across(within, BY_KEY), b_s, float("-inf"))


@triton.jit
def _table(g, axis: tl.constexpr, c):
    o_p, o_d = tl.arange(0, g.P), tl.arange(0, c.BLOCK_D)
    mask = (o_p < 2 * g.window - 1)[:, None] & (o_d < c.DIM)[None, :]
    p_table = g.tables + axis * ((2 * g.window - 1) * c.DIM)
    return tl.load(p_table + o_p[:, None] * c.DIM + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _product(g, b_q, place, axis: tl.constexpr, c):
    b_product = tl.dot(b_q, _table(g, axis, c).T, input_precision=c.precision)  # [BLOCK_M, P]
    index = tl.arange(0, g.R)[None, :] - place[:, None] + (g.window - 1)
    return tl.gather(b_product, tl.minimum(tl.maximum(index, 0), g.P - 1), 1) * LOG2E  # [BLOCK_M, R]


@triton.jit
def _products(g, b_q, queries, c):
    return _product(g, b_q, queries.place[0], 0, c), _product(g, b_q, queries.place[1], 1, c)


@triton.jit
def _spread(g, first, position):
    """[R, BLOCK_N]: one where a key lies in a row (or column) of the block of these queries, else zero."""
    return (tl.arange(0, g.R)[:, None] == (position - first)[None, :]).to(tl.float32)


@triton.jit
def _relative_logits(g, products, queries, keys, c):
    _, _, first_y, first_x = queries.place
    logits = tl.dot(products[1], _spread(g, first_x, keys.x), input_precision=c.precision)
    return tl.dot(products[0], _spread(g, first_y, keys.y), logits, input_precision=c.precision)


@triton.jit
def _grad_products(g, b_ds, queries, keys, c):
    _, _, first_y, first_x = queries.place
    along_y, along_x = _spread(g, first_y, keys.y).T, _spread(g, first_x, keys.x).T
    along_y, along_x = along_y.to(b_ds.dtype), along_x.to(b_ds.dtype)
    return tl.dot(b_ds, along_y, input_precision=c.precision), tl.dot(b_ds, along_x, input_precision=c.precision)


@triton.jit
def _gradient(g, b_dproduct, b_q, place, axis: tl.constexpr, c):
    index = tl.arange(0, g.P)[None, :] + place[:, None] - (g.window - 1)
    b_dproduct = tl.gather(b_dproduct, tl.minimum(tl.maximum(index, 0), g.R - 1), 1)  # [BLOCK_M, P]
    b_dproduct = tl.where((index >= 0) & (index < g.window), b_dproduct, 0.0).to(b_q.dtype)
    b_dq = tl.dot(b_dproduct, _table(g, axis, c), input_precision=c.precision)
    return b_dq, tl.dot(b_dproduct.T, b_q, input_precision=c.precision)


@triton.jit
def _gradients(g, b_dproduct_y, b_dproduct_x, b_q, queries, c):
    b_dq_y, b_dtable_y = _gradient(g, b_dproduct_y, b_q, queries.place[0], 0, c)
    b_dq_x, b_dtable_x = _gradient(g, b_dproduct_x, b_q, queries.place[1], 1, c)
    return b_dq_y + b_dq_x, b_dtable_y, b_dtable_x


def _plan(q, k, tables, table, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    block, halo, step = parameters
    side, window = block // step, block + 2 * halo
    padded = triton.next_power_of_2(2 * window - 1), max(MIN_BLOCK, triton.next_power_of_2(window))
    q_block = fit(side, side, block_m)
    if by_key:
        blocks = q_block._replace(has_many=constant(True)), Block(*map(constant, (*KV_TILE, False, 1, False)))
        size, tile = k.shape[1:3], KV_TILE
        tiles = 1
    else:
        blocks = q_block, fit(window, window, block_n)
        size, tile = q.shape[1:3], (side, side)
        tiles = math.prod(triton.cdiv(side, n.value) for n in q_block[:2])
    tables = None if tables is None else tables.contiguous()
    geometry = Geometry(*blocks, tables, *map(constant, (block, side, halo, window, *padded)))
    tiles *= math.prod(triton.cdiv(length, n) for length, n in zip(size, tile, strict=True))
    return Plan(geometry, tiles, relative=padded)


def _fold_bias(sums: Tensor, plan: Plan, tables: Tensor) -> Tensor:
    return sums.sum(0)[:, : tables.shape[1], : tables.shape[2]]


_functions = Functions(_q_tile, _kv_at, _kv_tile, _q_at, _logits)
_relative = Relative(_products, _relative_logits, _grad_products, _gradients)
PATTERNS["halo"] = Pattern(_functions, _plan)
PATTERNS["halo with tables"] = Pattern(_functions._replace(relative=_relative), _plan, _fold_bias)


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
    parameters = block_size, halo_size, _step(q.shape[1:3], k.shape[1:3], block_size)
    tables = _tables(rel_height, rel_width)
    if tables is None:
        output, lse = attend("halo", q, k, v, parameters, scale)
    else:
        output, lse = attend("halo with tables", q, k, v, parameters, scale, tables.to(q.dtype))
    return (output, lse) if return_lse else output
