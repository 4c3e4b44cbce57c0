"""Window attention in the benchmark: the stages of Swin-T and DaViT-T, and what their kernel is compared with.

Every candidate is called with q, k, v and the arguments of a case: window_size, shift, dilated (False), bias.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import window_attention

__all__ = ["CANDIDATES", "cases", "macs"]

WINDOW, HEAD_DIM = 7, 32


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments: shifted windows of Swin-T, and its and DaViT-T's plain ones.

    Swin's last stage, at 224 px one window, and DaViT's differ from the others only in size.
    """
    found = []
    for stage, (step, heads) in enumerate(((4, 3), (8, 6), (16, 12)), 1):
        side = size // step
        bias = 0.02 * torch.randn(heads, WINDOW**2, WINDOW**2, generator=torch.Generator().manual_seed(0))
        for name, shift, table in (("shifted", WINDOW // 2, bias), ("biased", 0, bias), ("plain", 0, None)):
            found.append((f"stage {stage}, {size} px, {name}", side, heads, HEAD_DIM, (WINDOW, shift, False, table)))
    return found


def macs(side: int, heads: int, dim: int, window_size: int, *_: object) -> float:
    """Multiply-adds of one image: two products of each query with its window."""
    return 2 * side**2 * heads * dim * window_size**2


def _partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, tokens, C)"""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).reshape(-1, window**2, x.shape[-1])


@functools.lru_cache(maxsize=16)
def _swin_mask(h: int, w: int, window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 or -100 for the pairs of tokens of each window of the rolled map, which timm makes once for a model."""
    rows, columns = (
        (torch.arange(n, device=device) >= n - window).long() + (torch.arange(n, device=device) >= n - shift)
        for n in (h, w)
    )
    regions = _partition((rows[:, None] * 3 + columns)[None, :, :, None], window)[..., 0]
    return (regions[:, None] != regions[:, :, None]).to(dtype) * -100.0


def window_by_timm(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, shift: int, dilated: bool, bias: Tensor | None
) -> Tensor:
    """What timm does between the projections of Swin, with a bias, or of DaViT, without: windows copied out of the
    padded and rolled map, and a mask of -100."""
    (b, h, w, heads, dim), area = q.shape, window_size**2
    padding = 0, 0, 0, -w % window_size, 0, -h % window_size
    maps = [F.pad(x.flatten(3).roll((-shift, -shift), (1, 2)) if shift else x.flatten(3), padding) for x in (q, k, v)]
    rows, columns = maps[0].shape[1:3]
    q, k, v = (_partition(x, window_size).unflatten(2, (heads, dim)).transpose(1, 2) for x in maps)
    if bias is None:
        output = F.scaled_dot_product_attention(q, k, v)
    else:
        logits = (q * dim**-0.5) @ k.mT + bias.to(q)
        if shift:
            mask = _swin_mask(rows, columns, window_size, shift, q.device, q.dtype)
            logits = (logits.view(b, -1, heads, area, area) + mask[:, None]).view(-1, heads, area, area)
        output = logits.softmax(-1) @ v
    output = output.transpose(1, 2).reshape(b, rows // window_size, -1, window_size, window_size, heads * dim)
    output = output.transpose(2, 3).reshape(b, rows, columns, -1)[:, :h, :w]
    output = output.roll((shift, shift), (1, 2)) if shift else output
    return output.unflatten(3, (heads, dim))


CANDIDATES = {"timm": window_by_timm, "visionattn": window_attention}
