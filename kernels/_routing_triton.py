"""Routing attention in Triton: the kernels read the table of routed regions, and its inverse in backward."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._attention_triton import (
    PATTERNS,
    Functions,
    Pattern,
    Plan,
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


class Geometry(NamedTuple):
    q: Any
    k: Any
    routes: Any  # (B, R, K) int32: regions that a region attends to
    order: Any  # (B, R * K) int32: for each pair of a region and one that it attends to, by the latter, the former
    starts: Any  # (B, R + 1) int32: where the pairs of a region start in that order
    rows: Any  # regions of a column of the grid
    columns: Any
    topk: Any


@triton.jit
def _at(g, height, width, region, row, column, exists):
    """Tokens at a row and column of a region."""
    height, width = height // g.rows, width // g.columns
    y, x = region // g.columns * height + row, region % g.columns * width + column
    return Tokens(y, x, exists & (row < height) & (column < width), (exists,))


@triton.jit
def _tile(g, n, height, width, tile, block):
    """A region's number, and the tokens of one of its tiles."""
    across = ceil_div(width // g.columns, block.columns)
    tiles = ceil_div(height // g.rows, block.rows) * across
    region, part = tile // tiles, tile % tiles
    boxes, row, column = in_block(block)
    row += part // across * block.rows
    column += part % across * block.columns
    return region, _at(g, height, width, region, row, column, boxes == 0)


@triton.jit
def _listed(g, height, width, p_list, walk, box, row, column, block):
    """Tokens of the regions of a list."""
    boxes, rows, columns = in_block(block)
    exists = boxes + box < walk[0]
    region = tl.load(p_list + walk[3] + box + boxes, mask=exists, other=0)
    return _at(g, height, width, region, rows + row, columns + column, exists)


@triton.jit
def _q_tile(g, n, batch, tile):
    region, queries = _tile(g, n, n.height, n.width, tile, g.q)
    first = (batch * (g.rows * g.columns) + region) * g.topk
    return queries, (g.topk, n.key_height // g.rows, n.key_width // g.columns, first)


@triton.jit
def _kv_at(g, n, batch, walk, box, row, column):
    return _listed(g, n.key_height, n.key_width, g.routes, walk, box, row, column, g.k)


@triton.jit
def _kv_tile(g, n, batch, tile):
    region, keys = _tile(g, n, n.key_height, n.key_width, tile, g.k)
    p_start = g.starts + batch * (g.rows * g.columns + 1) + region
    start, stop = tl.load(p_start), tl.load(p_start + 1)
    first = batch * (g.rows * g.columns * g.topk) + start
    return keys, (stop - start, n.height // g.rows, n.width // g.columns, first)


@triton.jit
def _q_at(g, n, batch, walk, box, row, column):
    return _listed(g, n.height, n.width, g.order, walk, box, row, column, g.q)


@triton.jit
def _logits(g, b_s, head, queries, keys, BY_KEY: tl.constexpr):
    return tl.where(across(keys.valid, BY_KEY), b_s, float("-inf"))


def _plan(q, k, bias, routes, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    rows, columns = parameters
    regions, topk = routes.shape[1:]
    sizes = [(x.shape[1] // rows, x.shape[2] // columns) for x in (q, k)]
    own, walked = reversed(sizes) if by_key else sizes
    tile = fit(*own, block_n if by_key else block_m)
    block = fit(*walked, block_m if by_key else block_n, topk)
    order = starts = routes = routes.int()
    if by_key:
        pairs, order = routes.flatten(1).sort(stable=True)
        edges = torch.arange(regions + 1, device=routes.device, dtype=pairs.dtype).expand(len(routes), -1).contiguous()
        order, starts = (order // topk).int(), torch.searchsorted(pairs, edges, out_int32=True)
    blocks = (block, tile) if by_key else (tile, block)
    geometry = Geometry(*blocks, routes.contiguous(), order, starts, *map(constant, (rows, columns, topk)))
    tiles = regions * math.prod(triton.cdiv(size, n.value) for size, n in zip(own, tile[:2], strict=True))
    return Plan(geometry, tiles)


PATTERNS["routing"] = Pattern(Functions(_q_tile, _kv_at, _kv_tile, _q_at, _logits), _plan)


def unsupported(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, *_: Any) -> str | None:
    if route_weights is not None:
        return "route_weights are given"
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
