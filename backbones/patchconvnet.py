"""PatchConvNet: one map that convolutions work on, and attention at the end in place of average pooling.

Touvron et al., Augmenting Convolutional Networks with Attention-based Aggregation, 2021,
https://arxiv.org/abs/2112.13692. Same functions as the authors' code, https://github.com/facebookresearch/deit
(Apache-2.0). Special:
- width and depth are all that its sizes differ in: four convolutions of stride 2 make a map of stride 16, which
  residual blocks of a depthwise convolution and squeeze-and-excitation keep;
- a class token attends once, with one head, to all positions: where it looks is a map that explains the class;
- `_multi` has a token, and so a map, for each class.

Any size of image: convolutions of stride 2 round up, and nothing depends on position. The authors' code takes square
images only.

Maps are (B, H, W, C), tokens (B, classes + H * W, C) with the class token, or that of each class, first.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SqueezeExcite, get_device_dtype, register_notrace_module, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import TokenClassifier, create
from visionattn.backbones.layers import Mlp, channels_last, check_in_chans, init_linear, linear
from visionattn.kernels import routing_attention

__all__ = ["PatchConvNet"]


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> map (B, H / 16, W / 16, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential()
        for source, target in ((in_chans, dim // 8), (dim // 8, dim // 4), (dim // 4, dim // 2), (dim // 2, dim)):
            if len(self.proj):
                self.proj.append(nn.GELU())
            self.proj.append(nn.Conv2d(source, target, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(channels_last(x)).permute(0, 2, 3, 1)


@register_notrace_module
class ConvBranch(nn.Module):
    """Two layers over channels of a map (B, H, W, dim); between them a depthwise convolution, and a gate of each
    channel by its mean over the map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.act1 = nn.GELU()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act2 = nn.GELU()
        self.se = SqueezeExcite(dim, rd_channels=round(dim / 4))
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(linear(self.fc1, x)).permute(0, 3, 1, 2)
        x = self.se(self.act2(self.conv(x)))
        return linear(self.fc2, x.permute(0, 2, 3, 1))


class Block(nn.Module):
    """The branch, with a scaled residual: (B, H, W, dim) -> (B, H, W, dim).

    init_scale: initial value of the learned scale.
    """

    def __init__(self, dim: int, init_scale: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ConvBranch(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.gamma_1, self.drop_path(self.attn(self.norm1(x))))


@register_notrace_module
class Aggregation(nn.Module):
    """Class tokens (B, K, dim) attend to keys (B, N, dim) -> (B, K, dim)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        tokens, keys = tokens[:, :, None], keys[:, :, None]
        q, k, v = linear(self.q, tokens), linear(self.k, keys), linear(self.v, keys)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        return linear(self.proj, routing_attention(q, k, v, regions=1, topk=1)[:, :, 0].flatten(2))


class AggregationBlock(nn.Module):
    """Attention and MLP for class tokens (B, K, dim), which look at patches (B, N, dim), each with a scaled residual.

    see_themselves: class tokens are keys too.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, init_scale: float, see_themselves: bool
    ) -> None:
        super().__init__()
        self.see_themselves = see_themselves
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Aggregation(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_scale))

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        norm = self.norm1(torch.cat([tokens, patches], 1))
        classes = tokens.shape[1]
        keys = norm if self.see_themselves else norm[:, classes:]
        tokens = torch.addcmul(tokens, self.gamma_1, self.attn(norm[:, :classes], keys))
        return torch.addcmul(tokens, self.gamma_2, self.mlp(self.norm2(tokens)))


