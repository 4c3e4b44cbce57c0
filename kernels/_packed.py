"""Slices of one packed projection, whose gradients come back as one tensor where an operator has written them so."""

from typing import Any

import torch
from torch import Tensor

from visionattn.kernels._check import transforms
from visionattn.kernels._plain import slice_step

__all__ = ["unpack"]


def unpack(packed: Tensor) -> tuple[Tensor, ...]:
    """(B, H, W, P, heads, dim) -> P maps, which are views; in backward, gradients that are again slices of one tensor
    are not copied together."""
    if not packed.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms():
        return packed.unbind(3)
    return _Unpack.apply(packed)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first, step = grads[0], slice_step(*grads)
        if step <= 0:
            return torch.stack(grads, 3)
        size, stride = ((*x[:3], n, *x[3:]) for x, n in ((first.shape, len(grads)), (first.stride(), step)))
        return first.as_strided(size, stride, first.storage_offset())
