"""Faster attention in a model that timm made: its attention layers get our forward, and keep everything else.

    model = visionattn.accelerate(timm.create_model("volo_d1_224", pretrained=True))

A layer is changed by making its class a subclass of what it was, whose forward calls visionattn.kernels. So it stays
the same object with the same parameters, buffers, hooks, keys, inputs and outputs.
"""

import math
import re
import warnings
from typing import Any

from timm.layers import register_notrace_module
from timm.layers.halo_attn import HaloAttn
from timm.models import cait, convit, davit, volo, xcit
from torch import Tensor, nn

from visionattn.backbones import convit as our_convit
from visionattn.backbones import volo as our_volo
from visionattn.backbones import xcit as our_xcit
from visionattn.kernels import channel_attention, halo_attention, window_attention
from visionattn.kernels._packed import unpack

__all__ = ["accelerate"]


def accelerate(model: nn.Module) -> nn.Module:
    """Make the attention layers of a model of timm's compute by visionattn.kernels, in place.

    Families: `davit_*`, `xcit_*`, `convit_*`, `volo_*`, and what has halo attention (`halonet*`, `sehalonet33ts`,
    `haloregnetz_b` and others). The function of the model does not change, nor do its parameters (an optimizer made
    before stays valid), its hooks and the keys of its state dict; halo attention takes maps of any size from then on.
    What is inside of such a layer and does nothing, a dropout of rate 0, is no longer called.

    Returns `model`. Warns once, naming them, of attention layers that it leaves as they were: those of a kind not
    supported, and those with dropout, which the kernels do not have.

    Raises:
        TypeError: `model` is no module, but for example the name of one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a model, as in accelerate(timm.create_model('davit_tiny'))")
    left = []
    for name, module in model.named_modules():
        kind = type(module)
        dropout = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.children())
        if kind in FASTER and not dropout:
            module.__class__ = FASTER[kind]
        elif kind in FASTER or _is_attention(kind):
            left.append(f"{name} ({kind.__name__}{' with dropout' if dropout else ''})")
    if left:
        layers = ", ".join(left)
        warnings.warn(f"visionattn.accelerate left {len(left)} attention layers as they were: {layers}", stacklevel=2)
    return model


def _is_attention(kind: type) -> bool:
    """By its name: one layer of attention, not ours."""
    name, ours = kind.__name__, kind.__module__.startswith("visionattn.")
    return re.search("Attention|Attn|Lambda", name) is not None and "Block" not in name and not ours


class OutlookAttention(volo.OutlookAttention):
    forward = our_volo.OutlookAttention.forward


class Attention(volo.Attention):
    forward = our_volo.Attention.forward


class ClassAttention(volo.ClassAttention):
    forward = our_volo.ClassAttention.forward


class SeparateClassAttention(cait.ClassAttn):
    forward = our_xcit.ClassAttention.forward


class TokenAttention(convit.MHSA):
    forward = our_convit.Attention.forward


class GatedPositionalAttention(convit.GPSA):
    position_logits = our_convit.GatedPositionalAttention.position_logits
    _position_weights = our_convit.GatedPositionalAttention._position_weights

    def forward(self, x: Tensor) -> Tensor:
        maps = x.unflatten(1, (math.isqrt(x.shape[1]), -1))
        forward: Any = our_convit.GatedPositionalAttention.forward
        return forward(self, maps).flatten(1, 2)

    def get_attention(self, x: Tensor) -> Tensor:
        """As timm's, which relies on what its forward left behind."""
        if self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        return super().get_attention(x)


class CrossCovarianceAttention(xcit.XCA):
    def forward(self, x: Tensor) -> Tensor:
        forward: Any = our_xcit.CrossCovarianceAttention.forward
        return forward(self, x[:, :, None])[:, :, 0]


class ChannelAttention(davit.ChannelAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(self.qkv(x[:, :, None]).unflatten(-1, (3, self.num_heads, -1)))
        return self.proj(channel_attention(k, v, q, self.num_heads)[:, :, 0].flatten(2))


class WindowAttention(davit.WindowAttention):
    def forward(self, x: Tensor) -> Tensor:
        """Windows (B, tokens, C)."""
        q, k, v = unpack(self.qkv(x.unflatten(1, self.window_size)).unflatten(-1, (3, self.num_heads, -1)))
        return self.proj(window_attention(q, k, v, self.window_size).flatten(3)).flatten(1, 2)


class HaloAttention(HaloAttn):
    def forward(self, x: Tensor) -> Tensor:
        q, kv = (y.permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1)) for y in (self.q(x), self.kv(x)))
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], -1)
        scale = self.scale if self.scale_pos_embed else 1
        tables = self.pos_embed.height_rel * scale, self.pos_embed.width_rel * scale
        x = halo_attention(q, k, v, self.block_size, self.halo_size, *tables, scale=self.scale)
        return self.pool(x.flatten(3).permute(0, 3, 1, 2))


FASTER = {
    kind.__base__: kind
    for kind in (
        OutlookAttention,
        Attention,
        ClassAttention,
        SeparateClassAttention,
        TokenAttention,
        GatedPositionalAttention,
        CrossCovarianceAttention,
        ChannelAttention,
        WindowAttention,
        HaloAttention,
    )
}
for _kind in FASTER.values():
    register_notrace_module(_kind)  # fx sees one node
