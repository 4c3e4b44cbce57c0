"""Keeps the attention weights that a model computes, for explanation: of our kernels, and of timm's attention layers.

What a kernel records is placed on the map of its layer: sequences of tokens are laid out by the size of the image, and
layers that pad their map, or cut it into regions, say so by `place`.
"""

import ctypes
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

__all__ = [
    "Attention",
    "active",
    "attention_in_backward",
    "in_strips",
    "keep",
    "place",
    "record_attention",
    "recorded",
    "repeatable",
]

STRIDES = (16, 8, 32, 14, 4, 2, 64, 28, 7, 1)  # pixels of a token, by which sequences of tokens are laid out
PREFIX = 9  # class tokens and registers, less than
CHUNK = 2**22  # weights at a time
LARGE = 2**12  # queries from which heads, and rows of the map, are computed one by one where memory is short
Size = tuple[int, ...]


class Attention(NamedTuple):
    """Attention weights of one call of a kernel, or of an attention layer of timm's.

    Rows sum to 1, but for talking heads, which mix the weights of heads. What a row gives to places outside of the
    picture (the zero padding of halo and outlook attention, tokens that a layer pads its map with) stands at index -1.

    Attributes:
        weights: (B, heads, N, K), of query n to key k. After backward, `weights.grad` is their gradient.
        indices: (B, N, K), the key that each weight belongs to: `prefix` tokens without a place, then the places of
            `keys` in row-major order, then those of `pooled`; -1: outside of the picture. None: all keys, in order.
        pattern: the kernel, such as "window"; "softmax" of a layer of timm's.
        kind: "space": places attend to places. "class": class tokens do, and are the rows. "channel": channels attend
            to channels, which have no place: N = K = channels of a group, and `queries` and `keys` are ().
        queries: (H, W) of the map of the queries; () where the layer does not say it.
        keys: (H, W) of the map of the keys, which has the same outlines, coarser or finer.
        prefix: so many class tokens and the like come before the keys, and where kind is "space" before the queries.
        places: (N,), what each row adds to: a class token, or a place of `queries` from `prefix` on. None: all in
            order. CrossFormer's calls have the places of a region each; in outlook attention a place has a row for
            each window that it is in, and takes their sum.
        pooled: (h, w) of a second, coarser map of keys (TransNeXt), or ().
    """

    weights: Tensor
    indices: Tensor | None = None
    pattern: str = ""
    kind: str = "space"
    queries: Size = ()
    keys: Size = ()
    prefix: int = 0
    places: Tensor | None = None
    pooled: Size = ()

    @property
    def outside(self) -> Tensor:
        """(B, heads, N), the share of each row that goes to places outside of the picture."""
        if self.indices is None:
            return torch.zeros_like(self.weights[..., 0])
        return (self.weights * (self.indices < 0)[:, None]).sum(-1)


