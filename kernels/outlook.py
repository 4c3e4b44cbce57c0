"""Outlook attention: each place of a map gives, from its own features alone, the weights that mix its neighbours.

Yuan et al., VOLO: Vision Outlooker for Visual Recognition, 2021, https://arxiv.org/abs/2106.13112, section 3.

Sizes in comments: B images, h x w windows (one for each stride x stride places of the H x W map), K = kernel_size ** 2
neighbours of a window, N heads, D channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels._check import check_int, check_map, check_tensor, precise
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._function import Function

__all__ = ["outlook_attention"]

SMALL = 2**12  # elements of v, up to which the plain body is faster on a CPU
BAND = 4 * 2**20  # bytes of neighbours at a time, which stay in a CPU's cache
Cut = tuple[slice, slice]  # images, rows of windows


def _reference(
    logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, height, width, heads, dim = v.shape
    h, w = logits.shape[1:3]
    place = torch.arange(kernel_size**2, device=v.device)
    row, column = (stride * torch.arange(n, device=v.device) - padding for n in (h, w))
    y = row[:, None, None] + place // kernel_size  # [h, 1, K]: rows of the neighbours of each window
    x = column[None, :, None] + place % kernel_size  # [1, w, K]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    keys = (y * width + x).where(inside, height * width).flatten(0, 1)  # [h w, K]; H W is a place of zeros
    weights = (logits * scale).softmax(-1).flatten(1, 2).transpose(1, 2).flatten(2, 3)  # [B, N, h w K, K]
    padded = torch.cat([v.flatten(1, 2), v.new_zeros(b, 1, heads, dim)], dim=1)
    mixed = torch.einsum("bnpij,bpjnd->bpind", weights.unflatten(2, (h * w, -1)), padded[:, keys])
    output = torch.zeros_like(padded).index_add(1, keys.flatten(), mixed.flatten(1, 2))[:, :-1]
    places = keys.where(keys < height * width, -1)
    indices = places.repeat_interleave(kernel_size**2, dim=0).expand(b, -1, -1)
    return output.reshape(v.shape), weights, indices, places.flatten()


def _on_cpu(logits: Tensor, v: Tensor, *windows: Any) -> Tensor:
    return (_plain if v.numel() <= SMALL else _Outlook.run)(logits, v, *windows)


def _plain(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    """Neighbours by one copy of a view of the padded map, a matmul, and the copy's transpose on each axis."""
    if v.device.type not in ("cpu", "cuda"):  # some of which have no such transpose
        return _Outlook.run(logits, v, kernel_size, stride, padding, scale)
    b, height, width, heads, dim = v.shape
    h, w = logits.shape[1:3]
    rows, columns = ((n - 1) * stride + kernel_size for n in (h, w))  # of the padded map, all that is in windows
    right, below = columns - width - padding, rows - height - padding
    v = F.pad(v, (0, 0, 0, 0, padding, right, padding, below))
    v = v.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)  # [B, h, w, heads, D, y, x]
    v = v.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)
    mixed = (logits * scale).softmax(-1).to(v.dtype) @ v
    if torch.compiler.is_compiling():  # ONNX knows this transpose
        mixed = mixed.permute(0, 3, 5, 4, 1, 2).flatten(4).flatten(1, 3)
        mixed = F.fold(mixed, (rows, columns), kernel_size, stride=stride).unflatten(1, (heads, dim))
        mixed = mixed.permute(0, 3, 4, 1, 2)
    else:
        mixed = mixed.unflatten(4, (kernel_size, kernel_size)).permute(0, 1, 2, 3, 6, 4, 5)
        size = [b, h, columns, heads, dim, kernel_size]
        mixed = torch.ops.aten.unfold_backward(mixed, size, 2, kernel_size, stride)
        mixed = torch.ops.aten.unfold_backward(mixed, [b, rows, *size[2:5]], 1, kernel_size, stride)
    return F.pad(mixed, (0, 0, 0, 0, -padding, -right, -padding, -below))


