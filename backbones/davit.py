"""DaViT: a pyramid of blocks whose attention is over the tokens of a window, then over the channels of a group.

Ding et al., DaViT: Dual Attention Vision Transformers, ECCV 2022, https://arxiv.org/abs/2204.03645. Same functions,
argument names and state-dict keys as timm's `davit_*`, from https://github.com/dingmyu/davit. Special:
- a block of windows and a block of channels take turns: local detail, and all of the image at linear cost;
- in channel attention, as published, keys ask values, and queries are what is mixed (the paper has it the other way);
- positions come from depthwise convolutions before attention and before the MLP.

Any size of image, as in timm: it is zero padded below and to the right where a patch needs it, and so is the normalised
map of a block where windows need it. Tokens added there take part in attention: they are keys that the bias makes.

Maps are (B, H, W, C) from the stem to the last stage; what leaves the network is (B, C, H, W).
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    register_notrace_module,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, twin_cfgs, unwrap
from visionattn.backbones.backbone import HeadClassifier, create
from visionattn.backbones.layers import (
    Mlp,
    channels_last,
    check_in_chans,
    init_linear,
    linear,
    pad_map_to_multiple,
    pad_to_multiple,
)
from visionattn.kernels import _record, channel_attention, window_attention
from visionattn.kernels._packed import unpack
from visionattn.kernels._plain import crop

__all__ = ["DaViT"]

torch.fx.wrap("pad_to_multiple")


class ConvPosition(nn.Module):
    """Adds a depthwise 3 x 3 convolution of a map (B, H, W, dim) to it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class WindowAttention(nn.Module):
    """Attention inside windows of a map (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = pad_map_to_multiple(x, self.window_size, self.window_size)
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        if _record.active():
            _record.place()
        x = window_attention(q, k, v, self.window_size)
        return linear(self.proj, crop(x, (height, width)).flatten(3))


@register_notrace_module
class ChannelAttention(nn.Module):
    """Attention over the channels of groups of a map (B, H, W, dim)."""

    def __init__(self, dim: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_groups, -1)))
        return linear(self.proj, channel_attention(k, v, q, self.num_groups).flatten(3))


class Block(nn.Module):
    """Attention and MLP on a map (B, H, W, dim), each after a position encoding and with a residual."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.cpe1 = ConvPosition(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = ConvPosition(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> map (B, H / 4, W / 4, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(pad_to_multiple(x, 4))
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Map (B, H, W, source) -> (B, H / 2, W / 2, target), rounded up."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(source)
        self.conv = nn.Conv2d(source, target, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_to_multiple(self.norm(x).permute(0, 3, 1, 2), 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Downsampling, and pairs of a block of windows and a block of channels.

    drop_paths: the rate of stochastic depth of each pair.
    """

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential()
        for rate in drop_paths:
            attns = WindowAttention(dim, num_heads, window_size), ChannelAttention(dim, num_heads)
            self.blocks.append(nn.Sequential(*(Block(dim, attn, mlp_ratio, rate) for attn in attns)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class DaViT(HeadClassifier):
    """DaViT for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        depths: pairs of blocks of each of the four stages.
        embed_dims, num_heads: channels, and heads (of channel attention: groups) of each stage.
        window_size: tokens of a window on a side.
        mlp_ratio: hidden channels of the MLP over embed_dims.
        img_size: accepted and not used: any size will do.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.stem = Stem(in_chans, embed_dims[0])
        self.stages = nn.Sequential()
        drop_paths: Sequence[Any] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (dim, heads, rates) in enumerate(zip(embed_dims, num_heads, drop_paths, strict=True)):
            downsample = Downsample(embed_dims[i - 1], dim) if i else nn.Identity()
            self.stages.append(Stage(downsample, dim, heads, window_size, mlp_ratio, rates))
        norm = partial(LayerNorm2d, eps=1e-5)
        head = partial(NormMlpClassifierHead, self.num_features, num_classes, drop_rate=drop_rate, norm_layer=norm)
        self.set_head(head, global_pool)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]  # nn.Module declares no attributes

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            yield x
        yield x.permute(0, 3, 1, 2)

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.stages)
        self.stages = self.stages[:stages]
        if head or cut:
            self.head = ClassifierHead(self.num_features, 0, "")
            self.num_classes = 0


FROM_AUTHORS = {
    r"^patch_embeds\.0\.proj\.": "stem.conv.",
    r"^patch_embeds\.0\.": "stem.",
    r"^patch_embeds\.(\d+)\.proj\.": r"stages.\1.downsample.conv.",
    r"^patch_embeds\.(\d+)\.": r"stages.\1.downsample.",
    r"^main_blocks\.(\d+)\.": r"stages.\1.blocks.",
    r"\.cpe\.0\.": ".cpe1.",
    r"\.cpe\.1\.": ".cpe2.",
    r"^norms\.": "head.norm.",
    r"^head\.(weight|bias)$": r"head.fc.\1",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: DaViT) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with timm's key names, which are ours; timm's passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    renamed = {}
    for key, value in unwrap(state_dict).items():
        for pattern, name in FROM_AUTHORS.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    check_checkpoint(renamed, model)
    return renamed


SMALL = {"depths": (1, 1, 9, 1)}
BASE = {"depths": (1, 1, 9, 1), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
LARGE = {"depths": (1, 1, 9, 1), "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
HUGE = {"depths": (1, 1, 9, 1), "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
GIANT = {"depths": (1, 1, 12, 3), "embed_dims": (384, 768, 1536, 3072), "num_heads": (12, 24, 48, 96)}

PAPER = {
    "origin_url": "https://github.com/dingmyu/davit",
    "paper_name": "DaViT: Dual Attention Vision Transformers",
    "paper_ids": "arXiv:2204.03645",
}
default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for size in ("tiny", "small", "base", "large", "huge", "giant")
        for name, cfg in twin_cfgs(f"davit_{size}", **PAPER).items()
    }
)


def _create_davit(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(DaViT, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def va_davit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_davit("va_davit_tiny", pretrained, **kwargs)


@register_model
def va_davit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_davit("va_davit_small", pretrained, **{**SMALL, **kwargs})


@register_model
def va_davit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_davit("va_davit_base", pretrained, **{**BASE, **kwargs})


@register_model
def va_davit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_davit("va_davit_large", pretrained, **{**LARGE, **kwargs})


@register_model
def va_davit_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_davit("va_davit_huge", pretrained, **{**HUGE, **kwargs})


@register_model
def va_davit_giant(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_davit("va_davit_giant", pretrained, **{**GIANT, **kwargs})
