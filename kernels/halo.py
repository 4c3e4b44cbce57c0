"""Halo attention: blocks of queries attend to the keys of their block and of a halo around it.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021,
https://arxiv.org/abs/2103.12731.

Sizes in comments: B images, N queries of a map, T blocks, Q queries of a block, side = block_size + 2 * halo_size, K =
side ** 2 keys of a block, R = 2 * side - 1 rows of a table, b images and t blocks of a chunk.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import check_int, check_maps, check_tensor, precise
from visionattn.kernels._dispatch import dispatch

__all__ = ["halo_attention"]

CHUNK = 8 * 2**20  # bytes that the blocks computed at a time may take: they stay in a CPU's cache
KEEP = 32 * 2**20  # bytes of weights up to which backward finds them kept instead of computing them again


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
    axes = _axes(q, k, block_size, halo_size)
    positions = [torch.arange(length, device=q.device) for length in q.shape[1:3]]
    per_block = [axis.queries.shape[1] for axis in axes]
    keys = [axis.keys[x // n] for axis, x, n in zip(axes, positions, per_block, strict=True)]  # [H or W, side]
    rows, columns = (axis.rows[x % n] for axis, x, n in zip(axes, positions, per_block, strict=True))
    indices, outside = _combine(*keys, k.shape[1:3])
    logits = torch.einsum("bnhd,bnkhd->bhnk", q.flatten(1, 2) * scale, _zero(k.flatten(1, 2)[:, indices], outside))
    side = rows.shape[1]
    logits = logits.view(*logits.shape[:2], *q.shape[1:3], side, side)  # [B, heads, H, W, side, side]
    if rel_height is not None:
        logits = logits + torch.einsum("byxhd,yud->bhyxu", q, rel_height[rows])[..., :, None]
    if rel_width is not None:
        logits = logits + torch.einsum("byxhd,xwd->bhyxw", q, rel_width[columns])[..., None, :]
    logits = logits.flatten(4).flatten(2, 3)
    weights = logits.softmax(-1).masked_fill(outside, 0)  # what is missing to 1 goes to values of zero
    output = torch.einsum("bhnk,bnkhd->bnhd", weights, v.flatten(1, 2)[:, indices]).unflatten(1, q.shape[1:3])
    if return_lse:
        output = output, logits.to(precise(q)).logsumexp(-1).unflatten(-1, q.shape[1:3])
    return output, weights, indices.expand(q.shape[0], -1, -1)


def _zero(x: Tensor, outside: Tensor) -> Tensor:
    """x [..., N, K, heads, dim] with zeros for keys outside of the map."""
    return x.masked_fill(outside[..., None, None], 0)


class _Axis(NamedTuple):
    """One axis cut into n blocks. Positions may lie outside of the map."""

    queries: Tensor  # [n, queries of a block]
    keys: Tensor  # [n, side]
    rows: Tensor  # [queries of a block, side]: rows of the table for a query and its keys


def _axes(q: Tensor, k: Tensor, block_size: int, halo_size: int) -> list[_Axis]:
    step, side = _step(q, k, block_size), block_size + 2 * halo_size
    query, key = torch.arange(block_size // step, device=q.device), torch.arange(side, device=q.device)
    rows = side - 1 + key - query[:, None]
    starts = (torch.arange(0, length, block_size, device=q.device)[:, None] for length in k.shape[1:3])
    return [_Axis(start // step + query, start - halo_size + key, rows) for start in starts]


def _step(q: Tensor, k: Tensor, block_size: int) -> int | None:
    """The least divisor of block_size by which the map of q is coarser than that of k; None if there is none."""
    for step in range(1, block_size + 1):
        sizes = tuple((length + step - 1) // step for length in k.shape[1:3])
        if block_size % step == 0 and sizes == q.shape[1:3]:
            return step
    return None


def _combine(rows: Tensor, columns: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions [n, p] and [m, q] on each axis -> flat positions in a map of `size`, with the nearest in place of those
    outside, and which were outside: both [n * m, p * q]."""
    rows, columns = rows[:, None, :, None], columns[:, None, :]
    outside = (rows < 0) | (rows >= size[0]) | (columns < 0) | (columns >= size[1])
    flat = rows.clamp(0, size[0] - 1) * size[1] + columns.clamp(0, size[1] - 1)
    return tuple(x.flatten(2).flatten(0, 1) for x in (flat, outside))


def _torch(
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
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, tables))
    output, lse, _ = _Halo.apply(q, k, v, tables, block_size, halo_size, scale, return_lse, trained)
    return (output, lse) if return_lse else output


def _tables(*tables: Tensor | None) -> Tensor | None:
    """Both in one, [2, R, D], with zeros for one that was not given."""
    given = [x for x in tables if x is not None]
    return torch.stack([torch.zeros_like(given[0]) if x is None else x for x in tables]) if given else None


class _Chunk(NamedTuple):
    """Blocks to compute together: t blocks of b images."""

    queries: Tensor  # [b, t, Q]: rows of q as (B * N, heads * dim); not all of a block at once where it is large
    spare: Tensor | None  # queries outside of the map, as `_rows_outside` has them
    keys: Tensor  # [b, t, K]: rows of k and v
    outside: Tensor | None  # keys outside of the map
    entries: Tensor  # [Q, 2 * side]: of the products of the chunk's Q queries with both tables, those for their keys


