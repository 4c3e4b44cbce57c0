"""What the plain bodies share: the PyTorch forms of GPUs, and of all that a compiler traces.

A plain body is a few large operators in the dtype of its caller: rows of q, k and v are moved once to where fused
attention wants them, and its result once back. Where q, k and v are slices of one packed projection, they move
together. Nothing waits for the device. Index tables that depend on sizes alone are made once and kept.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels._check import known, precise, transforms
from visionattn.kernels._function import Function

__all__ = [
    "attend",
    "can_keep",
    "capturing",
    "crop",
    "exact_lse",
    "forget",
    "fused",
    "keep",
    "packed",
    "rows",
    "slice_step",
    "together",
]

HEADS = 65535  # that one launch of fused attention can have on CUDA; windows and tiles count as heads
KEPT = 64  # index tables of a kind
_kept: list[Any] = []


def can_keep(x: Tensor) -> bool:
    """Whether a table for x may be kept: not where x is traced, transformed or fake, nor what CUDA graphs own."""
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms():
        return False
    return not capturing(x)


def capturing(x: Tensor) -> bool:
    """Whether what is done with x goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def keep(make: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function (*hashable, device) of index tables one of (x, *hashable), for the device of x, that makes them
    once."""
    usable_in_training = torch.inference_mode(False)(make)
    kept = functools.lru_cache(maxsize=KEPT)(usable_in_training)
    _kept.append(kept)

    @functools.wraps(make)
    def call(x: Tensor, *key: Any) -> Any:
        return (kept if can_keep(x) else make)(*key, x.device)

    return call


def forget() -> None:
    for kept in _kept:
        kept.cache_clear()


def together(move: Callable[[Tensor], Tensor], *maps: Tensor) -> list[Tensor]:
    """Each map (B, *size, heads, dim), moved; all by one move where they are slices of one packed projection.

    move: (B, *size, P, heads, dim) -> (P, ...), of P maps.
    """
    if torch.compiler.is_compiling() or transforms():
        return [move(x.unsqueeze(-3))[0] for x in maps]
    order = sorted(range(len(maps)), key=lambda i: maps[i].storage_offset())
    slices = [maps[i] for i in order]
    if not slice_step(*slices):
        return [move(x.unsqueeze(-3))[0] for x in maps]
    moved = move(_Packed.run(*slices)).unbind(0)
    return [moved[order.index(i)] for i in range(len(maps))]


def packed(*maps: Tensor) -> Tensor:
    """Maps (B, *size, heads, dim) -> (B, *size, P, heads, dim): a view of slices, in their order, of one projection,
    else a copy."""
    if torch.compiler.is_compiling() or transforms() or slice_step(*maps) <= 0:
        return torch.stack(maps, -3)
    return _Packed.run(*maps)


def slice_step(first: Tensor, *others: Tensor) -> int:
    """How far apart in one memory such slices are; 0 if they are no slices of one tensor."""
    storage, step = first.untyped_storage()._cdata, others[0].storage_offset() - first.storage_offset()
    alike = all(
        x.untyped_storage()._cdata == storage
        and (x.shape, x.stride()) == (first.shape, first.stride())
        and x.storage_offset() == first.storage_offset() + i * step
        for i, x in enumerate(others, 1)
    )
    return int(step) if alike else 0


class _Packed(Function):
    """A view of all slices, which autograd takes for a new tensor; the gradients of the slices are views too."""

    @staticmethod
    def forward(*maps: Tensor) -> Tensor:
        first = maps[0]
        size = (*first.shape[:-2], len(maps), *first.shape[-2:])
        stride = (*first.stride()[:-2], slice_step(*maps), *first.stride()[-2:])
        return first.detach().as_strided(size, stride, first.storage_offset())

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad.unbind(-3)


def rows(x: Tensor, index: Tensor, back: Tensor | None = None) -> Tensor:
    """[B, N, ...], [M] -> [B, M, ...], one row for each entry of the index.

    back: [N], the one of the M rows that gives each row of x its gradient; None where that is a sum over all that are
    copies of it.
    """
    return x.index_select(1, index) if back is None else _Rows.run(x, index, back)


class _Rows(Function):
    """Backward is the same again, where PyTorch would add."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        return x.index_select(1, index)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        index, back = ctx.saved_tensors
        return _Rows.apply(grad, back, index), None, None


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H', W', ...) -> its first H x W. For compilers a copy: whether a view of it is dense depends on the size."""
    for dim, length in enumerate(size, 1):
        if not known(x.shape[dim] == length):
            compiling = torch.compiler.is_compiling()
            x = x.index_select(dim, torch.arange(length, device=x.device)) if compiling else x.narrow(dim, 0, length)
    return x


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, heads, N, dim), with what is added to the logits, that broadcasts to (B, heads, N, N')."""
    if q.shape[1] > HEADS:
        parts = zip(q.split(HEADS, 1), k.split(HEADS, 1), v.split(HEADS, 1), strict=True)
        wide = bias is not None and bias.shape[1] > 1
        biases = bias.split(HEADS, 1) if bias is not None and wide else itertools.repeat(bias)
        results = [attend(*part, added, scale, return_lse) for part, added in zip(parts, biases, strict=False)]
        output, lse = zip(*results, strict=True)
        return torch.cat(output, 1), torch.cat(lse, 1) if return_lse else None
    if not return_lse:
        return fused(q, k, v, bias, scale), None
    logits = _logits(q, k, bias, scale)  # fused attention does not give their log-sum-exp
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """F.scaled_dot_product_attention, of (B, heads, N, dim); for ONNX by operators.

    Its exporter lays the output of fused attention out otherwise than it was traced, and views of it then fail.
    """
    if torch.onnx.is_in_onnx_export():
        return _logits(q, k, bias, scale).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = (q * scale) @ k.mT
    return logits if bias is None else logits + bias


def exact_lse(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Of a plain body whose last argument is return_lse one that computes in float32 at least where it is true."""

    @functools.wraps(plain)
    def call(q: Tensor, *rest: Any) -> Any:
        dtype = precise(q)
        if not rest[-1] or q.dtype == dtype:
            return plain(q, *rest)
        output, lse = plain(*(x.to(dtype) if isinstance(x, Tensor) and x.dtype == q.dtype else x for x in (q, *rest)))
        return output.to(q.dtype), lse

    return call
