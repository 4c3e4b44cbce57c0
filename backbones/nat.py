"""NAT, DiNAT and DiNAT_s: pyramids in which each position attends to the positions nearest to it.

Hassani et al., Neighborhood Attention Transformer, CVPR 2023, https://arxiv.org/abs/2204.07143, and Hassani and Shi,
Dilated Neighborhood Attention Transformer, 2022, https://arxiv.org/abs/2209.15001. Same functions and argument names
as the authors' code, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT licence). Special:
- a position has the same number of keys everywhere: windows are shifted inwards at the borders, never padded;
- a bias that is learned for each offset of a key from its query;
- DiNAT spreads the keys of every other block over the map; DiNAT_s does that in the layout of Swin.
Published weights have the bias, which newer releases of the authors' kernels no longer take; here they run as they are.

Any size of image: a map smaller than a window is zero padded below and to the right, and what is padded takes part, as
in the authors' first kernels.

Maps are (B, H, W, C) inside the network, and (B, C, H, W) where it returns them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerScale,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from visionattn.backbones._twins import unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import Mlp, check_in_chans, init_linear, linear
from visionattn.kernels import _record, neighborhood_attention
from visionattn.kernels._check import at_least, known
from visionattn.kernels._packed import unpack
from visionattn.kernels._plain import crop

__all__ = ["NAT"]


class ConvEmbed(nn.Module):
    """Overlapping patches of an image: (B, in_chans, H, W) -> (B, H / 4, W / 4, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """(B, H, W, dim) -> (B, H / 2, W / 2, 2 * dim), rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Each position of a map (B, H, W, dim) attends to the kernel_size x kernel_size nearest of its dilation class."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7, dilation: int = 1) -> None:
        super().__init__()
        check_attention(dim, num_heads, kernel_size, dilation)
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window = self.kernel_size * self.dilation
        if not (known(height >= window) and known(width >= window)):
            below, right = (at_least(window - length, 0) for length in (height, width))
            x = F.pad(x, (0, 0, 0, right, 0, below))
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        if _record.active():
            _record.place()
        x = neighborhood_attention(q, k, v, self.kernel_size, self.dilation, bias=self.rpb)
        return linear(self.proj, crop(x.flatten(3), (height, width)))


def check_attention(dim: int, num_heads: int, kernel_size: int, dilation: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads: {num_heads} heads cannot share the {dim} channels of their level equally")
    if kernel_size < 2:
        raise ValueError(f"kernel_size={kernel_size}: expected at least 2")
    if dilation < 1:
        raise ValueError(f"dilations: got {dilation}, expected at least 1")


class Block(nn.Module):
    """Attention and MLP on a map (B, H, W, dim), each with a residual.

    attn: maps (B, H, W, dim) -> (B, H, W, dim). layer_scale: initial value of the learned scale of the residual
    branches, None for no scale.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.gamma1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.gamma2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.gamma2(self.mlp(self.norm2(x))))


