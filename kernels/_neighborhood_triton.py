"""Neighborhood attention in Triton, dilated and strided, with bias: tiles of queries, keys from the box around them.

Positions are counted inside a dilation class (the tokens that lie a multiple of `dilation` apart), on each axis; a tile
of queries, or of keys, is a box in one class. Maps of one axis are maps of one row.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    LOG2E,
    PATTERNS,
    Block,
    Functions,
    Pattern,
    Plan,
    Tokens,
    across,
    attend,
    ceil_div,
    constant,
    down,
    fit,
    in_block,
    unsuited_map,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps


class Axis(NamedTuple):
    kernel: Any
    dilation: Any
    stride: Any
    bias_start: Any  # of the keys that `_bias_kv_at` numbers, before the first query of a q_tile
    bias_blocks: Any  # of them


class Geometry(NamedTuple):
    q: Any
    k: Any
    bias: Any  # (heads, 2 * kernel - 1, 2 * kernel - 1), contiguous, or None
    y: Any
    x: Any


@triton.jit
def _places(axis, length, residue):
    """Number of tokens in a class."""
    return (length - residue + axis.dilation - 1) // axis.dilation


@triton.jit
def _start(axis, places, place):
    """First key of the query at a place."""
    if axis.stride > 1:
        place = tl.minimum(place // axis.stride * axis.stride + axis.stride // 2, places - 1)
    return tl.minimum(tl.maximum(place - axis.kernel // 2, 0), places - axis.kernel)


@triton.jit
def _first(axis, length, tile, TILE: tl.constexpr):
    """Class residue, number of tokens in the class and first place of the tile that has this number on an axis."""
    tiles = ceil_div(ceil_div(length, axis.dilation), TILE)
    residue = tile // tiles
    return residue, _places(axis, length, residue), tile % tiles * TILE


@triton.jit
def _split(g, n, tile, block):
    """`_first` of both axes."""
    tiles = ceil_div(ceil_div(n.width, g.x.dilation), block.columns) * g.x.dilation
    return _first(g.y, n.height, tile // tiles, block.rows), _first(g.x, n.width, tile % tiles, block.columns)


@triton.jit
def _kv_range(axis, first, TILE: tl.constexpr):
    """First key, and number of keys, of a tile's queries along an axis."""
    _, places, place = first
    start = _start(axis, places, place)
    stop = _start(axis, places, tl.minimum(place + TILE, places) - 1) + axis.kernel
    return start, tl.where(place < places, stop - start, 0)


