"""Checks of arguments that several patterns share; each raises ValueError naming argument, value and expectation."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["autocasting", "check_maps", "check_tensor"]


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; some devices, such as meta, have none."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, W, heads, head_dim), k (B, H', W', heads, head_dim) and v (B, H', W', heads, value_dim) fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 5 or not x.is_floating_point():
            raise ValueError(f"{name} is {_kind(x)}: expected a floating tensor of (B, H, W, heads, head_dim)")
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} is {_kind(x)}: expected no size but the batch to be 0")
    batch, _, _, heads, head_dim = q.shape
    check_tensor("k", k, (batch, *k.shape[1:3], heads, head_dim), q)
    check_tensor("v", v, (*k.shape[:4], v.shape[4]), q)


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`tensor` has this shape, the device of `like`, and `dtype` or else (autocast mends it) that of `like`."""
    autocast = dtype is None and autocasting(like)
    dtype = like.dtype if dtype is None else dtype
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} is {_kind(tensor)}: expected the shape {tuple(shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {like.device}, where q is")
    if tensor.dtype != dtype and not autocast:
        raise ValueError(f"{name} is {_kind(tensor)}: expected {str(dtype).removeprefix('torch.')}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"