class Level(nn.Module):
    """Blocks on a map (B, H, W, dim), and what halves it after them, None in the last level."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class NAT(MapClassifier):
    """NAT for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dim: channels of the first level; they double from level to level.
        depths: blocks of each level.
        num_heads: heads of each level.
        mlp_ratio: hidden channels of the MLP over its input's.
        kernel_size: a position attends to kernel_size x kernel_size.
        dilations: for each level, how far apart these lie in every other block (1 in those between), or that of each
            block. (8, 4, 2, 1) spreads windows of 7 over the maps of 224 x 224 pixels, (13, 6, 3, 1) over those of 384.
        layer_scale: initial value of the learned scale of each residual branch, None for no scale.
        layout: `conv`: 3x3 convolutions make and halve the maps. `swin`: Swin's patches do (DiNAT_s). `isotropic`:
            patches of 16 pixels make a map that keeps its size and channels.
        patch_norm: normalise the embedding of patches; convolutions always do.
        img_size: accepted and not used: any size will do.
    """

    levels: Any  # nn.ModuleList of Level
    norm: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[int | Sequence[int]] = (1, 1, 1, 1),
        layer_scale: float | None = None,
        layout: str = "conv",
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        for name, values in {"num_heads": num_heads, "dilations": dilations}.items():
            if len(values) != len(depths):
                raise ValueError(f"{name}: {len(values)} values were given for {len(depths)} levels (length of depths)")
        if layout not in ("conv", "swin", "isotropic"):
            raise ValueError(f"layout={layout!r}: expected 'conv', 'swin' or 'isotropic'")
        self.num_classes, self.in_chans = num_classes, in_chans
        isotropic = layout == "isotropic"
        growth = [1 if isotropic else 2**i for i in range(len(depths))]
        stride = 16 if isotropic else 4
        self.num_features = self.head_hidden_size = embed_dim * growth[-1]
        self.feature_info = [
            {"num_chs": embed_dim * times, "reduction": stride * times, "module": f"levels.{i}.blocks"}
            for i, times in enumerate(growth)
        ]
        self.patch_embed: nn.Module
        if layout == "conv":
            self.patch_embed = ConvEmbed(in_chans, embed_dim)
        else:
            norm = nn.LayerNorm if patch_norm else None
            self.patch_embed = PatchEmbed(
                None, stride, in_chans, embed_dim, norm, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
            )
        downsample = {"conv": ConvDownsample, "swin": PatchMerging, "isotropic": nn.Identity}[layout]
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.levels = nn.ModuleList()
        for i, (times, depth, heads) in enumerate(zip(growth, depths, num_heads, strict=True)):
            blocks = []
            for dilation in _dilation_of_each_block(dilations[i], depth):
                attn = NeighborhoodAttention(embed_dim * times, heads, kernel_size, dilation)
                blocks.append(Block(embed_dim * times, attn, mlp_ratio, layer_scale, next(drop_paths)))
            self.levels.append(Level(blocks, downsample(embed_dim * times) if i < len(depths) - 1 else None))
        self.norm = nn.LayerNorm(self.num_features)
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {key for key, _ in self.named_parameters() if key.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict:
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)"}
        blocks = [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^levels\.(\d+)\.downsample", (99999,)),
            (r"^norm\b", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        for level in self.levels:
            x = checkpoint_seq(level.blocks, x) if self.grad_checkpointing else level.blocks(x)
            yield x
            if level.downsample is not None:
                x = level.downsample(x)
        yield self.norm(x).permute(0, 3, 1, 2)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the map of the last level."""
        return self.norm(x) if norm and stage == len(self.levels) - 1 else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.levels)
        self.levels = self.levels[:stages]
        self.levels[-1].downsample = None
        if norm or cut:
            self.norm = nn.Identity()
        if head or cut:
            self.reset_classifier(0, "")