class ClassHead(nn.Module):
    """The logit of each class from its own token: (B, classes, dim) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(trunc_normal_(torch.empty(num_classes, dim), std=0.02))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bkc,kc->bk", x, self.weight)
        return logits + self.bias.to(logits.dtype)


class PatchConvNet(TokenClassifier):
    """PatchConvNet for classification, and as a backbone with a map at stride 16 after every block.

    Takes images (B, in_chans, H, W) of any size from 32 x 32. `visionattn.record_attention` keeps what class tokens
    look at, (B, num_heads, tokens, keys), under `blocks_token_only.0.attn`: of each class the H * W patches where it
    has a token, else the class token, then the patches.

    Args:
        embed_dim, depth: channels, and convolutional blocks.
        num_heads, mlp_ratio_clstk, qkv_bias: of the blocks of class tokens.
        depth_token_only: how many these are.
        init_scale: initial value of the learned scale of each residual branch.
        multiclass: a token for each class, that attends to the patches only, and gives its logit. Before the logits
            (pre_logits, num_classes=0) the mean over these tokens counts.
        global_pool: `token` (the class token), `avg` or `ggem` (of all others) or "" (no pooling).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, the same in all convolutional blocks.
        img_size: accepted and not used: any size will do.
    """

    output_formats = ("NCHW", "NLC")
    blocks_token_only: nn.ModuleList | None
    norm: nn.Module

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 60,
        num_heads: int = 1,
        mlp_ratio_clstk: float = 3.0,
        qkv_bias: bool = True,
        depth_token_only: int = 1,
        init_scale: float = 1e-4,
        multiclass: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if embed_dim % 8 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim}: expected a multiple of 8 and of num_heads={num_heads}")
        self.num_classes, self.in_chans, self.multiclass = num_classes, in_chans, multiclass
        self.num_features = self.head_hidden_size = embed_dim
        self.set_pool(global_pool)
        self.feature_info = [{"num_chs": embed_dim, "reduction": 16, "module": f"blocks.{i}"} for i in range(depth)]
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, num_classes if multiclass and num_classes else 1, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, init_scale, drop_path_rate) for _ in range(depth)))
        self.blocks_token_only = nn.ModuleList(
            AggregationBlock(embed_dim, num_heads, mlp_ratio_clstk, qkv_bias, init_scale, not multiclass)
            for _ in range(depth_token_only)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head()
        trunc_normal_(self.cls_token, std=0.02)
        self.blocks_token_only.apply(init_linear)
        self.head.apply(init_linear)

    def _make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        token_per_class = self.multiclass and self.global_pool == "token"
        return (ClassHead if token_per_class else nn.Linear)(self.num_features, self.num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for num_classes, or by nothing for 0; global_pool "" leaves tokens.

        Where each class has a token these are replaced too, unless num_classes is 0.
        """
        if global_pool is not None:
            self.set_pool(global_pool, self.cls_token is not None)
            self.ggem = self.ggem and self.ggem.to(**get_device_dtype(self))
        self.num_classes = num_classes
        options = get_device_dtype(self)
        if self.multiclass and self.cls_token is not None and num_classes:
            tokens = self.cls_token.new_empty(1, num_classes, self.num_features)
            self.cls_token = nn.Parameter(trunc_normal_(tokens, std=0.02))
        self.head = self._make_head().to(**options).train(self.training)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^(?:cls_token|patch_embed)",
            "blocks": r"^blocks\.(\d+)",
            "class_blocks": [(r"^blocks_token_only\.(\d+)", None), (r"^norm", (99999,))],
        }

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            yield x
        x = x.flatten(1, 2)
        if self.blocks_token_only is not None and self.cls_token is not None:
            tokens = self.cls_token.repeat(x.shape[0], 1, 1)
            for block in self.blocks_token_only:
                tokens = checkpoint(block, tokens, x) if self.grad_checkpointing else block(tokens, x)
            x = torch.cat([tokens, x], 1)
        yield self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        classes = 0 if self.cls_token is None else self.cls_token.shape[1]
        if self.ggem is not None:
            x = self.ggem(x[:, classes:])
        elif self.global_pool == "avg":
            x = x[:, classes:].mean(1)
        elif self.global_pool == "token" and isinstance(self.head, ClassHead) and not pre_logits:
            x = x[:, :classes]
        elif self.global_pool == "token":
            x = x[:, :classes].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the maps of all blocks."""
        return self.norm(x) if norm else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        self.blocks = self.blocks[:stages]
        if norm:
            self.norm = nn.Identity()
        if head:
            self.blocks_token_only = self.cls_token = None
            self.reset_classifier(0, "")


OUR_NAMES = {
    "qkv_pos.0.": "fc1.",
    "qkv_pos.2.": "conv.",
    "qkv_pos.4.conv_reduce.": "se.fc1.",
    "qkv_pos.4.conv_expand.": "se.fc2.",
    "qkv_pos.5.": "fc2.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PatchConvNet) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names; ours passes unchanged.

    Tokens of other classes than the model's are left out: those of the model stay as they are.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = in_our_names(unwrap(state_dict))
    tokens = state_dict.get("cls_token")
    ours = model.cls_token if model.multiclass else None
    if tokens is not None and ours is not None and tokens.shape[1] not in (1, ours.shape[1]):
        state_dict["cls_token"] = ours.detach()
    check_checkpoint(state_dict, model)
    return state_dict


def in_our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' network or of a layer of it, with our key names and shapes."""
    renamed: dict[str, Tensor] = {}
    heads: dict[str, list[Tensor]] = {}  # of a network with a classifier for each class
    for key, value in state_dict.items():
        if match := re.fullmatch(r"head\.\d+\.(weight|bias)", key):
            heads.setdefault(f"head.{match[1]}", []).append(value)
            continue
        if re.search(r"qkv_pos\.[05]\.weight$", key):  # convolutions of one position
            value = value.flatten(1)
        for theirs, ours in OUR_NAMES.items():
            key = key.replace(theirs, ours)
        renamed[re.sub(r"^(patch_embed\.proj\.\d+)\.0\.", r"\1.", key)] = value
    return renamed | {key: torch.cat(values) for key, values in heads.items()}


