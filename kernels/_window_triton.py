"""Window attention in Triton: windows of the shifted or dilated map, read where their tokens lie.

A window of the shifted map that reaches over its end wraps around; only tokens of one side of the seam attend to each
other. Sizes are rounded up to whole windows; what lies outside the map is no key.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
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
    fit_block,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps


class Axis(NamedTuple):
    length: Any
    window: Any
    windows: Any
    shift: Any
    dilated: Any


class Geometry(NamedTuple):
    bias: Any  # (heads, T, T), contiguous, or None; T tokens of a window
    mask: Any  # (B or 1, H, W) int8, contiguous, or None: zero where a token is no key
    masks: Any  # images of the mask
    y: Any
    x: Any
    window_tiles: Any  # tiles of a window
    tile: Any  # tokens of a tile


@triton.jit
def _position(axis, window, place):
    """Position in the map of a place of a window."""
    if axis.dilated:
        position = place * axis.windows + window
    else:
        position = window * axis.window + place
    if axis.shift > 0:
        position += axis.shift
        position -= tl.where(position >= axis.windows * axis.window, axis.windows * axis.window, 0)
    return position


@triton.jit
def _place(axis, position):
    """Place in its window of a position in the map."""
    if axis.shift > 0:
        position -= axis.shift
        position += tl.where(position < 0, axis.windows * axis.window, 0)
    if axis.dilated:
        position = position // axis.windows
    else:
        position = position % axis.window
    return position


@triton.jit
def _in_window(g, window, n):
    y = _position(g.y, window // g.x.windows, n // g.x.window)
    x = _position(g.x, window % g.x.windows, n % g.x.window)
    return y, x, (n < g.y.window * g.x.window) & (y < g.y.length) & (x < g.x.length)


@triton.jit
def _tile_at(g, batch, tile, n):
    return _in_window(g, tile // g.window_tiles, tile % g.window_tiles * g.tile + n)


@triton.jit
def _count(g, batch, tile):
    return g.y.window * g.x.window


@triton.jit
def _window_at(g, batch, tile, n):
    return _in_window(g, tile // g.window_tiles, n)


@triton.jit
def _logits(g, logits, batch, head, y, x, key_y, key_x, valid):
    if g.mask is not None:
        place = (tl.where(g.masks > 1, batch, 0) * g.y.length + key_y) * g.x.length + key_x
        valid = valid & (tl.load(g.mask + place, mask=valid, other=0) != 0)
    if g.y.shift > 0:
        valid = valid & ((y < g.y.shift) == (key_y < g.y.shift))
    if g.x.shift > 0:
        valid = valid & ((x < g.x.shift) == (key_x < g.x.shift))
    if g.bias is not None:
        tokens: tl.constexpr = g.y.window * g.x.window
        place = _place(g.y, y) * g.x.window + _place(g.x, x)
        key_place = _place(g.y, key_y) * g.x.window + _place(g.x, key_x)
        mask = valid & (place < tokens)
        bias = tl.load(g.bias + head * (tokens * tokens) + place * tokens + key_place, mask=mask, other=0.0)
        logits += bias.to(tl.float32) * LOG2E
    return tl.where(valid, logits, float("-inf"))


def _plan(q, k, bias, mask, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    (window_y, window_x), shifts, dilated = parameters[:2], parameters[2:4], parameters[4]
    tokens = window_y * window_x
    block_m, block_n = fit_block(tokens, block_m), fit_block(tokens, block_n)
    tile = block_n if by_key else block_m
    windows = triton.cdiv(q.shape[1], window_y), triton.cdiv(q.shape[2], window_x)
    y, x = (
        Axis(length, constant(window), count, constant(shift), constant(bool(dilated)))
        for length, window, count, shift in zip(q.shape[1:3], (window_y, window_x), windows, shifts, strict=True)
    )
    window_tiles = triton.cdiv(tokens, tile)
    bias, mask = (None if x is None else x.contiguous() for x in (bias, mask))
    geometry = Geometry(bias, mask, 0 if mask is None else len(mask), y, x, window_tiles, tile)
    return Plan(geometry, windows[0] * windows[1] * window_tiles, block_m, block_n, tokens, window_tiles)


def _fold_bias(sums: Tensor, plan: Plan, bias: Tensor) -> Tensor:
    return sums[:, : bias.shape[1]]


PATTERNS["window"] = Pattern(
    Functions(_tile_at, _count, _window_at, _tile_at, _count, _window_at, _logits, _window_at), _plan, _fold_bias
)


def unsupported(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    return unsupported_tensors(q, k, v)


def unsuited(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, window: tuple[int, int], *_: Any
) -> str | None:
    whole = window[0] >= q.shape[1] and window[1] >= q.shape[2]
    return "one window is the whole map, for which PyTorch has its own kernel" if whole else None


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
