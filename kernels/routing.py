"""Bi-level routing attention: each region of a map attends to the few regions that matter most to it.

Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, https://arxiv.org/abs/2303.08810.

Sizes in comments: B images, R regions (row-major over the grid of rows x columns), N tokens of a map, T tokens of a
region, K regions that a region attends to (top-k), S = K * T keys of a query.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import autocasting, check_maps, check_tensor, precise
from visionattn.kernels._dispatch import dispatch

__all__ = ["routing_attention"]

Grid = tuple[int, int]  # rows, columns of regions

CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # of selected keys and logits at a time; on a CPU they stay in its cache
SMALL_LOGITS = 2**13  # T * S up to which separate matmuls beat the fused kernel on a CPU
MASKED_TOKENS = 512  # N up to which masking all keys may beat selecting some


def _reference(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    positions = _positions(k, grid)[routes]  # [B, R, K, T]
    q, k, v = _split(q, grid), _by_region(k, grid)[image, routes], _by_region(v, grid)[image, routes]
    if route_weights is not None:
        k, v = (x * route_weights[..., None, None, None] for x in (k, v))
    k, v, positions = (x.flatten(2, 3).unflatten(1, grid) for x in (k, v, positions))  # [B, rows, columns, S, ...]
    logits = torch.einsum("brhcwnd,brcsnd->bnrhcws", q * scale, k)
    weights = logits.softmax(-1).flatten(2, 5)  # [B, heads, N, S]
    output = torch.einsum("bnrhcws,brcsnd->brhcwnd", weights.unflatten(2, q.shape[1:5]), v)
    indices = None
    if grid != (1, 1):
        indices = positions[:, :, None, :, None].expand(*q.shape[:5], -1).flatten(1, 4)  # [B, N, S]
    return output.flatten(3, 4).flatten(1, 2), weights, indices


def _split(x: Tensor, grid: Grid) -> Tensor:
    """[B, H, W, ...] -> view [B, rows, H / rows, columns, W / columns, ...]"""
    return x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))


def _by_region(x: Tensor, grid: Grid) -> Tensor:
    """[B, H, W, ...] -> [B, R, T, ...]"""
    return _split(x, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _positions(x: Tensor, grid: Grid) -> Tensor:
    """Flat positions, in a map of the size of x, of the tokens of each region: [R, T]"""
    h, w = x.shape[1:3]
    return _by_region(torch.arange(h * w, device=x.device).view(1, h, w), grid)[0]


def _torch(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    if grid == (1, 1) and route_weights is None:
        return _fused(*(x.flatten(1, 2) for x in (q, k, v)), scale).unflatten(1, q.shape[1:3])
    if torch.compiler.is_compiling():
        return _attend(q, k, v, routes, route_weights, grid, scale).flatten(3, 4).flatten(1, 2)
    return _Chunked.apply(q, k, v, routes, route_weights, grid, scale)


class _Chunked(torch.autograd.Function):
    """`_attend`, chunk by chunk of the map, and once more in backward, so that no selected key or logit is kept."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, grid, scale = arguments
        ctx.save_for_backward(*tensors)
        ctx.parameters = grid, scale
        q, _, v = tensors[:3]
        output = q.new_empty(*q.shape[:4], v.shape[4])
        for places in _chunks(*tensors, grid):
            chunk = _attend(*_take(tensors, places), grid, scale)
            output[places[0]].view(chunk.shape).copy_(chunk)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        totals = [x.new_zeros(x.shape) if need else None for x, need in zip(tensors, needed, strict=False)]
        for places in _chunks(*tensors, ctx.parameters[0]):
            chunk = [x if x is None else x.detach() for x in _take(tensors, places)]
            inputs = [x.requires_grad_() for x, total in zip(chunk, totals, strict=True) if total is not None]
            with torch.enable_grad():
                output = _attend(*chunk, *ctx.parameters)
            sums = [x for x in _take(totals, places) if x is not None]
            parts = torch.autograd.grad(output, inputs, gradient[places[0]].reshape(output.shape))
            for total, part in zip(sums, parts, strict=True):
                total += part
        return *totals, None, None


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid
) -> Iterator[Sequence[tuple[slice, ...]]]:
    """Where chunks of CHUNK_BYTES lie in the five tensors: some images, or a band of region rows of one."""
    rows, columns = grid
    height, heads = q.shape[1] // rows, q.shape[3]
    tokens = height * q.shape[2] // columns
    keys = routes.shape[2] * (k.shape[1] // rows) * (k.shape[2] // columns)
    logits = heads * min(tokens * keys, SMALL_LOGITS)
    row_bytes = columns * (keys * heads * (k.shape[4] + v.shape[4]) + logits) * q.element_size()
    fit = CHUNK_BYTES.get(q.device.type, 2**28) // row_bytes  # rows of regions
    images, band = max(1, fit // rows), min(rows, max(1, fit))
    for i in range(0, len(q), images):
        for row in range(0, rows, band):
            whole = (slice(i, i + images),)
            regions = (*whole, slice(row * columns, (row + band) * columns))
            yield (*whole, slice(row * height, (row + band) * height)), whole, whole, regions, regions


def _take(tensors: Sequence[Tensor | None], places: Sequence[tuple[slice, ...]]) -> list[Tensor | None]:
    return [x if x is None else x[place] for x, place in zip(tensors, places, strict=True)]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid, scale: float
) -> Tensor:
    """Attention of a band of region rows (q and its routes; it may be the whole map) to a map (k and v, and its grid).

    Returns the band as [B, rows of the band, h, columns, w, heads, dim]. Keys are selected, but where the routed
    regions are a large part of a small map they are masked; CPU, batch 8, 8 heads, forward + backward in ms:
        14 x 14 map, 7 x 7 regions, one core:   topk 2: 24 selected, 32 masked; topk 8: 32, 32; topk 16: 53, 32
        32 x 32 map, 8 x 8 regions, two cores (batch 2):   topk 16: 67 selected, 93 masked
    """
    band = (routes.shape[1] // grid[1], grid[1])
    split = _split(q, band).shape[1:5]
    many = 4 * routes.shape[2] >= grid[0] * grid[1] and k.shape[1] * k.shape[2] <= MASKED_TOKENS
    if many and route_weights is None:
        mask = _mask(routes, split, _split(k, grid).shape[1:5], q.dtype)
        return _fused(*(x.flatten(1, 2) for x in (q, k, v)), scale, mask).unflatten(1, split)
    k, v = _select(k, v, routes, route_weights, grid)
    q = _by_region(q, band).flatten(0, 1)
    small = q.device.type == "cpu" and q.shape[1] * k.shape[1] <= SMALL_LOGITS
    output = _separate(q, k, v, scale) if small else _fused(q, k, v, scale)
    return output.unflatten(1, split[1::2]).unflatten(0, (-1, *band)).transpose(2, 3)


def _select(k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """The tokens of the routed regions, times the weights of the routes: two of [B * R, S, heads, dim]."""
    b, regions, topk = routes.shape
    tokens = _positions(k, grid).index_select(0, routes.flatten()).view(b, -1)  # [B, R * S]
    tokens = (tokens + k.shape[1] * k.shape[2] * torch.arange(b, device=k.device)[:, None]).flatten()
    k, v = (x.flatten(0, 2).flatten(1).index_select(0, tokens).unflatten(1, x.shape[3:]) for x in (k, v))
    if route_weights is not None:
        weights = route_weights.flatten()[:, None, None, None]
        k, v = ((x.unflatten(0, (b * regions * topk, -1)) * weights).flatten(0, 1) for x in (k, v))
    return tuple(x.unflatten(0, (b * regions, -1)) for x in (k, v))


def _mask(routes: Tensor, split_q: Sequence[int], split_k: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[B, 1, N, N], the logarithm of how often the key's region is among the routes of the query's: -inf for never."""
    regions = torch.arange(split_k[0] * split_k[2], device=routes.device)
    mask = (routes[..., None] == regions).sum(2).to(dtype).log()  # [B, R, R]
    mask = mask.unflatten(2, (split_k[0], 1, split_k[2], 1)).unflatten(1, (split_q[0], 1, split_q[2], 1))
    return mask.expand(-1, *split_q, *split_k).flatten(5, 8).flatten(1, 4).unsqueeze(1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, queries, heads, dim] to [B, keys, heads, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def _separate(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As `_fused`, in matmuls of one head at a time, which read their operands where they lie."""
    heads, zero = zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True), q.new_zeros(1, 1, 1)
    weights = [(torch.baddbmm(zero, a, b.mT, beta=0, alpha=scale).softmax(-1), c) for a, b, c in heads]
    return torch.stack([torch.bmm(a, c) for a, c in weights], 2)


def _top_regions(q: Tensor, k: Tensor, grid: Grid, topk: int) -> Tensor:
    """The routes of the paper: for each region the topk regions with the largest product of mean q and mean k."""
    dtype = precise(q)
    # The mean over one axis, then the other: on a CPU four times faster than over both at once.
    q, k = (_split(x.detach(), grid).mean(4, dtype=dtype).mean(2).flatten(3).flatten(1, 2) for x in (q, k))
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
    return dispatch("routing", backend, _reference, _torch, q, k, v, routes, route_weights, grid, scale)


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
        if (
            routes.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and ((routes < 0) | (routes >= count)).any()
        ):
            raise ValueError(f"routes has values from {routes.min()} to {routes.max()}: expected 0 to {count - 1}")
    if route_weights is not None:
        if routes is None:
            raise ValueError("route_weights was given without routes: expected both, in the same order")
        check_tensor("route_weights", route_weights, (q.shape[0], count, topk), q)
    return grid
