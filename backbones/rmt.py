"""RMT: attention that fades with distance, by rows and columns where maps are large.

Fan et al., RMT: Retentive Networks Meet Vision Transformers, CVPR 2024, https://arxiv.org/abs/2309.11523. Same
functions as the authors' networks, https://github.com/qhfan/RMT, whose code for classification has no licence: written
from the paper and from what their networks compute. Special:
- what a position gives to another falls with the rows and columns between them, in each head at another rate; the
  logarithm of it is added to the logits (the paper multiplies weights by it);
- in the first stages a position attends to its row, and then to its column of the result, with the same q and k;
- rotary positions, by the number of a position in its map, row by row;
- convolutions everywhere: 3 x 3 before attention and in the MLP, 5 x 5 of the values beside attention.

Any size of image: nothing is learned of a position, and convolutions of stride 2 round up.

Maps are (B, H, W, C).
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_module,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import (
    DepthwiseConv,
    channels_last,
    check_in_chans,
    conv_norm,
    init_linear,
    linear,
    rotate,
)
from visionattn.kernels import decayed_attention
from visionattn.kernels._check import precise

__all__ = ["RMT"]

torch.fx.wrap("turns_of_places")


@register_notrace_module
class ConvNorm(nn.Sequential):
    """3 x 3 convolution, rounding up, and batch norm of a map (B, C, H, W)."""

    def __init__(self, source: int, target: int, stride: int) -> None:
        super().__init__(nn.Conv2d(source, target, 3, stride, padding=1), nn.BatchNorm2d(target))

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, *self)


class Stem(nn.Sequential):
    """Image (B, in_chans, H, W) -> map (B, H / 4, W / 4, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        half = dim // 2
        convs = ConvNorm(in_chans, half, 2), ConvNorm(half, half, 1), ConvNorm(half, dim, 2), ConvNorm(dim, dim, 1)
        super().__init__(*(layer for conv in convs for layer in (conv, nn.GELU())))
        del self[-1]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_last(x)).permute(0, 2, 3, 1)


class Downsample(ConvNorm):
    """(B, H, W, source) -> (B, H / 2, W / 2, target), rounded up."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(source, target, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def turns_of_places(x: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines (H, W, head_dim / 2, 2) of what `rotate` turns the positions of a map (B, H, W, C) by."""
    size = x.shape[1:3]
    fractions = torch.linspace(0, 1, head_dim // 2, dtype=precise(x), device=x.device)
    places = torch.arange(size[0] * size[1], dtype=precise(x), device=x.device)
    angles = places[:, None] * 10000**-fractions
    return torch.stack([angles.cos(), angles.sin()], -1).unflatten(0, size)


@register_notrace_module
class Retention(nn.Module):
    """Decayed attention on a map (B, H, W, dim), of rotated q and k, beside a convolution of v.

    decay_range: head h of n loses 2 ** (-2 - decay_range * h / n) with each step.
    by_axis: attend to the row, then to the column, in place of the map.
    """

    def __init__(self, dim: int, num_heads: int, decay_range: float, by_axis: bool) -> None:
        super().__init__()
        self.num_heads, self.by_axis = num_heads, by_axis
        self.decay = [math.log(1 - 2 ** (-2 - decay_range * head / num_heads)) for head in range(num_heads)]
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        qk, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], 3)
        (q, k), v = rotate(qk, turns[:, :, None, None]).unbind(3), v.squeeze(3)
        x = v
        for along in ("rows", "columns") if self.by_axis else ("map",):
            x = decayed_attention(q, k, x, self.decay, along)
        return linear(self.proj, x.flatten(3) + self.lepe(v.flatten(3)))


