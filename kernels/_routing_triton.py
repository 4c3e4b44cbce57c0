"""Routing attention in Triton: the kernels read the table of routed regions, and its inverse in backward.

The tokens of the regions of a list are walked over as one column, so that neither the size of a region nor that of the
map is compiled for, but for how many tokens of a region there are at a time: 16, 32 or 64.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    MIN_BLOCK,
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
    in_block,
    unsuited_map,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps

LARGEST = 2**31
LONG = 4  # times as many pairs of regions as there are on average are walked over by one program


class Geometry(NamedTuple):
    q: Any
    k: Any
    routes: Any  # (B, R, K) int32: regions that a region attends to
    order: Any  # (B, R * K) int32: for each pair of a region and one that it attends to, by the latter, the former
    starts: Any  # (B, R + 1) int32: where the pairs of a region start in that order
    rows: Any  # regions of a column of the grid
    columns: Any
    topk: Any
    most: Any  # pairs of a region that one program walks over; those of a region with more are split. 0: never
    parts: Any  # (B, R) int32: how many parts the regions up to each have, where they are split
    of_part: Any  # (B, parts at most) int32: the region that each is of; R: of none


@triton.jit
def _divide(i, n):
    """i // n and the rest, where i * n is below LARGEST: in three instructions, for which a division takes 20."""
    share = tl.full([], 2**31 - 1, tl.uint32) // n.to(tl.uint32) + 1
    quotient = tl.umulhi((i + i).to(tl.uint32), share).to(tl.int32)
    return quotient, i - quotient * n


@triton.jit
def _region(g, height, width):
    """Height and width of the regions of a map."""
    return height // g.rows, width // g.columns


@triton.jit
def _at(g, size, region, i, valid):
    """The i-th tokens of regions of this size."""
    height, width = size
    row, column = _divide(i, width)
    y, x = region // g.columns * height + row, region % g.columns * width + column
    return Tokens(y, x, valid, region * (height * width) + i)


@triton.jit
def _split(size, tile, block):
    """Number of a tile's region, that of the tile in it, and how many tiles it has."""
    tiles = ceil_div(size[0] * size[1], block.rows)
    return tile // tiles, tile % tiles, tiles


@triton.jit
def _tile(g, size, region, part, block, exists):
    """The tokens of one of a region's tiles."""
    i = part * block.rows + in_block(block)[0]
    return _at(g, size, region, i, exists & (i < size[0] * size[1]))


@triton.jit
def _listed(g, size, p_list, walk, row, block):
    """Tokens of the regions of a list, one after the other."""
    i = row + in_block(block)[0]
    exists = i < walk[0]
    number, i = _divide(i, size[0] * size[1])
    region = tl.load(p_list + walk[2] + number, mask=exists, other=0)
    return _at(g, size, region, i, exists)


@triton.jit
def _q_tile(g, n, batch, tile):
    size, walked = _region(g, n.height, n.width), _region(g, n.key_height, n.key_width)
    region, part, _ = _split(size, tile, g.q)
    first = (batch * (g.rows * g.columns) + region) * g.topk
    return _tile(g, size, region, part, g.q, region >= 0), (walked[0] * walked[1] * g.topk, 1, first)


@triton.jit
def _kv_at(g, n, batch, walk, row, column):
    return _listed(g, _region(g, n.key_height, n.key_width), g.routes, walk, row, g.k)


@triton.jit
def _parts_before(g, batch, region):
    """How many parts the regions before this one have."""
    return tl.load(g.parts + batch * (g.rows * g.columns) + region - 1, mask=region > 0, other=0)


