"""Window attention: tokens attend to each other inside windows, cut out of the map or spread over all of it.

Liu et al., Swin Transformer, ICCV 2021, https://arxiv.org/abs/2103.14030 (windows, shifted windows); Wang et al.,
CrossFormer, ICLR 2022, https://arxiv.org/abs/2108.00154 (dilated windows: its long distance attention).

An axis of length L is thought of as padded at its end to n whole windows of w places. Window i holds the positions
i * w + p, or dilated i + p * n, of the places p < w; shifted by s, the positions (i * w + p + s) mod (n * w), and then
positions below s, which wrapped around, and the others do not attend to each other. Padded positions are no keys.

Sizes in comments: B images, N tokens of a map, T windows, Q = K tokens of a window, b images and t windows of a chunk.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import check_maps, check_tensor, known, per_axis, precise
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._function import Function
from visionattn.kernels._plain import attend, crop, exact_lse, keep, together
from visionattn.kernels._tiles import Tiles, as_rows, cached, chunks, join, map_size, split

__all__ = ["window_attention"]

Pair = tuple[int, int]  # along height and width
Geometry = tuple[Pair, Pair, bool]  # window, shift, dilated

# Bytes of logits to compute at a time: with all that is computed from the same tokens they stay in a CPU's cache.
CHUNK = {"forward": 4 * 2**20, "backward": 2 * 2**20}
SMALL = 2**14  # elements of q, up to which what takes a CPU time are operators, not what they do
SAVED = 16 * 2**20  # bytes of weights up to which they are saved for backward: less time than computing them again


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    window: Pair,
    shift: Pair,
    dilated: bool,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    (height, width), device = q.shape[1:3], q.device
    rows, columns = (_keys(*axis, dilated, device) for axis in zip((height, width), window, shift, strict=True))
    place = (rows.place[:, None] * window[1] + columns.place).flatten()  # [N]
    windows = _count(height, window[0]), _count(width, window[1])
    here = (rows.window[:, None] * windows[1] + columns.window).flatten() * math.prod(window) + place
    nowhere = torch.full((math.prod(windows) * math.prod(window),), height * width, device=device)
    tokens = nowhere.scatter(0, here, torch.arange(height * width, device=device))  # positions of windows' places
    tokens = tokens.view(-1, math.prod(window))  # [T, Q]
    indices = (rows.keys[:, None, :, None] * width + columns.keys[:, None]).flatten(2).flatten(0, 1)  # [N, K]
    allowed = (rows.allowed[:, None, :, None] & columns.allowed[:, None]).flatten(2).flatten(0, 1)[None]
    if mask is not None:
        allowed = allowed & mask.flatten(1)[:, indices]
    q_tiles, k_tiles, v_tiles = (F.pad(x.flatten(1, 2), (0, 0, 0, 0, 0, 1))[:, tokens] for x in (q * scale, k, v))
    logits = torch.einsum("btqhd,btkhd->bhtqk", q_tiles, k_tiles)
    if bias is not None:
        logits = logits + bias[:, None]
    logits = logits.flatten(2, 3)[:, :, here].masked_fill(~allowed[:, None], -torch.inf)
    weights = logits.softmax(-1).masked_fill(~allowed.any(-1)[:, None, :, None], 0)
    of_windows = weights[:, :, tokens.clamp(max=height * width - 1)]
    tiles = torch.einsum("bhtqk,btkhd->btqhd", of_windows, v_tiles)
    output = tiles.flatten(1, 2)[:, here].unflatten(1, (height, width))
    if return_lse:
        output = output, logits.to(precise(q)).logsumexp(-1).unflatten(-1, (height, width))
    return output, weights, indices.expand(q.shape[0], -1, -1)


class _Keys(NamedTuple):
    window: Tensor  # [L]: of each position
    place: Tensor  # [L]: of each position in its window
    keys: Tensor  # [L, w]: the positions in its window; its own instead of padded ones
    allowed: Tensor  # [L, w]: whether they are keys of it


def _keys(length: int, window: int, shift: int, dilated: bool, device: torch.device) -> _Keys:
    count = _count(length, window)
    position, places = torch.arange(length, device=device), torch.arange(window, device=device)
    which, place = _where(length, window, shift, dilated, device)
    keys = which[:, None] + places * count if dilated else which[:, None] * window + places
    keys = (keys + shift) % (count * window)
    allowed = (keys < length) & ((keys < shift) == (position < shift)[:, None])
    return _Keys(which, place, torch.where(keys < length, keys, position[:, None]), allowed)


def _where(length: int, window: int, shift: int, dilated: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The window of each position, and its place there: both [L]."""
    count = _count(length, window)
    moved = (torch.arange(length, device=device) - shift) % (count * window)
    return (moved % count, moved // count) if dilated else (moved // window, moved % window)


def _count(length: int, window: int) -> int:
    return 1 if known(length == window) else (length + window - 1) // window


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    window: Pair,
    shift: Pair,
    dilated: bool,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if window == q.shape[1:3] and shift == (0, 0) and bias is None and mask is None and not return_lse:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).unflatten(1, window)
    if q.numel() <= SMALL:
        return _plain(q, k, v, bias, mask, window, shift, dilated, scale, return_lse)
    windows = _windows(q, (window, shift, dilated))
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    saved_weights = _new_weights(q, windows) if trained else None
    output, lse = _Window.run(q, k, v, bias, mask, saved_weights, windows, scale, return_lse)
    return (output, lse) if return_lse else output


