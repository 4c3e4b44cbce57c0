"""Routing attention in Triton: the kernels read the table of routed regions, and its inverse in backward."""

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
    attend,
    fit_block,
    unsupported_tensors,
)
from visionattn.kernels._proof import draw, draw_maps


class Geometry(NamedTuple):
    routes: Any  # (B, R, K): regions that a region attends to
    order: Any  # (B, R * K): pairs (region, route), sorted by the region routed to
    starts: Any  # (B, R + 1): where the pairs of a region start in that order
    regions: Any
    topk: Any
    columns: Any  # regions of a row of the grid
    query_width: Any  # tokens of a region
    query_tokens: Any
    key_width: Any
    key_tokens: Any
    region_tiles: Any  # tiles of a region
    tile: Any  # tokens of a tile


@triton.jit
def _token(g, region, n, width, tokens):
    """Place in the map of the n-th token of a region."""
    return region // g.columns * (tokens // width) + n // width, region % g.columns * width + n % width


@triton.jit
def _tile_at(g, tile, n, width, tokens):
    n += tile % g.region_tiles * g.tile
    y, x = _token(g, tile // g.region_tiles, n, width, tokens)
    return y, x, n < tokens


@triton.jit
def _q_tile_at(g, batch, tile, n):
    return _tile_at(g, tile, n, g.query_width, g.query_tokens)


@triton.jit
def _kv_count(g, batch, tile):
    return g.topk * g.key_tokens


@triton.jit
def _kv_at(g, batch, tile, n):
    valid = n < g.topk * g.key_tokens
    routes = g.routes + (batch * g.regions + tile // g.region_tiles) * g.topk
    region = tl.load(routes + n // g.key_tokens, mask=valid, other=0).to(tl.int32)
    y, x = _token(g, region, n % g.key_tokens, g.key_width, g.key_tokens)
    return y, x, valid


@triton.jit
def _kv_tile_at(g, batch, tile, n):
    return _tile_at(g, tile, n, g.key_width, g.key_tokens)


@triton.jit
def _starts(g, batch, tile):
    starts = g.starts + batch * (g.regions + 1) + tile // g.region_tiles
    return tl.load(starts), tl.load(starts + 1)


@triton.jit
def _q_count(g, batch, tile):
    start, stop = _starts(g, batch, tile)
    return (stop - start) * g.query_tokens


@triton.jit
def _q_at(g, batch, tile, n):
    start, stop = _starts(g, batch, tile)
    pair = start + n // g.query_tokens
    valid = pair < stop
    region = tl.load(g.order + batch * g.regions * g.topk + pair, mask=valid, other=0).to(tl.int32) // g.topk
    y, x = _token(g, region, n % g.query_tokens, g.query_width, g.query_tokens)
    return y, x, valid


@triton.jit
def _logits(g, logits, batch, head, y, x, key_y, key_x, valid):
    return tl.where(valid, logits, float("-inf"))


def _plan(q, k, bias, routes, parameters, block_m: int, block_n: int, by_key: bool) -> Plan:
    rows, columns = parameters
    b, regions, topk = routes.shape
    (query_height, query_width), (key_height, key_width) = ((x.shape[1] // rows, x.shape[2] // columns) for x in (q, k))
    query_tokens, key_tokens = query_height * query_width, key_height * key_width
    order = starts = routes
    if by_key:
        tokens = key_tokens
        tile = block_n = fit_block(key_tokens, block_n)
        pairs, order = routes.flatten(1).sort(stable=True)
        edges = torch.arange(regions + 1, device=routes.device, dtype=pairs.dtype).expand(b, -1).contiguous()
        order, starts = order.int(), torch.searchsorted(pairs, edges, out_int32=True)
    else:
        tokens = query_tokens
        tile = block_m = fit_block(query_tokens, block_m)
        block_n = fit_block(topk * key_tokens, block_n)
    region_tiles = triton.cdiv(tokens, tile)
    geometry = Geometry(
        routes.contiguous(), order, starts, regions, topk, columns,
        query_width, query_tokens, key_width, key_tokens, region_tiles, tile,
    )  # fmt: skip
    return Plan(geometry, regions * region_tiles, block_m, block_n)


PATTERNS["routing"] = Pattern(Functions(_q_tile_at, _kv_count, _kv_at, _kv_tile_at, _q_count, _q_at, _logits), _plan)


def unsupported(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, *_: Any) -> str | None:
    if route_weights is not None:
        return "route_weights are given"
    return unsupported_tensors(q, k, v)


def unsuited(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: None, grid: tuple[int, int], *_: Any
) -> str | None:
    whole = routes.shape[2] == grid[0] * grid[1]
    return "all regions are routed to, for which PyTorch has its own kernel" if whole else None


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
