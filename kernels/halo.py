"""Halo attention: blocks of queries attend to the keys of their block and of a halo around it.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021,
https://arxiv.org/abs/2103.12731.

Sizes in comments: B images, N queries of a map, T blocks, Q queries of a block, side = block_size + 2 * halo_size, K =
side ** 2 keys of a block, R = 2 * side - 1 rows of a table, b images and t blocks of a chunk.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import check_int, check_maps, check_tensor, known, precise
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._function import Function
from visionattn.kernels._plain import attend, crop, exact_lse, together
from visionattn.kernels._tiles import Tiles, as_rows, cached, chunks, join, map_size, split

__all__ = ["halo_attention"]

Size = tuple[int, ...]  # of a map: height and width

CHUNK = 16 * 2**20  # bytes that the blocks computed at a time may take: of 4 to 32 MiB about the fastest on a CPU
SAVED = 32 * 2**20  # bytes of weights up to which they are saved for backward instead of computed again


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    axes = _axes(q.shape[1:3], k.shape[1:3], block_size, halo_size, q.device)
    positions = [torch.arange(length, device=q.device) for length in q.shape[1:3]]
    per_block = [axis.queries.shape[1] for axis in axes]
    key_rows, key_columns = (axis.keys[x // n] for axis, x, n in zip(axes, positions, per_block, strict=True))
    rows, columns = (axis.rows[x % n] for axis, x, n in zip(axes, positions, per_block, strict=True))
    indices, outside = _combine(key_rows, key_columns, k.shape[1:3])  # [H * W, side ** 2]
    logits = torch.einsum("bnhd,bnkhd->bhnk", q.flatten(1, 2) * scale, _zero(k.flatten(1, 2)[:, indices], outside))
    side = rows.shape[1]
    logits = logits.view(*logits.shape[:2], *q.shape[1:3], side, side)  # [B, heads, H, W, side, side]
    if rel_height is not None:
        logits = logits + torch.einsum("byxhd,yud->bhyxu", q, rel_height[rows])[..., :, None]
    if rel_width is not None:
        logits = logits + torch.einsum("byxhd,xwd->bhyxw", q, rel_width[columns])[..., None, :]
    logits = logits.flatten(4).flatten(2, 3)
    weights = logits.softmax(-1)
    values = _zero(v.flatten(1, 2)[:, indices], outside)
    output = torch.einsum("bhnk,bnkhd->bnhd", weights, values).unflatten(1, q.shape[1:3])
    if return_lse:
        output = output, logits.to(precise(q)).logsumexp(-1).unflatten(-1, q.shape[1:3])
    return output, weights, indices.where(~outside, -1).expand(q.shape[0], -1, -1)


def _zero(x: Tensor, outside: Tensor) -> Tensor:
    """x [..., N, K, heads, dim] with zeros for keys outside of the map."""
    return x.masked_fill(outside[..., None, None], 0)


class _Axis(NamedTuple):
    """One axis cut into n blocks. Positions may lie outside of the map."""

    queries: Tensor  # [n, queries of a block]
    keys: Tensor  # [n, side]
    rows: Tensor  # [queries of a block, side]: rows of the table for a query and its keys


def _axes(size: Size, size_of_keys: Size, block_size: int, halo_size: int, device: torch.device) -> list[_Axis]:
    step, side = _step(size, size_of_keys, block_size), block_size + 2 * halo_size
    query, key = torch.arange(block_size // step, device=device), torch.arange(side, device=device)
    rows = side - 1 + key - query[:, None]
    starts = (torch.arange(0, length, block_size, device=device)[:, None] for length in size_of_keys)
    return [_Axis(start // step + query, start - halo_size + key, rows) for start in starts]


def _step(size: Size, size_of_keys: Size, block_size: int) -> int:
    """The least divisor of block_size by which the map of q is coarser than that of k; 0 if there is none."""
    for step in range(1, block_size + 1):
        sizes = tuple((length + step - 1) // step for length in size_of_keys)
        if block_size % step == 0 and sizes == size:
            return step
    return 0


def _combine(rows: Tensor, columns: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Positions [n, p] and [m, q] on each axis -> flat positions in a map of `size`, with the nearest in place of those
    outside, and which were outside: both [n * m, p * q]."""
    rows, columns = rows[:, None, :, None], columns[:, None, :]
    outside = (rows < 0) | (rows >= size[0]) | (columns < 0) | (columns >= size[1])
    flat = rows.clamp(0, size[0] - 1) * size[1] + columns.clamp(0, size[1] - 1)
    return flat.flatten(2).flatten(0, 1), outside.flatten(2).flatten(0, 1)


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    tables = _tables(rel_height, rel_width)
    tables = None if tables is None else tables.flatten(0, 1)
    blocks = _blocks(q, k, block_size, halo_size)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, tables))
    saved_weights = _new_weights(q, blocks) if trained else None
    output, lse = _Halo.run(q, k, v, tables, saved_weights, blocks, scale, return_lse)
    return (output, lse) if return_lse else output