@exact_lse
def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    window: Pair,
    shift: Pair,
    dilated: bool,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rolled and padded where it has to be, the map is cut into windows by one permuting copy, and put together again
    by another."""
    geometry = window, shift, dilated
    tiles = together(lambda x: _cut(x, geometry), q, k, v)  # [B, T, heads, Q, dim]
    allowed, empty = _allowed(q, tuple(q.shape[1:3]), geometry), None  # [1, T, 1, Q, Q], or None
    if mask is not None:
        keys = _cut(mask[..., None, None, None], geometry)[0].mT  # [B or 1, T, 1, 1, Q]
        allowed = keys if allowed is None else keys & allowed
        empty = ~allowed.any(-1, keepdim=True)  # queries without any key
        allowed = allowed | empty
    first = 0
    if allowed is not None:
        added = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
        added = added if bias is None else added + bias
        if added.shape[0] == 1:  # for all images: windows join the heads, so that it is not copied for each image
            first, added = 1, added.expand(-1, -1, q.shape[3], -1, -1)
        bias = added.flatten(first, first + 1)
    q_tiles, k_tiles, v_tiles = (tile.flatten(first, first + 1) for tile in tiles)
    output, lse = attend(q_tiles, k_tiles, v_tiles, bias, scale, return_lse)
    output = output.unflatten(first, tiles[0].shape[first : first + 2])
    if empty is not None:
        output = output.masked_fill(empty, 0)
    output = _join(output, q.shape[1:3], geometry)
    if lse is None:
        return output
    lse = lse.unflatten(first, tiles[0].shape[first : first + 2])[..., None]
    if empty is not None:
        lse = lse.masked_fill(empty, -torch.inf)
    return output, _join(lse, q.shape[1:3], geometry)[..., 0].movedim(-1, 1)


def _cut(x: Tensor, geometry: Geometry) -> Tensor:
    """[B, H, W, P, heads, dim] -> [P, B, T, heads, Q, dim], with zeros for what is padded."""
    window, shift, dilated = geometry
    counts = [_count(length, w) for length, w in zip(x.shape[1:3], window, strict=True)]
    below, right = (n * w - length for n, w, length in zip(counts, window, x.shape[1:3], strict=True))
    if not (known(below == 0) and known(right == 0)):
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, right, 0, below))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    if dilated:
        x = x.unflatten(2, (window[1], counts[1])).unflatten(1, (window[0], counts[0])).permute(5, 0, 2, 4, 6, 1, 3, 7)
    else:
        x = x.unflatten(2, (counts[1], window[1])).unflatten(1, (counts[0], window[0])).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.flatten(5, 6).flatten(2, 3)


def _join(x: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
    """[B, T, heads, Q, dim] -> [B, H, W, heads, dim]"""
    window, shift, dilated = geometry
    counts = [_count(length, w) for length, w in zip(size, window, strict=True)]
    x = x.unflatten(3, window).unflatten(1, counts)  # [B, window y, x, heads, place y, x, dim]
    x = x.permute(0, 4, 1, 5, 2, 3, 6) if dilated else x.permute(0, 1, 4, 2, 5, 3, 6)
    x = x.flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll(shift, (1, 2))
    return crop(x, size)


@keep
def _allowed(size: Pair, geometry: Geometry, device: torch.device) -> Tensor | None:
    """Which keys a query of a window may attend to, [1, T, 1, Q, Q]; None where it is all. What is padded attends to
    something, to be dropped."""
    window, shift, dilated = geometry
    whole = [known(_count(length, w) * w == length) for length, w in zip(size, window, strict=True)]
    if all(whole) and not any(shift):
        return None
    axes = zip(size, window, shift, strict=True)
    (_, y_outside, y_wrapped), (_, x_outside, x_wrapped) = (_places(*axis, dilated, device) for axis in axes)
    outside = (y_outside[:, None, :, None] | x_outside[:, None]).flatten(2).flatten(0, 1)
    wrapped = (2 * y_wrapped[:, None, :, None] + 1 * x_wrapped[:, None]).flatten(2).flatten(0, 1)
    allowed = (wrapped[:, :, None] == wrapped[:, None]) & ~outside[:, None]
    return (allowed | ~allowed.any(-1, keepdim=True))[None, :, None]


class _Masks(NamedTuple):
    """Of t windows of one or b images; without `fully_masked` where those queries are all outside of the map."""

    values: Tensor  # [1 or b, t, 1, Q, K]: 0 or -inf, to add to logits
    fully_masked: Tensor | None  # [1 or b, t, 1, Q, 1]: queries without a key; to have finite logits they are given all


class _Windows(NamedTuple):
    """T windows of a map, of Q places; those whose tokens all attend to each other first."""

    unmasked: int  # how many those are
    masks: _Masks | None  # of the others; None where they are large, and made when they are needed
    tiles: Tiles
    wrapped: Tensor  # [T, Q]: 0 to 3: whether the position wrapped around on either axis


def _windows(q: Tensor, geometry: Geometry) -> _Windows:
    return cached(_make_windows, q)(map_size(q), geometry, precise(q), q.device)


@functools.lru_cache(maxsize=16)
def _make_windows(size: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, device: torch.device) -> _Windows:
    window, shift, dilated = geometry
    axes = list(zip(size, window, shift, strict=True))
    (y, y_outside, y_wrapped), (x, x_outside, x_wrapped) = (_places(*axis, dilated, device) for axis in axes)
    y, y_outside, y_wrapped = (rows[:, None, :, None] for rows in (y, y_outside, y_wrapped))
    x, x_outside, x_wrapped = (columns[:, None] for columns in (x, x_outside, x_wrapped))
    grids = y * size[1] + x, y_outside | x_outside, 2 * y_wrapped + x_wrapped  # [windows y, x, window y, x]
    rows, columns = (_unmasked(*axis, dilated) for axis in axes)
    counts = [_count(length, w) for length, w, _ in axes]
    grid = torch.arange(counts[0] * counts[1], device=device).view(counts)
    order = torch.cat([grid[:rows, :columns].flatten(), grid[:rows, columns:].flatten(), grid[rows:].flatten()])
    unmasked, (tokens, outside, wrapped) = rows * columns, (x.flatten(2).flatten(0, 1)[order] for x in grids)
    small = (len(tokens) - unmasked) * tokens.shape[1] ** 2 * dtype.itemsize <= CHUNK["forward"]
    masks = _masks(outside[unmasked:], wrapped[unmasked:], None, dtype) if small else None
    return _Windows(unmasked, masks, Tiles(tokens, outside, size[0] * size[1]), wrapped)


def _places(length: int, window: int, shift: int, dilated: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Position, whether it is padded, and whether it wrapped around, of each place: (windows, places)."""
    padded = _count(length, window) * window
    position = torch.arange(padded, device=device)
    position = position.view(window, -1).T if dilated else position.view(-1, window)
    position = (position + shift) % padded if shift else position
    outside = position >= length
    first = position.masked_fill(outside, padded).amin(1, keepdim=True)
    return torch.where(outside, first, position), outside, position < shift


