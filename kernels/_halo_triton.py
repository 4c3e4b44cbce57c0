"""Halo attention in Triton: blocks of queries, keys from the block and a halo around it, logits from relative tables.

Keys outside the map are zeros that take part. The products of a query with the tables of relative rows and columns are
computed once for a tile and shifted, so that number r belongs to row r (or column r) of the block's keys; a product
with a matrix of zeros and ones then spreads them over the keys, and its transpose collects their gradients.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    LOG2E,
    MIN_BLOCK,
    PATTERNS,
    Functions,
    Pattern,
    Plan,
    Relative,
    attend,
    constant,
    fit_block,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps
from visionattn.kernels.halo import _step, _tables

KV_TILE = 4, 8  # height and width; a smaller kv_tile is attended to by fewer blocks


class Geometry(NamedTuple):
    tables: Any  # (2, 2 * window - 1, dim), contiguous, or None: rel_height and rel_width
    height: Any  # of the map of queries
    width: Any
    key_height: Any  # of the map of keys
    key_width: Any
    blocks_y: Any
    blocks_x: Any
    block: Any  # keys of a block on a side, without the halo
    query_block: Any  # queries of a block on a side
    halo: Any
    window: Any  # block + 2 * halo
    block_tiles: Any  # tiles of a block
    tile: Any  # queries of a q_tile
    kv_tile_y: Any
    kv_tile_x: Any
    P: Any  # rows of a table, padded to a power of two
    R: Any  # window, padded to a power of two


@triton.jit
def _keys(g, y, x, valid):
    return y, x, valid & (y >= 0) & (y < g.key_height) & (x >= 0) & (x < g.key_width)


@triton.jit
def _in_block(g, block, n):
    """The n-th query of a block; past its end, none, but with the place of the last."""
    inside = tl.minimum(n, g.query_block * g.query_block - 1)
    y = block // g.blocks_x * g.query_block + inside // g.query_block
    x = block % g.blocks_x * g.query_block + inside % g.query_block
    return y, x, (n < g.query_block * g.query_block) & (y < g.height) & (x < g.width)


@triton.jit
def _q_tile_at(g, batch, tile, n):
    return _in_block(g, tile // g.block_tiles, tile % g.block_tiles * g.tile + n)


@triton.jit
def _kv_count(g, batch, tile):
    return g.window * g.window


@triton.jit
def _kv_at(g, batch, tile, n):
    block = tile // g.block_tiles
    y = block // g.blocks_x * g.block - g.halo + n // g.window
    x = block % g.blocks_x * g.block - g.halo + n % g.window
    return _keys(g, y, x, n < g.window * g.window)


@triton.jit
def _first_key(g, tile):
    columns = (g.key_width + g.kv_tile_x - 1) // g.kv_tile_x
    return tile // columns * g.kv_tile_y, tile % columns * g.kv_tile_x


@triton.jit
def _kv_tile_at(g, batch, tile, n):
    y, x = _first_key(g, tile)
    return _keys(g, y + n // g.kv_tile_x, x + n % g.kv_tile_x, n >= 0)


@triton.jit
def _blocks(first, tile, blocks, g):
    """First block, and number of blocks, along an axis, with a key of a tile that starts at `first`."""
    start = tl.maximum(first - g.halo, 0) // g.block
    return start, tl.minimum((first + tile - 1 + g.halo) // g.block, blocks - 1) - start + 1


@triton.jit
def _q_count(g, batch, tile):
    y, x = _first_key(g, tile)
    _, rows = _blocks(y, g.kv_tile_y, g.blocks_y, g)
    _, columns = _blocks(x, g.kv_tile_x, g.blocks_x, g)
    return rows * columns * (g.block_tiles * g.tile)


@triton.jit
def _q_at(g, batch, tile, n):
    y, x = _first_key(g, tile)
    row, _ = _blocks(y, g.kv_tile_y, g.blocks_y, g)
    column, columns = _blocks(x, g.kv_tile_x, g.blocks_x, g)
    n_block = n // (g.block_tiles * g.tile)
    block = (row + n_block // columns) * g.blocks_x + column + n_block % columns
    return _in_block(g, block, n % (g.block_tiles * g.tile))


@triton.jit
def _logits(g, logits, batch, head, y, x, key_y, key_x, valid):
    down = key_y - (y // g.query_block * g.block - g.halo)
    right = key_x - (x // g.query_block * g.block - g.halo)
    within = (down >= 0) & (down < g.window) & (right >= 0) & (right < g.window)
    return tl.where(within, logits, float("-inf"))


@triton.jit
def _table(g, axis: tl.constexpr, s):
    o_p, o_d = tl.arange(0, g.P), tl.arange(0, s.BLOCK_D)
    mask = (o_p < 2 * g.window - 1)[:, None] & (o_d < s.dim)[None, :]
    p_table = g.tables + axis * ((2 * g.window - 1) * s.dim)
    return tl.load(p_table + o_p[:, None] * s.dim + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _product(g, b_q, position, axis: tl.constexpr, s):
    b_product = tl.dot(b_q, _table(g, axis, s).T, input_precision=s.precision)  # [BLOCK_M, P]
    index = tl.arange(0, g.R)[None, :] - (position % g.query_block)[:, None] + (g.window - 1)
    return tl.gather(b_product, tl.minimum(tl.maximum(index, 0), g.P - 1), 1) * LOG2E  # [BLOCK_M, R]


@triton.jit
def _products(g, b_q, queries, s):
    return _product(g, b_q, queries[0], 0, s), _product(g, b_q, queries[1], 1, s)


@triton.jit
def _spread(g, position, key_position):
    """[R, BLOCK_N]: one where a key lies in a row (or column) of the block of these queries, else zero."""
    first = tl.max(position // g.query_block, 0) * g.block - g.halo
    return (tl.arange(0, g.R)[:, None] == (key_position - first)[None, :]).to(tl.float32)


@triton.jit
def _relative_logits(g, products, queries, keys, s):
    logits = tl.dot(products[0], _spread(g, queries[0], keys[0]), input_precision=s.precision)
    return tl.dot(products[1], _spread(g, queries[1], keys[1]), logits, input_precision=s.precision)


@triton.jit
def _grad_products(g, b_ds, queries, keys, s):
    along_y, along_x = _spread(g, queries[0], keys[0]).T, _spread(g, queries[1], keys[1]).T
    along_y, along_x = along_y.to(b_ds.dtype), along_x.to(b_ds.dtype)
    return tl.dot(b_ds, along_y, input_precision=s.precision), tl.dot(b_ds, along_x, input_precision=s.precision)


@triton.jit
def _gradient(g, b_dproduct, b_q, position, axis: tl.constexpr, s):
    index = tl.arange(0, g.P)[None, :] + (position % g.query_block)[:, None] - (g.window - 1)
    b_dproduct = tl.gather(b_dproduct, tl.minimum(tl.maximum(index, 0), g.R - 1), 1)  # [BLOCK_M, P]
    b_dproduct = tl.where((index >= 0) & (index < g.window), b_dproduct, 0.0).to(b_q.dtype)
    b_dq = tl.dot(b_dproduct, _table(g, axis, s), input_precision=s.precision)
    return b_dq, tl.dot(b_dproduct.T, b_q, input_precision=s.precision)


@triton.jit
def _gradients(g, b_dproduct_y, b_dproduct_x, b_q, queries, s):
    b_dq_y, b_dtable_y = _gradient(g, b_dproduct_y, b_q, queries[0], 0, s)
    b_dq_x, b_dtable_x = _gradient(g, b_dproduct_x, b_q, queries[1], 1, s)
    return b_dq_y + b_dq_x, b_dtable_y, b_dtable_x


def _plan(q, k, tables, table, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    block, halo, step = parameters
    side, window = block // step, block + 2 * halo
    (height, width), (key_height, key_width) = q.shape[1:3], k.shape[1:3]
    blocks_y, blocks_x = triton.cdiv(height, side), triton.cdiv(width, side)
    block_m = fit_block(side**2, block_m)
    block_tiles = triton.cdiv(side**2, block_m)
    padded = triton.next_power_of_2(2 * window - 1), max(MIN_BLOCK, triton.next_power_of_2(window))
    constants = map(constant, (block, side, halo, window, block_tiles, block_m, *KV_TILE, *padded))
    tables = None if tables is None else tables.contiguous()
    geometry = Geometry(tables, height, width, key_height, key_width, blocks_y, blocks_x, *constants)
    if by_key:
        tiles = triton.cdiv(key_height, KV_TILE[0]) * triton.cdiv(key_width, KV_TILE[1])
        return Plan(geometry, tiles, block_m, KV_TILE[0] * KV_TILE[1], relative=padded)
    return Plan(geometry, blocks_y * blocks_x * block_tiles, block_m, block_n, relative=padded)


def _fold_bias(sums: Tensor, plan: Plan, tables: Tensor) -> Tensor:
    return sums[:, : tables.shape[1], : tables.shape[2]]


_functions = Functions(_q_tile_at, _kv_count, _kv_at, _kv_tile_at, _q_count, _q_at, _logits)
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
    return "one block is the whole map, for which PyTorch has its own kernel" if whole else None


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