@exact_lse
def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    block_size: int,
    halo_size: int,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Keys and values by one copy of a view of the padded map; logits by the tables as what is added to the others."""
    counts = [(length + block_size - 1) // block_size for length in k.shape[1:3]]
    side, width = block_size + 2 * halo_size, block_size // _step(q.shape[1:3], k.shape[1:3], block_size)

    def blocks(x: Tensor) -> Tensor:
        below, right = (n * block_size - length + halo_size for n, length in zip(counts, x.shape[1:3], strict=True))
        x = F.pad(x, (0, 0, 0, 0, 0, 0, halo_size, right, halo_size, below))
        x = x.unfold(1, side, block_size).unfold(2, side, block_size)  # [B, blocks y, x, P, heads, dim, y, x]
        return x.permute(3, 0, 1, 2, 4, 6, 7, 5).flatten(5, 6).flatten(1, 3)  # [P, B * T, heads, K, dim]

    k, v = together(blocks, k, v)
    below, right = (n * width - length for n, length in zip(counts, q.shape[1:3], strict=True))
    batch, *size = q.shape[:3]
    if not (known(below == 0) and known(right == 0)):
        q = F.pad(q, (0, 0, 0, 0, 0, right, 0, below))
    q = q.unflatten(2, (-1, width)).unflatten(1, (-1, width)).permute(0, 1, 3, 5, 2, 4, 6)
    q = q.flatten(4, 5).flatten(0, 2)  # [B * T, heads, Q, dim]
    tables, bias = _tables(rel_height, rel_width), None
    if tables is not None:
        bias = _Distances.run(q @ tables.flatten(0, 1).T, width, side)
    output, lse = attend(q, k, v, bias, scale, return_lse)

    def join(x: Tensor) -> Tensor:
        x = x.unflatten(2, (width, width)).unflatten(0, (batch, *counts)).permute(0, 1, 4, 2, 5, 3, 6)
        return crop(x.flatten(3, 4).flatten(1, 2), size)

    return join(output) if lse is None else (join(output), join(lse[..., None])[..., 0].movedim(-1, 1))


class _Distances(Function):
    """Of products [n, heads, Q, 2 * R] of queries with the rows of both tables the sums for their keys: [n, heads, Q,
    K], in rows that fused attention can read."""

    @staticmethod
    def forward(products: Tensor, width: int, side: int) -> Tensor:
        down, across = _relative(products.flatten(0, 1), 0, width, side)
        if torch.compiler.is_compiling():
            return (down[..., :, None] + across[..., None, :]).view(*products.shape[:3], side**2)
        sums = products.new_empty(*products.shape[:3], (side**2 + 7) // 8 * 8)[..., : side**2]
        sums.view(*down.shape, side).copy_(down[..., :, None]).add_(across[..., None, :])
        return sums

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        products, ctx.width, ctx.side = inputs
        ctx.rows = products.shape[3]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        shape = *grad.shape[:3], ctx.rows
        return _grad_distances(grad.flatten(0, 1), ctx.rows, ctx.width, ctx.side).view(shape), None, None


def _tables(*tables: Tensor | None) -> Tensor | None:
    """Both in one, [2, R, D], with zeros for one that was not given."""
    like = next((x for x in tables if x is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if x is None else x for x in tables])


class _Blocks(NamedTuple):
    """T blocks of a map, of width ** 2 = Q queries and side ** 2 = K keys."""

    queries: Tiles
    keys: Tiles
    width: int
    side: int


def _blocks(q: Tensor, k: Tensor, block_size: int, halo_size: int) -> _Blocks:
    return cached(_make_blocks, q)(map_size(q), map_size(k), block_size, halo_size, q.device)


@functools.lru_cache(maxsize=16)
def _make_blocks(size: Size, size_of_keys: Size, block_size: int, halo_size: int, device: torch.device) -> _Blocks:
    y, x = _axes(size, size_of_keys, block_size, halo_size, device)
    queries = Tiles(*_combine(y.queries, x.queries, size), math.prod(size))
    keys = Tiles(*_combine(y.keys, x.keys, size_of_keys), math.prod(size_of_keys))
    return _Blocks(queries, keys, y.queries.shape[1], y.keys.shape[1])


def _chunks(q: Tensor, blocks: _Blocks) -> Iterator[tuple[slice, list[slice], list[slice]]]:
    """Images, blocks to compute at a time, and the rows of queries of a block to compute at a time."""
    (count, queries), heads, dim = blocks.queries.tokens.shape, q.shape[3], q.shape[4]
    fit = CHUNK // (8 * heads * (queries * blocks.side**2 + (queries + blocks.side**2) * dim))
    rows = CHUNK // (8 * heads * blocks.width * blocks.side**2)
    row_slices = split(blocks.width, rows)
    for images, block_slices in chunks(q.shape[0], count, fit):
        yield images, block_slices, row_slices


def _relative(products: Tensor, first: int, width: int, side: int) -> list[Tensor]:
    """Of products [n, q, 2 * R] of the queries of some rows of blocks, from the first on, with the rows of both tables
    those for their keys, for the vertical and the horizontal distance, as views [n, rows, width, side]."""
    n, queries, both = products.shape
    size, row = (n, queries // width, width, side), width * both
    return [
        products.as_strided(size, (queries * both, row - 1, both, 1), side - 1 - first),
        products.as_strided(size, (queries * both, row, both - 1, 1), both // 2 + side - 1),
    ]


def _logits(q: Tensor, k: Tensor, tables: Tensor | None, first: int, blocks: _Blocks, scale: float) -> Tensor:
    """[b, t, heads, q, K], of the queries [b, t, heads, q, dim] of some rows of blocks, from the first on."""
    shape, (q, k) = (*q.shape[:4], k.shape[3]), (x.flatten(0, 2) for x in (q, k))
    if tables is None:
        return torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=scale).view(shape)
    down, across = _relative(q @ tables.to(q.dtype).T, first, blocks.width, blocks.side)
    logits = (down[..., :, None] + across[..., None, :]).flatten(3).flatten(1, 2)
    return logits.baddbmm_(q, k.mT, alpha=scale).view(shape)


def _grad_distances(grad: Tensor, rows: int, width: int, side: int, first: int = 0) -> Tensor:
    """Of logits [n, q, K] -> gradient of the products of queries with so many rows of both tables: [n, q, rows]"""
    products = grad.new_zeros(*grad.shape[:2], rows)
    grad = grad.reshape(-1, grad.shape[1] // width, width, side, side)
    down, across = _relative(products, first, width, side)
    down.copy_(grad.sum(4))
    across.copy_(grad.sum(3))
    return products


def _new_weights(q: Tensor, blocks: _Blocks) -> Tensor | None:
    """Empty, for the weights of all blocks; None where they take more than SAVED."""
    count, queries = blocks.queries.tokens.shape
    shape, dtype = (q.shape[0], count, q.shape[3], queries, blocks.side**2), precise(q)
    return q.new_empty(shape, dtype=dtype) if math.prod(shape) * dtype.itemsize <= SAVED else None


class _Halo(Function):
    """Chunk by chunk of blocks: rows of q, k and v are copied, then matmul, softmax, matmul."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Tensor | None,
        saved_weights: Tensor | None,
        blocks: _Blocks,
        scale: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and lse; writes the weights to `saved_weights`, [B, T, heads, Q, K]."""
        output = v.new_empty(*q.shape[:4], v.shape[4])
        lse = q.new_empty(*q.shape[:4], 1, dtype=precise(q)) if return_lse else None
        maps = [as_rows(x) for x in (q, k, v)]
        for images, block_slices, row_slices in _chunks(q, blocks):
            outputs, lses = [], []
            for block in block_slices:
                tile_outputs, tile_lses = [], []
                (q_tile,) = blocks.queries.gather(images, block, maps[0])
                k_tile, v_tile = blocks.keys.gather(images, block, *maps[1:])
                for rows in row_slices:
                    i = slice(rows.start * blocks.width, rows.stop * blocks.width)
                    logits = _logits(q_tile[..., i, :], k_tile, tables, rows.start, blocks, scale)
                    weights = torch.softmax(
                        logits, -1, out=None if saved_weights is None else saved_weights[images, block, :, i]
                    )
                    tile_outputs.append(weights @ v_tile)
                    if return_lse:
                        tile_lses.append(logits.logsumexp(-1, keepdim=True))
                outputs.append(join(tile_outputs, 3))
                if return_lse:
                    lses.append(join(tile_lses, 3))
            blocks.queries.restore(output[images], outputs)
            if lse is not None:
                blocks.queries.restore(lse[images], lses)
        return output, None if lse is None else lse[..., 0].movedim(-1, 1).contiguous()

    @staticmethod
    def setup_context(ctx, inputs: tuple, outputs: tuple) -> None:
        *tensors, ctx.blocks, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor | None) -> tuple:
        (q, k, v, tables, saved_weights), blocks = ctx.saved_tensors, ctx.blocks
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        grad_tables = None if tables is None else torch.zeros_like(tables, dtype=precise(q))
        maps = [as_rows(x) for x in (q, grad, k, v)]
        if grad_lse is not None:
            grad_lse = as_rows(grad_lse.movedim(1, -1)[..., None])
        for images, block_slices, row_slices in _chunks(q, blocks):
            grads_q, grads_k, grads_v = [], [], []
            for block in block_slices:
                q_tile, grad_tile = blocks.queries.gather(images, block, *maps[:2])
                k_tile, v_tile = blocks.keys.gather(images, block, *maps[2:])
                grad_q, grad_k, grad_v = [], [], []
                for rows in row_slices:
                    i = slice(rows.start * blocks.width, rows.stop * blocks.width)
                    q_i, grad_i = q_tile[..., i, :], grad_tile[..., i, :]
                    if saved_weights is None:
                        weights = _logits(q_i, k_tile, tables, rows.start, blocks, ctx.scale).softmax(-1)
                    else:
                        weights = saved_weights[images, block, :, i]
                    grad_v.append(weights.mT @ grad_i)
                    grad_logits = grad_i @ v_tile.mT
                    grad_logits = torch._softmax_backward_data(grad_logits, weights, -1, weights.dtype)
                    if grad_lse is not None:
                        (lse_tile,) = blocks.queries.gather(images, block, grad_lse)
                        grad_logits.addcmul_(weights, lse_tile[..., i, :])
                    grad_q.append((grad_logits @ k_tile).mul_(ctx.scale))
                    grad_k.append((grad_logits.mT @ q_i).mul_(ctx.scale))
                    if grad_tables is not None:
                        flat, sizes = grad_logits.flatten(0, 2), (len(tables), blocks.width, blocks.side)
                        products = _grad_distances(flat, *sizes, rows.start)
                        grad_q[-1] += (products @ tables.to(products.dtype)).view(grad_q[-1].shape)
                        grad_tables += products.flatten(0, 1).T @ q_i.flatten(0, 3)
                grads_q.append(join(grad_q, 3))
                grads_k.append(functools.reduce(Tensor.add_, grad_k))
                grads_v.append(functools.reduce(Tensor.add_, grad_v))
            blocks.queries.restore(grads[0][images], grads_q)
            blocks.keys.add(grads[1][images], grads_k)
            blocks.keys.add(grads[2][images], grads_v)
        return *grads, None if grad_tables is None else grad_tables.to(tables.dtype), *[None] * 4


@overload
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the queries of each block to the keys of the block and of `halo_size` positions on all sides of it.

    The map may have any size: blocks are counted from its first row and column, and the last may hold fewer queries.
    Keys and values outside of the map are zeros that take part in the softmax, as in HaloNet.

    Args:
        q: (B, H, W, heads, head_dim) queries, any strides. Their map may be coarser than that of the keys: (ceil(H' /
            step), ceil(W' / step)) for a step that divides block_size; a block then has block_size / step queries a
            side.
        k: (B, H', W', heads, head_dim) keys.
        v: (B, H', W', heads, value_dim) values.
        block_size: keys of a block on a side, without the halo; at least 1.
        halo_size: keys around a block on each side; at least 0.
        rel_height: (2 * side - 1, head_dim), side = block_size + 2 * halo_size: query number i and key number j from
            the top of their block, the key's including the halo, get q . rel_height[side - 1 + j - i], not scaled,
            added to their logit.
        rel_width: the same for their places from the left.
        scale: factor of q . k, by default head_dim ** -0.5.
        return_lse: also return the log-sum-exp of each query's logits, to merge this with attention to other keys.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        (B, H, W, heads, value_dim) in the dtype of q, or that of autocast; with `return_lse` also (B, heads, H, W) in
        float32 (float64 for float64). Their gradients can be taken once.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot run.

    `record_attention` keeps weights (B, heads, H * W, side ** 2) and the flat positions in the map of keys (B, H * W,
    side ** 2) that they belong to, -1 for the zeros outside of the map.
    """
    check_int("block_size", block_size, 1)
    check_int("halo_size", halo_size, 0)
    check_maps(q, k, v)
    if _step(q.shape[1:3], k.shape[1:3], block_size) == 0:
        raise ValueError(
            f"q is a map of {q.shape[1]} x {q.shape[2]} and k of {k.shape[1]} x {k.shape[2]}: expected the same size, "
            f"or for q that of k divided by a divisor of block_size={block_size}, rounded up"
        )
    for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
        if table is not None:
            check_tensor(name, table, (2 * (block_size + 2 * halo_size) - 1, q.shape[4]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forms = Forms(_reference, _on_cpu, _plain)
    return dispatch("halo", backend, forms, q, k, v, rel_height, rel_width, block_size, halo_size, scale, return_lse)
