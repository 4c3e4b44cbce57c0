"""XCiT: a transformer on one map whose attention is over channels, so that its cost grows with the image, not faster.

El-Nouby et al., XCiT: Cross-Covariance Image Transformers, NeurIPS 2021, https://arxiv.org/abs/2106.09681. Same
functions, argument names and state-dict keys as timm's `xcit_*`, from https://github.com/facebookresearch/xcit
(Apache-2.0). Special:
- cross-covariance attention: channels ask channels of their head, by the cosine of what they have in all tokens;
- tokens talk only through two depthwise convolutions in each block (local patch interaction);
- sines and cosines of each token's position as a fraction of height and width, projected, say where it is;
- two class attention blocks at the end: only the class token asks.

Any size of image, as in timm: convolutions of stride 2 make the patches, of 16 or of 8 pixels, and round up.

Maps are (B, H, W, C), tokens (B, 1 + H * W, C) with the class token first.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath, register_notrace_module, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, twin_cfgs, unwrap
from visionattn.backbones.backbone import TokenClassifier, create
from visionattn.backbones.layers import Mlp, channels_last, check_in_chans, conv_norm, init_linear, linear
from visionattn.kernels import cross_covariance_attention, routing_attention
from visionattn.kernels._packed import unpack

__all__ = ["XCiT"]

FOURIER_DIM = 32  # channels of sines and cosines for each axis


@register_notrace_module
class PositionEncoding(nn.Module):
    """Adds to a map (B, H, W, dim) a projection of Fourier features of its rows and columns."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FOURIER_DIM, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = (_fourier(length, x.device) for length in (height, width))
        features = torch.cat([rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)])
        return x + self.token_projection(features[None].to(x.dtype)).permute(0, 2, 3, 1)


def _fourier(length: int, device: torch.device) -> Tensor:
    """(FOURIER_DIM, length) in float32, which the published numbers come from."""
    position = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    position = position / (position[-1:] + 1e-6) * (2 * math.pi)
    pair = torch.arange(FOURIER_DIM, device=device, dtype=torch.float32).div(2, rounding_mode="floor")
    angles = position / 10000 ** (2 * pair / FOURIER_DIM)[:, None]
    return torch.stack([angles[0::2].sin(), angles[1::2].cos()], 1).flatten(0, 1)


@register_notrace_module
class ConvNorm(nn.Sequential):
    """3 x 3 convolution and batch norm of a map (B, source, H, W) -> (B, target, H / 2, W / 2), rounded up."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__(nn.Conv2d(source, target, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(target))

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, *self)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> map (B, H / patch_size, W / patch_size, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        if patch_size not in (8, 16):
            raise ValueError(f"patch_size={patch_size}: expected 8 or 16")
        self.proj = nn.Sequential()
        source = in_chans
        for target in (dim // 8, dim // 4, dim // 2, dim) if patch_size == 16 else (dim // 4, dim // 2, dim):
            if len(self.proj):
                self.proj.append(nn.GELU())
            self.proj.append(ConvNorm(source, target))
            source = target

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(channels_last(x)).permute(0, 2, 3, 1)


class LocalPatchInteraction(nn.Module):
    """Two depthwise convolutions of a map (B, H, W, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.permute(0, 3, 1, 2))
        return self.conv2(self.bn(self.act(x))).permute(0, 2, 3, 1)


@register_notrace_module
class CrossCovarianceAttention(nn.Module):
    """Attention over the channels of each head of a map (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        return linear(self.proj, cross_covariance_attention(q, k, v, self.temperature).flatten(3))


@register_notrace_module
class ClassAttention(nn.Module):
    """The class token attends to itself and all others: tokens (B, N, dim) -> (B, 1, dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None]
        q, k, v = linear(self.q, x[:, :1]), linear(self.k, x), linear(self.v, x)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        return linear(self.proj, routing_attention(q, k, v, regions=1, topk=1)[:, :, 0].flatten(2))


class Block(nn.Module):
    """Attention, local patch interaction and MLP on a map (B, H, W, dim), each with a scaled residual."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eta: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossCovarianceAttention(dim, num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.local_mp = LocalPatchInteraction(dim)
        self.drop_path3 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma3 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.gamma1, self.drop_path1(self.attn(self.norm1(x))))
        x = torch.addcmul(x, self.gamma3, self.drop_path3(self.local_mp(self.norm3(x))))
        return torch.addcmul(x, self.gamma2, self.drop_path2(self.mlp(self.norm2(x))))


class ClassBlock(nn.Module):
    """Class attention and MLP for the class token, as published: tokens (B, N, dim) -> (B, N, dim).

    The others do not pass unchanged: their norm is added to them, and what comes of it doubled.
    tokens_norm: the second norm is for all tokens; if False, for the class token.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eta: float, tokens_norm: bool) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm1(x)
        x = torch.addcmul(x, self.gamma1, torch.cat([self.attn(norm), norm[:, 1:]], 1))
        if self.tokens_norm:
            x = self.norm2(x)
            token = x[:, :1]
        else:
            token = self.norm2(x[:, :1])
        return torch.cat([torch.addcmul(token, self.gamma2, self.mlp(token)), 2 * x[:, 1:]], 1)


