"""Agent Attention: a few agents, averages of the queries, see all of a map and tell it to every position.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024,
https://arxiv.org/abs/2312.08874. Here is what its four networks share, `agent_deit.py`, `agent_pvt.py`, `agent_swin.py`
and `agent_cswin.py`. The authors' classification code, https://github.com/LeapLabTHU/Agent-Attention, has no licence:
all is written from the equations, and computes the same functions. Special:
- the cost of attention grows with the number of positions, not with its square;
- both of its softmaxes have a bias, a coarse one of 7 x 7 places plus one of rows plus one of columns;
- a depthwise convolution of the values makes up for what agents blur.

Any size of image: tables of rows, columns and positions are stretched from the size that they were built for, as the
authors do when they load weights for another size, and maps are rounded up.

Maps are (B, H, W, C), and in attention (B, H, W, heads, C / heads).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, register_notrace_module, to_2tuple, trunc_normal_
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import Backbone
from visionattn.backbones.layers import Mlp, channels_last, linear, pad_to_multiple, pool_to, stretch
from visionattn.kernels import _record, agent_attention
from visionattn.kernels._check import known
from visionattn.kernels._packed import unpack

__all__ = ["AgentAttention", "Block", "MapAttention", "PatchEmbed"]

Size = tuple[int, int]
COARSE = 7  # places a side of a coarse bias
UNPUBLISHED = "its weights are files of a cloud drive, see https://github.com/LeapLabTHU/Agent-Attention"


@register_notrace_module
class PatchEmbed(nn.Module):
    """(B, source, H, W) -> (B, H / patch, W / patch, dim), rounded up.

    eps: of the norm after it; None for none.
    """

    def __init__(self, source: int, dim: int, patch: int, eps: float | None = 1e-5) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(source, dim, patch, patch)
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(channels_last(pad_to_multiple(x, self.patch))).permute(0, 2, 3, 1))


class AgentAttention(nn.Module):
    """What all kinds of it share, from queries, keys and values on.

    agents: how many, a square number.
    size, keys: rows and columns of the map, and of that of keys, where tables are as they were trained.
    """

    an_bias: nn.Parameter
    na_bias: nn.Parameter
    ah_bias: nn.Parameter
    aw_bias: nn.Parameter
    ha_bias: nn.Parameter
    wa_bias: nn.Parameter

    def __init__(self, dim: int, num_heads: int, agents: int, size: Size, keys: Size | None = None) -> None:
        super().__init__()
        self.num_heads, self.side = num_heads, math.isqrt(agents)
        if self.side**2 != agents or agents < 1:
            raise ValueError(f"agent_num={agents}: expected square numbers, such as 9, 16 or 49")
        rows, columns = size if keys is None else keys
        shapes = {
            "an_bias": (num_heads, agents, COARSE, COARSE),
            "na_bias": (num_heads, agents, COARSE, COARSE),
            "ah_bias": (1, num_heads, agents, rows, 1),
            "aw_bias": (1, num_heads, agents, 1, columns),
            "ha_bias": (1, num_heads, size[0], 1, agents),
            "wa_bias": (1, num_heads, 1, size[1], agents),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02)))
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def set_size(self, size: Size, keys: Size | None = None) -> None:
        """Stretch the tables for another map, as new parameters."""
        lengths = dict(zip(AXES, (*(size if keys is None else keys), *size), strict=True))
        for name, length in lengths.items():
            table = getattr(self, name)
            stretched = stretch(table.detach(), AXES[name], length, "bilinear").clone()
            setattr(self, name, nn.Parameter(stretched, table.requires_grad))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Maps (B, H, W, heads, head_dim), those of keys and values perhaps smaller -> (B, H, W, dim)"""
        size, keys = (q.shape[1], q.shape[2]), (k.shape[1], k.shape[2])
        return agent_attention(q, k, v, self.pooled(q), *self.biases(size, keys)).flatten(3) + self.local(v, size)

    def pooled(self, q: Tensor) -> Tensor:
        """The agents (B, n, heads, head_dim)."""
        bins = pool_to(q.flatten(3).permute(0, 3, 1, 2), (self.side, self.side))
        return bins.flatten(2).mT.unflatten(-1, (self.num_heads, -1))

    def local(self, v: Tensor, size: Size) -> Tensor:
        v = v.flatten(3).permute(0, 3, 1, 2)
        if not (known(v.shape[2] == size[0]) and known(v.shape[3] == size[1])):
            v = F.interpolate(v, size, mode="bilinear")
        return self.dwc(v).permute(0, 2, 3, 1)

    def biases(self, size: Size, keys: Size) -> tuple[Tensor, Tensor]:
        """(heads, n, keys) and (heads, H * W, n)"""
        of_keys = _bias(self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0], keys)
        of_queries = _bias(self.na_bias, self.ha_bias[0, :, :, 0].mT, self.wa_bias[0, :, 0].mT, size)
        return of_keys, of_queries.mT.contiguous()


AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}  # of AgentAttention's tables, that maps stretch


def _bias(coarse: Tensor, rows: Tensor, columns: Tensor, size: Size) -> Tensor:
    """(heads, n, 7, 7), (heads, n, rows), (heads, n, columns) -> (heads, n, H * W)"""
    coarse = stretch(stretch(coarse, 2, size[0], "bilinear"), 3, size[1], "bilinear")
    rows, columns = (stretch(x, 2, n, "bilinear") for x, n in zip((rows, columns), size, strict=True))
    return (coarse + rows[..., None] + columns[..., None, :]).flatten(2)