def _chunks(q: Tensor, k: Tensor, block_size: int, halo_size: int) -> Iterator[_Chunk]:
    """All blocks. Traced, a chunk holds all images: their number may be symbolic."""
    height, width = _axes(q, k, block_size, halo_size)
    queries, spare = _combine(height.queries, width.queries, q.shape[1:3])
    keys, outside = _combine(height.keys, width.keys, k.shape[1:3])
    (per_block, per_query), heads = (queries.shape[1], keys.shape[1]), q.shape[3]
    fit = CHUNK // (8 * heads * (per_block * per_query + (per_block + per_query) * q.shape[4]))  # blocks
    tracing = torch.compiler.is_compiling()
    images, step = (q.shape[0], max(1, fit)) if tracing else (max(1, fit), max(1, fit // max(1, q.shape[0])))
    part = max(1, CHUNK // (8 * heads * per_query))  # queries of one block
    entries = _entries(height.rows, width.rows).split(part)
    whole = all(length % axis.queries.shape[1] == 0 for length, axis in zip(q.shape[1:3], (height, width), strict=True))
    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    for first in image.split(images) if not tracing else [image]:
        for start in range(0, len(queries), step):
            blocks = slice(start, start + step)
            rows = first * (k.shape[1] * k.shape[2]) + keys[blocks]
            for i, entry in enumerate(entries):
                places = blocks, slice(i * part, (i + 1) * part)
                yield _Chunk(
                    first * (q.shape[1] * q.shape[2]) + queries[places],
                    None if whole else _rows_outside(spare[places], first),
                    rows,
                    _rows_outside(outside[blocks], first),
                    entry,
                )


def _rows_outside(outside: Tensor, images: Tensor) -> Tensor:
    """[t, Q] -> of the rows (b * t * Q, ...) of some images those outside of the map: their numbers, as which they are
    cleared much faster on a CPU, or, where asking for numbers would wait for a device or break a trace, a bool each."""
    outside = outside.expand(images.shape[0], -1, -1).flatten()
    by_number = outside.device.type == "cpu" and not torch.compiler.is_compiling()
    return outside.nonzero().flatten() if by_number else outside[:, None]


def _entries(height: Tensor, width: Tensor) -> Tensor:
    """Rows of the two tables, one below the other, for each query of a block: [Q, 2 * side]"""
    width = width + (2 * width.shape[1] - 1)
    return torch.cat([height[:, None].expand(-1, len(width), -1), width[None].expand(len(height), -1, -1)], -1).flatten(
        0, 1
    )


def _gather(x: Tensor, rows: Tensor, without: Tensor | None) -> Tensor:
    """(B, H, W, heads, dim), [b, t, Q] -> copy [b, t, heads, Q, dim] with zeros where `without`, at least float32"""
    copy = _clear(x.flatten(0, 2).flatten(1).index_select(0, rows.flatten()), without)
    return copy.to(precise(x)).view(*rows.shape, *x.shape[3:]).transpose(2, 3).contiguous()


def _clear(rows: Tensor, without: Tensor | None) -> Tensor:
    """Zeros, in place, in those of the rows."""
    if without is None:
        return rows
    return rows.masked_fill_(without, 0) if without.dtype == torch.bool else rows.index_fill_(0, without, 0)


def _add(total: Tensor, rows: Tensor, x: Tensor, without: Tensor | None) -> None:
    """Adds [b, t, heads, Q, dim] to the rows of (B, H, W, heads, dim), but where `without`."""
    x = _clear(x.transpose(2, 3).flatten(3).flatten(0, 2), without)
    total.flatten(0, 2).flatten(1).index_add_(0, rows.flatten(), x.to(total.dtype))


def _places(entries: Tensor, rows: int) -> Tensor:
    """The same, in the flat products of all queries of a chunk."""
    return (entries + rows * torch.arange(len(entries), device=entries.device)[:, None]).flatten()


def _logits(q: Tensor, k: Tensor, tables: Tensor | None, entries: Tensor, scale: float) -> Tensor:
    """[b, t, heads, Q, K], of tiles of queries and keys."""
    if tables is None:
        return (q * scale) @ k.mT
    products = (q @ tables.to(q.dtype).T).flatten(-2).flatten(0, 2)
    relative = products.index_select(1, _places(entries, len(tables))).unflatten(1, (q.shape[3], 2, -1))
    logits = (relative[:, :, 0, :, None] + relative[:, :, 1, None]).flatten(2)  # [b * t * heads, Q, K]
    return logits.baddbmm_(q.flatten(0, 2), k.flatten(0, 2).mT, alpha=scale).unflatten(0, q.shape[:3])


def _grad_products(grad_logits: Tensor, entries: Tensor, rows: int) -> Tensor:
    """Gradient of the products of queries with the rows of both tables: [b * t * heads * Q, rows]"""
    side = entries.shape[1] // 2
    grad = grad_logits.flatten(0, 2).unflatten(2, (side, side))  # [b * t * heads, Q, side, side]
    relative = torch.stack([grad.sum(3), grad.sum(2)], 2).flatten(1)
    products = relative.new_zeros(len(relative), len(entries) * rows)
    return products.index_add_(1, _places(entries, rows), relative).view(-1, rows)


def _room(q: Tensor, k: Tensor, block_size: int, halo_size: int) -> Tensor | None:
    """For the weights of all blocks, if KEEP allows."""
    if torch.compiler.is_compiling():
        return None
    height, width = _axes(q, k, block_size, halo_size)
    pairs = height.queries.numel() * width.queries.numel() * height.keys.shape[1] * width.keys.shape[1]
    total, dtype = q.shape[0] * q.shape[3] * pairs, precise(q)
    return q.new_empty(total, dtype=dtype) if total * dtype.itemsize <= KEEP else None


class _Halo(torch.autograd.Function):
    """Chunk by chunk of blocks: rows of q, k and v are copied, then matmul, softmax, matmul."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Tensor | None,
        block_size: int,
        halo_size: int,
        scale: float,
        return_lse: bool,
        trained: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output, lse, and weights if they are kept, chunk after chunk"""
        output = v.new_zeros(*q.shape[:4], v.shape[4])
        lse = q.new_zeros(*q.shape[:4], 1, dtype=precise(q)) if return_lse else None
        kept = _room(q, k, block_size, halo_size) if trained else None
        filled = 0
        for queries, spare, keys, outside, entries in _chunks(q, k, block_size, halo_size):
            logits = _logits(_gather(q, queries, spare), _gather(k, keys, outside), tables, entries, scale)
            room = None if kept is None else kept[filled : filled + logits.numel()].view(logits.shape)
            filled += logits.numel()
            weights = torch.softmax(logits, -1, out=room)
            _add(output, queries, weights @ _gather(v, keys, outside), spare)
            if return_lse:
                _add(lse, queries, logits.logsumexp(-1, keepdim=True), spare)
        return output, lse[..., 0].movedim(-1, 1).contiguous() if return_lse else None, kept

    @staticmethod
    def setup_context(ctx, inputs: tuple, outputs: tuple) -> None:
        q, k, v, tables, *ctx.sizes, ctx.scale, _, _ = inputs
        kept = outputs[2]
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(q, k, v, tables, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor | None, _: None) -> tuple:
        q, k, v, tables, kept = ctx.saved_tensors
        given = [x for x in (q, k, v, tables) if x is not None]
        grads = [torch.zeros(x.shape, dtype=precise(x), device=x.device) for x in given]
        if grad_lse is not None:
            grad_lse = grad_lse.movedim(1, -1)[..., None]
        filled = 0
        for queries, spare, keys, outside, entries in _chunks(q, k, *ctx.sizes):
            q_tile, k_tile = _gather(q, queries, spare), _gather(k, keys, outside)
            if kept is None:
                weights = _logits(q_tile, k_tile, tables, entries, ctx.scale).softmax(-1)
            else:
                shape = *q_tile.shape[:4], k_tile.shape[3]
                weights = kept[filled : filled + math.prod(shape)].view(shape)
                filled += weights.numel()
            grad_tile = _gather(grad, queries, spare)
            _add(grads[2], keys, weights.mT @ grad_tile, outside)
            grad_logits = grad_tile @ _gather(v, keys, outside).mT
            grad_logits = torch._softmax_backward_data(grad_logits, weights, -1, weights.dtype)
            if grad_lse is not None:
                grad_logits.addcmul_(weights, _gather(grad_lse, queries, spare))
            grad_q = (grad_logits @ k_tile).mul_(ctx.scale)
            if tables is not None:
                products = _grad_products(grad_logits, entries, len(tables))
                grad_q += (products @ tables.to(products.dtype)).view(grad_q.shape)
                grads[3] += products.T @ q_tile.flatten(0, 3)
            _add(grads[0], queries, grad_q, spare)
            _add(grads[1], keys, (grad_logits.mT @ q_tile).mul_(ctx.scale), outside)
        grads = [total.to(x.dtype) for total, x in zip(grads, given, strict=True)]
        return *grads, *[None] * (9 - len(grads))


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
    side ** 2) that they belong to. Keys outside of the map have the weight 0 and the position of another; what is
    missing to 1 in a row is their share.
    """
    check_int("block_size", block_size, 1)
    check_int("halo_size", halo_size, 0)
    check_maps(q, k, v)
    if _step(q, k, block_size) is None:
        raise ValueError(
            f"q is a map of {q.shape[1]} x {q.shape[2]} and k of {k.shape[1]} x {k.shape[2]}: expected the same size, "
            f"or for q that of k divided by a divisor of block_size={block_size}, rounded up"
        )
    for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
        if table is not None:
            check_tensor(name, table, (2 * (block_size + 2 * halo_size) - 1, q.shape[4]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch(
        "halo", backend, _reference, _torch, q, k, v, rel_height, rel_width, block_size, halo_size, scale, return_lse
    )
