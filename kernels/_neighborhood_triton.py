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
    Functions,
    Pattern,
    Plan,
    attend,
    constant,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps


class Axis(NamedTuple):
    length: Any
    kernel: Any
    dilation: Any
    stride: Any
    tile: Any  # tokens of a q_tile or kv_tile along this axis
    tiles: Any  # along this axis, in one class


class Geometry(NamedTuple):
    bias: Any  # (heads, 2 * kernel - 1, 2 * kernel - 1), contiguous, or None
    y: Any
    x: Any


@triton.jit
def _places(axis, residue):
    """Number of tokens in a class."""
    return (axis.length - residue + axis.dilation - 1) // axis.dilation


@triton.jit
def _start(axis, places, place):
    """First key of the query at a place."""
    if axis.stride > 1:
        place = tl.minimum(place // axis.stride * axis.stride + axis.stride // 2, places - 1)
    return tl.minimum(tl.maximum(place - axis.kernel // 2, 0), places - axis.kernel)


@triton.jit
def _split(g, tile):
    """Class residues and first places of a tile."""
    x = tile % (g.x.tiles * g.x.dilation)
    y = tile // (g.x.tiles * g.x.dilation)
    return y // g.y.tiles, x // g.x.tiles, y % g.y.tiles * g.y.tile, x % g.x.tiles * g.x.tile


@triton.jit
def _tile_at(g, batch, tile, n):
    residue_y, residue_x, first_y, first_x = _split(g, tile)
    y, x = first_y + n // g.x.tile, first_x + n % g.x.tile
    valid = (y < _places(g.y, residue_y)) & (x < _places(g.x, residue_x))
    return y * g.y.dilation + residue_y, x * g.x.dilation + residue_x, valid


@triton.jit
def _kv_range(axis, residue, first):
    """First key, and number of keys, of a tile's queries along an axis."""
    places = _places(axis, residue)
    last = tl.minimum(first + axis.tile, places) - 1
    start = _start(axis, places, first)
    stop = _start(axis, places, last) + axis.kernel
    return start, tl.where(first < places, stop - start, 0)


@triton.jit
def _q_range(axis, residue, first):
    """First query, and number of queries, that may attend to a tile's keys along an axis."""
    places = _places(axis, residue)
    last = tl.minimum(first + axis.tile, places) - 1
    start = first - axis.kernel + 1
    stop = last + axis.kernel // 2 + 1
    if axis.stride > 1:
        stop += axis.stride
        start -= axis.stride
    start = tl.where(first < axis.kernel, 0, start + axis.kernel // 2)
    stop = tl.where(last >= places - axis.kernel, places, tl.minimum(stop, places))
    return tl.maximum(start, 0), tl.where(first < places, stop - tl.maximum(start, 0), 0)


@triton.jit
def _box_at(g, residue_y, residue_x, start_y, start_x, height, width, n):
    """The n-th token of a box in a class."""
    y, x = start_y + n // width, start_x + n % width
    return y * g.y.dilation + residue_y, x * g.x.dilation + residue_x, n < height * width


@triton.jit
def _kv_count(g, batch, tile):
    residue_y, residue_x, first_y, first_x = _split(g, tile)
    _, height = _kv_range(g.y, residue_y, first_y)
    _, width = _kv_range(g.x, residue_x, first_x)
    return height * width


@triton.jit
def _kv_at(g, batch, tile, n):
    residue_y, residue_x, first_y, first_x = _split(g, tile)
    start_y, height = _kv_range(g.y, residue_y, first_y)
    start_x, width = _kv_range(g.x, residue_x, first_x)
    return _box_at(g, residue_y, residue_x, start_y, start_x, height, width, n)


@triton.jit
def _q_count(g, batch, tile):
    residue_y, residue_x, first_y, first_x = _split(g, tile)
    _, height = _q_range(g.y, residue_y, first_y)
    _, width = _q_range(g.x, residue_x, first_x)
    return height * width


@triton.jit
def _q_at(g, batch, tile, n):
    residue_y, residue_x, first_y, first_x = _split(g, tile)
    start_y, height = _q_range(g.y, residue_y, first_y)
    start_x, width = _q_range(g.x, residue_x, first_x)
    return _box_at(g, residue_y, residue_x, start_y, start_x, height, width, n)


@triton.jit
def _bias_kv_at(g, batch, tile, n):
    """All places within kernel - 1 of the tile, row by row."""
    residue_y, residue_x, first_y, first_x = _split(g, tile)
    height, width = g.y.tile + 2 * g.y.kernel - 2, g.x.tile + 2 * g.x.kernel - 2
    y, x = first_y - g.y.kernel + 1 + n // width, first_x - g.x.kernel + 1 + n % width
    valid = (y >= 0) & (y < _places(g.y, residue_y)) & (x >= 0) & (x < _places(g.x, residue_x)) & (n < height * width)
    return y * g.y.dilation + residue_y, x * g.x.dilation + residue_x, valid


@triton.jit
def _near(axis, position, key_position):
    """Whether a query, which must be in the map, has a key along an axis, and its place in the bias table."""
    place, key_place = position // axis.dilation, key_position // axis.dilation
    places = _places(axis, position % axis.dilation)
    start = _start(axis, places, place)
    near = (place < places) & (key_place >= start) & (key_place < start + axis.kernel)
    return near, key_place - place + axis.kernel - 1


@triton.jit
def _logits(g, logits, batch, head, y, x, key_y, key_x, valid):
    near_y, bias_y = _near(g.y, y, key_y)
    near_x, bias_x = _near(g.x, x, key_x)
    near = near_y & near_x & valid
    if g.bias is not None:
        width: tl.constexpr = 2 * g.x.kernel - 1
        row = g.bias + head * ((2 * g.y.kernel - 1) * width)
        logits += tl.load(row + bias_y * width + bias_x, mask=near, other=0.0).to(tl.float32) * LOG2E
    return tl.where(near, logits, float("-inf"))


def _plan(q, k, bias, table, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    sizes, kernels, dilations, strides = q.shape[1:3], parameters[:2], parameters[2:4], parameters[4:]
    places = [triton.cdiv(size, dilation) for size, dilation in zip(sizes, dilations, strict=True)]
    tiles = _tile(block_n if by_key else block_m, *map(triton.next_power_of_2, places))
    counts = [triton.cdiv(place, tile) for place, tile in zip(places, tiles, strict=True)]
    y, x = (
        Axis(size, constant(kernel), constant(dilation), constant(stride), constant(tile), count)
        for size, kernel, dilation, stride, tile, count in zip(
            sizes, kernels, dilations, strides, tiles, counts, strict=True
        )
    )
    geometry = Geometry(None if bias is None else bias.contiguous(), y, x)
    height, width = (tile + 2 * kernel - 2 for tile, kernel in zip(tiles, kernels, strict=True))
    block_m, block_n = (block_m, math.prod(tiles)) if by_key else (math.prod(tiles), block_n)
    return Plan(geometry, math.prod(counts) * math.prod(dilations), block_m, block_n, height * width)


def _tile(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a tile of 16 to `tokens` tokens (powers of two), as square as a map of that size allows."""
    rows = min(height, 2 ** ((tokens.bit_length() - 1) // 2))
    columns = min(tokens // rows, max(16 // rows, width))
    return min(tokens // columns, max(16 // columns, height)), columns


def _fold_bias(sums: Tensor, plan: Plan, bias: Tensor) -> Tensor:
    """Adds up (heads, BLOCK_M, bias_keys) along equal distances of key and query."""
    axes = plan.geometry.y, plan.geometry.x
    rows, columns = (axis.tile.value for axis in axes)
    height, width = (axis.tile.value + 2 * axis.kernel.value - 2 for axis in axes)
    sums = sums.contiguous()
    keys = height * width
    strides = (sums.stride(0), width, 1, columns * keys + width, keys + 1)
    return sums.as_strided((*bias.shape, rows, columns), strides).sum((3, 4))


PATTERNS["neighborhood"] = Pattern(
    Functions(_tile_at, _kv_count, _kv_at, _tile_at, _q_count, _q_at, _logits, _bias_kv_at), _plan, _fold_bias
)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: tuple[int, ...], *_: Any
) -> str | None:
    if len(kernel_size) > 2:
        return f"the map has {len(kernel_size)} axes, 1 and 2 are supported"
    return unsupported_tensors(q, k, v)


def unsuited(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: tuple[int, ...], *_: Any) -> str | None:
    whole = tuple(q.shape[1:-2]) == kernel_size
    return "a window is the whole map, for which PyTorch has its own kernel" if whole else None


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
