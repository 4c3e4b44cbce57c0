"""Counts what a call would do on a CUDA device, without one: launches, bytes, multiplications and their dtype.

The call runs on fake CUDA tensors, which have a device, a shape and a dtype but no memory, so that it takes the
branches, and under autocast the casts, that it takes on a GPU. Every operator that is no view and does more than
allocate counts as one launch, which reads its tensor arguments and writes its results once; what is expanded is read as
often as it is stored, and what a tensor is only made like is not read. Fused attention is the one
kernel that a GPU takes: flash attention in 16 bits without a mask, else memory-efficient attention. What a call makes
once and keeps (index tables) is not counted: the second of two calls is.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from visionattn.kernels import _plain
from visionattn.tools._roofline import Device

__all__ = ["Count", "Waits", "autocast", "count", "fake_cuda", "to_fake_cuda"]

aten = torch.ops.aten
CUDA, META = torch.device("cuda:0"), torch.device("meta")
FREE = {  # beside views: they allocate, or tell a number
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh"),
    *("_reshape_alias", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
}
FILLS = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # they read no argument


class Waits(RuntimeError):
    """The call reads a value of the device."""


@dataclass
class Count:
    """Of one call. flops: operations of matrix products and convolutions, a multiply-add being two, by their dtype.
    peak: bytes of all that it made and held at one time, its result among them."""

    launches: int = 0
    bytes: int = 0
    peak: int = 0
    flops: Counter[torch.dtype] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    work: list[tuple[float, torch.dtype, int]] = field(default_factory=list)  # flops, dtype and bytes of each launch

    def add(self, operator: torch._ops.OpOverload, inputs: tuple, output: Any) -> None:
        tensors = [x for x in tree_iter((inputs, output)) if isinstance(x, Tensor)]
        name = operator.overloadpacket.__name__
        moved = sum(map(_stored, tree_iter(output) if name in FILLS else tensors))
        flops = _flops(operator, inputs, output)
        dtype = next((x.dtype for x in tensors), torch.float32)
        self.launches, self.bytes = self.launches + 1, self.bytes + moved
        self.operators[name] += 1
        self.work.append((flops, dtype, moved))
        if flops:
            self.flops[dtype] += flops

    def seconds(self, device: Device) -> float:
        """What the roofline of a device gives: its host starts kernels while it computes, so the longer of the two."""
        return max(self.launches * device.launch, sum(device.seconds(*work) for work in self.work))


def _stored(x: Tensor) -> int:
    """Bytes in memory: an expanded axis has one entry."""
    return math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step) * x.element_size()


def _flops(operator: torch._ops.OpOverload, inputs: tuple, output: Any) -> int:
    if operator is aten.convolution_backward.default:  # the registry's formula leaves out groups
        grad, _, weight, *_, wanted = inputs[0]
        return 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])
    formula = flop_registry.get(operator.overloadpacket)
    return 0 if formula is None else formula(*inputs[0], **inputs[1], out_val=output)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors that are made inside are fake. What a kernel keeps, it keeps as long."""
    before, _plain.can_keep = _plain.can_keep, lambda x: True
    _plain.forget()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _plain.can_keep = before
        _plain.forget()


def to_fake_cuda(model: nn.Module) -> nn.Module:
    """The model, its parameters and buffers made fake CUDA tensors, inside of `fake_cuda`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                x = torch.empty_like(parameter, device=CUDA)
                module._parameters[name] = nn.Parameter(x, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return model


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast of CUDA, which refuses to be on where no CUDA device is; None: as it is."""
    if dtype is None:
        yield
        return
    before = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_dtype("cuda", before[0])
        torch.set_autocast_enabled("cuda", before[1])


def count(forward: Callable[[], Tensor], inputs: list[Tensor], dtype: torch.dtype | None = None) -> Count:
    """Of one call and, unless `inputs` is empty, the backward pass to those leaves; inside of `fake_cuda`.

    dtype: that of autocast in the forward pass, None for none.
    """
    counter = _Counter()
    with counter, _AsOnCuda(counter):
        with torch.no_grad(), autocast(dtype):
            forward()
        counter.engine = True
        views: Any = [x.view_as(x) for x in inputs]
        accumulators = [view.grad_fn.next_functions[0][0] for view in views]  # made, and kept, beforehand
        counter.engine, counter.count, counter.before = False, Count(), counter.held
        with torch.set_grad_enabled(bool(inputs)), autocast(dtype):
            output = forward()
        if inputs:
            counter.engine = True
            torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)
    del accumulators
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts operators. To autograd's engine, which starts a thread for a CUDA device, tensors are on meta.

    Autograd asks for the device of what an operator has returned before its Python call ends, of what a
    torch.autograd.Function has returned outside of such calls, and in backward; autocast asks for that of what it is
    called with. Python never asks here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.calling = False  # in a Python call of an operator
        self.fresh: list[Tensor] = []  # what operators returned in it
        self.engine = False  # only autograd asks
        self.live: dict[int, tuple[Any, int]] = {}  # storages, and their bytes
        self.held = self.before = 0  # bytes now, and at the start of the count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            device = args[0].fake_device
            hidden = self.engine or not self.calling or any(x is args[0] for x in self.fresh)
            return META if hidden and device.type == "cuda" else device
        if kwargs.get("device") == META:  # an operator's inside made a tensor like another
            kwargs = {**kwargs, "device": CUDA}
        try:
            output = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waits(f"{func.overloadpacket.__name__} makes the host wait for the device") from error
        if func is aten.convolution_backward.default and output[0] is not None:
            output = _like_input(output[0], args[1]), *output[1:]
        tensors = [x for x in tree_iter(output) if isinstance(x, Tensor)]
        self.fresh += tensors
        name = func.overloadpacket.__name__
        if tensors and not func.is_view and name not in FREE:
            self.count.add(func, (args, kwargs), output)
        for x in tensors:
            self._hold(x.untyped_storage())
        return output

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Counts it as held, until it is freed."""
        key = storage._cdata
        if key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self._free(key)), storage.nbytes()
            self.held += storage.nbytes()
            self.count.peak = max(self.count.peak, self.held - self.before)

    def _free(self, key: int) -> None:
        self.held -= self.live.pop(key)[1]


def _like_input(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a map in the memory format that a convolution on a CUDA device gives it: that of the map."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return grad.contiguous(memory_format=torch.channels_last) if last else grad


class _AsOnCuda(TorchFunctionMode):
    """Tells the counter of Python calls, and takes the fused attention that a CUDA device takes."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            with self:
                return _fused_attention(*args, **(kwargs or {}))
        self.counter.calling, self.counter.fresh = True, []
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.calling = False


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What F.scaled_dot_product_attention calls on a CUDA device: (B, heads, N, dim)."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    if attn_mask is None and q.dtype != torch.float32 and k.shape[-1] == v.shape[-1]:
        dim = q.shape[-1]
        scale = dim**-0.5 if scale is None else scale
        if dim % 8:
            q, k, v = (F.pad(x, (0, -dim % 8)) for x in (q, k, v))
        output = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return output[..., :dim]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        keys = attn_mask.shape[-1]
        if attn_mask.stride(-1) != 1 or any(step % 8 for step in attn_mask.stride()[:-1]):
            attn_mask = F.pad(attn_mask, (0, -keys % 8))[..., :keys]
        attn_mask = attn_mask.expand(*q.shape[:2], q.shape[2], keys)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, attn_mask))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, training, dropout_p, is_causal, scale=scale
    )[0]
