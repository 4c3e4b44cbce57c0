"""Outlook attention in the benchmark: the outlooker stages of VOLO, and timm's form of it.

Every candidate is called with q, k, v and the arguments of a case: kernel_size, stride, scale. Outlook attention has no
queries and keys: what VOLO projects from the map is read off q and k instead, at the same cost for all candidates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import outlook_attention

__all__ = ["CANDIDATES", "cases", "macs"]


def _logits(q: Tensor, k: Tensor, kernel_size: int, stride: int) -> Tensor:
    """(B, h, w, heads, K, K), half of the numbers from the q and half from the k of a window's places."""
    heads, count = q.shape[3], kernel_size**4

    def of_windows(x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(*x.shape[:3], heads, -1)

    numbers = torch.cat([of_windows(q)[..., : count // 2], of_windows(k)[..., : count - count // 2]], -1)
    return numbers.unflatten(-1, (kernel_size**2, kernel_size**2))


def outlook_by_unfold(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    """Outlook attention as timm's OutlookAttention computes it between its projections: unfold, matmul, fold."""
    b, height, width, heads, dim = v.shape
    logits = _logits(q, k, kernel_size, stride)
    places, padding, windows = kernel_size**2, kernel_size // 2, logits.shape[1] * logits.shape[2]
    v = F.unfold(v.flatten(3).permute(0, 3, 1, 2), kernel_size, padding=padding, stride=stride)
    v = v.reshape(b, heads, dim, places, windows).permute(0, 1, 4, 3, 2)
    weights = (logits.flatten(1, 2).permute(0, 2, 1, 3, 4) * scale).softmax(-1)
    mixed = (weights @ v).permute(0, 1, 4, 3, 2).reshape(b, heads * dim * places, windows)
    output = F.fold(mixed, (height, width), kernel_size, padding=padding, stride=stride)
    return output.permute(0, 2, 3, 1).reshape(b, height, width, heads, dim)


def outlook(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, stride: int, scale: float) -> Tensor:
    return outlook_attention(_logits(q, k, kernel_size, stride), v, kernel_size, stride, scale=scale)


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: the first stage of volo_d1 and volo_d3."""
    return [(f"{name}, {size} px", size // 8, heads, 32, (3, 2, 32**-0.5)) for name, heads in (("d1", 6), ("d3", 8))]


def macs(side: int, heads: int, dim: int, kernel_size: int, stride: int, scale: float) -> float:
    """Multiply-adds of one image: the weights of each window with its values."""
    return (side / stride) ** 2 * heads * dim * kernel_size**4


CANDIDATES = {"timm": outlook_by_unfold, "visionattn": outlook}
