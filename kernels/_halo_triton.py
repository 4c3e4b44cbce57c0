"""Halo attention in Triton: blocks of queries, keys from the block and a halo around it, logits from relative tables.

Keys outside the map are zeros that take part. The products of a query with the tables of relative rows and columns are
computed once for a tile and shifted, so that number r belongs to row r (or column r) of the block's keys; a product
with a matrix of zeros and ones then spreads them over the keys, and its transpose collects their gradients.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    LOG2E,
    MIN_TILE,
    PATTERNS,
    Functions,
    Pattern,
    Plan,
    Relative,
    attend,
    constant,
    tile_size,
    unsupported_tensors,
)
from visionattn.kernels.halo import _step, _tables

KEY_TILE = 4, 8  # a smaller tile of keys is wanted by fewer blocks


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
    tile: Any  # tokens of a tile of queries
    key_tile_y: Any
    key_tile_x: Any
    P: Any  # rows of a table, padded to a power of two
    R: Any  # window, padded to a power of two


@triton.jit
def _keys(g, y, x, valid):
    return y, x, valid & (y >= 0) & (y < g.key_height) & (x >= 0) & (x < g.key_width)


@triton.jit
def _in_block(g, block, n):
    """The n-th query of a block; past its end, none, but with the place of the last."""
    place = tl.minimum(n, g.query_block * g.query_block - 1)
    y = block // g.blocks_x * g.query_block + place // g.query_block
    x = block % g.blocks_x * g.query_block + place % g.query_block
    return y, x, (n < g.query_block * g.query_block) & (y < g.height) & (x < g.width)


@triton.jit
def _query_at(g, batch, tile, n):
    return _in_block(g, tile // g.block_tiles, tile % g.block_tiles * g.tile + n)


@triton.jit
def _key_count(g, batch, tile):
    return g.window * g.window


@triton.jit
def _key_at(g, batch, tile, n):
    block = tile // g.block_tiles
    y = block // g.blocks_x * g.block - g.halo + n // g.window
    x = block % g.blocks_x * g.block - g.halo + n % g.window
    return _keys(g, y, x, n < g.window * g.window)


@triton.jit
def _first_key(g, tile):
    columns = (g.key_width + g.key_tile_x - 1) // g.key_tile_x
    return tile // columns * g.key_tile_y, tile % columns * g.key_tile_x


@triton.jit
def _own_key_at(g, batch, tile, n):
    y, x = _first_key(g, tile)
    return _keys(g, y + n // g.key_tile_x, x + n % g.key_tile_x, n >= 0)


@triton.jit
def _blocks(first, tile, blocks, g):
    """First block, and number of blocks, along an axis, with a key of a tile that starts at `first`."""
    start = tl.maximum(first - g.halo, 0) // g.block
    return start, tl.minimum((first + tile - 1 + g.halo) // g.block, blocks - 1) - start + 1


@triton.jit
def _asker_count(g, batch, tile):
    y, x = _first_key(g, tile)
    _, rows = _blocks(y, g.key_tile_y, g.blocks_y, g)
    _, columns = _blocks(x, g.key_tile_x, g.blocks_x, g)
    return rows * columns * (g.block_tiles * g.tile)


@triton.jit
def _asker_at(g, batch, tile, n):
    y, x = _first_key(g, tile)
    row, _ = _blocks(y, g.key_tile_y, g.blocks_y, g)
    column, columns = _blocks(x, g.key_tile_x, g.blocks_x, g)
    place = n // (g.block_tiles * g.tile)
    block = (row + place // columns) * g.blocks_x + column + place % columns
    return _in_block(g, block, n % (g.block_tiles * g.tile))


@triton.jit
def _logits(g, logits, batch, head, y, x, key_y, key_x, valid):
    down = key_y - (y // g.query_block * g.block - g.halo)
    right = key_x - (x // g.query_block * g.block - g.halo)
    within = (down >= 0) & (down < g.window) & (right >= 0) & (right < g.window)
    return tl.where(within, logits, float("-inf"))


@triton.jit
def _table(g, axis: tl.constexpr, s):
    rows, dims = tl.arange(0, g.P), tl.arange(0, s.D)
    mask = (rows < 2 * g.window - 1)[:, None] & (dims < s.dim)[None, :]
    start = g.tables + axis * ((2 * g.window - 1) * s.dim)
    return tl.load(start + rows[:, None] * s.dim + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _product(g, b_q, position, axis: tl.constexpr, s):
    b_product = tl.dot(b_q, _table(g, axis, s).T, input_precision=s.precision)  # [M, P]
    index = tl.arange(0, g.R)[None, :] - (position % g.query_block)[:, None] + (g.window - 1)
    return tl.gather(b_product, tl.minimum(tl.maximum(index, 0), g.P - 1), 1) * LOG2E  # [M, R]


@triton.jit
def _products(g, b_q, queries, s):
    return _product(g, b_q, queries[0], 0, s), _product(g, b_q, queries[1], 1, s)


@triton.jit
def _spread(g, position, key_position):
    """[R, N]: one where a key lies in a row (or column) of the block of these queries, else zero."""
    first = tl.max(position // g.query_block, 0) * g.block - g.halo
    return (tl.arange(0, g.R)[:, None] == (key_position - first)[None, :]).to(tl.float32)


@triton.jit
def _relative_logits(g, products, queries, keys, s):
    logits = tl.dot(products[0], _spread(g, queries[0], keys[0]), input_precision=s.precision)
    return tl.dot(products[1], _spread(g, queries[1], keys[1]), logits, input_precision=s.precision)


@triton.jit
def _sums(g, b_ds, queries, keys, s):
    along_y, along_x = _spread(g, queries[0], keys[0]).T, _spread(g, queries[1], keys[1]).T
    along_y, along_x = along_y.to(b_ds.dtype), along_x.to(b_ds.dtype)
    return tl.dot(b_ds, along_y, input_precision=s.precision), tl.dot(b_ds, along_x, input_precision=s.precision)


@triton.jit
def _gradient(g, b_sum, b_q, position, axis: tl.constexpr, s):
    index = tl.arange(0, g.P)[None, :] + (position % g.query_block)[:, None] - (g.window - 1)
    b_sum = tl.gather(b_sum, tl.minimum(tl.maximum(index, 0), g.R - 1), 1)  # [M, P]
    b_sum = tl.where((index >= 0) & (index < g.window), b_sum, 0.0).to(b_q.dtype)
    b_dq = tl.dot(b_sum, _table(g, axis, s), input_precision=s.precision)
    return b_dq, tl.dot(b_sum.T, b_q, input_precision=s.precision)


@triton.jit
def _gradients(g, b_sum_y, b_sum_x, b_q, queries, s):
    part_y, table_y = _gradient(g, b_sum_y, b_q, queries[0], 0, s)
    part_x, table_x = _gradient(g, b_sum_x, b_q, queries[1], 1, s)
    return part_y + part_x, table_y, table_x


def _plan(q, k, tables, table, parameters, own: int, walk: int, inverse: bool) -> Plan:
    block, halo, step = parameters
    walk = min(walk, 32)  # the relative logits take registers too
    side, window = block // step, block + 2 * halo
    (height, width), keys = q.shape[1:3], k.shape[1:3]
    blocks = triton.cdiv(height, side), triton.cdiv(width, side)
    tile = tile_size(side**2, walk if inverse else own)
    block_tiles = triton.cdiv(side**2, tile)
    padded = triton.next_power_of_2(2 * window - 1), max(MIN_TILE, triton.next_power_of_2(window))
    constants = map(constant, (block, side, halo, window, block_tiles, tile, *KEY_TILE, *padded))
    tables = None if tables is None else tables.contiguous()
    geometry = Geometry(tables, height, width, *keys, *blocks, *constants)
    if inverse:
        tiles = triton.cdiv(keys[0], KEY_TILE[0]) * triton.cdiv(keys[1], KEY_TILE[1])
        return Plan(geometry, tiles, KEY_TILE[0] * KEY_TILE[1], tile, relative=padded)
    return Plan(geometry, blocks[0] * blocks[1] * block_tiles, tile, walk, relative=padded)


def _fold_bias(sums: Tensor, layout: Plan, tables: Tensor) -> Tensor:
    return sums[:, : tables.shape[1], : tables.shape[2]]


_functions = Functions(_query_at, _key_count, _key_at, _own_key_at, _asker_count, _asker_at, _logits)
_relative = Relative(_products, _relative_logits, _sums, _gradients)
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