def _unmasked(length: int, window: int, shift: int, dilated: bool) -> int:
    """How many windows, from the first on, have all their positions in the map and none that wrapped around."""
    if dilated:
        return max(0, length - (window - 1) * _count(length, window))
    return max(0, length - shift) // window


def _masks(outside: Tensor, wrapped: Tensor, keys: Tensor | None, dtype: torch.dtype) -> _Masks:
    """Of windows [t, Q], with those keys allowed: [1 or b, t, Q]"""
    allowed = ((wrapped[:, :, None] == wrapped[:, None]) & ~outside[:, None])[None]
    if keys is not None:
        allowed = allowed & keys[:, :, None]
    fully_masked = ~allowed.any(-1, keepdim=True)
    forbidden = ~(allowed | fully_masked)
    values = torch.zeros_like(forbidden, dtype=dtype).masked_fill_(forbidden, -torch.inf)
    return _Masks(values[:, :, None], None if keys is None else fully_masked[:, :, None])


class _Chunk(NamedTuple):
    """Windows to compute together."""

    block: slice
    q_slices: list[slice]  # of the Q queries, to compute at a time
    start: int  # the first of the windows that `masks` is for
    masks: _Masks


def _chunks(q: Tensor, mask: Tensor | None, windows: _Windows, size: int) -> Iterator[tuple[slice, list[_Chunk]]]:
    """Images, and the chunks that their windows are computed in."""
    (count, places), heads = windows.wrapped.shape, q.shape[3]
    fit = max(1, size // (4 * heads * places))  # queries
    q_slices = split(places, fit)
    for images, blocks in chunks(q.shape[0], count, fit // places):
        yield images, [_chunk(q, mask, windows, images, block, q_slices) for block in blocks]


def _chunk(
    q: Tensor, mask: Tensor | None, windows: _Windows, images: slice, block: slice, q_slices: list[slice]
) -> _Chunk:
    start = 0 if mask is not None else min(max(0, windows.unmasked - block.start), block.stop - block.start)
    rest, keys = slice(block.start + start, block.stop), None
    if mask is None and windows.masks is not None:
        values = windows.masks.values[:, rest.start - windows.unmasked : rest.stop - windows.unmasked]
        return _Chunk(block, q_slices, start, _Masks(values, None))
    if mask is not None:
        keys = (mask if mask.shape[0] == 1 else mask[images]).flatten(1)[:, windows.tiles.tokens[rest]]
    masks = _masks(windows.tiles.outside[rest], windows.wrapped[rest], keys, precise(q))
    return _Chunk(block, q_slices, start, masks)


def _fill(tile: Tensor, chunk: _Chunk, i: slice, value: float) -> Tensor:
    """Sets what belongs to fully masked queries among those of a slice, in place, of [b, t, heads, q, dim]."""
    return tile if chunk.masks.fully_masked is None else tile.masked_fill_(chunk.masks.fully_masked[..., i, :], value)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, chunk: _Chunk, i: slice, scale: float) -> Tensor:
    """[b, t, heads, q, K] of a slice of the queries, and all keys."""
    q = q[:, :, :, i]
    logits = q.new_zeros(()) if bias is None else bias[:, i].to(q.dtype)
    logits = logits.expand(*q.shape[:4], k.shape[3]).clone(memory_format=torch.contiguous_format)
    logits[:, chunk.start :] += chunk.masks.values[..., i, :]
    return logits.flatten(0, 2).baddbmm_(q.flatten(0, 2), k.flatten(0, 2).mT, alpha=scale).view(logits.shape)


class _Window(Function):
    """Chunk by chunk of windows: rows of q, k and v are copied, then matmul, softmax, matmul, and rows copied back; as
    fast as fused attention would be without the copies, in windows of 49 tokens on a CPU."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        saved_weights: Tensor | None,
        windows: _Windows,
        scale: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and lse; writes the weights to `saved_weights`, [B, T, heads, Q, K]."""
        maps = [as_rows(x) for x in (q, k, v)]
        output = torch.empty_like(v, memory_format=torch.contiguous_format)
        lse = q.new_empty(*q.shape[:4], 1, dtype=precise(q)) if return_lse else None
        for images, image_chunks in _chunks(q, mask, windows, CHUNK["forward"]):
            outputs, lses = [], []
            for chunk in image_chunks:
                tile_outputs, tile_lses = [], []
                q_tile, k_tile, v_tile = windows.tiles.gather(images, chunk.block, *maps)
                for i in chunk.q_slices:
                    logits = _logits(q_tile, k_tile, bias, chunk, i, scale)
                    out = None if saved_weights is None else saved_weights[images, chunk.block, :, i]
                    weights = torch.softmax(logits, -1, out=out)
                    tile_outputs.append(_fill(weights @ v_tile, chunk, i, 0))
                    if return_lse:
                        tile_lses.append(_fill(logits.logsumexp(-1, keepdim=True), chunk, i, -torch.inf))
                outputs.append(join(tile_outputs, 3))
                if return_lse:
                    lses.append(join(tile_lses, 3))
            windows.tiles.restore(output[images], outputs)
            if lse is not None:
                windows.tiles.restore(lse[images], lses)
        return output, None if lse is None else lse[..., 0].movedim(-1, 1).contiguous()

    @staticmethod
    def setup_context(ctx, inputs: tuple, outputs: tuple) -> None:
        *tensors, ctx.windows, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor | None) -> tuple:
        (q, k, v, bias, mask, saved_weights), windows = ctx.saved_tensors, ctx.windows
        maps = [as_rows(x) for x in (q, k, v, grad)]
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        grad_bias = torch.zeros_like(bias, dtype=precise(q)) if ctx.needs_input_grad[3] else None
        if grad_lse is not None:
            grad_lse = as_rows(grad_lse.movedim(1, -1)[..., None])
        for images, image_chunks in _chunks(q, mask, windows, CHUNK["backward"]):
            grads_q, grads_k, grads_v = [], [], []
            for chunk in image_chunks:
                q_tile, k_tile, v_tile, grad_tile = windows.tiles.gather(images, chunk.block, *maps)
                _fill(grad_tile, chunk, slice(None), 0)
                grad_q, grad_k, grad_v = [], [], []
                for i in chunk.q_slices:
                    if saved_weights is None:
                        weights = _logits(q_tile, k_tile, bias, chunk, i, ctx.scale).softmax(-1)
                    else:
                        weights = saved_weights[images, chunk.block, :, i]
                    grad_i = grad_tile[:, :, :, i]
                    grad_logits = grad_i @ v_tile.mT
                    grad_logits = torch._softmax_backward_data(grad_logits, weights, -1, weights.dtype)
                    if grad_lse is not None:
                        grad_lse_i = windows.tiles.gather(images, chunk.block, grad_lse)[0][:, :, :, i]
                        grad_logits.addcmul_(weights, _fill(grad_lse_i, chunk, i, 0))
                    if grad_bias is not None:
                        grad_bias[:, i] += grad_logits.sum((0, 1))
                    grad_q.append((grad_logits @ k_tile).mul_(ctx.scale))
                    grad_k.append(grad_logits.mT @ q_tile[:, :, :, i])
                    grad_v.append(weights.mT @ grad_i)
                grads_q.append(join(grad_q, 3))
                grads_k.append(functools.reduce(Tensor.add_, grad_k).mul_(ctx.scale))
                grads_v.append(functools.reduce(Tensor.add_, grad_v))
            for total, tiles in zip(grads, (grads_q, grads_k, grads_v), strict=True):
                windows.tiles.restore(total[images], tiles)
        return *grads, None if grad_bias is None else grad_bias.to(bias.dtype), *[None] * 5


