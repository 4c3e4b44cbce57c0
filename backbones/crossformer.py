"""CrossFormer and CrossFormer++: pyramids with patches of several sizes at once, and attention near and far in turn.

Wang et al., CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention, ICLR 2022,
https://arxiv.org/abs/2108.00154, and CrossFormer++, TPAMI 2023, https://arxiv.org/abs/2303.06908. Same functions and
argument names as the authors' code, https://github.com/cheerss/CrossFormer (MIT licence). Special:
- each token is made by convolutions of several kernel sizes, between stages too (cross-scale embedding);
- blocks attend in turn inside windows (short distance) and between tokens `interval` apart (long distance);
- the position bias of a pair of tokens is what a small network makes of their offset, so windows may have any size;
- "++" grows the windows from stage to stage and cools amplitudes: a convolution and a norm after every third block.

Any size of image: a map no larger than a window on a side is attended as a whole, as in the authors' dense models.

Maps are (B, H, W, C) inside the network, and (B, C, H, W) where it returns them.
"""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    register_notrace_module,
    resample_abs_pos_embed,
    to_2tuple,
    to_ntuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import DepthwiseConv, Mlp, check_in_chans, init_linear, linear, pad_to_multiple
from visionattn.kernels import _record, window_attention
from visionattn.kernels._check import autocasting, decided
from visionattn.kernels._packed import unpack
from visionattn.kernels._plain import keep

__all__ = ["CrossFormer"]

