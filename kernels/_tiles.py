"""Tiles of a map, copied out of it and back, for the forms on a CPU of window, halo and routing attention.

A tile holds some tokens of an image as matmuls want them: [heads, tokens, dim]. Each head of a token is copied as a row
of its own: one pass over memory, where copying whole tokens and transposing the copy were two.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels._check import precise

__all__ = ["Tiles", "as_rows", "cached", "chunks", "join", "map_size", "split"]

T = TypeVar("T")


def as_rows(x: Tensor) -> Tensor:
    """(B, *sizes, heads, dim) -> [B * N, heads, dim], in memory rows of one head each, and tokens a number of such rows
    apart; without a copy for slices of one packed qkv."""
    rows = x.flatten(0, -3)
    (_, heads, dim), (step, row, one) = rows.shape, rows.stride()
    return rows if (row, one) == (dim, 1) and step % dim == 0 and step >= heads * dim else rows.contiguous()


def map_size(x: Tensor) -> tuple[int, ...]:
    """Of (B, *map, heads, dim). Where torch.compile has symbols, their values: it compiles for each size, as the tiles
    depend on it, and takes several times as long over symbols."""
    return tuple(operator.index(length) for length in x.shape[1:-2])


def cached(make: "functools._lru_cache_wrapper[T]", q: Tensor) -> Callable[..., T]:
    """`make`, an lru_cache, or, for a q that is fake, what it wraps: such tensors must not be cached."""
    return make if type(q) is Tensor else make.__wrapped__


def chunks(images: int, tiles: int, fit: int) -> Iterator[tuple[slice, list[slice]]]:
    """Images, and the tiles to compute at a time: all of some images, or some of one, about `fit` together."""
    blocks = split(tiles, fit)
    for image_slice in split(images, fit // tiles):
        yield image_slice, blocks


def split(length: int, step: int) -> list[slice]:
    """Slices of a range, of `step` or at least 1."""
    step = max(1, step)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def join(tiles: list[Tensor], dim: int) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim)


class Tiles:
    """T tiles of Q tokens of a map of N, the same for all images. Its methods cache what they compute from that alone.

    Args:
        tokens: [T, Q], flat positions in the map.
        outside: [T, Q] bool, True for what is outside of the map: zeros when gathered, and never written back.
        length: N.
    """

    def __init__(self, tokens: Tensor, outside: Tensor, length: int) -> None:
        self.tokens, self.outside, self.length = tokens, outside, length
        self._cache: dict = {}

    def gather(self, images: slice, block: slice, *maps: Tensor) -> list[Tensor]:
        """Of maps `as_rows` those tiles: [b, t, heads, Q, dim], at least float32."""
        tiles = self._copies(images, maps, lambda *sizes: self._cached(self._heads, *sizes)[block])
        return [self.clear(tile, block) for tile in tiles]

    def select(self, images: slice, tiles: Tensor, *maps: Tensor) -> list[Tensor]:
        """As `gather`, of each image the K tiles named by each row of `tiles` [b, t, K], next to each other: [b, t,
        heads, K * Q, dim]. For tiles inside of the map."""
        tokens = self.tokens[tiles].flatten(2)
        return self._copies(images, maps, lambda *sizes: _heads(tokens, *sizes))

    def _copies(self, images: slice, maps: Sequence[Tensor], rows: Callable[[int, int], Tensor]) -> list[Tensor]:
        """Of each image the `rows`, [1 or b, t, heads, n], of maps of so many heads, and so many rows from one token to
        the next."""
        copies, indices = [], {}
        for x in maps:
            heads, dim = x.shape[1:]
            x = x[slice(*(None if n is None else n * self.length for n in (images.start, images.stop)))]
            tokens, step = x.shape[0], max(heads, x.stride(0) // dim)
            if step not in indices:
                first = torch.arange(0, tokens * step, self.length * step, device=x.device)
                indices[step] = first[:, None, None, None] + rows(heads, step)
            memory = x.as_strided(((tokens - 1) * step + heads, dim), (dim, 1))
            copy = memory.index_select(0, indices[step].flatten())
            copies.append(copy.view(*indices[step].shape, dim).to(precise(x)))
        return copies

    def clear(self, tiles: Tensor, block: slice) -> Tensor:
        """Zeros, in place, for what is outside of the map in [b, t, heads, Q, dim]."""
        rows = self._cached(self._rows_outside, block.start, block.stop, tiles.shape[2])
        if len(rows):
            per_image = tiles[0].numel() // tiles.shape[4]
            first = torch.arange(0, len(tiles) * per_image, per_image, device=tiles.device)
            tiles.flatten(0, 3).index_fill_(0, (first[:, None] + rows).flatten(), 0)
        return tiles

    def restore(self, target: Tensor, tiles: list[Tensor]) -> None:
        """Writes all tiles of some images, each [b, t, heads, Q, dim], to their contiguous map (b, *sizes, heads, dim),
        of which each token is in one tile."""
        joined = join(tiles, 1)
        first = torch.arange(joined.shape[0], device=joined.device) * (joined[0].numel() // joined.shape[4])
        index = (first[:, None, None] + self._cached(self._slots, joined.shape[2])).flatten()
        rows, target = joined.flatten(0, 3), target.flatten(0, -2)
        if target.dtype == rows.dtype:
            torch.index_select(rows, 0, index, out=target)
        else:
            target.copy_(rows.index_select(0, index))

    def add(self, target: Tensor, tiles: list[Tensor]) -> None:
        """As `restore`, where tokens are in any number of tiles: writes their sums."""
        joined = join(tiles, 1)
        rows, flat = joined.flatten(0, 3), target.flatten(0, -2)
        slots, starts = self._cached(self._bags, joined.shape[2])
        image = torch.arange(len(joined), device=joined.device)[:, None]
        slots = (slots + image * (len(rows) // len(joined))).flatten()
        starts = (starts + image * (len(slots) // len(joined))).flatten()
        flat.copy_(F.embedding_bag(slots, rows, starts, mode="sum"))

    def _cached(self, make: Callable, *arguments: int) -> Any:
        key = make.__name__, *arguments
        if key not in self._cache:
            self._cache[key] = make(*arguments)
        return self._cache[key]

    def _heads(self, heads: int, step: int) -> Tensor:
        return _heads(self.tokens, heads, step)

    def _rows_outside(self, start: int, stop: int, heads: int) -> Tensor:
        """Which of the rows [t, heads, Q] of tiles of an image are outside of the map."""
        return self.outside[start:stop, None].expand(-1, heads, -1).flatten().nonzero().flatten()

    def _slots(self, heads: int) -> Tensor:
        """[N, heads], where in the rows [T, heads, Q] of all tiles of an image each token is."""
        (count, places), device = self.tokens.shape, self.tokens.device
        tokens = self.tokens.masked_fill(self.outside, self.length).flatten()
        slots = torch.zeros(self.length + 1, dtype=torch.int64, device=device)
        slots = slots.index_copy(0, tokens, torch.arange(count * places, device=device))[:-1, None]
        return slots // places * (heads * places) + slots % places + torch.arange(heads, device=device) * places

    def _bags(self, heads: int) -> tuple[Tensor, Tensor]:
        """The rows [T, heads, Q] of all tiles of an image in the order of tokens, and for each head of each token, [N *
        heads], the place of the first of its rows in that order."""
        token = self._heads(heads, heads)
        inside = ~self.outside[:, None].expand_as(token)
        token, rows = token[inside], inside.flatten().nonzero().flatten()
        counts = torch.bincount(token, minlength=self.length * heads)
        return rows[token.argsort(stable=True)], counts.cumsum(0) - counts


def _heads(tokens: Tensor, heads: int, step: int) -> Tensor:
    """[..., heads, Q], where in the rows of an image the heads of tokens [..., Q] are, those `step` rows apart."""
    return tokens[..., None, :] * step + torch.arange(heads, device=tokens.device)[:, None]