def _new_weights(q: Tensor, windows: _Windows) -> Tensor | None:
    """Empty, for the weights of all windows; None where they take more than SAVED."""
    count, places = windows.wrapped.shape
    shape, dtype = (q.shape[0], count, q.shape[3], places, places), precise(q)
    return q.new_empty(shape, dtype=dtype) if math.prod(shape) * dtype.itemsize <= SAVED else None


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    dilated: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    dilated: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    dilated: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each token to the tokens of its window.

    The map may have any size: it is thought of as padded at the bottom and right to whole windows, and what is padded
    is no key of any query (a window larger than the map holds all of it).

    Args:
        q: (B, H, W, heads, head_dim) queries, any strides.
        k: (B, H, W, heads, head_dim) keys.
        v: (B, H, W, heads, value_dim) values.
        window_size: tokens of a window on a side, or (height, width).
        shift: 0 to window_size - 1, or (down, right): the windows start that many tokens further down and right. What
            is before the first of them joins the last windows, where it attends to itself only (Swin's cyclic shift).
        dilated: a window takes its tokens at equal steps from the whole map, as many tokens apart as there are windows
            on the axis (CrossFormer's long distance attention); without `shift`.
        bias: (heads, tokens of a window, the same), added to the logits: of each query (first) and key, row-major.
        mask: (B or 1, H, W) bool, False where a token is no key. A query without any key yields 0, and -inf as lse.
        scale: factor of q . k, by default head_dim ** -0.5.
        return_lse: also return the log-sum-exp of each query's logits, to merge this with attention to other keys.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        (B, H, W, heads, value_dim) in the dtype of q, or that of autocast; with `return_lse` also (B, heads, H, W) in
        float32 (float64 for float64). Their gradients can be taken once.

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot run.

    `record_attention` keeps weights (B, heads, H * W, tokens of a window) and the flat positions of those tokens (B,
    H * W, tokens of a window); padded ones have the weight 0 and the position of another.
    """
    window, shift = _check(q, k, v, window_size, shift, dilated)
    tokens = window[0] * window[1]
    if bias is not None:
        check_tensor("bias", bias, (q.shape[3], tokens, tokens), q)
    if mask is not None:
        images = 1 if mask.shape[:1] == (1,) else q.shape[0]
        check_tensor("mask", mask, (images, *q.shape[1:3]), q, torch.bool)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forms = Forms(_reference, _on_cpu, _plain)
    return dispatch("window", backend, forms, q, k, v, bias, mask, window, shift, dilated, scale, return_lse)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int],
    dilated: bool,
) -> tuple[Pair, Pair]:
    """Raises ValueError for arguments that do not fit together; returns window and shift as pairs."""
    height, width = per_axis("window_size", window_size, 2)
    down, right = per_axis("shift", shift, 2, least=0)
    if down >= height or right >= width:
        raise ValueError(f"shift={shift}: expected less than window_size={window_size}")
    if dilated and (down or right):
        raise ValueError(f"shift={shift} with dilated=True: expected one of them; dilated windows cannot be shifted")
    check_maps(q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"k is of {tuple(k.shape)}: expected the shape of q, {tuple(q.shape)}")
    return (height, width), (down, right)
