"""Layers and checks that several families share, and that timm.layers does not have."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeGuard, TypeVar

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module, trunc_normal_
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as hooks_of_all_modules

from visionattn.kernels._check import autocasting, known, precise, transforms
from visionattn.kernels._dispatch import takes_plain
from visionattn.kernels._plain import keep

__all__ = [
    "DepthwiseConv",
    "GGeM",
    "Mlp",
    "channels_last",
    "check_image_size",
    "check_in_chans",
    "check_pool",
    "conv_norm",
    "init_linear",
    "is_plain",
    "linear",
    "missing",
    "no_autocast",
    "pad_map_to_multiple",
    "pad_to_multiple",
    "pool_to",
    "position_embedding",
    "refuse_script",
    "rotate",
    "stretch",
]


@register_notrace_function
def check_image_size(x: Tensor, least: int = 32) -> None:
    """Raises ValueError for images (B, in_chans, H, W) smaller than least x least pixels."""
    height, width = x.shape[-2], x.shape[-1]
    if height < least or width < least:
        raise ValueError(
            f"input of {height} x {width} pixels: expected at least {least} x {least}; enlarge or pad the images"
        )


def check_in_chans(in_chans: int) -> None:
    if in_chans < 1:
        raise ValueError(f"in_chans={in_chans}: expected at least 1 channel")


def check_pool(global_pool: str, class_token: bool = True) -> str:
    """`global_pool`, if tokens can be pooled like that; else raises ValueError."""
    allowed = ["", "avg", "ggem", "token"] if class_token else ["", "avg", "ggem"]
    if global_pool not in allowed:
        why = "" if class_token else ": the class token was pruned"
        raise ValueError(f"global_pool={global_pool!r}: expected one of {allowed}{why}")
    return global_pool


class GGeM(nn.Module):
    """Group generalized mean pooling, (mean over places of max(x, 1e-6) ** p) ** (1 / p), p of each group learned.

    Tokens (B, N, C) -> (B, C), or maps (B, C, H, W) -> (B, C), or (B, C, 1, 1) where not flatten.

    groups: of neighbouring channels; by default of 64, as a head of ViT has, or one of all if 64 does not divide them.
    Source: Ko et al., Group Generalized Mean Pooling for Vision Transformer, 2022, https://arxiv.org/abs/2212.04114.
    """

    pool_type = "ggem"

    def __init__(self, dim: int, groups: int | None = None, flatten: bool = True) -> None:
        super().__init__()
        groups = (1 if dim % 64 else dim // 64) if groups is None else groups
        self.flatten = flatten
        self.p = nn.Parameter(torch.full((groups,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        is_map = x.ndim == 4
        places = (x.flatten(2).mT if is_map else x).to(precise(x)).clamp_min(1e-6)
        p = self.p.to(places.dtype)[:, None]
        pooled = places.unflatten(-1, (len(self.p), -1)).pow(p).mean(1).pow(1 / p).flatten(1).to(x.dtype)
        return pooled[..., None, None] if is_map and not self.flatten else pooled

    def feat_mult(self) -> int:
        """As timm's pooling has it: how many channels come of one."""
        return 1


def refuse_script(network: nn.Module) -> NoReturn:
    """What torch.jit.script runs first, as `__prepare_scriptable__` of a network or of one inside another."""
    raise RuntimeError(
        f"{type(network).__name__}: torch.jit.script, which PyTorch has deprecated, is not supported; use"
        " torch.jit.trace or torch.export.export to save the network, torch.compile to run it faster"
    )


def init_linear(module: nn.Module) -> None:
    """Weights of a linear layer from a truncated normal distribution of standard deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_notrace_function
def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zero pads a map (B, C, H, W) below and to the right until size divides it."""
    below, right = (missing(length, size) for length in x.shape[2:])
    return x if known(below == 0) and known(right == 0) else F.pad(x, (0, right, 0, below))


def pad_map_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero pads a map (B, H, W, C) below and to the right until rows divides H and columns divides W."""
    below, right = missing(x.shape[1], rows), missing(x.shape[2], columns)
    return x if known(below == 0) and known(right == 0) else F.pad(x, (0, 0, 0, right, 0, below))


def missing(length: int, size: int) -> int:
    """From a length up to a multiple of size; without a remainder, which is slow with a compiler's symbols."""
    return (length + size - 1) // size * size - length


def channels_last(x: Tensor) -> Tensor:
    """The map (B, C, H, W) in channels-last memory; as it is under torch.func, whose vmap has no memory formats."""
    return x if transforms() else x.contiguous(memory_format=torch.channels_last)