SMALL = "maps of at most {} places a side are one group, larger ones are cut"


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class CrossScaleConv(nn.ModuleList):
    """Convolutions of one stride and several kernel sizes, side by side: (B, in_dim, H, W) -> (B, H', W', dim).

    The larger a kernel, the fewer its channels: dim / 2, dim / 4, ..., the last as many as the one before it. An input
    that the stride does not divide is zero padded below and to the right.
    """

    def __init__(self, in_dim: int, dim: int, kernel_sizes: Sequence[int], stride: int) -> None:
        last = len(kernel_sizes) - 1
        if dim % 2**last:
            raise ValueError(f"embed_dim: {dim} channels cannot be halved {last} times, for kernels {kernel_sizes}")
        widths = [dim // 2 ** min(i + 1, last) for i in range(last + 1)]
        super().__init__(
            nn.Conv2d(in_dim, width, size, stride, padding=(size - stride) // 2)
            for size, width in zip(kernel_sizes, widths, strict=True)
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.stride)
        return torch.cat([conv(x) for conv in self], 1).permute(0, 2, 3, 1)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Cross-scale embedding of an image: (B, in_chans, H, W) -> (B, H / 4, W / 4, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.projs = CrossScaleConv(in_chans, dim, patch_size, patch_size[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projs(x))


@register_notrace_module
class PatchMerging(nn.Module):
    """Cross-scale embedding of a map: (B, H, W, dim) -> (B, H / 2, W / 2, 2 * dim), rounded up."""

    def __init__(self, dim: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.reductions = CrossScaleConv(dim, 2 * dim, patch_size, patch_size[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.reductions(self.norm(x).permute(0, 3, 1, 2))


class DynamicPosBias(nn.Module):
    """Offsets (N, 2), in tokens down and right -> position bias of each head (N, heads)."""

    def __init__(self, dim: int, num_heads: int, residual: bool = False) -> None:
        super().__init__()
        width = dim // 4
        self.residual = residual
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Linear(width, out))
            for out in (width, width, num_heads)
        )

    def forward(self, offsets: Tensor) -> Tensor:
        x = self.pos_proj(offsets)
        x = x + self.pos1(x) if self.residual else self.pos1(x)
        x = x + self.pos2(x) if self.residual else self.pos2(x)
        return self.pos3(x)


@register_notrace_module
class GroupAttention(nn.Module):
    """Attention on a map (B, H, W, dim) inside groups of group_size x group_size tokens.

    Args:
        interval: 1: a group is a window (short distance). Otherwise (long distance) the map is cut into regions of
            group_size * interval tokens on a side, and a group is what lies `interval` apart in a region; "adaptive":
            as far apart as it takes to have one region. In either case a map that is no larger than group_size on a
            side is one group.
        position_bias: add a position bias to the logits.
        pad_type: 0 pads maps that groups do not fill below and to the right, 1 on all sides.
        no_mask: what is padded takes part in attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int = 7,
        interval: int | str = 1,
        position_bias: bool = True,
        pad_type: int = 0,
        no_mask: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} heads cannot share the {dim} channels of their stage equally")
        if position_bias and dim < 16:
            raise ValueError(f"embed_dim: a stage has {dim} channels, expected at least 16")
        self.num_heads, self.group_size, self.interval = num_heads, group_size, interval
        self.pad_type, self.no_mask = pad_type, no_mask
        self.pos = DynamicPosBias(dim // 4, num_heads) if position_bias else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        group, longest = self.group_size, max(x.shape[1:3])
        if any(decided(side <= group, SMALL.format(group)) for side in x.shape[1:3]):
            group, interval = longest, 1
        else:
            interval = _ceil_div(longest, group) if isinstance(self.interval, str) else self.interval
        if self.no_mask or self.pad_type == 1:
            return self._padded(x, group, interval)
        places = _places(x) if _record.active() else None
        return linear(self.proj, self._attend(x, group, interval, None, places))

    def _padded(self, x: Tensor, group: int, interval: int) -> Tensor:
        """Attention with padded tokens before the map, or with those that are keys."""
        height, width = x.shape[1:3]
        below, right = (-length % (group * interval) for length in (height, width))
        above, left = (below // 2, right // 2) if self.pad_type == 1 else (0, 0)
        padding = left, right - left, above, below - above
        mask = None if self.no_mask else F.pad(x.new_ones(1, height, width, dtype=torch.bool), padding)
        places = F.pad(_places(x), padding, value=-1) if _record.active() else None
        x = self._attend(F.pad(x, (0, 0, *padding)), group, interval, mask, places)
        return linear(self.proj, x[:, above : above + height, left : left + width])

    def _attend(self, x: Tensor, group: int, interval: int, mask: Tensor | None, places: Tensor | None) -> Tensor:
        """(B, H, W, dim) -> the same before the last projection; mask (1, H, W); places (1, H, W) of the map's own,
        where weights are recorded"""
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        if interval == 1:
            groups = min(group, x.shape[1]), min(group, x.shape[2])
            if places is not None:
                _record.place(places)
            return window_attention(q, k, v, groups, bias=self.bias(groups, q), mask=mask).flatten(3)
        rows, columns = (_cut(length, group * interval) for length in x.shape[1:3])

        def far(r: slice, c: slice) -> Tensor:
            own = None if places is None else places[:, r, c]
            return self._far(q[:, r, c], k[:, r, c], v[:, r, c], group, interval, mask, own)

        return torch.cat([torch.cat([far(r, c) for c in columns], 2) for r in rows], 1)

    def _far(
        self, q: Tensor, k: Tensor, v: Tensor, group: int, interval: int, mask: Tensor | None, places: Tensor | None
    ) -> Tensor:
        """(B, H, W, heads, head_dim) -> (B, H, W, dim): long distance in whole regions, or on an axis in a smaller one.

        Groups of a smaller region have fewer tokens; those that interval does not divide are filled up and masked.
        """
        batch = q.shape[0]
        regions = max(1, q.shape[1] // (group * interval)), max(1, q.shape[2] // (group * interval))
        q, k, v = (_split(x, regions) for x in (q, k, v))
        height, width = q.shape[1:3]
        below, right = -height % interval, -width % interval
        if below or right:
            mask = F.pad(q.new_ones(1, height, width, dtype=torch.bool), (0, right, 0, below))
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, right, 0, below)) for x in (q, k, v))
        elif mask is not None:
            mask = _split(mask, regions).repeat(batch, 1, 1)
        groups = q.shape[1] // interval, q.shape[2] // interval
        if places is not None:
            _record.place(F.pad(_split(places, regions), (0, right, 0, below), value=-1))
        x = window_attention(q, k, v, groups, dilated=True, bias=self.bias(groups, q), mask=mask)
        x = x[:, :height, :width].flatten(3).unflatten(0, (-1, *regions))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def bias(self, group: tuple[int, int], like: Tensor) -> Tensor | None:
        """Position bias (heads, tokens of a group, the same) of queries and keys in row-major order.

        like: a tensor of the device and dtype of maps.
        """
        if self.pos is None:
            return None
        offsets, pairs = _offsets(like, group, torch.float32 if autocasting(like) else like.dtype)
        tokens = group[0] * group[1]
        with torch.autocast(like.device.type, enabled=False) if autocasting(like) else nullcontext():
            table = self.pos(offsets)  # of few numbers: casts would take longer
        return table.T.index_select(1, pairs).unflatten(1, (tokens, tokens))


def _places(x: Tensor) -> Tensor:
    """(1, H, W), the places of the map (B, H, W, dim) in row-major order."""
    return torch.arange(x.shape[1] * x.shape[2], device=x.device).view(1, *x.shape[1:3])


@keep
def _offsets(group: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All offsets (N, 2) of a query from a key, and the one of each pair, queries first, in row-major order."""
    steps = (torch.arange(1 - size, size, dtype=dtype, device=device) for size in group)
    offsets = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, 1)
    down, right = (position[:, None] - position + len(position) - 1 for position in map(torch.arange, group))
    pairs = down[:, None, :, None] * (2 * group[1] - 1) + right[:, None]
    return offsets, pairs.flatten().to(device)


def _cut(length: int, region: int) -> list[slice]:
    """The whole regions of an axis, and what is left of it."""
    whole = length // region * region
    return [region for region in (slice(0, whole), slice(whole, length)) if region.start < region.stop]


def _split(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """(B, H, W, ...) -> (B * regions, H / rows of regions, W / columns of regions, ...)"""
    return x.unflatten(2, (regions[1], -1)).unflatten(1, (regions[0], -1)).transpose(2, 3).flatten(0, 2)


class RowwiseConv(nn.Conv2d):
    """3 x 3 convolution of a map (B, H, W, C) over columns and channels, with a kernel for each row.

    The authors' conditional position encoding. Kernels for another number of rows are interpolated linearly.
    """

    bias: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__(rows, rows, 3, padding=1, groups=rows)

    def forward(self, x: Tensor) -> Tensor:
        rows, weight, bias = x.shape[1], self.weight, self.bias
        if rows != self.in_channels:
            kernels = torch.cat([weight.flatten(1), bias[:, None]], 1).T[None]
            kernels = F.interpolate(kernels, rows, mode="linear")[0].T
            weight, bias = kernels[:, :9].reshape(rows, 1, 3, 3), kernels[:, 9]
        return F.conv2d(x, weight, bias, padding=1, groups=rows)


@register_notrace_module
class Block(nn.Module):
    """Attention and MLP on a map (B, H, W, dim), each with a residual.

    Args:
        attn: maps (B, H, W, dim) -> (B, H, W, dim).
        use_extra_conv: end with a cooling layer, a convolution and a norm without residual.
        cpe_rows: rows of the map to make conditional position encodings for; 0 for none.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        use_extra_conv: bool = False,
        cpe_rows: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.cpe = RowwiseConv(cpe_rows) if cpe_rows else None
        self.norm_cpe = nn.LayerNorm(dim) if cpe_rows else None
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ex_conv = DepthwiseConv(dim, 3) if use_extra_conv else None
        self.ex_ln = nn.LayerNorm(dim) if use_extra_conv else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.cpe is not None and self.norm_cpe is not None:
            y = y + self.norm_cpe(self.cpe(y))
        x = x + self.drop_path(self.attn(y))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.ex_conv is None or self.ex_ln is None else self.ex_ln(self.ex_conv(x))


class Stage(nn.Module):
    """Blocks on a map (B, H, W, dim), and the merging of patches that comes after them, None in the last stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


def group_sizes(group_type: str, group_size: Sequence[int], depths: Sequence[int], grid: int) -> list[list[int]]:
    """Group size of each block of each stage, by the authors' rules; grid: tokens on a side in the first stage.

    `constant`: that of the stage. `7_14`: half of it in the first four blocks of the third stage. The others grow from
    4 tokens to the whole map with the depth of the block: `linear` evenly; `linear_div` and `alter` use, beyond half of
    the map, all of it, and in the third stage half of it too: up to 3/4 of the map, or in every other block.
    """
    types = ("constant", "7_14", "linear", "linear_div", "alter")
    if group_type not in types:
        raise ValueError(f"group_type={group_type!r}: expected one of {types}")
    sizes: list[list[int]] = []
    block = 0
    for stage, depth in enumerate(depths):
        side, half = grid // 2**stage, grid // 2**stage // 2
        sizes.append([])
        for i in range(depth):
            grown = side * (4 / grid + block * (1 - 4 / grid) / sum(depths))
            if group_type in ("constant", "7_14"):
                halved = group_type == "7_14" and stage == 2 and i < 4
                size = group_size[stage] // 2 if halved else group_size[stage]
            elif group_type == "linear" or grown <= half:
                size = max(4, math.ceil(grown))
            elif stage == 2 and (grown <= 0.75 * side if group_type == "linear_div" else block % 2 == 0):
                size = half
            else:
                size = side
            sizes[-1].append(size)
            block += 1
    return sizes


class CrossFormer(MapClassifier):
    """CrossFormer for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32. Arguments for which a sequence is allowed take one value
    for all stages or one for each.

    Args:
        embed_dim: channels of the first stage, a multiple of 8; they double from stage to stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        group_size: tokens on a side of a window.
        crs_interval: how far apart the tokens of a group are in every other block.
        mlp_ratio: hidden channels of the MLP over its input's.
        patch_size: kernel sizes of the embedding of the image; the first is its stride.
        merge_size: the same of each embedding between stages.
        use_acl: cooling layers after every third block of a stage but its last (CrossFormer++).
        group_type: how group sizes change with depth, see `group_sizes`.
        adaptive_interval: choose crs_interval by the size of the map, so that long distance is all of it.
        ape: learn absolute positions too; for images of another size than img_size they are interpolated.
        use_cpe: conditional position encodings instead of position bias; interpolated likewise.
        pad_type: 0 pads maps that groups do not divide below and to the right, 1 on all sides.
        no_mask: padded tokens take part in attention.
        img_size: size of image that group types other than constant, `ape` and `use_cpe` are made for; else not used.
    """

    layers: Any  # nn.ModuleList of Stage
    norm: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: int | Sequence[int] = (2, 4, 8, 16),
        group_size: int | Sequence[int] = 7,
        crs_interval: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        patch_size: Sequence[int] = (4, 8, 16, 32),
        merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        use_acl: bool = False,
        group_type: str = "constant",
        adaptive_interval: bool = False,
        ape: bool = False,
        use_cpe: bool = False,
        pad_type: int = 0,
        no_mask: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        super().__init__()
        stages = len(depths)
        num_heads, group_size, crs_interval, mlp_ratios = _by_stage(
            stages, num_heads=num_heads, group_size=group_size, crs_interval=crs_interval, mlp_ratio=mlp_ratio
        )
        if len(merge_size) != stages - 1:
            raise ValueError(f"merge_size: {len(merge_size)} values were given for {stages - 1} mergings")
        check_in_chans(in_chans)
        if min(to_2tuple(img_size)) < 32:
            raise ValueError(f"img_size={img_size}: expected at least 32")
        if pad_type not in (0, 1):
            raise ValueError(f"pad_type={pad_type}: expected 0 (below and to the right) or 1 (on all sides)")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (stages - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**i, "reduction": patch_size[0] * 2**i, "module": f"layers.{i}.blocks"}
            for i in range(stages)
        ]
        self.grid = tuple(_ceil_div(side, patch_size[0]) for side in to_2tuple(img_size))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), embed_dim)) if ape else None

        sizes = group_sizes(group_type, group_size, depths, min(self.grid))
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        options: dict[str, Any] = {"position_bias": not use_cpe, "pad_type": pad_type, "no_mask": no_mask}
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim, rows = embed_dim * 2**i, _ceil_div(self.grid[0], 2**i)
            far = "adaptive" if adaptive_interval else crs_interval[i]
            blocks = []
            for j in range(depth):
                attn = GroupAttention(dim, num_heads[i], sizes[i][j], far if j % 2 else 1, **options)
                cooled = use_acl and j % 3 == 2 and j < depth - 1
                blocks.append(Block(dim, attn, mlp_ratios[i], cooled, rows if use_cpe else 0, next(drop_paths)))
            self.layers.append(Stage(blocks, PatchMerging(dim, merge_size[i]) if i < stages - 1 else None))
        self.norm = nn.LayerNorm(self.num_features)
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)
        if ape:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return set() if self.absolute_pos_embed is None else {"absolute_pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = r"^(?:patch_embed|absolute_pos_embed)"
        if coarse:
            return {"stem": stem, "blocks": r"^layers\.(\d+)"}
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^norm\b", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + self._positions(self.absolute_pos_embed, x.shape[1:3])
        for stage in self.layers:
            x = checkpoint_seq(stage.blocks, x) if self.grad_checkpointing else stage.blocks(x)
            yield x
            if stage.downsample is not None:
                x = stage.downsample(x)
        yield self.norm(x).permute(0, 3, 1, 2)

    def _positions(self, table: Tensor, size: tuple[int, int]) -> Tensor:
        """The table of absolute positions for a map of this size, (1, H, W, C)."""
        if tuple(size) != self.grid:
            table = resample_abs_pos_embed(table, list(size), list(self.grid), num_prefix_tokens=0)
        return table.unflatten(1, size)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the map of the last stage."""
        return self.norm(x) if norm and stage == len(self.layers) - 1 else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.layers)
        self.layers = self.layers[:stages]
        self.layers[-1].downsample = None
        if norm or cut:
            self.norm = nn.Identity()
        if head or cut:
            self.reset_classifier(0, "")


def _by_stage(stages: int, **options: Any) -> list[tuple]:
    """Options with one value, or one for each stage -> the values for each stage."""
    values = {name: to_ntuple(stages)(value) for name, value in options.items()}
    for name, value in values.items():
        if len(value) != stages:
            raise ValueError(f"{name}: {len(value)} values were given for {stages} stages (the length of depths)")
        if min(value) <= 0:
            raise ValueError(f"{name}={value}: expected positive values")
    return list(values.values())


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, without the tables that older ones keep; ours passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = unwrap(state_dict)
    theirs, ours = _configuration(state_dict), _configuration(model.state_dict())
    if theirs != ours:
        raise ValueError(
            f"the checkpoint is of a network with {theirs}, expected {ours}: create the model that it belongs to, or"
            " pass its arguments"
        )
    tables = ("attn.biases", "attn.relative_position_index", "attn_mask")
    return {key: value for key, value in state_dict.items() if not key.endswith(tables)}


def _configuration(state_dict: dict[str, Tensor]) -> str:
    blocks = [key.split(".") for key in state_dict if re.fullmatch(r"layers\.\d+\.blocks\.\d+\.norm1\.weight", key)]
    depths = tuple(Counter(stage for _, stage, *_ in blocks).values())
    norm = state_dict.get("patch_embed.norm.weight")
    cooled = any(".ex_ln." in key for key in state_dict)
    return f"embed_dim={None if norm is None else len(norm)}, {depths=}, use_acl={cooled}"


AUTHORS = "https://github.com/cheerss/CrossFormer"


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    plus_plus = "pp_" in name
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": tuple(f"patch_embed.projs.{i}" for i in range(4)),
        "classifier": "head",
        "license": "mit",
        "origin_url": AUTHORS,
        "paper_name": "CrossFormer++" if plus_plus else "CrossFormer",
        "paper_ids": "arXiv:2303.06908" if plus_plus else "arXiv:2108.00154",
        **kwargs,
    }


PUBLISHED = {  # by the authors: ImageNet-1k top-1 in per cent, and Google Drive's id of the weights (else on Baidu)
    "crossformer_tiny": (81.5, "1YSkU9enn-ITyrbxLH13zNcBYvWSEidfq"),
    "crossformer_small": (82.5, "1RAkigsgr33va0RZ85S2Shs2BhXYcS6U8"),
    "crossformer_base": (83.4, "1bK8biVCi17nz_nkt7rBfio_kywUpllSU"),
    "crossformer_large": (84.0, "1zRWByVW_KIZ87NgaBkDIm60DAsGJErdG"),
    "crossformerpp_small": (83.2, None),
    "crossformerpp_base": (84.2, None),
    "crossformerpp_large": (84.7, None),
    "crossformerpp_huge": (84.9, None),
}
default_cfgs = generate_default_cfgs(
    {name: _cfg(name, description=f"ImageNet-1k top-1 {top1} %") for name, (top1, _) in PUBLISHED.items()}
)


def _create_crossformer(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    drive = PUBLISHED[variant][1]
    place = f"https://drive.google.com/file/d/{drive}" if drive else f"Baidu, linked from {AUTHORS}"
    unpublished = f"a program cannot fetch its weights; download the file by hand from {place}"
    # Published files contain the authors' settings too, as a subclass of dict
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        return create(CrossFormer, variant, pretrained, checkpoint_filter_fn, unpublished=unpublished, **kwargs)


@register_model
def crossformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """27.8 M parameters, 2.9 GMACs at 224 x 224."""
    return _create_crossformer("crossformer_tiny", pretrained, **kwargs)


@register_model
def crossformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """30.7 M parameters, 4.9 GMACs at 224 x 224."""
    args = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _create_crossformer("crossformer_small", pretrained, **{**args, **kwargs})


@register_model
def crossformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """52.0 M parameters, 9.2 GMACs at 224 x 224."""
    args = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    return _create_crossformer("crossformer_base", pretrained, **{**args, **kwargs})


@register_model
def crossformer_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """92.0 M parameters, 16.1 GMACs at 224 x 224."""
    args = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create_crossformer("crossformer_large", pretrained, **{**args, **kwargs})


PLUS_PLUS = {"depths": (2, 2, 18, 2), "group_size": (4, 4, 14, 7), "crs_interval": (4, 2, 1, 1), "use_acl": True}


@register_model
def crossformerpp_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """23.3 M parameters, 4.4 GMACs at 224 x 224."""
    return _create_crossformer("crossformerpp_small", pretrained, **{**PLUS_PLUS, **kwargs})


@register_model
def crossformerpp_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """52.0 M parameters, 9.6 GMACs at 224 x 224."""
    args = {**PLUS_PLUS, "embed_dim": 96, "num_heads": (3, 6, 12, 24)}
    return _create_crossformer("crossformerpp_base", pretrained, **{**args, **kwargs})


@register_model
def crossformerpp_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """92.0 M parameters, 16.7 GMACs at 224 x 224."""
    args = {**PLUS_PLUS, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
    return _create_crossformer("crossformerpp_large", pretrained, **{**args, **kwargs})


@register_model
def crossformerpp_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """96.0 M parameters, 22.0 GMACs at 224 x 224."""
    args = {**PLUS_PLUS, "embed_dim": 128, "depths": (6, 6, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create_crossformer("crossformerpp_huge", pretrained, **{**args, **kwargs})
