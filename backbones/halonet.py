"""HaloNet: a residual network whose blocks attend, in place of a 3 x 3 convolution, to a block of positions and a halo.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021,
https://arxiv.org/abs/2103.12731. Two kinds of network:
- `va_halonet26t`, `va_halonet50ts`, `va_sehalonet33ts`: convolutions in early blocks, attention in later ones. The same
  functions and state-dict keys as timm's networks of those names (Apache-2.0).
- `va_halonet_h0` to `va_halonet_h7`: attention in all blocks, the paper's table. The authors published no code and no
  weights. timm has only `halonet_h1`; ours follows the paper where they differ: heads are 16 channels wide in every
  stage, so that there are 4, 8, 16 and 32, while timm has 8 heads of 8, 16, 32 and 64 channels. What the paper leaves
  open is as in timm: batch norm and activation after attention, relative logits from queries that are not scaled, one
  pair of tables for all heads of a layer, no downsampling but by strided queries. With that the numbers of parameters
  are those of the paper.

Any size of image. Blocks are counted from the first row and column of a map. Where they do not divide it, or where the
map is smaller than a block, the last ones reach over its edge, and there as in every halo keys and values are zeros.

Maps are (B, C, H, W), in channels-last memory.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    DropPath,
    SEModule,
    calculate_drop_path_rates,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, twin_cfgs, unwrap
from visionattn.backbones.backbone import HeadClassifier, create
from visionattn.backbones.layers import channels_last, check_in_chans, conv_norm
from visionattn.kernels import halo_attention

__all__ = ["HaloNet"]

WIDTHS = (64, 128, 256, 512)  # of attention and of 3 x 3 convolutions, by stage


@register_notrace_module
class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, unless None, activation. Rounds sizes up."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    act: nn.Module

    def __init__(
        self, source: int, target: int, kernel_size: int = 1, stride: int = 1, act: type[nn.Module] | None = None
    ) -> None:
        conv = nn.Conv2d(source, target, kernel_size, stride, padding=kernel_size // 2, bias=False)
        activation = nn.Identity() if act is None else act(inplace=True)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(target), act=activation))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(conv_norm(x, self.conv, self.bn))


class RelativeTables(nn.Module):
    """Rows for the distances of keys from queries inside a block with its halo, along height and along width."""

    def __init__(self, side: int, head_dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * side - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * side - 1, head_dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.height_rel, self.width_rel


@register_notrace_module
class HaloAttention(nn.Module):
    """Halo attention on a map (B, dim, H, W) -> (B, value_dim, H / stride, W / stride), rounded up.

    dim: channels of queries and keys, all heads together; value_dim: those of values. stride: of queries; it divides
    block_size.
    """

    def __init__(
        self, dim: int, value_dim: int, num_heads: int, block_size: int, halo_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.num_heads, self.block_size, self.halo_size = num_heads, block_size, halo_size
        self.dim_head_qk, self.dim_head_v = dim // num_heads, value_dim // num_heads
        self.q = nn.Conv2d(dim, dim, 1, stride, bias=False)
        self.kv = nn.Conv2d(dim, dim + value_dim, 1, bias=False)
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, self.dim_head_qk)

    def reset_parameters(self) -> None:
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        for table in self.pos_embed.parameters():
            trunc_normal_(table, std=self.dim_head_qk**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (y.permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1)) for y in (self.q(x), self.kv(x)))
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], -1)
        x = halo_attention(q, k, v, self.block_size, self.halo_size, *self.pos_embed())
        return x.flatten(3).permute(0, 3, 1, 2)


class Block(nn.Module):
    """1 x 1 convolution to a width, the layers that mix positions, by name, 1 x 1 convolution, with a residual around.

    width, mixed: channels before and after the layers that mix; stride: theirs.
    """

    def __init__(
        self,
        source: int,
        width: int,
        mixers: dict[str, nn.Module],
        mixed: int,
        target: int,
        stride: int,
        act: type[nn.Module],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.shortcut = ConvNorm(source, target, 1, stride) if source != target or stride > 1 else nn.Identity()
        self.conv1_1x1 = ConvNorm(source, width, act=act)
        self.mixers = list(mixers)
        for name, layer in mixers.items():
            self.add_module(name, layer)
        self.conv3_1x1 = ConvNorm(mixed, target)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = act(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.conv1_1x1(x)
        for name in self.mixers:
            x = self.get_submodule(name)(x)
        return self.act(self.drop_path(self.conv3_1x1(x)) + shortcut)


def create_stem(in_chans: int, kernel_size: int, pool: bool, act: type[nn.Module]) -> nn.Sequential:
    """Image (B, in_chans, H, W) -> map (B, 64, H / 4, W / 4): one convolution of 7 x 7 or three of 3 x 3."""
    if kernel_size == 7:
        convs = [ConvNorm(in_chans, 64, 7, 2, act)]
    else:
        convs = [ConvNorm(in_chans, 24, 3, 2, act), ConvNorm(24, 32, 3, 1, act)]
        convs.append(ConvNorm(32, 64, 3, 1 if pool else 2, act))
    stem = nn.Sequential(OrderedDict((f"conv{i}", conv) for i, conv in enumerate(convs, 1)))
    if pool:
        stem.add_module("pool", nn.MaxPool2d(3, 2, padding=1))
    return stem


class HaloNet(HeadClassifier):
    """HaloNet for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        blocks: for each of the four stages a string with a letter for each block: c convolution, a attention.
        channels: of the map of each stage.
        num_heads: of the attention of each stage, whose queries and keys have 64, 128, 256 and 512 channels in all.
        value_ratio: channels of values by those of queries and keys.
        block_size, halo_size: of attention.
        stem_kernel: 3 for three convolutions of 3 x 3, or 7 for one of 7 x 7.
        stem_pool: max pooling after them; if False, the last of the three has stride 2.
        act_layer: activation.
        squeeze_excite: weigh the channels after each 3 x 3 convolution of a block.
        final_channels: of a last 1 x 1 convolution, which belongs to the last map; 0 for none.
        img_size: accepted and not used: any size will do.
    """

    map_format = "NCHW"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        blocks: Sequence[str] = ("cc", "cc", "ca", "aa"),
        channels: Sequence[int] = (256, 512, 1024, 2048),
        num_heads: Sequence[int] = (8, 8, 8, 8),
        value_ratio: float = 1.0,
        block_size: int = 8,
        halo_size: int = 3,
        stem_kernel: int = 3,
        stem_pool: bool = True,
        act_layer: type[nn.Module] = nn.ReLU,
        squeeze_excite: bool = False,
        final_channels: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if set("".join(blocks)) - {"c", "a"}:
            raise ValueError(f"blocks={blocks}: expected only the letters c (convolution) and a (attention)")
        if block_size % 2:
            raise ValueError(f"block_size={block_size}: expected an even number, for the strided queries")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = create_stem(in_chans, stem_kernel, stem_pool, act_layer)
        self.stages = nn.Sequential()
        source = 64
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(map(len, blocks))))
        for width, kinds, target, heads in zip(WIDTHS, blocks, channels, num_heads, strict=True):
            stage = nn.Sequential()
            for kind in kinds:
                stride = 2 if len(self.stages) and not len(stage) else 1
                if kind == "a":
                    mixed = int(width * value_ratio)
                    attention = HaloAttention(width, mixed, heads, block_size, halo_size, stride)
                    mixers = {"self_attn": attention, "post_attn": BatchNormAct2d(mixed, act_layer=act_layer)}
                else:
                    mixed, mixers = width, {"conv2_kxk": ConvNorm(width, width, 3, stride, act_layer)}
                    if squeeze_excite:
                        mixers["attn"] = SEModule(width)
                stage.append(Block(source, width, mixers, mixed, target, stride, act_layer, next(drop_paths)))
                source = target
            self.stages.append(stage)
        self.final_conv = ConvNorm(source, final_channels, act=act_layer) if final_channels else nn.Identity()
        self.num_features = self.head_hidden_size = final_channels or source
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(channels)
        ]
        self.feature_info[-1] = {"num_chs": self.num_features, "reduction": 32, "module": "final_conv"}
        self.set_head(partial(ClassifierHead, self.num_features, num_classes, drop_rate=drop_rate), global_pool)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final_conv", (99999,))]}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.stem(channels_last(images))
        for i, stage in enumerate(self.stages, 1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i == len(self.stages):
                x = self.final_conv(x)
            yield x
        yield x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.stages)
        self.stages = self.stages[:stages]
        if cut:
            self.final_conv = nn.Identity()
        if head or cut:
            self.head = ClassifierHead(self.num_features, 0, "")
            self.num_classes = 0


def _init_weights(module: nn.Module) -> None:
    """As timm: each block starts as its shortcut."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, HaloAttention):
        module.reset_parameters()
    elif isinstance(module, Block):
        nn.init.zeros_(module.conv3_1x1.bn.weight)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: HaloNet) -> dict[str, Tensor]:
    """timm's checkpoint or ours, bare or wrapped. Raises ValueError for one of a network of other widths or depths."""
    state_dict = unwrap(state_dict)
    check_checkpoint(state_dict, model, r"stages\.\d+\.\d+\.")
    return state_dict