Kind = TypeVar("Kind", bound=nn.Module)
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Dropout, nn.Identity)
}


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling the module runs kind's own forward on its own parameters and nothing else.

    Only then may its parameters be read in place of a call. Not plain: a subclass or wrapper (LoRA, quantised layers,
    parametrizations), parameters of another class, a `forward` of the instance (accelerate), a compiled module, and
    hooks of any kind, of the module or of all modules (profilers).
    """
    return (
        type(module) is kind
        and kind.forward is _FORWARDS[kind]
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and all(type(x) in (nn.Parameter, FakeTensor) for x in module._parameters.values() if x is not None)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not hooks_of_all_modules._global_forward_hooks
        and not hooks_of_all_modules._global_forward_pre_hooks
        and not hooks_of_all_modules._global_backward_hooks
        and not hooks_of_all_modules._global_backward_pre_hooks
    )


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """norm(conv(x)). Large maps on a CPU in evaluation by one convolution, the norm folded into its weights, in 0.5 to
    0.97 of the time."""
    if (
        norm.training
        or takes_plain(x)
        or x.numel() < SMALL
        or not (is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d))
    ):
        return norm(conv(x))
    if norm.weight is None or norm.running_mean is None or norm.running_var is None:
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv._conv_forward(x, weight, bias)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a map (B, H, W, C), zero padded to keep its size."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_function
def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position: each two channels (2 m, 2 m + 1) of x (..., 2 M), turned in their plane.

    turns: (..., M, 2), which broadcasts: cosines and sines of the angles. As complex numbers, where these can be used,
    this takes an eighth of the time on a CPU.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype in (torch.float32, torch.float64) and not (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms()
    ):
        turns = turns.to(x.dtype)
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), turns.to(x.dtype).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def no_autocast(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()


def pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), means over bins; where sizes are symbols by products, as PyTorch's form of it
    would be compiled for each size."""
    if known(x.shape[2] < 2**62) and known(x.shape[3] < 2**62):
        return F.adaptive_avg_pool2d(x, size)
    rows, columns = (_bins(length, n, x) for length, n in zip(x.shape[2:], size, strict=True))
    return rows @ (x @ columns.mT)