def _dilation_of_each_block(dilation: int | Sequence[int], depth: int) -> Sequence[int]:
    if isinstance(dilation, int):
        return [dilation if i % 2 else 1 for i in range(depth)]
    if len(dilation) != depth:
        raise ValueError(f"dilations: {dilation} has {len(dilation)} values, for a level of {depth} blocks")
    return dilation


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, or that of the transformers library, with our key names; ours passes
    unchanged.

    Raises ValueError for a checkpoint of a network of other widths, depths or windows.
    """
    state_dict = unwrap(state_dict)
    if any(".layernorm_before." in key for key in state_dict):
        state_dict = _from_transformers(state_dict)
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(r"^layers\.(\d+)\.(?!blocks|downsample)", r"levels.\1.blocks.0.", key)  # isotropic
        key = re.sub(r"^layers\.", "levels.", key)  # DiNAT_s
        key = re.sub(r"\.gamma([12])$", r".gamma\1.gamma", key)
        if not key.endswith(".relative_position_index"):
            renamed[key] = value
    theirs, ours = _configuration(renamed), _configuration(model.state_dict())
    if theirs != ours:
        raise ValueError(
            f"the checkpoint is of a network with {theirs}, expected {ours}: create the model that it belongs to, or"
            " pass its arguments"
        )
    return renamed


FROM_TRANSFORMERS = {
    r"^(?:dinat|nat)\.": "",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.": "patch_embed.",
    r"^encoder\.levels\.(\d+)\.layers\.": r"levels.\1.blocks.",
    r"^encoder\.": "",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.self\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


def _from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for key, value in state_dict.items():
        for theirs, name in FROM_TRANSFORMERS.items():
            key = re.sub(theirs, name, key)
        ours[key] = value
    for key in [key for key in ours if ".attn.query." in key]:
        qkv = [ours.pop(key.replace(".query.", f".{name}.")) for name in ("query", "key", "value")]
        ours[key.replace(".query.", ".qkv.")] = torch.cat(qkv)
    for key in [key for key in ours if key.endswith(".layer_scale_parameters")]:
        block = key.removesuffix("layer_scale_parameters")
        ours[f"{block}gamma1"], ours[f"{block}gamma2"] = ours.pop(key)
    return ours


def _configuration(state_dict: dict[str, Tensor]) -> str:
    tables = {
        key: table for key, table in state_dict.items() if re.fullmatch(r"levels\.\d+\.blocks\.\d+\.attn\.rpb", key)
    }
    depths = tuple(Counter(key.split(".")[1] for key in tables).values())
    kernel_sizes = {(table.shape[-1] + 1) // 2 for table in tables.values()}
    norm = state_dict.get("levels.0.blocks.0.norm1.weight")
    scaled = any(".gamma1." in key for key in state_dict)
    kernel_size = kernel_sizes.pop() if len(kernel_sizes) == 1 else None
    return f"embed_dim={None if norm is None else len(norm)}, {depths=}, {kernel_size=}, layer scale: {scaled}"


NAT_WEIGHTS = "https://shi-labs.com/projects/nat/checkpoints/CLS"
DINAT_WEIGHTS = "https://shi-labs.com/projects/dinat/checkpoints"


def imagenet_cfg(top1: float | None, **kwargs: Any) -> dict[str, Any]:
    """What the authors' networks share; the paper is DiNAT's unless given."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_name": "Dilated Neighborhood Attention Transformer",
        "paper_ids": "arXiv:2209.15001",
        "description": f"ImageNet-1k top-1 {top1} %",
        **kwargs,
    }


def _hub(name: str) -> dict[str, str]:
    return {"hf_hub_id": f"shi-labs/{name}", "hf_hub_filename": "pytorch_model.bin"}


def _nat_cfg(size: str, top1: float) -> dict[str, Any]:
    paper = {"paper_name": "Neighborhood Attention Transformer", "paper_ids": "arXiv:2204.07143"}
    return imagenet_cfg(top1, url=f"{NAT_WEIGHTS}/nat_{size}.pth", **_hub(f"nat-{size}-in1k-224"), **paper)


