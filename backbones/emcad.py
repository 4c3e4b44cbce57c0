"""EMCAD: Efficient Multi-scale Convolutional Attention Decoding for Medical Image Segmentation (CVPR 2024).

https://arxiv.org/abs/2405.06880. A decoder of convolutions only: top-down, each map is gated by the one above it, added
to it, weighted by channel and by position, and mixed by depthwise convolutions of several sizes.

This is an independent implementation from the equations of the paper. It shares no code, names or weights with the
authors' repository, whose licence is for research only.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from visionattn.backbones._twins import unwrap
from visionattn.backbones.backbone import factory
from visionattn.backbones.encoder_decoder import EncoderDecoder

__all__ = ["EMCAD"]


class ChannelAttention(nn.Module):
    """Weights of channels from their largest and their mean value (CAB): (B, C, H, W) -> the same."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)
        largest, mean = (self.fc2(F.relu(self.fc1(y))) for y in pooled)
        return x * (largest + mean).sigmoid()


class SpatialAttention(nn.Module):
    """Weights of positions from the largest and the mean of their channels (SAB): (B, C, H, W) -> the same."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * self.conv(pooled).sigmoid()


class MultiScaleConv(nn.Module):
    """An inverted residual with depthwise convolutions of several sizes side by side (MSCB).

    The paper shuffles the channels before the last convolution, which is dense: any order of its inputs is as good.
    """

    def __init__(self, dim: int, kernel_sizes: Sequence[int] = (1, 3, 5), expansion: int = 2) -> None:
        super().__init__()
        hidden = dim * expansion
        self.expand = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.scales = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(hidden, hidden, size, padding=size // 2, groups=hidden, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(),
            )
            for size in kernel_sizes
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        return x + self.project(sum(scale(hidden) for scale in self.scales))


class UpConv(nn.Module):
    """Enlarges a map and changes its channels (EUCB)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
        )
        self.project = nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.project(self.local(F.interpolate(x, size, mode="bilinear")))


class AttentionGate(nn.Module):
    """Weights of the positions of a skip connection, from it and from the map that comes down (LGAG).

    Its grouped convolutions make one channel out of each pair.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // 2
        self.gate, self.skip = (
            nn.Sequential(nn.Conv2d(dim, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden))
            for _ in range(2)
        )
        self.weigh = nn.Sequential(nn.Conv2d(hidden, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * self.weigh(F.relu(self.gate(gate) + self.skip(skip)))


class EMCAD(nn.Module):
    """Maps (B, C_i, H_i, W_i), fine to coarse, of any sizes -> decoded maps of the same shapes, in the same order.

    Args:
        channels: C_i of each map, fine to coarse; all even but the last.
        kernel_sizes: of the depthwise convolutions side by side, odd.
        expansion: their channels over the map's.
    """

    def __init__(self, channels: Sequence[int], kernel_sizes: Sequence[int] = (1, 3, 5), expansion: int = 2) -> None:
        super().__init__()
        if any(dim % 2 for dim in channels[:-1]):
            raise ValueError(f"channels={tuple(channels)}: expected even numbers for all maps but the coarsest")
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes={tuple(kernel_sizes)}: expected odd numbers")
        self.out_channels = list(channels)
        self.up = nn.ModuleList(UpConv(coarse, fine) for fine, coarse in pairwise(channels))
        self.gates = nn.ModuleList(AttentionGate(dim) for dim in channels[:-1])
        self.mix = nn.ModuleList(
            nn.Sequential(ChannelAttention(dim), SpatialAttention(), MultiScaleConv(dim, kernel_sizes, expansion))
            for dim in channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if [x.shape[1] for x in maps] != self.out_channels:
            raise ValueError(f"maps of {[x.shape[1] for x in maps]} channels, expected {self.out_channels}")
        decoded = [self.mix[-1](maps[-1])]
        for i in reversed(range(len(maps) - 1)):
            x = self.up[i](decoded[0], maps[i].shape[-2:])
            decoded.insert(0, self.mix[i](x + self.gates[i](x, maps[i])))
        return decoded


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of ours, bare or wrapped."""
    return unwrap(state_dict)


def _cfg(encoder: str) -> dict[str, Any]:
    cfg = resolve_pretrained_cfg(encoder)
    return {
        "num_classes": 2,
        "input_size": (3, 352, 352),
        "mean": cfg.mean,
        "std": cfg.std,
        "interpolation": cfg.interpolation,
        "crop_pct": 1.0,
        "first_conv": "encoder.model.patch_embed.proj",
        "classifier": ("heads.0", "heads.1", "heads.2", "heads.3"),
        "license": "apache-2.0",
        "origin_url": "https://arxiv.org/abs/2405.06880",
        "paper_name": "EMCAD: Efficient Multi-scale Convolutional Attention Decoding for Medical Image Segmentation",
        "paper_ids": "arXiv:2405.06880",
        "description": f"only the encoder is pretrained: {encoder} of timm",
    }


ENCODERS = {"emcad_pvt_v2_b0": "pvt_v2_b0", "emcad_pvt_v2_b2": "pvt_v2_b2"}
default_cfgs = generate_default_cfgs({name: _cfg(encoder) for name, encoder in ENCODERS.items()})


def _build(
    encoder: str,
    pretrained_encoder: bool,
    num_classes: int = 2,
    in_chans: int = 3,
    kernel_sizes: Sequence[int] = (1, 3, 5),
    expansion: int = 2,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> EncoderDecoder:
    pyramid: Any = timm.create_model(
        encoder,
        pretrained=pretrained_encoder,
        features_only=True,
        feature_cls="getter",
        out_indices=(0, 1, 2, 3),
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
    )
    decoder = EMCAD(pyramid.feature_info.channels(), kernel_sizes, expansion)
    return EncoderDecoder(pyramid, decoder, num_classes, in_chans, drop_rate=drop_rate)


def _create_emcad(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if kwargs.get("features_only"):
        raise ValueError(f"{variant} is a whole segmenter: for maps use {ENCODERS[variant]} with features_only=True")
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    whole = bool(cfg.has_weights or cfg.state_dict)
    return build_model_with_cfg(
        factory(partial(_build, ENCODERS[variant], pretrained and not whole), variant),
        variant,
        pretrained and whole,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


@register_model
def emcad_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """3.9 M parameters. `pretrained` starts from timm's weights of the encoder."""
    return _create_emcad("emcad_pvt_v2_b0", pretrained, **kwargs)


@register_model
def emcad_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """26.8 M parameters. `pretrained` starts from timm's weights of the encoder."""
    return _create_emcad("emcad_pvt_v2_b2", pretrained, **kwargs)
