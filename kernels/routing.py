"""Bi-level routing attention: each region of a map attends to the few regions that matter most to it.

Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, https://arxiv.org/abs/2303.08810.

Sizes in comments: B images, R regions (row-major over the grid of rows x columns), N tokens of a map, T tokens of a
region, K regions that a region attends to (top-k), S = K * T keys of a query.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import autocasting, check_maps, check_tensor, precise, transforms
from visionattn.kernels._dispatch import Forms, dispatch, takes_plain
from visionattn.kernels._function import Function
from visionattn.kernels._plain import attend, fused, keep, together
from visionattn.kernels._tiles import Tiles, as_rows, cached, chunks, join, split

__all__ = ["routing_attention"]

Grid = tuple[int, int]  # rows, columns of regions

# Bytes of selected keys and values and of logits to compute at a time, which stay in a CPU's cache.
CHUNK = {"forward": 8 * 2**20, "backward": 4 * 2**20}
SAVED = 16 * 2**20  # bytes of weights up to which they are saved for backward: less time than computing them again
SMALL_LOGITS = 2**13  # T * S up to which matmuls beat the fused kernel
MASKED_TOKENS = 512  # N up to which masking all keys may beat selecting some, and its mask is small


def _reference(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    positions = _positions(k.shape[1:3], grid, k.device)[routes]  # [B, R, K, T]
    own = routes.shape[1] // grid[1], grid[1]  # regions of queries, which may be some of them
    q, k, v = _split(q, own), _by_region(k, grid)[image, routes], _by_region(v, grid)[image, routes]
    if route_weights is not None:
        k, v = (x * route_weights[..., None, None, None] for x in (k, v))
    k, v, positions = (x.flatten(2, 3).unflatten(1, own) for x in (k, v, positions))  # [B, rows, columns, S, ...]
    logits = torch.einsum("brhcwnd,brcsnd->bnrhcws", q * scale, k)
    weights = logits.softmax(-1).flatten(2, 5)  # [B, heads, N, S]
    output = torch.einsum("bnrhcws,brcsnd->brhcwnd", weights.unflatten(2, q.shape[1:5]), v)
    indices = None
    if grid != (1, 1):
        indices = positions[:, :, None, :, None].expand(*q.shape[:5], -1).flatten(1, 4)  # [B, N, S]
    return output.flatten(3, 4).flatten(1, 2), weights, indices


def _strip(
    rows: int, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> Iterator[tuple[int, tuple]]:
    """Whole rows of regions, or of one region any."""
    region = 1 if grid == (1, 1) else q.shape[1] // grid[0]
    rows = -(-rows // region) * region
    for first in range(0, q.shape[1], rows):
        own = slice(None) if grid == (1, 1) else slice(first // region * grid[1], (first + rows) // region * grid[1])
        weights = None if route_weights is None else route_weights[:, own]
        yield first, (q[:, first : first + rows], k, v, routes[:, own], weights, grid, scale)


def _split(x: Tensor, grid: Grid) -> Tensor:
    """[B, H, W, ...] -> view [B, rows, H / rows, columns, W / columns, ...]"""
    return x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))


def _by_region(x: Tensor, grid: Grid) -> Tensor:
    """[B, H, W, ...] -> [B, R, T, ...]"""
    return _split(x, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _positions(size: tuple[int, ...], grid: Grid, device: torch.device) -> Tensor:
    """Flat positions, in a map of this size, of the tokens of each region: [R, T]"""
    return _by_region(torch.arange(size[0] * size[1], device=device).view(1, *size), grid)[0]


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """The keys of the routed regions are selected, but masked where regions are so small that matmuls of one are slow,
    and many of a small map are routed; CPU, 8 heads, batch 8, forward + backward in ms:
        14 x 14 map, 7 x 7 regions of 4 tokens:   topk 2: 19 selected, 21 masked; topk 8: 59, 18; topk 16: 109, 22
        21 x 21 map, 7 x 7 regions of 9 tokens (batch 4):   topk 13: 55 selected, 35 masked
        16 x 16 map, 4 x 4 regions of 16 tokens:   topk 4: 21 selected, 23 masked
    """
    if route_weights is None and _is_dense(q, k, routes, grid):
        return _dense(q, k, v, routes, grid, scale)
    regions = [cached(_make_regions, q)(x.shape[1:3], grid, x.device) for x in (q, k)]
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, route_weights))
    saved_weights = _new_weights(q, routes, *regions) if trained else None
    return _Routed.run(q, k, v, routes, route_weights, saved_weights, *regions, scale)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """Rows of k and v are gathered at once, and a copy puts q in the order of regions."""
    if route_weights is None and _is_dense(q, k, routes, grid):
        return _dense(q, k, v, routes, grid, scale)
    batch, tokens = k.shape[0], k.shape[1] * k.shape[2]
    first = torch.arange(0, batch * tokens, tokens, device=k.device)[:, None, None, None]
    index = first + _tokens(k, tuple(k.shape[1:3]), grid)[routes]  # [B, R, K, T]
    selected, index = index.shape[2] * index.shape[3], index.flatten()

    def select(x: Tensor) -> Tensor:
        x = x.flatten(0, 2).index_select(0, index).unflatten(0, (batch * routes.shape[1], selected))
        return x.permute(2, 0, 3, 1, 4)  # [P, B * R, heads, S, dim]

    k, v = together(select, k, v)
    if route_weights is not None:
        factors = route_weights.flatten(0, 1)[:, None, :, None, None]
        k, v = ((x.unflatten(2, (routes.shape[2], -1)) * factors).flatten(2, 3) for x in (k, v))
    rows = _by_region(q, grid)
    output, _ = attend(rows.flatten(0, 1).transpose(1, 2), k, v, None, scale)
    height, width = q.shape[1] // grid[0], q.shape[2] // grid[1]
    output = output.transpose(1, 2).unflatten(1, (height, width)).unflatten(0, (batch, *grid))
    return output.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@keep
def _tokens(size: tuple[int, ...], grid: Grid, device: torch.device) -> Tensor:
    return _positions(size, grid, device)


def _is_dense(q: Tensor, k: Tensor, routes: Tensor, grid: Grid) -> bool:
    """Whether to attend to all keys, under a mask unless there is one region."""
    if grid == (1, 1):
        return True
    q_tokens, k_tokens = (x.shape[1] * x.shape[2] for x in (q, k))
    return 64 * routes.shape[2] >= k_tokens and max(q_tokens, k_tokens) <= MASKED_TOKENS


def _dense(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, grid: Grid, scale: float) -> Tensor:
    mask = None if grid == (1, 1) else _mask(q, k, routes, grid)
    queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    output = fused(queries, keys, values, mask, scale)
    return output.transpose(1, 2).unflatten(1, q.shape[1:3])


def _mask(q: Tensor, k: Tensor, routes: Tensor, grid: Grid) -> Tensor:
    """[B, 1, N, N], the logarithm of how often the key's region is among the routes of the query's: -inf for never."""
    split_q, split_k = (_split(x, grid).shape[1:5] for x in (q, k))
    regions = grid[0] * grid[1]
    counts = q.new_zeros(q.shape[0], regions, regions)
    mask = counts.scatter_add_(2, routes, counts.new_ones(()).expand(routes.shape)).log()  # which ONNX has
    mask = mask.unflatten(2, (grid[0], 1, grid[1], 1)).unflatten(1, (grid[0], 1, grid[1], 1))
    return mask.expand(-1, *split_q, *split_k).flatten(5, 8).flatten(1, 4).unsqueeze(1)


@functools.lru_cache(maxsize=16)
def _make_regions(size: torch.Size, grid: Grid, device: torch.device) -> Tiles:
    tokens = _positions(size, grid, device)
    return Tiles(tokens, torch.zeros_like(tokens, dtype=torch.bool), size[0] * size[1])


def _new_weights(q: Tensor, routes: Tensor, queries: Tiles, keys: Tiles) -> Tensor | None:
    """Empty, for all weights, [B, R, heads, T, S]; None where they take more than SAVED."""
    (regions, tokens), selected = queries.tokens.shape, routes.shape[2] * keys.tokens.shape[1]
    shape, dtype = (q.shape[0], regions, q.shape[3], tokens, selected), precise(q)
    return q.new_empty(shape, dtype=dtype) if math.prod(shape) * dtype.itemsize <= SAVED else None


def _fit(k: Tensor, v: Tensor, selected: int, logits: int, size: int) -> int:
    """How many regions fit into `size` bytes of selected keys, values, and so many logits of each."""
    return size // (4 * k.shape[3] * selected * (k.shape[4] + v.shape[4] + logits))


class _Routed(Function):
    """Chunk by chunk of regions: rows of q, and of k and v those of the routed regions, are copied, then matmul,
    softmax, matmul, and rows copied back. Backward copies again, so that nothing copied is saved."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Tensor,
        factors: Tensor | None,
        saved_weights: Tensor | None,
        queries: Tiles,
        keys: Tiles,
        scale: float,
    ) -> Tensor:
        """The output; writes the weights to `saved_weights`."""
        maps = [as_rows(x) for x in (q, k, v)]
        output = q.new_empty(*q.shape[:4], v.shape[4])
        tokens, selected = queries.tokens.shape[1], routes.shape[2] * keys.tokens.shape[1]
        large = saved_weights is None and tokens * selected > SMALL_LOGITS
        fit = _fit(k, v, selected, 0 if large else tokens, CHUNK["forward"])
        for images, blocks in chunks(len(q), routes.shape[1], fit):
            outputs = []
            for block in blocks:
                (q_tile,) = queries.gather(images, block, maps[0])
                tiles = keys.select(images, routes[images, block], *maps[1:])
                k_tile, v_tile = (_times(x, factors, images, block) for x in tiles)
                if large:
                    output_tile = F.scaled_dot_product_attention(
                        q_tile.flatten(0, 1), k_tile.flatten(0, 1), v_tile.flatten(0, 1), scale=scale
                    )
                    outputs.append(output_tile.unflatten(0, q_tile.shape[:2]))
                else:
                    weights = None if saved_weights is None else saved_weights[images, block]
                    outputs.append(_weights(q_tile, k_tile, scale, weights) @ v_tile)
            queries.restore(output[images], outputs)
        return output

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.queries, ctx.keys, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        (q, k, v, routes, factors, saved_weights), queries, keys = ctx.saved_tensors, ctx.queries, ctx.keys
        maps = [as_rows(x) for x in (q, k, v, grad)]
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        grad_factors = None if factors is None else torch.empty_like(factors)
        fit = _fit(k, v, routes.shape[2] * keys.tokens.shape[1], queries.tokens.shape[1], CHUNK["backward"])
        for images, blocks in chunks(len(q), routes.shape[1], fit):
            grads_q, totals = [], [_zeros(x[images], keys) for x in (k, v)]
            for block in blocks:
                q_tile, grad_tile = queries.gather(images, block, maps[0], maps[3])
                tiles = keys.select(images, routes[images, block], *maps[1:3])
                k_tile, v_tile = (_times(x, factors, images, block) for x in tiles)
                weights = None if saved_weights is None else saved_weights[images, block]
                grad_q, *pair = _gradients(q_tile, k_tile, v_tile, grad_tile, ctx.scale, weights)
                grads_q.append(grad_q)
                if grad_factors is not None:
                    products = (x * y for x, y in zip(pair, tiles, strict=True))
                    of_k, of_v = (x.unflatten(3, (routes.shape[2], -1)).sum((2, 4, 5)) for x in products)
                    grad_factors[images, block] = of_k + of_v
                for total, grad_tiles in zip(totals, pair, strict=True):
                    _add(total, routes[images, block], _times(grad_tiles, factors, images, block))
            queries.restore(grads[0][images], grads_q)
            for target, total in zip(grads[1:], totals, strict=True):
                keys.restore(target[images], [total])
        return *grads, None, grad_factors, *[None] * 4