def _dinat_cfg(file: str, top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    folder, name = file.split("/")
    if name.startswith("dinat_s_"):
        kwargs["first_conv"] = "patch_embed.proj"
    elif folder == "imagenet1k":  # the others are not on the hub
        kwargs |= _hub(name.replace("_", "-"))
    return imagenet_cfg(top1, url=f"{DINAT_WEIGHTS}/{file}.pth", **kwargs)


AT_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
AT_22K: dict[str, Any] = {"num_classes": 21841, "description": "trained on the 21,841 classes of ImageNet-22k"}
default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _nat_cfg("mini", 81.8),
        "nat_tiny.in1k": _nat_cfg("tiny", 83.2),
        "nat_small.in1k": _nat_cfg("small", 83.7),
        "nat_base.in1k": _nat_cfg("base", 84.3),
        "dinat_mini.in1k": _dinat_cfg("imagenet1k/dinat_mini_in1k_224", 81.8),
        "dinat_tiny.in1k": _dinat_cfg("imagenet1k/dinat_tiny_in1k_224", 82.7),
        "dinat_small.in1k": _dinat_cfg("imagenet1k/dinat_small_in1k_224", 83.8),
        "dinat_base.in1k": _dinat_cfg("imagenet1k/dinat_base_in1k_224", 84.4),
        "dinat_large.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_224", 86.6),
        "dinat_large.in22k_ft_in1k_384": _dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384", 87.4, **AT_384),
        "dinat_large.in22k": _dinat_cfg("imagenet22k/dinat_large_in22k_224", **AT_22K),
        "dinat_s_tiny.in1k": _dinat_cfg("imagenet1k/dinat_s_tiny_in1k_224", 81.8),
        "dinat_s_small.in1k": _dinat_cfg("imagenet1k/dinat_s_small_in1k_224", 83.5),
        "dinat_s_base.in1k": _dinat_cfg("imagenet1k/dinat_s_base_in1k_224", 83.8),
        "dinat_s_large.in22k_ft_in1k": _dinat_cfg("imagenet1k/dinat_s_large_in1k_224", 86.5),
        "dinat_s_large.in22k_ft_in1k_384": _dinat_cfg("imagenet1k/dinat_s_large_in1k_384", 87.4, **AT_384),
        "dinat_s_large.in22k": _dinat_cfg("imagenet22k/dinat_s_large_in22k_224", **AT_22K),
    }
)


def _create_nat(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if variant.startswith("dinat"):
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        at_384 = (cfg.tag or "").endswith("_384")
        kwargs.setdefault("dilations", (13, 6, 3, 1) if at_384 else (8, 4, 2, 1))
    return create(NAT, variant, pretrained, checkpoint_filter_fn, **kwargs)


TINY = {"depths": (3, 4, 18, 5)}
SMALL = {"depths": (3, 4, 18, 5), "embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
BASE = {"depths": (3, 4, 18, 5), "embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0}
LARGE = {"depths": (3, 4, 18, 5), "embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}
SWIN = {"depths": (2, 2, 18, 2), "mlp_ratio": 4.0, "layout": "swin"}


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """20.0 M parameters, 2.7 GMACs at 224 x 224."""
    return _create_nat("nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """27.9 M parameters, 4.3 GMACs at 224 x 224."""
    return _create_nat("nat_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """50.7 M parameters, 7.8 GMACs at 224 x 224."""
    return _create_nat("nat_small", pretrained, **{**SMALL, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """89.8 M parameters, 13.7 GMACs at 224 x 224."""
    return _create_nat("nat_base", pretrained, **{**BASE, "layer_scale": 1e-5, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """20.0 M parameters, 2.7 GMACs at 224 x 224."""
    return _create_nat("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """27.9 M parameters, 4.3 GMACs at 224 x 224."""
    return _create_nat("dinat_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """50.7 M parameters, 7.8 GMACs at 224 x 224."""
    return _create_nat("dinat_small", pretrained, **{**SMALL, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """89.8 M parameters, 13.7 GMACs at 224 x 224."""
    return _create_nat("dinat_base", pretrained, **{**BASE, "layer_scale": 1e-5, **kwargs})


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """200.9 M parameters, 30.5 GMACs at 224 x 224."""
    return _create_nat("dinat_large", pretrained, **{**LARGE, **kwargs})


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28.3 M parameters, 4.5 GMACs at 224 x 224."""
    return _create_nat("dinat_s_tiny", pretrained, **{**SMALL, **SWIN, "depths": (2, 2, 6, 2), **kwargs})


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """49.6 M parameters, 8.7 GMACs at 224 x 224."""
    return _create_nat("dinat_s_small", pretrained, **{**SMALL, **SWIN, **kwargs})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """87.8 M parameters, 15.4 GMACs at 224 x 224."""
    return _create_nat("dinat_s_base", pretrained, **{**BASE, **SWIN, **kwargs})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """196.5 M parameters, 34.5 GMACs at 224 x 224."""
    return _create_nat("dinat_s_large", pretrained, **{**LARGE, **SWIN, **kwargs})