class _Call:
    """One call of a kernel: what is known of it before its weights are, and these.

    layout: (regions, positions), where in the layer's map the positions of the kernel's map lie, -1: nowhere; or None.
    """

    weights: Tensor
    indices: Tensor | None
    heads = 1  # of the layer, where a call is of one of them
    left: list[int]  # how many calls of the same layer backward has still to come to
    first: int | None = None  # query of the layer that the weights start at, where they are of some

    def __init__(self, name: str, geometry: Attention, layout: Tensor | None) -> None:
        self.name, self.geometry, self.layout = name, geometry, layout

    def row_slices(self) -> Iterator[slice]:
        """Of rows as the kernel has them, as many as are cheap at a time; all where they cannot be taken apart."""
        rows, keys = self.weights.shape[2:]
        step = max(1, CHUNK // max(1, keys))
        if self.geometry.places is not None or (self.layout is not None and len(self.layout) > 1):
            step = rows
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def attention(self, values: Tensor, part: slice = slice(None)) -> Attention:
        """Of weights, or of what there is of each, (B, any, n, K), for some rows of the kernel: placed on the map."""
        known, rows, layout = self.geometry, self.geometry.places, self.layout
        indices = None if self.indices is None else self.indices[:, part]
        first = (self.first or 0) + (part.start or 0)
        queries = slice(first, first + values.shape[2])
        if layout is not None:
            values, found, rows = _on_map(values, indices, layout, queries)
            indices = found if known.keys == known.queries else indices
        elif self.first is not None or values.shape[2] < self.weights.shape[2]:
            rows = torch.arange(queries.start, queries.stop, device=values.device)
        if rows is None:
            return known._replace(weights=values, indices=indices)
        order = rows.argsort(stable=True)[int((rows < 0).sum()) :]
        rows = rows[order]
        whole = len(rows) == known.prefix + math.prod(known.queries) and bool((rows.diff() == 1).all())
        indices = None if indices is None else indices[:, order]
        return known._replace(weights=values[:, :, order], indices=indices, places=None if whole else rows)


def _on_map(values: Tensor, indices: Tensor | None, places: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of an image's regions, (B * regions, any, n, K): rows (B, any, regions * n, K), their keys, and their places."""
    regions, rows = len(places), values.shape[2]
    values = values.unflatten(0, (-1, regions)).transpose(1, 2).flatten(2, 3)
    if indices is None:
        found = places[:, None].expand(-1, rows, -1)[None].expand(len(values), -1, -1, -1)
    else:
        found = indices.unflatten(0, (-1, regions))
        region = torch.arange(regions, device=places.device)[:, None, None]
        found = torch.where(found < 0, -1, places[region, found.clamp(min=0)])
    return values, found.flatten(1, 2), places[:, part].flatten()


class _Recorder:
    """take: what is done with each call; lean: in backward, with the gradient of its weights."""

    def __init__(self, take: Callable[..., None], lean: bool) -> None:
        self.take, self.lean = take, lean
        self.running: list[tuple[str, nn.Module, tuple]] = []  # modules being called and what with, outermost first
        self.layout: tuple[Size, Tensor | None] | None = None  # what `place` said of the next call of a kernel
        self.share: _Share | None = None  # where a layer is computed in parts
        self.calls: list[_Call] = []  # of the checkpointed function that is running
        self.repeated: Iterator[_Call] = iter(())  # while backward runs it again


class _Share(NamedTuple):
    """The part of a layer that is computed."""

    heads: int  # of the layer
    left: list[int]  # how many parts backward has still to come to
    first: int | None  # query that it starts at; None: it has all


_recorder: _Recorder | None = None


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[Attention]]]:
    """While active, attention called inside `model` runs its explicit form and its weights are kept.

        with record_attention(model) as record:
            model(images)[0, label].backward()
        record["stages.2.0.attn"][0].weights.grad

    Yields a dictionary that fills as the model runs: the name (in `model.named_modules()`) of the innermost module that
    was running -> one `Attention` for each call of a kernel. Kept are the calls of `visionattn.kernels`, and of timm's
    layers those that have a dropout of their weights, `attn_drop` (ViT, DeiT, Swin, PVT, CaiT, XCiT ...). Works on a
    compiled model too, which then runs uncompiled. A model with `grad_checkpointing` runs without it; where other code
    checkpoints, call backward inside the block (what backward computes again is not recorded a second time).
    """
    record: dict[str, list[Attention]] = {}

    def take(call: _Call) -> None:
        attention, weights = call.attention(call.weights), call.weights
        if attention.weights is weights:
            if weights.requires_grad:
                weights.retain_grad()
        else:  # padding is cropped, or regions are put together
            attention = attention._replace(weights=attention.weights.detach())
            if weights.requires_grad:
                weights.register_hook(partial(_add_gradient, call, attention.weights))
        record.setdefault(call.name, []).append(attention)

    with _recording(model, _Recorder(take, lean=False)):
        yield record


def _add_gradient(call: _Call, weights: Tensor, gradient: Tensor) -> None:
    placed = call.attention(gradient).weights
    weights.grad = placed if weights.grad is None else weights.grad + placed