@triton.jit
def _kv_tile(g, n, batch, tile):
    size, walked = _region(g, n.key_height, n.key_width), _region(g, n.height, n.width)
    region, part, _ = _split(size, tile, g.k)
    regions: tl.constexpr = g.rows * g.columns
    exists, is_only, skipped = region >= 0, region >= 0, 0
    if g.most > 0:
        number = region
        region = tl.load(g.of_part + batch * (regions + regions * g.topk // g.most) + number)
        exists = region < regions
        region = tl.minimum(region, regions - 1)
        before = _parts_before(g, batch, region)
        is_only = _parts_before(g, batch, region + 1) - before == 1
        skipped = (number - before) * g.most
    p_start = g.starts + batch * (regions + 1) + region
    start, stop = tl.load(p_start) + skipped, tl.load(p_start + 1)
    count = tl.where(exists, stop - start, 0)
    if g.most > 0:
        count = tl.minimum(count, g.most)
    keys = _tile(g, size, region, part, g.k, exists)
    return keys, (count * (walked[0] * walked[1]), 1, batch * (regions * g.topk) + start, is_only)


@triton.jit
def _parts(g, n, batch, tile):
    size = _region(g, n.key_height, n.key_width)
    region, part, tiles = _split(size, tile, g.k)
    first = _parts_before(g, batch, region)
    count = _parts_before(g, batch, region + 1) - first
    return _tile(g, size, region, part, g.k, region >= 0), first * tiles + part, tiles, count


@triton.jit
def _q_at(g, n, batch, walk, row, column):
    return _listed(g, _region(g, n.height, n.width), g.order, walk, row, g.q)


@triton.jit
def _number(queries):
    """By regions."""
    return queries.place


@triton.jit
def _logits(g, b_s, head, queries, keys, BY_KEY: tl.constexpr):
    return tl.where(across(keys.valid, BY_KEY), b_s, float("-inf"))


def _plan(q, k, bias, routes, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    rows, columns = parameters
    regions, topk = routes.shape[1:]
    tokens = [_tokens(x, parameters) for x in (q, k)]
    own, walked = reversed(tokens) if by_key else tokens
    tile = _block(own, block_n if by_key else block_m)
    block = _block(topk * walked, block_m if by_key else block_n)
    tiles = triton.cdiv(own, tile.rows.value)
    q_block, k_block = (block, tile) if by_key else (tile, block)
    grid = constant(rows), constant(columns), constant(topk)
    routes = routes.int().contiguous()
    if not by_key:
        geometry = Geometry(q_block, k_block, routes, routes, routes, *grid, constant(0), None, None)
        return Plan(geometry, regions * tiles)
    pairs, order = routes.flatten(1).sort(stable=True)
    starts = _find(pairs, regions + 1, right=False)
    order, most, parts, of_part = (order // topk).int(), LONG * topk, None, None
    if regions <= most:  # that no list is longer than
        most, numbers = 0, regions
    else:
        numbers = regions + regions * topk // most
        parts = ((starts.diff() + most - 1) // most).clamp(min=1).cumsum(1, dtype=torch.int32)
        of_part = _find(parts, numbers, right=True)
    geometry = Geometry(q_block, k_block, routes, order, starts, *grid, constant(most), parts, of_part)
    return Plan(geometry, numbers * tiles, summed_tiles=regions * tiles if most else 0)


def _tokens(x: Tensor, grid: Sequence[int]) -> int:
    """Of a region."""
    return x.shape[1] // grid[0] * (x.shape[2] // grid[1])


def _block(tokens: int, most: int) -> Block:
    """At most so many of these tokens at a time."""
    rows = min(most, max(MIN_BLOCK, triton.next_power_of_2(tokens)))
    return Block(*map(constant, (rows, 1, False)))


def _find(ordered: Tensor, count: int, right: bool) -> Tensor:
    """(B, count) int32: how many numbers of each row are less than 0, 1, 2 ..., or if right not greater."""
    numbers = torch.arange(count, device=ordered.device, dtype=ordered.dtype).expand(len(ordered), -1).contiguous()
    return torch.searchsorted(ordered, numbers, right=right, out_int32=True)


PATTERNS["routing"] = Pattern(Functions(_q_tile, _kv_at, _kv_tile, _q_at, _logits, parts=_parts, number=_number), _plan)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: tuple[int, int], *_: Any
) -> str | None:
    if route_weights is not None:
        return "route_weights are given"
    tokens, most = max(_tokens(x, grid) for x in (q, k)), math.isqrt(LARGEST // (LONG * routes.shape[2]))
    if tokens > most:
        return f"a region has {tokens} tokens, at most {most} are supported"
    return unsupported_tensors(q, k, v)


def unsuited(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: None, grid: tuple[int, int], *_: Any
) -> str | None:
    whole = routes.shape[2] == grid[0] * grid[1]
    return "all regions are routed to, for which PyTorch has its own kernel" if whole else unsuited_map(q)


def problems(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: None, grid: tuple[int, int], scale: float
) -> Iterator[tuple]:
    """Regions of few tokens, those of the keys perhaps of other sizes; one that all are routed to."""
    for height, width in ((3, 1), (5, 7)):
        small_q, small_k, small_v = draw_maps(q, v, (height * grid[0], width * grid[1]))
        if q.shape[1:3] != k.shape[1:3]:
            _, small_k, small_v = draw_maps(q, v, (2 * grid[0], grid[1]))
        scores = draw(q, 2, grid[0] * grid[1], grid[0] * grid[1]).float()
        scores[:, :, 0] = torch.inf
        yield small_q, small_k, small_v, scores.topk(routes.shape[2]).indices, route_weights, grid, scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    route_weights: None,
    grid: tuple[int, int],
    scale: float,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    output, lse = attend("routing", q, k, v, grid, scale, table=routes)
    return (output, lse) if return_lse else output