class XCiT(TokenClassifier):
    """XCiT for classification, and as a backbone with a map of one stride after every block.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        patch_size: 16 or 8 pixels, the stride of the map.
        embed_dim, depth, num_heads: channels, blocks before the two of class attention, heads of each.
        global_pool: `token` (the class token), `avg` or `ggem` (of all others) or "" (no pooling).
        mlp_ratio: hidden channels of the MLP over embed_dim.
        eta: initial value of the learned scale of each residual branch.
        tokens_norm: see `ClassBlock`.
        drop_rate, pos_drop_rate: dropout before the head, and after the position encoding.
        drop_path_rate: stochastic depth, the same in all blocks.
        img_size: accepted and not used: any size will do.
    """

    output_formats = ("NCHW", "NLC")
    cls_attn_blocks: nn.Sequential | None
    norm: nn.Module

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        mlp_ratio: float = 4.0,
        eta: float = 1.0,
        tokens_norm: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dim
        self.set_pool(global_pool)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = PositionEncoding(embed_dim)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, eta, drop_path_rate) for _ in range(depth))
        )
        self.cls_attn_blocks = nn.Sequential(
            *(ClassBlock(embed_dim, num_heads, mlp_ratio, eta, tokens_norm) for _ in range(2))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed.token_projection.weight", "pos_embed.token_projection.bias"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": r"^blocks\.(\d+)",
            "class_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.pos_drop(self.pos_embed(self.patch_embed(images)))
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            yield x
        x = x.flatten(1, 2)
        if self.cls_attn_blocks is not None and self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            for block in self.cls_attn_blocks:
                x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        yield self.norm(x)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the maps of all blocks."""
        return self.norm(x) if norm else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        self.blocks = self.blocks[:stages]
        if norm:
            self.norm = nn.Identity()
        if head:
            self.cls_attn_blocks = self.cls_token = None
            self.reset_classifier(0, "")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: XCiT) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with timm's key names, which are ours; timm's passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    renamed = {}
    for key, value in unwrap(state_dict).items():
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            for name, weight in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace(".qkv.", f".{name}.")] = weight
        else:
            renamed[key.replace("pos_embeder.", "pos_embed.")] = value
    check_checkpoint(renamed, model)
    return renamed


SIZES: dict[str, dict[str, Any]] = {
    "nano_12": {"embed_dim": 128, "depth": 12, "num_heads": 4},
    "tiny_12": {"embed_dim": 192, "depth": 12, "num_heads": 4, "tokens_norm": True},
    "tiny_24": {"embed_dim": 192, "depth": 24, "num_heads": 4, "tokens_norm": True, "eta": 1e-5},
    "small_12": {"embed_dim": 384, "depth": 12, "num_heads": 8, "tokens_norm": True},
    "small_24": {"embed_dim": 384, "depth": 24, "num_heads": 8, "tokens_norm": True, "eta": 1e-5},
    "medium_24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "tokens_norm": True, "eta": 1e-5},
    "large_24": {"embed_dim": 768, "depth": 24, "num_heads": 16, "tokens_norm": True, "eta": 1e-5},
}
VARIANTS = {  # xcit_SIZE_pPATCH_PIXELS -> arguments; PIXELS tell the weights apart
    f"xcit_{size}_p{patch}_{pixels}": {"patch_size": patch, **arguments}
    for size, arguments in SIZES.items()
    for patch in (16, 8)
    for pixels in (224, 384)
}
PAPER = {
    "origin_url": "https://github.com/facebookresearch/xcit",
    "paper_name": "XCiT: Cross-Covariance Image Transformers",
    "paper_ids": "arXiv:2106.09681",
}


def _cfgs(twin: str) -> dict[str, Any]:
    side = int(twin.rsplit("_", 1)[1]) // VARIANTS[twin]["patch_size"]
    return twin_cfgs(twin, fixed_input_size=False, pool_size=(side, side), **PAPER)


default_cfgs = generate_default_cfgs({name: cfg for twin in VARIANTS for name, cfg in _cfgs(twin).items()})


def _register(variant: str, arguments: dict[str, Any]) -> None:
    """Make the entry point of a variant, a function of this module by the variant's name."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(XCiT, variant, pretrained, checkpoint_filter_fn, default_indices=3, **{**arguments, **kwargs})

    entry.__name__ = entry.__qualname__ = variant
    globals()[variant] = register_model(entry)


for _twin, _arguments in VARIANTS.items():
    _register(f"va_{_twin}", _arguments)
