"""NAT and DiNAT without a pyramid, and ViT with relative position bias, which they are compared with.

Hassani and Shi, Dilated Neighborhood Attention Transformer, 2022, https://arxiv.org/abs/2209.15001. Same functions and
argument names as the authors' code, https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT licence).
Special: the blocks of NAT (see `nat.py`) on one map, of 16 x 16 pixels a position.

ViT with relative position bias (`vitrpb`) is the same network with a window as large as its map at 224 x 224 pixels.
Any size of image: on larger maps its windows then slide like those of the others, and smaller ones are padded likewise.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.backbones.backbone import create
from visionattn.backbones.nat import DINAT_WEIGHTS, NAT, checkpoint_filter_fn, imagenet_cfg

__all__ = ["NATIsotropic"]


class NATIsotropic(NAT):
    """Isotropic NAT for classification, and as a backbone with a map at stride 16 after every block.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        depth: number of blocks.
        num_heads: heads of each block.
        kernel_size: a position attends to kernel_size x kernel_size.
        dilation: how far apart these lie in every other block.

    The others are those of `NAT`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilation: int = 1,
        layer_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            embed_dim=embed_dim,
            depths=(1,) * depth,
            num_heads=(num_heads,) * depth,
            mlp_ratio=mlp_ratio,
            kernel_size=kernel_size,
            dilations=[(dilation if i % 2 else 1,) for i in range(depth)],
            layer_scale=layer_scale,
            layout="isotropic",
            patch_norm=patch_norm,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            img_size=img_size,
        )


def _isotropic_cfg(name: str, top1: float) -> dict[str, Any]:
    url = f"{DINAT_WEIGHTS}/isotropic/{name}_in1k_224.pth"
    return imagenet_cfg(top1, url=url, pool_size=(14, 14), first_conv="patch_embed.proj")


TOP1 = {  # the authors', in per cent
    "nat_isotropic_small": 80.0,
    "nat_isotropic_base": 81.6,
    "dinat_isotropic_small": 80.8,
    "dinat_isotropic_base": 82.1,
    "vitrpb_small": 81.2,
    "vitrpb_base": 82.5,
}
default_cfgs = generate_default_cfgs({f"{name}.in1k": _isotropic_cfg(name, top1) for name, top1 in TOP1.items()})


def _create_isotropic(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(NATIsotropic, variant, pretrained, checkpoint_filter_fn, default_indices=3, **kwargs)


BASE = {"embed_dim": 768, "num_heads": 24}


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """22.0 M parameters, 4.3 GMACs at 224 x 224."""
    return _create_isotropic("nat_isotropic_small", pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """86.5 M parameters, 16.9 GMACs at 224 x 224."""
    return _create_isotropic("nat_isotropic_base", pretrained, **{**BASE, **kwargs})


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """22.0 M parameters, 4.3 GMACs at 224 x 224."""
    return _create_isotropic("dinat_isotropic_small", pretrained, **{"dilation": 2, **kwargs})


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """86.5 M parameters, 16.9 GMACs at 224 x 224."""
    return _create_isotropic("dinat_isotropic_base", pretrained, **{**BASE, "dilation": 2, **kwargs})


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """22.1 M parameters, 4.6 GMACs at 224 x 224."""
    return _create_isotropic("vitrpb_small", pretrained, **{"kernel_size": 14, **kwargs})


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """86.6 M parameters, 17.5 GMACs at 224 x 224."""
    return _create_isotropic("vitrpb_base", pretrained, **{**BASE, "kernel_size": 14, **kwargs})