WEIGHTS = "https://dl.fbaipublicfiles.com/deit"


def _cfg(file: str | None = None, top1: float | None = None, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"{WEIGHTS}/{file}.pth" if file else "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 16, size // 16),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/facebookresearch/deit",
        "paper_name": "Augmenting Convolutional Networks with Attention-based Aggregation",
        "paper_ids": "arXiv:2112.13692",
        "description": f"ImageNet-1k top-1 {top1} %" if top1 else "",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "patchconvnet_s60.fb_in1k": _cfg("s60_224_1k", 82.1),
        "patchconvnet_s60.fb_in22k_ft_in1k": _cfg("s60_224_21k", 83.5),
        "patchconvnet_s60.fb_in22k_ft_in1k_384": _cfg("s60_384_21k", 84.9, 384),
        "patchconvnet_s60.fb_in22k_ft_in1k_512": _cfg("s60_512_21k", 85.4, 512),
        "patchconvnet_s120.fb_in1k": _cfg("s120_224_1k", 83.2),
        "patchconvnet_b60.fb_in1k": _cfg("b60_224_1k", 83.5),
        "patchconvnet_b60.fb_in22k_ft_in1k": _cfg("b60_224_21k", 85.4),
        "patchconvnet_b60.fb_in22k_ft_in1k_384": _cfg("b60_384_21k", 86.5, 384),
        "patchconvnet_b120.fb_in1k": _cfg("b120_224_1k", 84.1),
        "patchconvnet_b120.fb_in22k_ft_in1k": _cfg("b120_224_21k", 86.0),
        "patchconvnet_b120.fb_in22k_ft_in1k_384": _cfg("b120_384_21k", 86.9, 384),
        "patchconvnet_l60": _cfg(),
        "patchconvnet_s60_multi.fb_in1k": _cfg("s60_multi_finetune_1k", 82.0),
        "patchconvnet_s60_multi.fb_scratch_in1k": _cfg("s60_multi_scratch_1k", 81.1),
    }
)


def _create_patchconvnet(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(PatchConvNet, variant, pretrained, checkpoint_filter_fn, default_indices=3, **kwargs)


@register_model
def patchconvnet_s60(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """25.2 M parameters, 4.0 GMACs at 224 x 224."""
    return _create_patchconvnet("patchconvnet_s60", pretrained, **kwargs)


@register_model
def patchconvnet_s120(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """47.7 M parameters, 7.5 GMACs at 224 x 224."""
    return _create_patchconvnet("patchconvnet_s120", pretrained, **{"depth": 120, "init_scale": 1e-6, **kwargs})


@register_model
def patchconvnet_b60(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """99.4 M parameters, 15.8 GMACs at 224 x 224."""
    return _create_patchconvnet("patchconvnet_b60", pretrained, **{"embed_dim": 768, "init_scale": 1e-6, **kwargs})


@register_model
def patchconvnet_b120(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """188.6 M parameters, 29.8 GMACs at 224 x 224."""
    size = {"embed_dim": 768, "depth": 120, "init_scale": 1e-6}
    return _create_patchconvnet("patchconvnet_b120", pretrained, **{**size, **kwargs})


@register_model
def patchconvnet_l60(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """176.0 M parameters, 28.0 GMACs at 224 x 224."""
    return _create_patchconvnet("patchconvnet_l60", pretrained, **{"embed_dim": 1024, "init_scale": 1e-6, **kwargs})


@register_model
def patchconvnet_s60_multi(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """25.6 M parameters, 5.3 GMACs at 224 x 224, for 1000 classes."""
    return _create_patchconvnet("patchconvnet_s60_multi", pretrained, **{"multiclass": True, **kwargs})