@contextmanager
def attention_in_backward(
    model: nn.Module, of: Callable[[Tensor, Tensor], Tensor], take: Callable[[str, Attention, bool], None]
) -> Iterator[None]:
    """While active, what backward computes of attention is handed out, the last call first, in little memory.

    Forward keeps the input of each block, where the model has `grad_checkpointing`, and no weights; backward computes
    those of one call at a time again, of large maps head by head.

    Args:
        of: weights and their gradient (B, heads, n, K) -> what is wanted of each.
        take: is called with the name of the layer, some rows of a call with `weights` (B, 1, n, K), which add up to the
            mean over the heads, their `places`, if not all, and whether they are the last ones of the call.
    """

    def share(call: _Call, gradient: Tensor) -> None:
        call.left[0] -= 1
        parts = list(call.row_slices())
        for part in parts:
            values = of(call.weights[:, :, part], gradient[:, :, part]).sum(1, keepdim=True) / call.heads
            take(call.name, call.attention(values, part), call.left[0] == 0 and part is parts[-1])
        del call.weights, call.indices
        _trim()

    with _recording(model, _Recorder(share, lean=True)):
        yield


@contextmanager
def _recording(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    global _recorder
    if _recorder is not None:
        raise RuntimeError("record_attention is active already: leave its block before entering another")
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name.endswith("attn_drop"):
                continue
            undo.callback(module.register_forward_pre_hook(_entering(recorder, name)).remove)
            undo.callback(module.register_forward_hook(_leaving(recorder), always_call=True).remove)
            before = getattr(module, "grad_checkpointing", recorder.lean)
            if before is not recorder.lean:
                module.grad_checkpointing = recorder.lean
                undo.callback(setattr, module, "grad_checkpointing", before)
            dropout = getattr(module, "attn_drop", None)
            if isinstance(dropout, nn.Module):
                _open_up(module, dropout, recorder, undo)
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        _recorder = recorder
        try:
            yield
        finally:
            _recorder = None


def active() -> bool:
    """Whether a kernel called now has its weights recorded."""
    return _recorder is not None and (bool(_recorder.running) or _repeats())


def _repeats() -> bool:
    """Whether this is backward, which runs a checkpoint again."""
    return torch._C._current_graph_task_id() != -1


def place(places: Tensor | None = None) -> None:
    """What a layer of a map (B, H, W, dim) says before it calls a kernel with a map that it has padded or cut.

    places: (1, rows, columns), or of images cut into regions (regions, rows, columns): where in the layer's map, flat,
        each position of the kernel's map lies, -1 for padding. None: the map is padded below and to the right.
    """
    if _recorder is not None:
        _recorder.layout = tuple(_recorder.running[-1][2][0].shape[1:3]), places


def keep(
    weights: Tensor,
    indices: Tensor | None = None,
    pattern: str = "softmax",
    kind: str = "space",
    queries: Size = (),
    keys: Size = (),
    pooled: Size = (),
    places: Tensor | None = None,
) -> None:
    """Record weights where a recorder is active; the arguments are those of `Attention`.

    Maps that are not given, and sequences (N,) or (N, 1), are laid out by the size of the image, with tokens before
    them that do not fit; queries that are fewer than the keys are then class tokens. What backward computes a second
    time, of a checkpoint, is not recorded again.
    """
    recorder = _recorder
    if recorder is None:
        return
    if _repeats():
        for call in itertools.islice(recorder.repeated, 1):
            call.weights, call.indices = weights.detach(), indices
        return
    if not recorder.running:
        return
    given, recorder.layout = recorder.layout, None
    geometry = Attention(weights.new_empty(0), None, pattern, kind, queries, keys, 0, places, pooled)
    layout = None
    if given is not None:
        geometry, layout = _placed(geometry, *given, weights.device)
    elif kind != "channel":
        geometry = _laid_out(geometry, weights.shape, indices is None, recorder.running)
    call = _Call(recorder.running[-1][0], geometry, layout)
    if not recorder.lean:
        call.weights, call.indices = weights, indices
        recorder.take(call)
    elif weights.requires_grad:
        call.heads, call.left, call.first = recorder.share or (weights.shape[1], [1], None)
        recorder.calls.append(call)
        weights.register_hook(partial(recorder.take, call))


def recorded(
    reference: Callable[..., tuple], pattern: str, kind: str, strip: Callable[..., Any] | None, *arguments: Any
) -> Any:
    """The output of a kernel's reference, whose weights are kept; of large maps, where memory is short, head by head
    and, by `strip` (see `_dispatch.Forms`), some rows of the map of queries at a time."""
    queries, keys = ((), ()) if kind == "channel" else (_map_size(x) for x in arguments[:2])

    def run(*arguments: Any) -> Any:
        output, weights, indices, *places = reference(*arguments)
        if places:
            keep(weights, indices, pattern, kind, keys, keys, places=places[0])
        else:
            keep(weights, indices, pattern, kind, queries, keys)
        return output

    recorder, heads = _recorder, arguments[1].shape[-2]
    if recorder is None or not recorder.lean or math.prod(queries) < LARGE:
        return repeatable(run, *arguments)
    row = math.prod(queries[1:])  # queries
    step = max(1, CHUNK // (row * math.prod(keys)))
    of_heads, layout, left = [], recorder.layout, [0]
    for head in range(heads):
        own = [_of_head(x, head, heads) for x in arguments]
        parts = [(0, own)] if strip is None or step >= queries[0] else list(strip(step, *own))
        outputs = []
        for first, some in parts:
            recorder.layout = layout
            recorder.share = _Share(heads, left, first * row if len(parts) > 1 else None)
            left[0] += 1
            outputs.append(repeatable(run, *some))
        of_heads.append(torch.cat(outputs, 1))
    recorder.share = None
    return torch.cat(of_heads, -2)


def in_strips(
    run: Callable[..., Tensor], maps: tuple[Tensor, ...], size: Size, keys: int, heads: int, axis: int
) -> Tensor:
    """run(first, last, *maps) of some rows of a map of `size`, joined at `axis`: all, or where memory is short few at a
    time.

    keys, heads: weights of a position.
    """
    recorder, (height, width) = _recorder, size
    if recorder is None or not recorder.lean:
        return run(0, height, *maps)
    step = max(1, CHUNK // (width * keys * heads))
    starts, outputs = range(0, height, step), []
    left = [len(starts)]
    for first in starts:
        recorder.share = _Share(heads, left, first * width)
        outputs.append(repeatable(run, first, min(first + step, height), *maps))
    recorder.share = None
    return torch.cat(outputs, axis)


def _of_head(x: Any, head: int, heads: int) -> Any:
    """What one head takes of an argument: of maps (..., heads, dim) and logits (..., heads, K, K), and of what has the
    heads first, biases, temperatures, gates, and decays, which are floats."""
    if isinstance(x, tuple) and all(isinstance(y, float) for y in x):
        return x[head : head + 1]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    if x.ndim >= 4:
        return x.narrow(-3 if x.ndim == 6 else -2, head, 1)
    return x[head : head + 1] if x.ndim != 2 and len(x) == heads else x


def repeatable(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """run(...), which calls `keep`; where memory is short as a checkpoint, which keeps nothing for backward."""
    recorder = _recorder
    if recorder is None or not recorder.lean:
        return run(*arguments, **options)
    calls: list[_Call] = []

    def run_again(*arguments: Any, **options: Any) -> Any:
        recorder.calls, recorder.repeated = calls, iter(calls)
        return run(*arguments, **options)

    with set_checkpoint_early_stop(False):
        output = checkpoint(run_again, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
    _trim()
    return output


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _trim() -> None:
    """Have glibc give freed memory back: it keeps blocks of up to 32 MB, which pile up between those that stay."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _placed(
    geometry: Attention, size: Size, places: Tensor | None, device: torch.device
) -> tuple[Attention, Tensor | None]:
    """What a layer with a map of `size` calls a kernel for, and where the positions of the kernel's map are in it."""
    height, width = geometry.queries
    if places is None:
        if (height, width) == size:
            return geometry, None
        rows, columns = (torch.arange(length, device=device) for length in (height, width))
        inside = (rows < size[0])[:, None] & (columns < size[1])
        places = torch.where(inside, rows[:, None] * size[1] + columns, -1)
    keys = size if geometry.keys == geometry.queries else geometry.keys
    return geometry._replace(queries=size, keys=keys), places.reshape(-1, height * width)


def _laid_out(geometry: Attention, shape: Size, dense: bool, running: list[tuple[str, nn.Module, tuple]]) -> Attention:
    """With the maps of sequences of tokens; shape: of the weights."""
    queries, keys = geometry.queries, geometry.keys
    if len(queries) > 1 and queries[1] != 1:
        return geometry
    rows = math.prod(queries) if queries else shape[2]  # of which the weights may be some
    columns = shape[3] if dense else math.prod(keys)
    kind = "class" if geometry.kind == "space" and rows < columns else geometry.kind
    prefix, found = _grid(columns if kind == "class" else rows, shape[0], running)
    if not found:
        return geometry._replace(kind=kind)
    if kind == "class":
        return geometry._replace(kind=kind, queries=(), keys=found, prefix=prefix)
    of_keys = found if columns == rows else _coarser(found, columns - prefix)
    return geometry._replace(queries=found, keys=of_keys, prefix=prefix)


def _grid(tokens: int, batch: int, running: list[tuple[str, nn.Module, tuple]]) -> tuple[int, Size]:
    """The map that so many tokens are of images that modules were called with, and how many come before it."""
    known = [module.num_prefix_tokens for _, module, _ in running if hasattr(module, "num_prefix_tokens")]
    inputs = [x[0] for *_, x in running if x and isinstance(x[0], Tensor) and x[0].ndim == 4]
    if not inputs or len(inputs[0]) != batch:  # or the batch is of windows
        return 0, ()
    images = [x.shape[2:] for x in inputs[:2]]  # the second of an encoder, which pads it
    for image, prefix, stride in itertools.product(images, [*known[:1], *range(PREFIX)], STRIDES):
        size = tuple(-(-side // stride) for side in image)
        if math.prod(size) + prefix == tokens:
            return prefix, size
    return 0, ()


def _coarser(size: Size, tokens: int) -> Size:
    """A map of so many tokens that is pooled from one of `size`."""
    sizes = [tuple(-(-side // step) for side in size) for step in range(1, max(size) + 1)]
    sizes += [tuple(side // step for side in size) for step in range(1, min(size) + 1)]
    return next((found for found in [*sizes, (7, 7)] if math.prod(found) == tokens), ())


def _map_size(x: Any) -> Size:
    """Of a map (B, H, W, heads, ...) or a sequence (B, L, heads, ...)."""
    return tuple(x.shape[1:3]) if x.ndim > 4 else (x.shape[1],)


def _open_up(layer: Any, dropout: nn.Module, recorder: _Recorder, undo: ExitStack) -> None:
    """Make an attention layer of timm's compute its weights, which then pass through its dropout."""

    def see(module: nn.Module, arguments: tuple, weights: Tensor) -> None:
        if weights.ndim != 4:  # VOLO's outlook attention
            return
        if hasattr(layer, "temperature"):
            keep(weights, kind="channel")
            return
        for _, block, given in recorder.running[-2:-1]:
            if hasattr(block, "_attn") and hasattr(block, "window_size"):
                size = tuple(given[0].shape[1:3])
                places = _swin_windows(block, size).to(weights.device)
                recorder.layout = size, places
                keep(weights, queries=places.shape[1:], keys=places.shape[1:])
                return
        keep(weights)

    undo.callback(dropout.register_forward_hook(see).remove)
    if getattr(layer, "fused_attn", False):
        layer.fused_attn = False
        undo.callback(setattr, layer, "fused_attn", True)
    if recorder.lean:
        layer.forward = partial(repeatable, layer.forward)
        undo.callback(layer.__dict__.pop, "forward")


def _swin_windows(block: Any, size: Size) -> Tensor:
    """(windows, tokens of a window, 1): where in the map they are, which the block is asked by a map of its places."""
    seen: list[Tensor] = []
    attention = block.attn
    block.attn = _Seeing(seen)
    try:
        block._attn(1 + torch.arange(math.prod(size), dtype=torch.float64).view(1, *size, 1))
    finally:
        block.attn = attention
    return seen[0].long() - 1


class _Seeing(nn.Module):
    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen.append(x)
        return x


def _entering(recorder: _Recorder, name: str):
    return lambda module, arguments: recorder.running.append((name, module, arguments))


def _leaving(recorder: _Recorder):
    def leave(module, arguments, output) -> None:
        recorder.running.pop()

    return leave