class ConvMlp(nn.Module):
    """Two layers over channels of a map (B, H, W, dim), with GELU and a residual convolution between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(linear(self.fc1, x))
        return linear(self.fc2, x + self.dwconv(x))


class Block(nn.Module):
    """Convolution, retention and MLP on a map (B, H, W, dim), each with a residual.

    layer_scale: initial value of the learned scale of the last two, None for no scale.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = self._add(x, self.gamma_1, self.attn(self.norm1(x), turns))
        return self._add(x, self.gamma_2, self.mlp(self.norm2(x)))

    def _add(self, x: Tensor, gamma: Tensor | None, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + branch if gamma is None else torch.addcmul(x, gamma, branch)


class Stage(nn.Module):
    """The blocks of a map, and what halves it after them."""

    def __init__(self, head_dim: int, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Projection(nn.Module):
    """The last map (B, source, H, W) -> the features of the classifier (B, target, H, W)."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.fc = nn.Linear(source, target)
        self.norm = nn.BatchNorm2d(target)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(linear(self.fc, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class RMT(MapClassifier):
    """RMT for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32. `visionattn.record_attention` keeps two weights for each
    layer that attends by axis: of rows, then of columns.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden channels over channels of each
            stage.
        decay_ranges: of the heads of each stage, how many times slower in the last one what a position gives falls
            with distance than in the first, as a power of 2.
        by_axis: how many stages, from the first, attend to rows and columns in place of the map.
        layer_scales: of each stage the initial value of the learned scale of residual branches, None for no scale.
        projection: channels of the features of the classifier, which the last map is projected to.
        token_label: add to the logits half the largest ones of single positions of the last map, as the authors'
            networks do that were trained with a label for each; `forward_head` alone does not.
        extra_norms: a layer norm of each map that `features_only` and `forward_intermediates` return, as the authors'
            dense models have; not for classification, where these layers would have no gradient.
        img_size: accepted and not used: any size will do.
    """

    stages: Any  # nn.ModuleList of Stage
    projection: Any

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        decay_ranges: Sequence[float] = (4, 4, 6, 6),
        by_axis: int = 2,
        layer_scales: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        token_label: bool = False,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        of_stages = {"num_heads": num_heads, "mlp_ratios": mlp_ratios, "decay_ranges": decay_ranges}
        _check(depths, embed_dims=embed_dims, layer_scales=layer_scales, **of_stages)
        self.num_classes, self.in_chans, self.token_label = num_classes, in_chans, token_label
        self.num_features = self.head_hidden_size = projection
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}.blocks.{depth - 1}"}
            for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True))
        ]
        self.patch_embed = Stem(in_chans, embed_dims[0])
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks = []
            for _ in range(depth):
                attn = Retention(dim, num_heads[i], decay_ranges[i], i < by_axis)
                blocks.append(Block(dim, attn, mlp_ratios[i], layer_scales[i], next(drop_paths)))
            last = i == len(depths) - 1
            downsample = nn.Identity() if last else Downsample(dim, embed_dims[i + 1])
            self.stages.append(Stage(dim // num_heads[i], blocks, downsample))
        self.extra_norms = nn.ModuleList(map(nn.LayerNorm, embed_dims)) if extra_norms else None
        self.projection = Projection(embed_dims[-1], projection)
        self.global_pool, self.head_drop, self.head = make_classifier(
            projection, num_classes, global_pool, drop_rate=drop_rate
        )
        self.aux_head = nn.Linear(embed_dims[-1], num_classes) if token_label and num_classes else None
        self.apply(init_linear)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As of every classifier; the one for single positions of `token_label` is replaced too."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = None
        if self.token_label and num_classes:
            dim = self.feature_info[-1]["num_chs"]
            self.aux_head = nn.Linear(dim, num_classes, **get_device_dtype(self)).train(self.training)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.downsample", (99999,)),
            (r"^(?:extra_norms|projection|aux_head)\b", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        for stage in self.stages:
            turns = turns_of_places(x, stage.head_dim)
            for block in stage.blocks:
                x = checkpoint(block, x, turns) if self.grad_checkpointing else block(x, turns)
            yield x
            x = stage.downsample(x)
        yield self.projection(x.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.aux_head is None:
            return super().forward(x)
        features, maps = self.forward_intermediates(x, 1, output_fmt="NHWC")
        return self.forward_head(features) + 0.5 * self.aux_head(maps[0]).amax((1, 2))

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        return x if self.extra_norms is None else self.extra_norms[stage](x)

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        if not head and not norm and stages == len(self.stages):
            self.num_features = self.head_hidden_size = self.projection.fc.out_features
            return
        self.stages = self.stages[:stages]
        self.stages[-1].downsample = nn.Identity()
        if self.extra_norms is not None:
            self.extra_norms = self.extra_norms[:stages]
        self.projection = nn.Identity()
        self.reset_classifier(0, "")


def _check(depths: Sequence[int], **of_stages: Sequence[Any]) -> None:
    for name, values in of_stages.items():
        if len(values) != len(depths):
            raise ValueError(f"{name}: {len(values)} values were given for {len(depths)} stages (length of depths)")
    for dim, heads in zip(of_stages["embed_dims"], of_stages["num_heads"], strict=True):
        if heads < 1 or dim % (2 * heads):
            raise ValueError(
                f"num_heads: {heads} heads cannot share pairs of the {dim} channels of their stage equally"
            )


OUR_NAMES = {
    r"layers\.(\d+)\.": r"stages.\1.",
    r"retention_layer_norm\.": "norm1.",
    r"final_layer_norm\.": "norm2.",
    r"retention\.": "attn.",
    r"out_proj\.": "proj.",
    r"ffn\.": "mlp.",
    r"conv\.(weight|bias)$": r"\1",
    r"reduction\.": "0.",
    r"downsample\.norm\.": "downsample.1.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RMT) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names; ours passes unchanged. It holds for any size.

    The classifier of single positions is left out where it is of other classes than the model's.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = in_our_names(unwrap(state_dict))
    if model.aux_head is not None:
        for key, value in model.aux_head.state_dict(prefix="aux_head.").items():
            if key in state_dict and state_dict[key].shape != value.shape:
                state_dict[key] = value
    check_checkpoint(state_dict, model)
    return state_dict


def in_our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' network or of a layer of it, with our key names and shapes.

    Their tables of angles and of decay are left out: they follow from the sizes of a network.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if re.search(r"(^|\.)(Relpos\.)?(angle|decay)$", key):
            continue
        if match := re.match(r"patch_embed\.proj\.(\d+)\.", key):
            key = f"patch_embed.{int(match[1]) // 3 * 2}.{int(match[1]) % 3}.{key[match.end() :]}"
        for theirs, ours in OUR_NAMES.items():
            key = re.sub(rf"(?:^|(?<=\.)){theirs}", ours, key)
        if key.startswith(("proj.", "norm.")) and "head.weight" in state_dict:
            key = f"projection.{key.replace('proj.', 'fc.')}"
        renamed[key] = value.flatten() if re.search(r"gamma_[12]$", key) else value
    for key in [key for key in renamed if re.search(r"(^|\.)q_proj\.", key)]:
        parts = [renamed.pop(key.replace("q_proj.", f"{name}_proj.")) for name in "qkv"]
        renamed[key.replace("q_proj.", "qkv.")] = torch.cat(parts)
    return renamed


def _cfg(top1: float, top1_of_places: float | None = None) -> dict[str, Any]:
    of_places = f"; {top1_of_places} % with a label for each position" if top1_of_places else ""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0.0",
        "classifier": "head",
        "license": "not stated",
        "origin_url": "https://github.com/qhfan/RMT",
        "paper_name": "RMT: Retentive Networks Meet Vision Transformers",
        "paper_ids": "arXiv:2309.11523",
        "description": f"ImageNet-1k top-1 {top1} %{of_places}",
    }


default_cfgs = generate_default_cfgs(
    {
        "rmt_tiny": _cfg(82.4),
        "rmt_small": _cfg(84.1, 84.8),
        "rmt_base": _cfg(85.0, 85.6),
        "rmt_large": _cfg(85.5, 86.1),
    }
)


def _create_rmt(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    unpublished = (
        "its weights are on Baidu alone, where a program cannot fetch them; the README of qhfan/RMT links them"
    )
    return create(RMT, variant, pretrained, checkpoint_filter_fn, unpublished=unpublished, **kwargs)


BY_AXIS: dict[str, Any] = {"mlp_ratios": (4, 4, 3, 3), "by_axis": 3}
DEEP: dict[str, Any] = {**BY_AXIS, "depths": (4, 8, 25, 8), "layer_scales": (None, None, 1e-6, 1e-6)}


@register_model
def rmt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """14.3 M parameters, 2.6 GMACs at 224 x 224."""
    return _create_rmt("rmt_tiny", pretrained, **kwargs)


@register_model
def rmt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """27.0 M parameters, 4.8 GMACs at 224 x 224."""
    return _create_rmt("rmt_small", pretrained, **{**BY_AXIS, "depths": (3, 4, 18, 4), **kwargs})


@register_model
def rmt_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """54.2 M parameters, 10.4 GMACs at 224 x 224."""
    size = {"embed_dims": (80, 160, 320, 512), "num_heads": (5, 5, 10, 16), "decay_ranges": (5, 5, 6, 6)}
    return _create_rmt("rmt_base", pretrained, **{**DEEP, **size, **kwargs})


@register_model
def rmt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """95.5 M parameters, 19.5 GMACs at 224 x 224."""
    size = {"embed_dims": (112, 224, 448, 640), "num_heads": (7, 7, 14, 20), "decay_ranges": (6, 6, 6, 6)}
    return _create_rmt("rmt_large", pretrained, **{**DEEP, **size, **kwargs})