@register_notrace_module
class MapAttention(AgentAttention):
    """Agent attention on a map (B, H, W, dim), whose queries, keys and values are one projection of it.

    window: rows and columns of windows that it is cut into; None for none. shift: where these start. All positions of a
    window attend to each other, also those that the shift brought together: the authors mask none.
    """

    def __init__(
        self, dim: int, num_heads: int, agents: int, size: Size, window: Size | None = None, shift: int = 0
    ) -> None:
        super().__init__(dim, num_heads, agents, size if window is None else window)
        self.window, self.shift = window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(self.qkv, x)
        if self.window is None:
            return linear(self.proj, self.attend(*unpack(qkv.unflatten(-1, (3, self.num_heads, -1)))))
        size = x.shape[1], x.shape[2]
        if _record.active():
            places = torch.arange(size[0] * size[1], device=x.device).view(1, *size, 1)
            _record.place(cut(places.roll((-self.shift, -self.shift), (1, 2)), self.window)[..., 0])
        qkv = cut(qkv.roll((-self.shift, -self.shift), (1, 2)), self.window)
        x = join(self.attend(*unpack(qkv.unflatten(-1, (3, self.num_heads, -1)))), size)
        return linear(self.proj, x.roll((self.shift, self.shift), (1, 2)))


def cut(x: Tensor, window: Size) -> Tensor:
    """(B, H, W, C) -> windows of it (B * windows, *window, C)"""
    height, width = x.shape[1], x.shape[2]
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"windows of agents, {window[0]} x {window[1]}, do not divide a map of {height} x {width}: choose images"
            " of another size, or a window_size (split_size) as large as the map"
        )
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(0, 2)


def join(x: Tensor, size: Size) -> Tensor:
    """The opposite of `cut`, to a map of H x W = size."""
    rows, columns = size[0] // x.shape[1], size[1] // x.shape[2]
    return x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Block(nn.Module):
    """Attention and MLP on (..., dim), each with a residual; more arguments are for attention."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *more))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def agent_blocks(attn_type: str, depths: Sequence[int]) -> list[list[bool]]:
    """Which blocks of each stage have agents, by the authors' letters: A all, B none, M as many of the first ones as
    the next digit after the letters says.

    Raises ValueError for other letters, or not one for each stage.
    """
    letters, digits = attn_type[: len(depths)], attn_type[len(depths) :]
    right = len(letters) == len(depths) and set(letters) <= set("ABM") and set(digits) <= set("0123456789")
    if not right or len(digits) != letters.count("M"):
        raise ValueError(
            f"attn_type={attn_type!r}: expected A, B or M for each of {len(depths)} stages, then a digit for each M"
        )
    blocks, first = [], iter(digits)
    for letter, depth in zip(letters, depths, strict=True):
        count = int(next(first)) if letter == "M" else depth * (letter == "A")
        blocks.append([i < count for i in range(depth)])
    return blocks


def map_size(img_size: int | Size, stride: int) -> Size:
    """Rows and columns of a map at this stride; raises ValueError for less than 32 pixels."""
    height, width = to_2tuple(img_size)
    if min(height, width) < 32:
        raise ValueError(f"img_size={img_size}: expected at least 32 x 32 pixels")
    return -(-height // stride), -(-width // stride)


def positions(table: Tensor, grid: Size, size: Size) -> Tensor:
    """The table (1, positions of grid, C) -> (1, *size, C)"""
    return stretch(stretch(table.unflatten(1, grid), 1, size[0], "bicubic"), 2, size[1], "bicubic")


def fit_checkpoint(
    state_dict: dict[str, Any], model: Backbone, rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names, its tables stretched to the model's size.

    Position tables of a checkpoint are those of square images. Raises ValueError for a checkpoint of a network of other
    widths or depths.
    """
    derived = ("relative_position_index", "attn_mask")
    theirs = {rename(key): value for key, value in unwrap(state_dict).items() if not key.endswith(derived)}
    for key, ours in model.state_dict().items():
        parent, _, name = key.rpartition(".")
        table = theirs.get(key)
        if table is None or table.shape == ours.shape or table.ndim != ours.ndim:
            continue
        if name in AXES:
            theirs[key] = stretch(table, AXES[name], ours.shape[AXES[name]], "bilinear")
        elif name == "pos_embed":
            side = math.isqrt(table.shape[1])
            leading = table.shape[1] - side**2
            owner: Any = model.get_submodule(parent)
            patches = positions(table[:, leading:], (side, side), owner.grid).flatten(1, 2)
            theirs[key] = torch.cat([table[:, :leading], patches], 1)
        elif name == "relative_position_bias_table":
            source, target = math.isqrt(len(table)), math.isqrt(len(ours))
            theirs[key] = positions(table[None], (source, source), (target, target))[0].flatten(0, 1)
    check_checkpoint(theirs, model)
    return theirs


def imagenet_cfg(top1: float, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "none",
        "origin_url": "https://github.com/LeapLabTHU/Agent-Attention",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
        "paper_ids": "arXiv:2312.08874",
        "description": f"ImageNet-1k top-1 {top1} %",
        **kwargs,
    }
