"""What several patterns ask of their arguments; a check raises ValueError naming argument, value and expectation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_false, statically_known_true

__all__ = [
    "allows_tf32",
    "at_least",
    "autocasting",
    "check_alike",
    "check_int",
    "check_map",
    "check_maps",
    "check_tensor",
    "decided",
    "known",
    "per_axis",
    "precise",
    "transforms",
]

MAPS = {1: "(B, L, heads, head_dim)", 2: "(B, H, W, heads, head_dim)", 3: "(B, D, H, W, heads, head_dim)"}


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; some devices, such as meta, have none."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def precise(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def known(condition: bool) -> bool:
    """Whether a condition on sizes holds. Where a compiler has symbols for sizes, only what holds for all of them is
    known: asked for itself, the condition would have it compile once for each answer."""
    return statically_known_true(condition) if torch.compiler.is_compiling() else bool(condition)


def at_least(length: int, least: int) -> int:
    """The larger one of both, for which a compiler's symbols are not asked whether they are."""
    larger: Any = torch.sym_max if torch.compiler.is_compiling() else max
    return larger(length, least)


def decided(condition: bool, what: str) -> bool:
    """A condition on sizes by which a network computes one thing or another, so that no exported graph is for all.

    Raises ValueError, which says what depends on it, where an exporter has symbols for sizes.
    """
    if torch.compiler.is_exporting() and not (statically_known_true(condition) or statically_known_false(condition)):
        raise ValueError(f"{what}, so that no graph is for all sizes")
    return bool(condition)


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Whether torch's settings let CUDA multiply matrices of float32 with 10 bits of their mantissa."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@torch.compiler.assume_constant_result
def transforms() -> list[str]:
    """The transforms of torch.func at work, outermost first, such as ["Vmap", "Grad"]."""
    return [interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack() or ()]


def check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an int of at least {least}")


def per_axis(name: str, value: int | Sequence[int], axes: int, least: int = 1) -> tuple[int, ...]:
    """An int, or one for each axis of the map, as one for each axis."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if torch.jit.is_tracing():  # where sizes of maps are tensors
        values = tuple(int(x) if isinstance(x, Tensor) else x for x in values)
    if len(values) != axes or not all(isinstance(x, int | torch.SymInt) and x >= least for x in values):
        raise ValueError(
            f"{name}={value!r}: expected an int of at least {least}, or one for each of the {axes} axes of q"
        )
    return values


def check_map(name: str, x: Tensor, axes: Sequence[int] = (2,)) -> None:
    """x is (B, *map, heads, head_dim), its map having one of these numbers of axes."""
    if x.ndim - 3 not in axes or not x.is_floating_point():
        shapes = " or ".join(MAPS[n] for n in axes)
        raise ValueError(f"{name} is {_kind(x)}: expected a floating tensor of {shapes}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} is {_kind(x)}: expected no size but the batch to be 0")


def check_alike(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[int]) -> None:
    """q is such a map, and k and v have its shape."""
    check_map("q", q, axes)
    check_tensor("k", k, q.shape, q)
    check_tensor("v", v, q.shape, q)


def check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, W, heads, head_dim), k (B, H', W', heads, head_dim) and v (B, H', W', heads, value_dim) fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_map(name, x)
    batch, _, _, heads, head_dim = q.shape
    check_tensor("k", k, (batch, *k.shape[1:3], heads, head_dim), q)
    check_tensor("v", v, (*k.shape[:4], v.shape[4]), q)


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`tensor` has this shape, the device of `like`, and `dtype` or else (autocast mends it) that of `like`."""
    expected = like.dtype if dtype is None else dtype
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} is {_kind(tensor)}: expected the shape {tuple(shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {like.device}, where q is")
    if tensor.dtype != expected and not (dtype is None and autocasting(like)):
        raise ValueError(f"{name} is {_kind(tensor)}: expected {str(expected).removeprefix('torch.')}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"