class _Outlook(Function):
    """Band by band: copies of slices, matmuls, additions to slices; backward does the same again, keeping nothing.

    Nearly half of the forward time of timm's form on a CPU is torch.softmax over rows of 9: `_softmax` avoids it.
    """

    @staticmethod
    def forward(logits: Tensor, v: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
        windows = (kernel_size, stride, padding)
        output = torch.zeros_like(v, dtype=precise(v), memory_format=torch.contiguous_format)
        for cut in _bands(logits, v):
            weights = _softmax(logits[cut], scale)
            _fold(weights @ _unfold(v, logits.shape[2], cut, windows), output, cut, windows)
        return output.to(v.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        logits, v, *ctx.windows, ctx.scale = inputs
        ctx.save_for_backward(logits, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        logits, v = ctx.saved_tensors
        w = logits.shape[2]
        grad_logits, grad_v = torch.empty_like(logits), torch.zeros_like(v, dtype=precise(v))
        for cut in _bands(logits, v):
            weights = _softmax(logits[cut], ctx.scale)
            grad_mixed = _unfold(grad, w, cut, ctx.windows)
            _fold(weights.mT @ grad_mixed, grad_v, cut, ctx.windows)
            grad_weights = grad_mixed @ _unfold(v, w, cut, ctx.windows).mT
            grad_weights *= weights
            grad_logits[cut] = (grad_weights - weights * grad_weights.sum(-1, keepdim=True)) * ctx.scale
        return grad_logits, grad_v.to(v.dtype), None, None, None, None


def _softmax(logits: Tensor, scale: float) -> Tensor:
    """Softmax over short rows, statistics in float32: six times faster on a CPU than torch.softmax on rows of 9."""
    logits = logits.to(precise(logits)) * scale
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def _bands(logits: Tensor, v: Tensor) -> Iterator[Cut]:
    """Cuts whose neighbours take at most BAND, but at least one row of windows of one image."""
    b, h, w, heads, neighbours, _ = logits.shape
    row_bytes = w * heads * neighbours * max(neighbours, v.shape[-1]) * precise(v).itemsize
    rows = max(1, BAND // row_bytes)
    images, rows = max(1, rows // h), min(rows, h)
    for image in range(0, b, images):
        for row in range(0, h, rows):
            yield slice(image, image + images), slice(row, min(row + rows, h))


def _unfold(x: Tensor, w: int, cut: Cut, windows: tuple[int, int, int]) -> Tensor:
    """The neighbours, zero outside the map, of each window of a band: [B, H, W, N, D] -> [b, rows, w, N, K, D]"""
    images, rows = cut
    x = x[images]
    b, height, width, heads, dim = x.shape
    out = x.new_zeros(b, rows.stop - rows.start, w, heads, windows[0] ** 2, dim, dtype=precise(x))
    for place, band, source in _slices(height, width, rows, w, windows):
        out[:, band[0], band[1], :, place] = x[:, source[0], source[1]]
    return out


def _fold(x: Tensor, out: Tensor, cut: Cut, windows: tuple[int, int, int]) -> None:
    """Adds [b, rows, w, N, K, D] of a band where its neighbours lie in out: [B, H, W, N, D]"""
    images, rows = cut
    out = out[images]
    for place, band, target in _slices(out.shape[1], out.shape[2], rows, x.shape[2], windows):
        out[:, target[0], target[1]] += x[:, band[0], band[1], :, place]


def _slices(
    height: int, width: int, rows: slice, w: int, windows: tuple[int, int, int]
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """For each of the K neighbours: its index, the windows of the band that have it in the map, its places there."""
    kernel_size, stride, padding = windows
    for place in range(kernel_size**2):
        down, right = place // kernel_size - padding, place % kernel_size - padding
        band_rows, map_rows = _inside(rows.start, rows.stop, down, stride, height)
        band_columns, map_columns = _inside(0, w, right, stride, width)
        yield place, (band_rows, band_columns), (map_rows, map_columns)


def _inside(start: int, stop: int, offset: int, stride: int, size: int) -> tuple[slice, slice]:
    """The windows (counted from start) whose place `stride * window + offset` is in the map, and those places."""
    first = max(start, -(offset // stride))
    last = max(first, min(stop, (size - 1 - offset) // stride + 1))
    where = first * stride + offset
    return slice(first - start, last - start), slice(where, where + (last - first) * stride, stride)


def outlook_attention(
    logits: Tensor,
    v: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mix the neighbours of each place with weights that were projected from it, and add up where windows overlap.

    The map has a window of `kernel_size` x `kernel_size` places for each `stride` x `stride` places. For each of the
    K = kernel_size ** 2 places of a window, `logits` weigh its K values; the K mixed values are added to the result at
    those places. Places outside the map count as values of zero (they take their share of the softmax), and what is
    mixed for them is dropped.

    logits: (B, h, w, heads, K, K), the last axis over the values, the one before over the places of the window, both
        row-major; h = (H + 2 padding - kernel_size) // stride + 1, which is ceil(H / stride) for an odd `kernel_size`
        and the default padding; w likewise.
    v: (B, H, W, heads, head_dim), any strides.
    padding: how far windows reach over the border, 0 to `kernel_size // 2`; by default `kernel_size // 2`.
    scale: multiplies the logits; by default `head_dim ** -0.5`, as in VOLO.
    backend: "auto", "reference", "torch" or "triton".

    Returns (B, H, W, heads, head_dim). Recorded weights are those of the windows, (B, heads, N, K) with indices (B, N,
    K), -1 outside of the map, and the places (N,) that their rows add to, at most h w K of them, in order.
    Raises ValueError for shapes, dtypes, devices or parameters that do not fit.
    Source: Yuan et al., VOLO, https://arxiv.org/abs/2106.13112, algorithm 1.
    """
    check_map("v", v)
    check_int("kernel_size", kernel_size, 1)
    check_int("stride", stride, 1)
    padding = kernel_size // 2 if padding is None else padding
    if not isinstance(padding, int) or not 0 <= padding <= kernel_size // 2:
        raise ValueError(f"padding={padding!r}: expected an int from 0 to kernel_size // 2, here {kernel_size // 2}")
    b, *size, heads, dim = v.shape
    if min(size) + 2 * padding < kernel_size:
        raise ValueError(f"kernel_size={kernel_size}: larger than the padded map of v, {size} and padding={padding}")
    windows = [(length + 2 * padding - kernel_size) // stride + 1 for length in size]
    expected = (b, *windows, heads, kernel_size**2, kernel_size**2)
    check_tensor("logits", logits, expected, v)
    scale = dim**-0.5 if scale is None else scale
    forms = Forms(_reference, _on_cpu, _plain)
    return dispatch("outlook", backend, forms, logits, v, kernel_size, stride, padding, scale)