@triton.jit
def _q_range(axis, first, TILE: tl.constexpr):
    """First query, and number of queries, that may attend to a tile's keys along an axis."""
    _, places, place = first
    last = tl.minimum(place + TILE, places) - 1
    start = place - axis.kernel + 1
    stop = last + axis.kernel // 2 + 1
    if axis.stride > 1:
        stop += axis.stride
        start -= axis.stride
    start = tl.maximum(tl.where(place < axis.kernel, 0, start + axis.kernel // 2), 0)
    stop = tl.where(last >= places - axis.kernel, places, tl.minimum(stop, places))
    return start, tl.where(place < places, stop - start, 0)


@triton.jit
def _at(g, walk, row, column, block):
    """Row and column in the map of a block of a walk's box, whether they are in the box, and their places."""
    residue_y, _, _ = walk[2]
    residue_x, _, _ = walk[3]
    rows, columns = in_block(block)
    rows, columns = rows + row, columns + column
    valid = (rows < walk[0]) & (columns < walk[1])
    y, x = walk[4] + rows, walk[5] + columns
    return y * g.y.dilation + residue_y, x * g.x.dilation + residue_x, valid, (y, x)


@triton.jit
def _queries(g, walk, row, column):
    """Logits see of a query its place, and those of its first key; of what is none, those of the last."""
    y, x, valid, place = _at(g, walk, row, column, g.q)
    _, rows, _ = walk[2]
    _, columns, _ = walk[3]
    place_y, place_x = tl.minimum(place[0], rows - 1), tl.minimum(place[1], columns - 1)
    return Tokens(y, x, valid, (place_y, place_x, _start(g.y, rows, place_y), _start(g.x, columns, place_x)))


@triton.jit
def _own(first_y, first_x):
    """The walk over the tokens of a tile itself."""
    return first_y[1] - first_y[2], first_x[1] - first_x[2], first_y, first_x, first_y[2], first_x[2]


@triton.jit
def _q_tile(g, n, batch, tile):
    y, x = _split(g, n, tile, g.q)
    start_y, height = _kv_range(g.y, y, g.q.rows)
    start_x, width = _kv_range(g.x, x, g.q.columns)
    return _queries(g, _own(y, x), 0, 0), (height, width, y, x, start_y, start_x)


@triton.jit
def _kv_at(g, n, batch, walk, row, column):
    y, x, valid, place = _at(g, walk, row, column, g.k)
    return Tokens(y, x, valid, place)


@triton.jit
def _kv_tile(g, n, batch, tile):
    y, x = _split(g, n, tile, g.k)
    start_y, height = _q_range(g.y, y, g.k.rows)
    start_x, width = _q_range(g.x, x, g.k.columns)
    return _kv_at(g, n, batch, _own(y, x), 0, 0), (height, width, y, x, start_y, start_x)


@triton.jit
def _q_at(g, n, batch, walk, row, column):
    return _queries(g, walk, row, column)


@triton.jit
def _bias_kv_at(g, n, batch, walk, block):
    """All within kernel - 1 of the tile, and more, so that those of most tiles lie at the start of a block."""
    _, _, first_y = walk[2]
    _, _, first_x = walk[3]
    row = first_y - g.y.bias_start + block // g.x.bias_blocks * g.k.rows - walk[4]  # in the walk's box
    column = first_x - g.x.bias_start + block % g.x.bias_blocks * g.k.columns - walk[5]
    is_near = (row + g.k.rows > 0) & (row < walk[0]) & (column + g.k.columns > 0) & (column < walk[1])
    keys = _kv_at(g, n, batch, walk, row, column)
    rows, columns = in_block(g.k)
    return Tokens(keys.y, keys.x, keys.valid & (row + rows >= 0) & (column + columns >= 0), keys.place), is_near


@triton.jit
def _logits(g, b_s, head, queries, keys, BY_KEY: tl.constexpr):
    y, x, start_y, start_x = queries.place
    key_y, key_x = keys.place
    down_y, down_x = across(key_y, BY_KEY) - down(start_y, BY_KEY), across(key_x, BY_KEY) - down(start_x, BY_KEY)
    near = (down_y >= 0) & (down_y < g.y.kernel) & (down_x >= 0) & (down_x < g.x.kernel)
    if g.bias is not None:
        width: tl.constexpr = 2 * g.x.kernel - 1
        p_bias = g.bias + head * ((2 * g.y.kernel - 1) * width) + (g.y.kernel - 1) * width + g.x.kernel - 1
        o_bias = across(key_y * width + key_x, BY_KEY) - down(y * width + x, BY_KEY)
        b_s += tl.load(p_bias + o_bias, mask=near, other=0.0).to(tl.float32) * LOG2E
    return tl.where(near, b_s, float("-inf"))


def _plan(q, k, bias, table, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    sizes, kernels, dilations, strides = q.shape[1:3], parameters[:2], parameters[2:4], parameters[4:]
    places = [triton.cdiv(size, dilation) for size, dilation in zip(sizes, dilations, strict=True)]
    tile = _tile(block_n if by_key else block_m, *map(triton.next_power_of_2, places))
    box = [size + kernel + stride - 2 for size, kernel, stride in zip(tile, kernels, strides, strict=True)]
    own = Block(*map(constant, (*tile, False)))
    if by_key:
        walked = fit(*box, block_m)._replace(is_wide=constant(True))
    else:
        walked = fit(*box, block_n)
    axes = []
    for size, kernel, dilation, stride, step in zip(tile, kernels, dilations, strides, walked[:2], strict=True):
        start = kernel - 1 + (kernel // 2 - kernel + 1) % step.value
        blocks = triton.cdiv(start + size + kernel - 1, step.value)
        axes.append(Axis(*map(constant, (kernel, dilation, stride, start, blocks))))
    bias = None if bias is None else bias.contiguous()
    geometry = Geometry(*((walked, own) if by_key else (own, walked)), bias, *axes)
    tiles = math.prod(triton.cdiv(*x) * dilation for *x, dilation in zip(places, tile, dilations, strict=True))
    return Plan(geometry, tiles, math.prod(axis.bias_blocks.value for axis in axes))


def _tile(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a tile of 16 to `tokens` tokens (powers of two), as square as a map of that size allows."""
    rows = min(height, 2 ** ((tokens.bit_length() - 1) // 2))
    columns = min(tokens // rows, max(16 // rows, width))
    return min(tokens // columns, max(16 // columns, height)), columns


def _fold_bias(sums: Tensor, plan: Plan, bias: Tensor) -> Tensor:
    """Adds up (heads, 1, BLOCK_M, bias_blocks, BLOCK_N) along equal distances of key and query."""
    g = plan.geometry
    rows, columns = g.q.rows.value, g.q.columns.value
    (down, along), step = (axis.bias_blocks.value for axis in (g.y, g.x)), [x.value for x in g.k[:2]]
    sums = sums.squeeze(1).unflatten(3, step).unflatten(2, (down, along)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    sums = sums.unflatten(1, (rows, columns)).contiguous()  # [heads, rows, columns, keys down, keys along]
    head, row, column, key_row, _ = sums.stride()
    first = [axis.bias_start.value - axis.kernel.value + 1 for axis in (g.y, g.x)]
    strides = head, key_row, 1, row + key_row, column + 1
    return sums.as_strided((*bias.shape, rows, columns), strides, first[0] * key_row + first[1]).sum((3, 4))


PATTERNS["neighborhood"] = Pattern(Functions(_q_tile, _kv_at, _kv_tile, _q_at, _logits, _bias_kv_at), _plan, _fold_bias)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: tuple[int, ...], *_: Any
) -> str | None:
    if len(kernel_size) > 2:
        return f"the map has {len(kernel_size)} axes, 1 and 2 are supported"
    return unsupported_tensors(q, k, v)


def unsuited(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: tuple[int, ...], *_: Any) -> str | None:
    whole = tuple(q.shape[1:-2]) == kernel_size
    return "a window is the whole map, for which PyTorch has its own kernel" if whole else unsuited_map(q)


def problems(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    *rest: Any,
) -> Iterator[tuple]:
    """Maps a little larger than a window, and twice as large, whose dilation classes are not alike."""
    windows = [kernel * step for kernel, step in zip(kernel_size, dilation, strict=True)]
    for factor, more in ((1, 1), (2, 3)):
        maps = draw_maps(q, v, tuple(factor * window + more + axis for axis, window in enumerate(windows)))
        small_bias = None if bias is None else draw(bias, maps[0].shape[-2], *bias.shape[1:])
        yield *maps, small_bias, kernel_size, dilation, *rest


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    line = len(kernel_size) == 1
    if line:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        bias = None if bias is None else bias.unsqueeze(1)
        kernel_size, dilation, stride = ((1, *x) for x in (kernel_size, dilation, stride))
    output, lse = attend("neighborhood", q, k, v, (*kernel_size, *dilation, *stride), scale, bias)
    if line:
        output, lse = output.squeeze(1), lse.squeeze(2)
    return (output, lse) if return_lse else output