def _bins(length: int, keys: int, like: Tensor) -> Tensor:
    """(keys, length): the share of each position in each bin."""
    key, place = torch.arange(keys, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = (place >= key * length // keys) & (place < ((key + 1) * length + keys - 1) // keys)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


def stretch(x: Tensor, axis: int, length: int, mode: str) -> Tensor:
    """x with an axis of another length, between its entries by `F.interpolate`'s "bilinear" or "bicubic".

    By a product, which unlike that has deterministic gradients on all devices.
    """
    x = x.movedim(axis, -1)
    if not known(x.shape[-1] == length):
        with no_autocast(x):
            x = x @ _stretching(x, x.shape[-1], length, mode, x.dtype)
    return x.movedim(-1, axis)


@keep
def _stretching(source: int, target: int, mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if mode == "bilinear" and not known(target < 2**62):  # of a symbol in few operators
        centres = (torch.arange(target, device=device) + 0.5) * (source / target) - 0.5
        away = centres.clamp(0, source - 1) - torch.arange(source, device=device)[:, None]
        return (1 - away.abs()).clamp(min=0).to(dtype)
    unit = torch.eye(source, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return F.interpolate(unit[None, :, :, None], (target, 1), mode=mode)[0, :, :, 0].to(dtype)


@register_notrace_function
def position_embedding(table: Tensor, height: int, width: int, stride: int = 16) -> Tensor:
    """The table (1, rows, columns, C), stretched over the image, at the centres of the image's tokens.

    A token takes what lies at its own centre, as a fraction of the height and width of the image, between the entries
    by bicubic interpolation, over the edge the nearest. An image of `stride` times the table takes it as it is. So a
    slightly larger image sees a slightly stretched table.

    Returns (1, H / stride, W / stride, C), rounded up, for an image of H x W = height x width pixels.
    """
    if known(height == stride * table.shape[1]) and known(width == stride * table.shape[2]):
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    rows, columns = (
        _at_centres(table, entries, side, stride, dtype)
        for entries, side in zip(table.shape[1:3], (height, width), strict=True)
    )
    with no_autocast(table):
        stretched = (rows @ table[0].to(dtype).flatten(1)).unflatten(1, table.shape[2:])
        return (columns @ stretched)[None].to(table.dtype)


@keep
def _at_centres(entries: int, side: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tokens, entries): the share of each entry of one axis at the centres of the tokens of `side` pixels.

    Cubic convolution with a = -0.75, as PyTorch has it: Keys, 1981, equation 4.
    """
    token = torch.arange((side + stride - 1) // stride, device=device, dtype=dtype)
    centres = ((token + 0.5) * (stride * entries / side) - 0.5)[:, None]
    nearest = centres.floor() + torch.arange(-1, 3, device=device)
    away = (centres - nearest).abs()
    shares = torch.where(away <= 1, (1.25 * away - 2.25) * away**2 + 1, ((3.75 - 0.75 * away) * away - 6) * away + 3)
    inside = nearest.clamp(0, entries - 1)[..., None] == torch.arange(entries, device=device)
    return (shares[..., None] * inside).sum(1)


# oneDNN's linear layer, also with GELU; PyTorch itself multiplies by a slower library, then goes over the result again.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
SMALL, SMALL_MLP = 2**17, 2**14  # elements of a map below which what follows saves less time than asking for it takes
CHUNK = 8 * 2**20  # bytes of the hidden layer of an MLP to compute at a time


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x). A plain nn.Linear in float32 on a CPU, without gradients, takes 0.75 to 0.95 of its time."""
    small = type(x) is Tensor and known(x.numel() < SMALL)  # which fx does not know of what it traces
    if small or not isinstance(layer, nn.Linear) or not _can_be_fast(x, layer):
        return layer(x)
    return _fast(x, layer.weight, layer.bias)


def _fast(x: Tensor, *weights: Tensor | None) -> Tensor:
    """Linear layers, weight and bias of each, with GELU between. Compilers keep it whole, since what they make of it is
    slower."""
    return _compiled_linears(x, list(weights)) if torch.compiler.is_compiling() else _linears(x, list(weights))


def _linears(x: Tensor, weights: list[Any]) -> Tensor:
    *hidden, weight, bias = weights
    if hidden:  # in chunks that stay in the cache: of DaViT's first stages in half of the time, and little memory
        count = x.shape[:-1].numel() * hidden[0].shape[0] * x.element_size() // CHUNK
        if count > 1:
            parts = x.flatten(0, -2).chunk(count)
            return torch.cat([_linears(part, weights) for part in parts]).view(*x.shape[:-1], -1)
        x = _ONEDNN(x, *hidden, "gelu", [], "none")
    return _ONEDNN(x, weight, bias, "none", [], "none")


@torch.library.custom_op("visionattn::linears", mutates_args=(), device_types="cpu")
def _compiled_linears(x: Tensor, weights: list[Tensor | None]) -> Tensor:
    return _linears(x, weights)


@_compiled_linears.register_fake
def _(x: Tensor, weights: list[Any]) -> Tensor:
    return x.new_empty(*x.shape[:-1], weights[-2].shape[0])


def _can_be_fast(x: Tensor, *layers: nn.Linear) -> bool:
    return (
        _ONEDNN is not None
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
        and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or torch.jit.is_tracing())
        and torch.autograd.forward_ad._current_level < 0
        and not transforms()
        and type(x) is Tensor
        and all(is_plain(layer, nn.Linear) for layer in layers)
        and all((y.device.type, y.dtype) == ("cpu", torch.float32) for y in (x, *(layer.weight for layer in layers)))
    )


@register_notrace_module
class Mlp(timm.layers.Mlp):
    """timm's two layers with GELU between. On a CPU without gradients, if its hidden layer is large, in chunks, and in
    float32 with GELU fused into the first layer; so only where all its layers are plain."""

    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.GELU

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or known(x.numel() < SMALL_MLP) or not self._is_plain():
            return super().forward(x)
        if not self.training and self.act.approximate == "none" and _can_be_fast(x, self.fc1, self.fc2):
            return _fast(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        forward = super().forward
        if torch.compiler.is_compiling():  # whose sizes may be symbols
            return forward(x)
        count = x.shape[:-1].numel() * self.fc1.out_features * x.element_size() // CHUNK
        if count < 2:
            return forward(x)
        return torch.cat([forward(part) for part in x.flatten(0, -2).chunk(count)]).view(*x.shape[:-1], -1)

    def _is_plain(self) -> bool:
        linears, dropouts = (self.fc1, self.fc2), (self.drop1, self.drop2)
        kinds = {nn.Linear: linears, nn.GELU: [self.act], nn.Dropout: dropouts, nn.Identity: [self.norm]}
        return all(is_plain(layer, kind) for kind, layers in kinds.items() for layer in layers)