PAPER = {
    "origin_url": "https://arxiv.org/abs/2103.12731",
    "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    "paper_ids": "arXiv:2103.12731",
}
TIMM = {**PAPER, "origin_url": "https://github.com/huggingface/pytorch-image-models", "min_input_size": None}


def _cfg(size: int) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **PAPER,
    }


SIZES = {"h0": 256, "h1": 256, "h2": 256, "h3": 320, "h4": 384, "h5": 448, "h6": 512, "h7": 600}
default_cfgs = generate_default_cfgs(
    {
        **{f"va_halonet_{name}.untrained": _cfg(size) for name, size in SIZES.items()},
        **twin_cfgs("halonet26t", **TIMM),
        **twin_cfgs("halonet50ts", **TIMM),
        **twin_cfgs("sehalonet33ts", **TIMM),
    }
)


def _create_halonet(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(HaloNet, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _paper(third: int, b: int, h: int, rv: float = 1.0, rb: float = 1.0, lf: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a network by the paper's names for them; third: blocks of the third stage."""
    args = {
        "blocks": tuple("a" * depth for depth in (3, 3, third, 3)),
        "channels": tuple(int(width * rb) for width in WIDTHS),
        "num_heads": tuple(width // 16 for width in WIDTHS),
        "value_ratio": rv,
        "block_size": b,
        "halo_size": h,
        "stem_kernel": 7,
        "final_channels": lf,
    }
    return {**args, **kwargs}


@register_model
def va_halonet26t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """12.5 M parameters."""
    return _create_halonet("va_halonet26t", pretrained, **{"halo_size": 2, **kwargs})


@register_model
def va_halonet50ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """22.7 M parameters."""
    blocks = ("ccc", "ccca", "cacaca", "cac")
    args = {"blocks": blocks, "num_heads": (8, 4, 8, 8), "act_layer": nn.SiLU}
    return _create_halonet("va_halonet50ts", pretrained, **{**args, **kwargs})


@register_model
def va_sehalonet33ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """13.7 M parameters."""
    args = {"blocks": ("cc", "cca", "cca", "aa"), "channels": (256, 512, 1024, 1536), "final_channels": 1280}
    args |= {"stem_pool": False, "act_layer": nn.SiLU, "squeeze_excite": True}
    return _create_halonet("va_sehalonet33ts", pretrained, **{**args, **kwargs})


@register_model
def va_halonet_h0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """5.5 M parameters."""
    return _create_halonet("va_halonet_h0", pretrained, **_paper(7, 8, 3, rb=0.5, **kwargs))


@register_model
def va_halonet_h1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """8.1 M parameters."""
    return _create_halonet("va_halonet_h1", pretrained, **_paper(10, 8, 3, **kwargs))


@register_model
def va_halonet_h2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """9.4 M parameters."""
    return _create_halonet("va_halonet_h2", pretrained, **_paper(11, 8, 3, rb=1.25, **kwargs))


@register_model
def va_halonet_h3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """11.8 M parameters."""
    return _create_halonet("va_halonet_h3", pretrained, **_paper(12, 10, 3, rb=1.5, lf=1024, **kwargs))


@register_model
def va_halonet_h4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """19.1 M parameters."""
    return _create_halonet("va_halonet_h4", pretrained, **_paper(12, 12, 2, rb=3.0, lf=1280, **kwargs))


@register_model
def va_halonet_h5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """30.7 M parameters."""
    return _create_halonet("va_halonet_h5", pretrained, **_paper(23, 14, 2, rv=2.5, rb=2.0, lf=1536, **kwargs))


@register_model
def va_halonet_h6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """43.4 M parameters."""
    return _create_halonet("va_halonet_h6", pretrained, **_paper(24, 8, 4, rv=3.0, rb=2.75, lf=1536, **kwargs))


@register_model
def va_halonet_h7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """67.4 M parameters."""
    return _create_halonet("va_halonet_h7", pretrained, **_paper(26, 10, 3, rv=4.0, rb=3.5, lf=2048, **kwargs))