def _times(tiles: Tensor, factors: Tensor | None, images: slice, block: slice) -> Tensor:
    """Selected tiles [b, t, heads, S, dim], times the factors of their routes."""
    if factors is None:
        return tiles
    factors = factors[images, block, None, :, None, None]
    return (tiles.unflatten(3, (factors.shape[3], -1)) * factors).flatten(3, 4)


def _weights(q: Tensor, k: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """[b, t, heads, q, S], of [b, t, heads, q, dim] and [b, t, heads, S, dim]; written to `out` if there is one."""
    zero = q.new_zeros(())
    logits = torch.baddbmm(zero, q.flatten(0, 2), k.flatten(0, 2).mT, beta=0, alpha=scale).view(*q.shape[:4], -1)
    return torch.softmax(logits, -1, out=logits if out is None else out)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, saved_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, tiles [b, t, heads, T or S, dim]."""
    grads_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    for i in split(q.shape[3], CHUNK["backward"] // (4 * q.shape[:3].numel() * k.shape[3])):
        q_i, grad_i = q[:, :, :, i], grad[:, :, :, i]
        weights = _weights(q_i, k, scale) if saved_weights is None else saved_weights[:, :, :, i]
        grad_logits = torch._softmax_backward_data(grad_i @ v.mT, weights, -1, weights.dtype).mul_(scale)
        grads_q.append(grad_logits @ k)
        grad_k += grad_logits.mT @ q_i
        grad_v += weights.mT @ grad_i
    return join(grads_q, 3), grad_k, grad_v


def _zeros(x: Tensor, regions: Tiles) -> Tensor:
    """[b, R, heads, T, dim]"""
    return x.new_zeros(len(x), len(regions.tokens), x.shape[3], regions.tokens.shape[1], x.shape[4], dtype=precise(x))


def _add(total: Tensor, routes: Tensor, tiles: Tensor) -> None:
    """Adds tiles [b, t, heads, S, dim] of the routed regions to those [b, R, heads, T, dim] of all."""
    image, head = (torch.arange(n, device=routes.device) for n in total.shape[:3:2])
    rows = (image[:, None, None] * total.shape[1] + routes)[:, :, None] * total.shape[2] + head[:, None]
    total = total.flatten(0, 2).flatten(1)
    total.index_add_(0, rows.flatten(), tiles.reshape(-1, total.shape[1]))


def _top_regions(q: Tensor, k: Tensor, grid: Grid, topk: int) -> Tensor:
    """The routes of the paper: for each region the topk regions with the largest product of mean q and mean k."""
    dtype, maps = precise(q), (q.detach(), k.detach())
    if takes_plain(q):
        q, k = together(lambda x: _split(x, grid).mean((2, 4), dtype=dtype).movedim(3, 0), *maps)
    else:  # the mean over one axis, then the other: on a CPU four times faster than over both at once
        q, k = (_split(x, grid).mean(4, dtype=dtype).mean(2) for x in maps)
    q, k = (x.flatten(3).flatten(1, 2) for x in (q, k))
    with torch.autocast(q.device.type, enabled=False) if autocasting(q) else nullcontext():
        return (q @ k.mT).topk(topk, sorted=False).indices


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    *,
    routes: Tensor | None = None,
    route_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each token to the tokens of the `topk` regions that its region is routed to.

    Args:
        q: (B, H, W, heads, head_dim) queries, any strides; H, W multiples of the rows and columns of regions.
        k: (B, H', W', heads, head_dim) keys; their map may have another size, divisible by the same regions.
        v: (B, H', W', heads, value_dim) values.
        regions: regions a side, or (rows, columns); 1 is global attention.
        topk: regions that each region attends to, 1 to rows * columns.
        scale: factor of the logits, by default head_dim ** -0.5.
        routes: (B, R, topk) int64, the row-major regions that each region attends to. By default those with the
            largest product of the regions' mean q and mean k, over all heads together, without gradient and at least
            in float32.
        route_weights: (B, R, topk) with `routes`: factors of the keys and values of each routed region (soft routing);
            differentiable.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        (B, H, W, heads, value_dim) in the dtype of q, or that of autocast. Its gradient can be taken once.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot run.

    `record_attention` keeps weights (B, heads, H * W, topk * T) and, with more than one region, the flat positions in
    the key map (B, H * W, topk * T) that they belong to, T tokens of a region.
    """
    grid = _check(q, k, v, regions, topk, routes, route_weights)
    if routes is None and topk == grid[0] * grid[1]:  # every region to every region: as one region
        grid, routes = (1, 1), torch.zeros(q.shape[0], 1, 1, dtype=torch.int64, device=q.device)
    elif routes is None:
        routes = _top_regions(q, k, grid, topk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forms = Forms(_reference, _on_cpu, _plain, strip=_strip)
    return dispatch("routing", backend, forms, q, k, v, routes, route_weights, grid, scale)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    routes: Tensor | None,
    route_weights: Tensor | None,
) -> Grid:
    """Raises ValueError for arguments that do not fit together; returns rows and columns of regions."""
    grid = (regions, regions) if isinstance(regions, int) else tuple(regions)
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"regions={regions}: expected a positive int or (rows, columns)")
    check_maps(q, k, v)
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] % grid[0] or x.shape[2] % grid[1]:
            raise ValueError(
                f"{name} is a map of {x.shape[1]} x {x.shape[2]} tokens: expected multiples of regions={regions}; pad "
                "the map, or choose regions that divide it"
            )
    count = grid[0] * grid[1]
    if not 1 <= topk <= count:
        raise ValueError(f"topk={topk}: expected 1 to {count}, the number of regions")
    if routes is not None:
        check_tensor("routes", routes, (q.shape[0], count, topk), q, torch.int64)
        readable = routes.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms()
        if readable and ((routes < 0) | (routes >= count)).any():
            raise ValueError(f"routes has values from {routes.min()} to {routes.max()}: expected 0 to {count - 1}")
    if route_weights is not None:
        if routes is None:
            raise ValueError("route_weights was given without routes: expected both, in the same order")
        check_tensor("route_weights", route_weights, (q.shape[0], count, topk), q)
    return grid
