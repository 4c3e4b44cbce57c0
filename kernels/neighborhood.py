"""Neighborhood attention: each query attends to the keys nearest to it, on a line, a map or a volume.

Hassani et al., Neighborhood Attention Transformer, CVPR 2023, https://arxiv.org/abs/2204.07143; dilation: Hassani and
Shi, 2022, https://arxiv.org/abs/2209.15001; stride: Hassani et al., Generalized Neighborhood Attention, 2025,
https://arxiv.org/abs/2504.16922.

On an axis of length L, with kernel k, dilation d and stride s: positions r + d * c with the same residue r are a class
of n = ceil((L - r) / d) places c. Place c attends to the k places from clamp(leader - k // 2, 0, n - k) on, where
leader = min(c // s * s + s // 2, n - 1): always k keys, the window shifted inwards at the borders.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from visionattn.kernels._check import check_alike, check_tensor, per_axis, precise, transforms
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._function import Function
from visionattn.kernels._plain import attend, exact_lse, keep, packed, rows
from visionattn.kernels._tiles import map_size

__all__ = ["neighborhood_attention"]

Axes = tuple[int, ...]  # one int for each axis of the map

OUTSIDE = 2**30  # in place of a place of the bias table: the key is not in the query's window
CHUNK = 8 * 2**20  # bytes that the tiles computed at a time may take; 2 to 8 MiB are equally fast on a CPU


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Axes,
    dilation: Axes,
    stride: Axes,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    size = q.shape[1:-2]
    windows = [_windows(*axis, q.device) for axis in zip(size, kernel_size, dilation, stride, strict=True)]
    keys, places = zip(*windows, strict=True)
    indices = _flat(keys, size)  # [N, K]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))  # [B, N, heads, dim]
    logits = torch.einsum("bnhd,bnkhd->bhnk", q * scale, k[:, indices])
    if bias is not None:
        logits = logits + bias.flatten(1)[:, _flat(places, bias.shape[1:])]
    weights = logits.softmax(-1)
    output = torch.einsum("bhnk,bnkhd->bnhd", weights, v[:, indices]).unflatten(1, size)
    if return_lse:
        lse = logits.to(precise(q)).logsumexp(-1).unflatten(-1, size)
        return (output, lse), weights, indices.expand(q.shape[0], -1, -1)
    return output, weights, indices.expand(q.shape[0], -1, -1)


def _windows(length: int, kernel: int, dilation: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each position of an axis its keys, and their places in the bias table: both [length, kernel]."""
    position = torch.arange(length, device=device)
    residue, place = position % dilation, position // dilation
    n = (length - 1 - residue) // dilation + 1
    leader = torch.minimum(place // stride * stride + stride // 2, n - 1)
    start = torch.minimum((leader - kernel // 2).clamp(min=0), n - kernel)
    keys = start[:, None] + torch.arange(kernel, device=device)
    return residue[:, None] + dilation * keys, keys - place[:, None] + kernel - 1


def _flat(coordinates: tuple[Tensor, ...], sizes: Sequence[int]) -> Tensor:
    """Coordinates on each axis of a row-major array of `sizes` -> flat positions of all their combinations.

    [N, L, ...], [P, M, ...], ... -> [N * P * ..., L * M * ..., ...]
    """
    flat = coordinates[0]
    for along_axis, size in zip(coordinates[1:], sizes[1:], strict=True):
        flat = flat * size
        for dim in range(along_axis.ndim):
            flat, along_axis = flat.unsqueeze(2 * dim + 1), along_axis.unsqueeze(2 * dim)
        flat = flat + along_axis
        for dim in range(flat.ndim // 2):
            flat = flat.flatten(dim, dim + 1)
    return flat


class _AxisTiles(NamedTuple):
    """One axis cut into tiles of queries, each with the block of keys that holds their windows."""

    queries: list[list[int]]  # [tiles, queries of a tile]: positions; the last query is repeated to fill its tile
    repeated: list[list[int]]  # [tiles, queries of a tile]: 1 where a query is such a repetition
    keys: list[list[int]]  # [tiles, keys of a block]: positions
    kinds: list[int]  # [tiles]: rows of
    places: list[list[list[int]]]  # [kinds, queries of a tile, keys of a block]: places in the bias table, or OUTSIDE


@functools.lru_cache(maxsize=256)
def _axis_tiles(length: int, kernel: int, dilation: int, stride: int, small: int) -> _AxisTiles:
    """Tiles of about `small` queries, of twice as many where a class has at most 16 places."""

    def start(place: int, n: int) -> int:
        leader = min(place // stride * stride + stride // 2, n - 1)
        return max(0, min(leader - kernel // 2, n - kernel))

    longest = math.ceil(length / dilation)
    most = small if longest > 16 else 2 * small
    count = math.ceil(longest / max(stride, most // stride * stride))
    tile = min(longest, stride * math.ceil(longest / count / stride))
    starts = []  # class, its length, and first place, of each tile
    for residue in range(dilation):
        n = math.ceil((length - residue) / dilation)
        starts += [(residue, n, first) for first in range(0, n, tile)]
    block = max(start(min(first + tile, n) - 1, n) + kernel - start(first, n) for _, n, first in starts)

    axis = _AxisTiles([], [], [], [], [])
    for residue, n, first in starts:
        queries = [min(place, n - 1) for place in range(first, first + tile)]
        first_key = max(0, min(start(first, n), n - block))
        keys = range(first_key, first_key + block)
        places = [
            [key - place + kernel - 1 if 0 <= key - start(place, n) < kernel else OUTSIDE for key in keys]
            for place in queries
        ]
        if places not in axis.places:
            axis.places.append(places)
        axis.kinds.append(axis.places.index(places))
        axis.queries.append([residue + dilation * place for place in queries])
        axis.repeated.append([int(place >= n) for place in range(first, first + tile)])
        axis.keys.append([residue + dilation * min(key, n - 1) for key in keys])
    return axis


class _Tiles(NamedTuple):
    """The same for a map: all combinations of the tiles of its axes, flat. T tiles of Q queries and K keys."""

    queries: Tensor  # [T, Q]
    repeated: Tensor | None  # [T, Q], bool; None if no query is
    keys: Tensor  # [T, K]
    kinds: Tensor  # [T]
    places: Tensor  # [kinds, Q, K]: places in the flat bias table, or one past its end


# About so many queries of a tile on each axis, by the number of axes. Fastest on a CPU (kernels 3 to 11, batch 4, 8):
# 4 x 4 at 56 and 28 px, 7 x 7 at 14 and 7 px, 16 on a line of 2048, 2 x 2 x 2 in a volume of 16 a side. Smaller tiles
# waste fewer products with keys that are masked; larger ones copy fewer keys, which counts on a GPU.
SMALL = {1: 16, 2: 4, 3: 2}
LARGE = {1: 64, 2: 7, 3: 4}


@torch.compiler.assume_constant_result
def _tiles_of_axes(
    size: Axes, kernel_size: Axes, dilation: Axes, stride: Axes, most: dict[int, int]
) -> list[_AxisTiles]:
    axes = zip(size, kernel_size, dilation, stride, strict=True)
    return [_axis_tiles(*axis, most[len(size)]) for axis in axes]


def _make_tiles(
    size: Axes, kernel_size: Axes, dilation: Axes, stride: Axes, most: dict[int, int], device: torch.device
) -> _Tiles:
    axes = _tiles_of_axes(size, kernel_size, dilation, stride, most)

    def flat(name: str, sizes: Axes) -> Tensor:
        return _flat(tuple(torch.tensor(getattr(axis, name), device=device) for axis in axes), sizes)

    tables = tuple(2 * kernel - 1 for kernel in kernel_size)
    repeats = any(itertools.chain.from_iterable(row for axis in axes for row in axis.repeated))
    return _Tiles(
        queries=flat("queries", size),
        repeated=flat("repeated", (1,) * len(size)) > 0 if repeats else None,
        keys=flat("keys", size),
        kinds=flat("kinds", tuple(len(axis.places) for axis in axes)),
        places=flat("places", tables).clamp(max=math.prod(tables)),
    )


@keep
def _tiles(size: Axes, kernel_size: Axes, dilation: Axes, stride: Axes, device: torch.device) -> _Tiles:
    return _make_tiles(size, kernel_size, dilation, stride, SMALL, device)


class _Chunk(NamedTuple):
    """Tiles to compute together: t tiles of b images."""

    queries: Tensor  # [b, t, Q]: rows of q as (B * N, heads, dim)
    keys: Tensor  # [b, t, K]: rows of k and v
    kinds: Tensor  # [t]
    repeated: Tensor | None  # [t, 1, Q, 1]


def _chunks(q: Tensor, tiles: _Tiles) -> Iterator[_Chunk]:
    heads, dim = q.shape[-2:]
    queries, keys = tiles.queries.shape[1], tiles.keys.shape[1]
    fit = CHUNK // (4 * heads * (2 * queries * keys + 2 * (queries + keys) * dim))  # tiles of one image
    first = torch.arange(q.shape[0], device=q.device)[:, None, None] * math.prod(q.shape[1:-2])
    step = max(1, fit // max(1, q.shape[0]))
    for images in first.split(max(1, fit)):
        for start in range(0, len(tiles.kinds), step):
            t = slice(start, start + step)
            repeated = None if tiles.repeated is None else tiles.repeated[t, None, :, None]
            yield _Chunk(images + tiles.queries[t], images + tiles.keys[t], tiles.kinds[t], repeated)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """[B, *map, heads, dim], [b, t, Q] -> [b, t, heads, Q, dim], at least float32"""
    x = x.flatten(0, -3).index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return x.to(precise(x)).transpose(2, 3).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[b, t, heads, Q, dim] -> [b * t * Q, heads, dim]"""
    return x.transpose(2, 3).flatten(0, 2)


def _logits(q: Tensor, k: Tensor, table: Tensor, chunk: _Chunk, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [b, t, heads, Q, K] of the chunk, its scaled queries and its keys."""
    q, k = _gather(q, chunk.queries).mul_(scale), _gather(k, chunk.keys)
    return (q @ k.mT).add_(table.index_select(0, chunk.kinds)), q, k


def _table(bias: Tensor | None, tiles: _Tiles, q: Tensor, kernel_size: Axes) -> Tensor:
    """For each kind of tile its bias, -inf outside of the windows: [kinds, heads or 1, Q, K]."""
    if bias is None:
        bias = q.new_zeros(1, *(2 * kernel - 1 for kernel in kernel_size))
    bias = bias.to(precise(q)).flatten(1).T
    bias = torch.cat([bias, bias.new_full((1, bias.shape[1]), -math.inf)])
    return bias.index_select(0, tiles.places.flatten()).unflatten(0, tiles.places.shape).movedim(-1, 1).contiguous()


# Bytes of moved rows that a call of the plain body may hold, for training until its backward pass: they are about eight
# times its map, of some forty that a block holds. Of more, images are computed in parts, and again in backward.
GATHERED = {"cpu": 2**24, "cuda": 2**30}


class _Tables(NamedTuple):
    """For the plain body: which rows to move, of maps with rows of one head each. Heads come before tiles."""

    moved: Tensor  # [heads * T * (Q + 2 * K)], rows of queries, keys and values in one packed projection
    of_queries: Tensor  # [N * heads], where among the queries of tiles, [Q, heads * T], each is
    of_keys: Tensor  # [heads * T * K], where among the keys of tiles, [K, heads * T], they are, in the order of the map
    starts: Tensor  # [N * heads], where in the former the copies of each key start
    of_outputs: Tensor | None  # [Q * heads * T], row of the map of each query of tiles; None if some are repeated
    places: Tensor  # [kinds * Q * K'], places in the bias table, K' being K rounded up
    of_places: Tensor  # [places of the bias table, entries], where in [kinds, Q, K] they are, or one past its end
    kinds: Tensor  # [T]
    of_kinds: Tensor  # [kinds, T], 1 for the kind of a tile
    sizes: tuple[int, int, int]  # heads * T, Q, K


@keep
def _tables(
    size: Axes, kernel_size: Axes, dilation: Axes, stride: Axes, heads: int, dtype: torch.dtype, device: torch.device
) -> _Tables:
    tiles = _make_tiles(size, kernel_size, dilation, stride, LARGE, device)
    (count, q_size), k_size, total = tiles.queries.shape, tiles.keys.shape[1], math.prod(size)
    head = torch.arange(heads, device=device)
    slots = torch.arange(count * q_size, device=device)
    real = tiles.queries if tiles.repeated is None else tiles.queries.masked_fill(tiles.repeated, total)
    slot = torch.zeros(total + 1, dtype=torch.int64, device=device).scatter(0, real.flatten(), slots)[:-1, None]
    moved = [
        (tokens * (3 * heads) + i * heads + head[:, None, None]).flatten()
        for i, tokens in enumerate((tiles.queries, tiles.keys, tiles.keys))
    ]
    keys, of_keys = (tiles.keys.T[:, None] * heads + head[:, None]).flatten().sort(stable=True)
    of_outputs = None
    if tiles.repeated is None:
        of_outputs = (tiles.queries.T[:, None] * heads + head[:, None]).flatten().int()
    places = F.pad(tiles.places, (0, -k_size % 8), value=math.prod([2 * kernel - 1 for kernel in kernel_size]))
    return _Tables(
        moved=torch.cat(moved).int(),
        of_queries=(slot % q_size * (heads * count) + head * count + slot // q_size).flatten().int(),
        of_keys=of_keys.int(),
        starts=torch.searchsorted(keys, torch.arange(total * heads, device=device)).int(),
        of_outputs=of_outputs,
        places=places.flatten().int(),
        of_places=_entries(size, kernel_size, dilation, stride).int().to(device),
        kinds=tiles.kinds.int(),
        of_kinds=(torch.arange(len(places), device=device)[:, None] == tiles.kinds).to(dtype),
        sizes=(heads * count, q_size, k_size),
    )


def _entries(size: Axes, kernel_size: Axes, dilation: Axes, stride: Axes) -> Tensor:
    """Where in [kinds, Q, K] each place of the bias table is: as many columns as the most frequent needs."""
    places = np.zeros((1, 1, 1), dtype=np.int64)
    outside = np.zeros((1, 1, 1), dtype=bool)
    axes = [_axis_tiles(*axis, LARGE[len(size)]) for axis in zip(size, kernel_size, dilation, stride, strict=True)]
    for axis, kernel in zip(axes, kernel_size, strict=True):
        of_axis = np.array(axis.places)
        outside = _combined(outside, of_axis == OUTSIDE, np.logical_or)
        places = _combined(places * (2 * kernel - 1), np.where(of_axis == OUTSIDE, 0, of_axis), np.add)
    place, entry = places[~outside], np.flatnonzero(~outside)
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place, minlength=math.prod(2 * kernel - 1 for kernel in kernel_size))
    table = np.full((len(counts), counts.max()), places.size)
    column = np.arange(len(place)) - np.repeat(counts.cumsum() - counts, counts)
    table[place[order], column] = entry[order]
    return torch.tensor(table)


def _combined(first: np.ndarray, second: np.ndarray, combine: Callable) -> np.ndarray:
    """[a, b, c], [d, e, f] -> [a * d, b * e, c * f], row-major."""
    result = combine(first[:, None, :, None, :, None], second[None, :, None, :, None])
    return result.reshape([m * n for m, n in zip(first.shape, second.shape, strict=True)])


@exact_lse
def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Axes,
    dilation: Axes,
    stride: Axes,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tiles of queries, each with the block of keys that holds their windows: one gather of rows, fused attention with
    the bias of the tiles, -inf outside of the windows, and a gather of the output."""
    if bias is None:
        bias = q.new_zeros(q.shape[-2], *(2 * kernel - 1 for kernel in kernel_size))
    if torch.compiler.is_compiling():
        return _compiled(q, k, v, bias, kernel_size, dilation, stride, scale, return_lse)
    tables = _tables(q, tuple(q.shape[1:-2]), kernel_size, dilation, stride, q.shape[-2], q.dtype)
    tiles, q_size, k_size = tables.sizes
    fit = max(1, GATHERED.get(q.device.type, 2**30) // (tiles * (q_size + 2 * k_size) * q.shape[-1] * q.element_size()))
    if len(q) <= fit or transforms():
        return _attend_in_tiles(q, k, v, bias, tables, scale, return_lse)
    attend_part: Callable[..., Any] = _attend_in_tiles
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias)):
        attend_part = functools.partial(checkpoint, attend_part, use_reentrant=False, preserve_rng_state=False)
    parts = zip(q.split(fit), k.split(fit), v.split(fit), strict=True)
    results = [attend_part(*part, bias, tables, scale, return_lse) for part in parts]
    if not return_lse:
        return torch.cat(results)
    output, lse = zip(*results, strict=True)
    return torch.cat(output), torch.cat(lse)


def _attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tables: _Tables, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    queries, keys, values = _Moved.run(packed(q, k, v).flatten(1, -2), tables)
    output, lse = attend(queries, keys, values, _BiasOfTiles.run(bias.flatten(1), tables), scale, return_lse)

    def join(x: Tensor) -> Tensor:
        x = rows(x.transpose(1, 2).flatten(1, 2), tables.of_queries, tables.of_outputs)
        return x.view(*q.shape[:-1], x.shape[-1])

    return join(output) if lse is None else (join(output), join(lse[..., None])[..., 0].movedim(-1, 1))


class _Moved(Function):
    """Rows [B, N * 3 * heads, dim] of a packed projection -> tiles of queries [B, heads * T, Q, dim], and of keys and
    values with K. The gradient of a key is the sum over its copies, in a fixed order."""

    @staticmethod
    def forward(x: Tensor, tables: _Tables) -> tuple[Tensor, ...]:
        tiles, q_size, k_size = tables.sizes
        sizes = (q_size, k_size, k_size)
        parts = x.index_select(1, tables.moved).split([tiles * size for size in sizes], 1)
        return tuple(part.unflatten(1, (tiles, size)) for part, size in zip(parts, sizes, strict=True))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        x, ctx.tables = inputs
        ctx.shape = x.shape

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, *grads: Tensor) -> tuple:
        tables, (batch, length, dim), copies = ctx.tables, ctx.shape, len(ctx.tables.of_keys)
        image = torch.arange(0, batch * copies, copies, dtype=torch.int32, device=grad_q.device)[:, None]
        order, starts = (tables.of_keys + image).flatten(), (tables.starts + image).flatten()
        of_queries = grad_q.transpose(1, 2).flatten(1, 2).index_select(1, tables.of_queries)
        sums = [F.embedding_bag(order, x.transpose(1, 2).flatten(0, 2), starts, mode="sum") for x in grads]
        heads = tables.sizes[0] // len(tables.kinds)
        joined = [x.view(batch, length // (3 * heads), heads, dim) for x in (of_queries, *sums)]
        return torch.stack(joined, 2).view(batch, length, dim), None


class _BiasOfTiles(Function):
    """[heads, places] -> [1, heads * T, Q, K], -inf outside of the windows, in rows that fused attention can read. The
    gradient is summed in a fixed order, where PyTorch would add in any."""

    @staticmethod
    def forward(bias: Tensor, tables: _Tables) -> Tensor:
        (tiles, q_size, k_size), (kinds, count) = tables.sizes, tables.of_kinds.shape
        added = F.pad(bias, (0, 1), value=-math.inf).index_select(1, tables.places)
        if kinds > 1 or count > 1:
            added = added.view(len(bias), kinds, -1).index_select(1, tables.kinds)
        return added.view(1, tiles, q_size, -1)[..., :k_size]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.heads, ctx.tables = len(inputs[0]), inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        of_places, of_kinds = ctx.tables.of_places, ctx.tables.of_kinds
        by_kind = (of_kinds @ grad.reshape(ctx.heads, of_kinds.shape[1], -1)).flatten(1)
        entries = F.pad(by_kind, (0, 1)).index_select(1, of_places.flatten())
        return entries.view(ctx.heads, *of_places.shape).sum(2), None


class _Axis(NamedTuple):
    """As `_AxisTiles`, of an axis whose length may be a symbol: its tiles are all of one size."""

    queries: Tensor  # [tiles, queries of a tile]
    keys: Tensor  # [tiles, keys of a block]
    places: Tensor  # [tiles, queries of a tile, keys of a block]
    tile: Tensor  # [length], of each position
    query: Tensor  # [length], of its tile


def _axis(length: int, kernel: int, dilation: int, stride: int, most: int, device: torch.device) -> _Axis:
    longest, size = (length + dilation - 1) // dilation, max(stride, most // stride * stride)
    count = (longest + size - 1) // size
    residue, position = torch.arange(dilation, device=device)[:, None, None], torch.arange(length, device=device)
    n = (length - 1 - residue) // dilation + 1
    place = torch.arange(count, device=device)[:, None] * size + torch.arange(size, device=device)
    place = torch.minimum(place, n - 1)  # [dilation, count, size]
    leader = torch.minimum(place // stride * stride + stride // 2, n - 1)
    start = torch.minimum((leader - kernel // 2).clamp(min=0), n - kernel)
    key = start[..., :1] + torch.arange(size - stride + kernel, device=device)
    seen = key[..., None, :] - start[..., None]
    places = torch.where((seen >= 0) & (seen < kernel), key[..., None, :] - place[..., None] + kernel - 1, OUTSIDE)
    return _Axis(
        queries=(residue + dilation * place).flatten(0, 1),
        keys=(residue + dilation * torch.minimum(key, n - 1)).flatten(0, 1),
        places=places.flatten(0, 1),
        tile=position % dilation * count + position // dilation // size,
        query=position // dilation % size,
    )


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    kernel_size: Axes,
    dilation: Axes,
    stride: Axes,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The plain body in one graph for all sizes of maps: tables are computed in it."""
    size, heads, most = q.shape[1:-2], q.shape[-2], LARGE[q.ndim - 3]
    axes = [_axis(*axis, most, q.device) for axis in zip(size, kernel_size, dilation, stride, strict=True)]
    queries, keys, places, tile, query = zip(*axes, strict=True)
    tables = tuple(2 * kernel - 1 for kernel in kernel_size)
    flat_places = _flat(places, tables).clamp(max=math.prod(tables))  # [T, Q, K]
    added = F.pad(bias.flatten(1), (0, 1), value=-math.inf)[:, flat_places]
    q_tiles, k_tiles, v_tiles = (
        x.flatten(1, -3)[:, _flat(positions, size)].permute(0, 3, 1, 2, 4).flatten(1, 2)
        for x, positions in ((q, queries), (k, keys), (v, keys))
    )
    output, lse = attend(q_tiles, k_tiles, v_tiles, added.flatten(0, 1)[None], scale, return_lse)
    counts, of_tile = [x.shape[0] for x in queries], [x.shape[1] for x in queries]
    slot = _flat(tile, counts) * math.prod(of_tile) + _flat(query, of_tile)

    def join(x: Tensor) -> Tensor:
        x = x.unflatten(1, (heads, -1)).flatten(2, 3)[:, :, slot]
        return x.transpose(1, 2).unflatten(1, size)

    return join(output) if lse is None else (join(output), join(lse[..., None])[..., 0].movedim(-1, 1))


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Any) -> Any:
    """Without gradients by the plain body, which on small maps takes half of the time, on others 0.8 to 1.0 of it, as
    long as its moved rows of an image are few. Its gradients take 1.0 to 1.7 times as long, or several maps of memory.
    """
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    many = 8 * q.element_size() * math.prod(q.shape[1:]) > GATHERED["cpu"]
    return (_Neighborhood.run if trained or many else _plain)(q, k, v, bias, *others)


class _Neighborhood(Function):
    """Tile by tile: rows of q, k and v are copied, then matmul, softmax, matmul; backward does the same again.

    Against fused attention on the same tiles: 5 to 15 % slower forward on a CPU, but it has the gradient of the bias.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel_size: Axes,
        dilation: Axes,
        stride: Axes,
        scale: float,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tiles = _tiles(q, map_size(q), kernel_size, dilation, stride)
        table = _table(bias, tiles, q, kernel_size)
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:-1], dtype=table.dtype) if return_lse else None
        for chunk in _chunks(q, tiles):
            logits, _, _ = _logits(q, k, table, chunk, scale)
            rows = chunk.queries.flatten()
            out = _rows(logits.softmax(-1) @ _gather(v, chunk.keys))
            output.flatten(0, -3).index_copy_(0, rows, out.to(q.dtype))
            if lse is not None:
                lse.flatten(0, -2).index_copy_(0, rows, _rows(logits.logsumexp(-1, keepdim=True))[..., 0])
        return output if lse is None else (output, lse.movedim(-1, 1))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
        q, k, v, bias, *ctx.parameters, _ = inputs
        ctx.save_for_backward(q, k, v, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor | None = None) -> tuple:
        q, k, v, bias = ctx.saved_tensors
        kernel_size, dilation, stride, scale = ctx.parameters
        tiles = _tiles(q, map_size(q), kernel_size, dilation, stride)
        table = _table(bias, tiles, q, kernel_size)
        grad_table = torch.zeros_like(table)
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=table.dtype, device=x.device) for x in (q, k, v))
        if grad_lse is not None:
            grad_lse = grad_lse.movedim(1, -1)[..., None]
        for chunk in _chunks(q, tiles):
            logits, q_tile, k_tile = _logits(q, k, table, chunk, scale)
            weights = logits.softmax(-1)
            grad_tile = _gather(grad, chunk.queries)
            if chunk.repeated is not None:
                grad_tile = grad_tile.masked_fill_(chunk.repeated, 0)
            keys = chunk.keys.flatten()
            grad_v.flatten(0, -3).index_add_(0, keys, _rows(weights.mT @ grad_tile))
            grad_weights = grad_tile @ _gather(v, chunk.keys).mT
            mean = (weights * grad_weights).sum(-1, keepdim=True)
            if grad_lse is not None:
                lse_tile = _gather(grad_lse, chunk.queries)
                mean -= lse_tile if chunk.repeated is None else lse_tile.masked_fill_(chunk.repeated, 0)
            grad_logits = grad_weights.sub_(mean).mul_(weights)
            grad_q.flatten(0, -3).index_add_(0, chunk.queries.flatten(), _rows(grad_logits @ k_tile), alpha=scale)
            grad_k.flatten(0, -3).index_add_(0, keys, _rows(grad_logits.mT @ q_tile))
            if ctx.needs_input_grad[3]:
                grad_table.index_add_(0, chunk.kinds, grad_logits.sum(0))
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = grad_table.new_zeros(bias[0].numel() + 1, len(bias))
            grad_bias.index_add_(0, tiles.places.flatten(), grad_table.movedim(1, -1).flatten(0, 2))
            grad_bias = grad_bias[:-1].T.reshape(bias.shape).to(bias.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, None, None, None, None, None


def _check_windows(size: Axes, kernel_size: Axes, dilation: Axes, stride: Axes) -> None:
    for axis, (length, kernel, step, group) in enumerate(zip(size, kernel_size, dilation, stride, strict=True)):
        if kernel * step > length:
            raise ValueError(
                f"kernel_size={kernel} times dilation={step} is {kernel * step}, more than the {length} positions of "
                f"axis {axis} of the map {tuple(size)}: pad the axis to {kernel * step}, or use a smaller window"
            )
        if group > kernel:
            raise ValueError(
                f"stride={group} on axis {axis}: expected at most kernel_size={kernel}, as groups of "
                "queries that share a window lie inside it"
            )


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Axes,
    dilation: int | Axes = 1,
    stride: int | Axes = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Axes,
    dilation: int | Axes = 1,
    stride: int | Axes = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Axes,
    dilation: int | Axes = 1,
    stride: int | Axes = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query to the `kernel_size` keys nearest to it on each axis.

    q, k, v: (B, L, heads, head_dim), (B, H, W, heads, head_dim) or (B, D, H, W, heads, head_dim), any strides.
    kernel_size, dilation, stride: an int, or one for each axis of the map.
        kernel_size: keys of a window; an even one has one key more before the query than after it.
        dilation: step between the keys of a window. kernel_size * dilation may not be larger than the axis; a model
            pads its map where it is.
        stride: queries in groups of so many neighbours (of a dilation class) share the window of the group's middle
            one, the right one of two middles; at most kernel_size. kernel_size itself gives separate windows.
    bias: (heads, 2 * kernel_size - 1 for each axis), added to the logits: the place of the key less that of the query,
        plus kernel_size - 1, counted inside the dilation class. -inf entries forbid keys; a query needs one allowed.
    scale: multiplies q . k; head_dim ** -0.5 if None.
    return_lse: return (output, lse), lse (B, heads, L), (B, heads, H, W) or (B, heads, D, H, W), float32 (float64 for
        float64): log-sum-exp of the scaled and biased logits, by which results over two sets of keys merge exactly.

    Returns the output, shaped like q. The torch backend multiplies masked keys near a window by zero: NaN and inf in v
    or k reach queries a few positions beyond those that attend to them.
    Raises ValueError for arguments that do not fit together.
    """
    check_alike(q, k, v, axes=(1, 2, 3))
    axes = q.ndim - 3
    kernel_size = per_axis("kernel_size", kernel_size, axes)
    dilation = per_axis("dilation", dilation, axes)
    stride = per_axis("stride", stride, axes)
    _check_windows(q.shape[1:-2], kernel_size, dilation, stride)
    if bias is not None:
        check_tensor("bias", bias, (q.shape[-2], *(2 * kernel - 1 for kernel in kernel_size)), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # The canonical arguments, for every backend, in this order:
    #   q, k, v      (B, *map, heads, head_dim), one shape, dtype and device; any strides
    #   bias         None or (heads, 2 * kernel_size[0] - 1, ...), dtype and device of q
    #   kernel_size, dilation, stride   tuples of ints, one for each axis of the map (1 to 3 axes), checked as above
    #   scale        float, multiplies q . k
    #   return_lse   False: return output, shaped like q; True: return (output, lse), lse (B, heads, *map)
    forms = Forms(_reference, _on_cpu, _plain)
    return dispatch("neighborhood", backend, forms, q, k, v, bias, kernel_size, dilation, stride, scale, return_lse)
