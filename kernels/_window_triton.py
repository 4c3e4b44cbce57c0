"""Window attention in Triton: windows of the shifted or dilated map, read where their tokens lie.

A window of the shifted map that reaches over its end wraps around; only tokens of one side of the seam attend to each
other. Sizes are rounded up to whole windows; what lies outside the map is no key.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
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
    constant,
    down,
    fit,
    in_block,
    unsuited_map,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps


class Axis(NamedTuple):
    window: Any
    shift: Any
    dilated: Any


class Geometry(NamedTuple):
    q: Any
    k: Any
    bias: Any  # (heads, T, T), contiguous, or None; T tokens of a window
    mask: Any  # (B or 1, H, W) int8, contiguous, or None: zero where a token is no key
    has_masks: Any  # whether each image has its own
    y: Any
    x: Any


@triton.jit
def _windows(axis, length):
    """How many there are along an axis."""
    return (length + axis.window - 1) // axis.window


@triton.jit
def _position(axis, length, window, place):
    """Position in the map of a place of a window."""
    if axis.dilated:
        position = place * _windows(axis, length) + window
    else:
        position = window * axis.window + place
    if axis.shift > 0:
        position += axis.shift
        padded = _windows(axis, length) * axis.window
        position = tl.where(position >= padded, position - padded, position)
    return position


@triton.jit
def _tokens(g, n, walk, place_y, place_x):
    """Logits see the number of the place in its window, and on which sides of the seams it is."""
    y = _position(g.y, n.height, walk[2], place_y)
    x = _position(g.x, n.width, walk[3], place_x)
    valid = (place_y < g.y.window) & (place_x < g.x.window) & (y < n.height) & (x < n.width)
    side = tl.where(y < g.y.shift, 2, 0) + tl.where(x < g.x.shift, 1, 0)
    number = tl.minimum(place_y * g.x.window + place_x, g.y.window * g.x.window - 1)  # beyond: the last, for the bias
    return Tokens(y, x, valid, (number, side))


@triton.jit
def _keys(g, n, batch, walk, place_y, place_x):
    """What is no key is on no side."""
    keys = _tokens(g, n, walk, place_y, place_x)
    allowed = keys.valid
    if g.mask is not None:
        image = batch if g.has_masks else 0
        place = (image * n.height + keys.y) * n.width + keys.x
        allowed = allowed & (tl.load(g.mask + place, mask=allowed, other=0) != 0)
    number, side = keys.place
    return Tokens(keys.y, keys.x, keys.valid, (number, tl.where(allowed, side, -1)))


@triton.jit
def _tile(g, n, tile, block):
    """The walk over the window of a tile, and the places of its tokens."""
    columns: tl.constexpr = (g.x.window + block.columns - 1) // block.columns
    rows: tl.constexpr = (g.y.window + block.rows - 1) // block.rows
    window, part = tile // (rows * columns), tile % (rows * columns)
    windows = _windows(g.x, n.width)
    walk = g.y.window, g.x.window, window // windows, window % windows
    row, column = in_block(block)
    return walk, part // columns * block.rows + row, part % columns * block.columns + column


@triton.jit
def _q_tile(g, n, batch, tile):
    walk, place_y, place_x = _tile(g, n, tile, g.q)
    return _tokens(g, n, walk, place_y, place_x), walk


@triton.jit
def _kv_tile(g, n, batch, tile):
    walk, place_y, place_x = _tile(g, n, tile, g.k)
    return _keys(g, n, batch, walk, place_y, place_x), walk


@triton.jit
def _q_at(g, n, batch, walk, row, column):
    rows, columns = in_block(g.q)
    return _tokens(g, n, walk, rows + row, columns + column)


@triton.jit
def _kv_at(g, n, batch, walk, row, column):
    rows, columns = in_block(g.k)
    return _keys(g, n, batch, walk, rows + row, columns + column)


@triton.jit
def _bias_kv_at(g, n, batch, walk, block):
    across: tl.constexpr = (g.x.window + g.k.columns - 1) // g.k.columns
    return _kv_at(g, n, batch, walk, block // across * g.k.rows, block % across * g.k.columns), True


@triton.jit
def _logits(g, b_s, head, queries, keys, BY_KEY: tl.constexpr):
    number, side = queries.place
    key_number, key_side = keys.place
    if g.bias is not None:
        tokens: tl.constexpr = g.y.window * g.x.window
        p_bias = g.bias + head * (tokens * tokens)
        o_bias = down(number * tokens, BY_KEY) + across(key_number, BY_KEY)
        b_s += tl.load(p_bias + o_bias).to(tl.float32) * LOG2E
    return tl.where(down(side, BY_KEY) == across(key_side, BY_KEY), b_s, float("-inf"))


def _plan(q, k, bias, mask, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    window, shifts, dilated = tuple(parameters[:2]), parameters[2:4], parameters[4]
    blocks = [fit(*window, most) for most in (block_m, block_n)]
    counts = [_blocks_of(window, block) for block in blocks]
    y, x = (Axis(*map(constant, (*axis, bool(dilated)))) for axis in zip(window, shifts, strict=True))
    bias, mask = (None if x is None else x.contiguous() for x in (bias, mask))
    has_masks = constant(mask is not None and len(mask) > 1)
    windows = math.prod(triton.cdiv(length, size) for length, size in zip(q.shape[1:3], window, strict=True))
    q_tiles, k_tiles = (math.prod(count) for count in counts)
    tiles = windows * (k_tiles if by_key else q_tiles)
    geometry = Geometry(blocks[0], blocks[1], bias, mask, has_masks, y, x)
    return Plan(geometry, tiles, k_tiles, q_tiles, is_closed=q_tiles == k_tiles == 1)


def _blocks_of(window: tuple[int, ...], block: Block) -> list[int]:
    return [triton.cdiv(size, n.value) for size, n in zip(window, block[:2], strict=True)]


def _fold_bias(sums: Tensor, plan: Plan, bias: Tensor) -> Tensor:
    """Puts the blocks of queries and keys together to windows."""
    g = plan.geometry
    window = g.y.window.value, g.x.window.value
    for dim, block in ((1, g.q), (5, g.k)):
        size = block.rows.value, block.columns.value
        sums = sums.unflatten(dim + 1, size).unflatten(dim, _blocks_of(window, block)).transpose(dim + 1, dim + 2)
    sums = sums.flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return sums[:, : window[0], : window[1], : window[0], : window[1]].flatten(3).flatten(1, 2)


PATTERNS["window"] = Pattern(Functions(_q_tile, _kv_at, _kv_tile, _q_at, _logits, _bias_kv_at), _plan, _fold_bias)


def unsupported(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    return unsupported_tensors(q, k, v)


def unsuited(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, window: tuple[int, int], *_: Any
) -> str | None:
    whole = window[0] >= q.shape[1] and window[1] >= q.shape[2]
    return "one window is the whole map, for which PyTorch has its own kernel" if whole else unsuited_map(q)


def problems(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    window: tuple[int, int],
    *rest: Any,
) -> Iterator[tuple]:
    """Windows that the map does not fill; with a mask, some without keys."""
    for size in ((window[0] + 1, 2 * window[1] + 1), (2 * window[0] + 1, window[1])):
        maps, tokens = draw_maps(q, v, size), window[0] * window[1]
        small_bias = None if bias is None else draw(bias, maps[0].shape[3], tokens, tokens)
        small_mask = None
        if mask is not None:
            small_mask = draw(q, 2, *size) > -0.5
            small_mask[0, : window[0]] = False
            small_mask = small_mask if len(mask) > 1 else small_mask[:1]
        yield *maps, small_bias, small_mask, window, *rest


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    dilated: bool,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    mask = None if mask is None else mask.to(torch.int8)
    output, lse = attend("window", q, k, v, (*window, *shift, int(dilated)), scale, bias, mask)
    return (output, lse) if return_lse else output
