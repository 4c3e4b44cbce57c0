"""LGViT: gated linear attention on one map, for medical images of 1024 pixels.

Xu et al., HRMedSeg (later HER-Seg): Unlocking High-resolution Medical Image Segmentation via Memory-efficient Attention
Modeling, 2025, https://arxiv.org/abs/2504.06205. Same functions as the image encoder of the authors' code,
https://github.com/xq141839/HER-Seg (Apache-2.0). Special:
- patches of 16 pixels make a map that keeps its size and its few channels: blocks of convolutions, then of attention;
- attention without a softmax, linear in positions; what it divides by does not see rotary positions;
- rotary positions turn the first half of all channels by rows, the second by columns, so that the first heads know rows
  only, the last ones columns;
- two gates: values come through a bottleneck, and what attention gives is multiplied by a function of its input.

Any size of image: the authors' code takes square ones of one size, since it keeps the turns of all positions. The
classifier is ours: theirs is an encoder, which decoders of segmentation use (`model: {name: lgvit_96, decoder: fpn}`).

Maps are (B, H, W, C).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_module,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import (
    DepthwiseConv,
    Mlp,
    check_in_chans,
    conv_norm,
    init_linear,
    linear,
    rotate,
)
from visionattn.kernels import linear_attention
from visionattn.kernels._check import precise

__all__ = ["LGViT"]

torch.fx.wrap("turns_of_places")


@register_notrace_module
class ConvNorm(nn.Module):
    """Convolution and batch norm of a map (B, C, H, W), which keep its size."""

    def __init__(self, source: int, target: int, kernel_size: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(source, target, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(target)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, self.c, self.bn)


class ConvBlock(nn.Module):
    """Inverted bottleneck with a depthwise convolution: (B, H, W, dim) -> (B, H, W, dim)."""

    def __init__(self, dim: int, ratio: float = 2.0, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.conv1 = ConvNorm(dim, hidden)
        self.act1 = nn.GELU()
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.act2 = nn.GELU()
        self.conv3 = ConvNorm(hidden, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act3 = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        branch = self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))
        return self.act3(x + self.drop_path(branch)).permute(0, 2, 3, 1)


def turns_of_places(x: Tensor) -> Tensor:
    """Cosines and sines (H, W, C / 2, 2) of what `rotate` turns the positions of a map (B, H, W, C) by."""
    size, pairs = x.shape[1:3], x.shape[3] // 4
    frequencies = 10000 ** (-torch.arange(pairs, dtype=precise(x), device=x.device) / pairs)
    rows, columns = (torch.arange(n, dtype=precise(x), device=x.device)[:, None] * frequencies for n in size)
    angles = torch.cat([rows[:, None].expand(*size, -1), columns.expand(*size, -1)], -1)
    return torch.stack([angles.cos(), angles.sin()], -1)


@register_notrace_module
class LinearAttention(nn.Module):
    """Attention without a softmax on a map (B, H, W, dim), beside a convolution of its values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.up_proj = nn.Linear(dim, dim // 4)
        self.down_proj = nn.Linear(dim // 4, dim)
        self.lepe = DepthwiseConv(dim, 3)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        qk = (F.elu(linear(self.qk, x)) + 1).unflatten(-1, (2, -1))
        v = linear(self.down_proj, F.silu(linear(self.up_proj, x)))
        products = qk[:, :, :, 0] * qk[:, :, :, 1].mean((1, 2), keepdim=True)
        sums = products.unflatten(-1, (self.num_heads, -1)).sum(-1, keepdim=True) + 1e-6
        q, k = rotate(qk, turns[:, :, None]).unflatten(-1, (self.num_heads, -1)).unbind(3)
        output = linear_attention(q / sums.to(q.dtype), k, v.unflatten(-1, (self.num_heads, -1)))
        return output.flatten(3) + self.lepe(v)


class Block(nn.Module):
    """Gated attention and MLP on a map (B, H, W, dim), each with a residual."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.act_proj = nn.Linear(dim, dim)
        self.attn = LinearAttention(dim, num_heads)
        self.out_proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        norm = self.norm1(x)
        mixed = self.attn(norm, turns) * F.silu(linear(self.act_proj, norm))
        x = x + self.drop_path(linear(self.out_proj, mixed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LGViT(MapClassifier):
    """LGViT, as a backbone with the map at stride 16 after each stage; the classifier is not the authors'.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dim: channels, a multiple of 4.
        depths: blocks of each stage, of convolutions in the first one.
        num_heads: heads of each stage; the first value is not used.
        mlp_ratio: hidden channels of an MLP, and of a block of convolutions, over embed_dim.
        patch_size: pixels a side of a position.
        img_size: accepted and not used: any size will do.
    """

    stages: Any  # nn.ModuleList of nn.ModuleList of blocks

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 2.0,
        patch_size: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads: {len(num_heads)} values were given for {len(depths)} stages (length of depths)"
            )
        if embed_dim % 4 or any(heads < 1 or embed_dim % heads for heads in num_heads[1:]):
            raise ValueError(f"embed_dim={embed_dim}: expected a multiple of 4 and of num_heads={tuple(num_heads[1:])}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dim
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"stages.{i}.{depth - 1}"}
            for i, depth in enumerate(depths)
        ]
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
        )
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            blocks = nn.ModuleList()
            for drop_path in (next(drop_paths) for _ in range(depth)):
                local = i == 0
                blocks.append(
                    ConvBlock(embed_dim, mlp_ratio, drop_path)
                    if local
                    else Block(embed_dim, heads, mlp_ratio, drop_path)
                )
            self.stages.append(blocks)
        self.global_pool, self.head_drop, self.head = make_classifier(
            embed_dim, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        turns = turns_of_places(x)
        for i, stage in enumerate(self.stages):
            for block in stage:
                arguments = (x, turns) if i else (x,)
                x = checkpoint(block, *arguments) if self.grad_checkpointing else block(*arguments)
            yield x
        yield x.permute(0, 3, 1, 2)

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.stages)
        self.stages = self.stages[:stages]
        if head or cut:
            self.reset_classifier(0, "")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: LGViT) -> dict[str, Tensor]:
    """The authors' checkpoint, of the encoder or of a network with one, with our key names; ours passes unchanged.

    It holds for any size. Of a network the encoder alone is taken. It has no classifier: the model's stays as it is.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = in_our_names(unwrap(state_dict))
    if "head.weight" not in state_dict and model.num_classes:
        state_dict |= model.head.state_dict(prefix="head.")
    check_checkpoint(state_dict, model, r"stages\.\d+\.\d+\.")
    return state_dict


def in_our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' network, of its encoder or of a layer of it, with our key names, without the turns
    of positions."""
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    encoder = "image_encoder."
    if any(key.startswith(encoder) for key in state_dict):
        state_dict = {key.removeprefix(encoder): x for key, x in state_dict.items() if key.startswith(encoder)}
    return {
        re.sub(r"^layers\.(\d+)\.blocks\.", r"stages.\1.", key): value
        for key, value in state_dict.items()
        if not key.endswith("rope.rotations")
    }


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 1024, 1024),
        "pool_size": (64, 64),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/xq141839/HER-Seg",
        "paper_name": "HRMedSeg: Unlocking High-resolution Medical Image Segmentation via Memory-efficient Attention"
        " Modeling",
        "paper_ids": "arXiv:2504.06205",
        "description": "encoder of HER-Seg; the classifier is not the authors'",
    }


default_cfgs = generate_default_cfgs({"lgvit_96": _cfg(), "lgvit_192": _cfg()})


def _create_lgvit(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    place = "https://github.com/xq141839/HER-Seg/tree/main/pretrain_weights"
    unpublished = f"no address of a file of its weights is known here; they are to be looked for at {place}"
    return create(LGViT, variant, pretrained, checkpoint_filter_fn, unpublished=unpublished, **kwargs)


@register_model
def lgvit_96(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """1.0 M parameters without its classifier, 3.9 GMACs at 1024 x 1024."""
    return _create_lgvit("lgvit_96", pretrained, **kwargs)


@register_model
def lgvit_192(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """3.6 M parameters without its classifier, 15.0 GMACs at 1024 x 1024."""
    return _create_lgvit("lgvit_192", pretrained, **{"embed_dim": 192, **kwargs})
