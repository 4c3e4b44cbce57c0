"""Agent-CSwin: CSwin with Agent Attention on whole maps in its first stages, see `agent.py`.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024,
https://arxiv.org/abs/2312.08874; Dong et al., CSWin Transformer, CVPR 2022, https://arxiv.org/abs/2107.00652. Special:
- blocks without agents attend in stripes, half of the heads in upright and half in level ones, and add a depthwise
  convolution of the values that ends at the border of a stripe;
- convolutions that overlap make the maps.

Maps are (B, H, W, C), and in attention (B, H, W, heads, C / heads).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, register_notrace_module
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones.agent import (
    UNPUBLISHED,
    AgentAttention,
    Block,
    Size,
    agent_blocks,
    cut,
    fit_checkpoint,
    imagenet_cfg,
    join,
    map_size,
)
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import (
    channels_last,
    check_in_chans,
    init_linear,
    linear,
    pad_map_to_multiple,
    pad_to_multiple,
)
from visionattn.kernels import _record, routing_attention, window_attention
from visionattn.kernels._packed import unpack

__all__ = ["AgentCSwin"]


@register_notrace_module
class ConvEmbed(nn.Module):
    """(B, source, H, W) -> (B, H / stride, W / stride, dim), rounded up."""

    def __init__(self, source: int, dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(source, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(channels_last(pad_to_multiple(x, self.stride))).permute(0, 2, 3, 1))


def stripe(size: Size, width: int | None, level: bool) -> Size:
    """Rows and columns of stripes of a map; those of the map without a width."""
    if width is None:
        return size
    return (width, size[1]) if level else (size[0], width)


class StripeAttention(nn.Module):
    """Projections (B, H, W, 3, heads, head_dim) attend inside stripes -> (B, H, W, dim).

    width: of the stripes; None for one, the whole map. level: they are rows.
    """

    def __init__(self, dim: int, width: int | None, level: bool) -> None:
        super().__init__()
        self.width, self.level = width, level
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = unpack(qkv)
        size = q.shape[1], q.shape[2]
        window = stripe(size, self.width, self.level)
        if self.width is None:
            return routing_attention(q, k, v, regions=1, topk=1).flatten(3) + self.local(v.flatten(3))
        values = pad_map_to_multiple(v.flatten(3), *window)
        local = join(self.local(cut(values, window)), (values.shape[1], values.shape[2]))
        return window_attention(q, k, v, window).flatten(3) + local[:, : size[0], : size[1]]

    def local(self, x: Tensor) -> Tensor:
        return self.dwc(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AgentStripes(AgentAttention):
    """The same with agents, of each stripe its own; size: of the map where tables are as they were trained."""

    def __init__(self, dim: int, num_heads: int, agents: int, size: Size, width: int | None, level: bool) -> None:
        super().__init__(dim, num_heads, agents, stripe(size, width, level))
        self.width, self.level = width, level

    def forward(self, qkv: Tensor) -> Tensor:
        if self.width is None:
            return self.attend(*unpack(qkv))
        size = qkv.shape[1], qkv.shape[2]
        window = stripe(size, self.width, self.level)
        if _record.active():
            places = torch.arange(size[0] * size[1], device=qkv.device).view(1, *size, 1)
            _record.place(cut(places, window)[..., 0])
        stripes = cut(qkv.flatten(3), window).unflatten(-1, qkv.shape[3:])
        return join(self.attend(*unpack(stripes)), size)


@register_notrace_module
class CrossAttention(nn.Module):
    """Attention on a map (B, H, W, dim), by one layer for all heads or by one for each half of them."""

    def __init__(self, dim: int, num_heads: int, attns: Sequence[nn.Module]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(attns)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).chunk(len(self.attns), -2)
        return linear(self.proj, torch.cat([attn(part) for attn, part in zip(self.attns, parts, strict=True)], -1))


class Stage(nn.Module):
    """What makes the map of a stage, and its blocks."""

    def __init__(self, patch_embed: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)


class AgentCSwin(MapClassifier):
    """CSwin with Agent Attention for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dim: channels of the first stage, doubled in each further one.
        depth, num_heads: blocks, and heads of each, of each stage.
        agent_num: agents of each stage, square numbers.
        attn_type: A, B or M for each stage: all, none or the first of its blocks have agents; then a digit for each M.
        split_size: width of the stripes of each stage, of blocks without agents; the last stage attends to the whole
            map.
        la_split_size: the same of blocks with agents; None, or no less than the map at `img_size`, for whole maps.
        img_size: the size that tables are made for; any other size works too.
    """

    stages: Any  # nn.ModuleList of Stage
    norm: nn.Module

    def __init__(
        self,
        embed_dim: int = 64,
        depth: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agent_num: Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AABB",
        split_size: Sequence[int] = (1, 2, 7, 7),
        la_split_size: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        self.num_classes, self.in_chans = num_classes, in_chans
        dims = [embed_dim * 2**i for i in range(len(depth))]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}.blocks"} for i, dim in enumerate(dims)
        ]
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depth)))
        self.stages = nn.ModuleList()
        for i, have_agents in enumerate(agent_blocks(attn_type, depth)):
            dim, heads, grid = dims[i], num_heads[i], map_size(img_size, 4 * 2**i)
            last = i == len(depth) - 1
            blocks = []
            for has_agents in have_agents:
                widths = la_split_size if has_agents else split_size
                whole = last or widths is None or widths[i] >= max(grid)
                width, halves = (None, 1) if whole or widths is None else (widths[i], 2)
                attns: list[nn.Module] = []
                for level in (False, True)[:halves]:
                    attn: nn.Module = StripeAttention(dim // halves, width, level)
                    if has_agents:
                        attn = AgentStripes(dim // halves, heads // halves, agent_num[i], grid, width, level)
                    attns.append(attn)
                blocks.append(Block(dim, CrossAttention(dim, heads, attns), mlp_ratio, next(drop_paths), eps=1e-5))
            embed = ConvEmbed(dims[i - 1], dim, 3, 2, 1) if i else ConvEmbed(in_chans, dim, 7, 4, 2)
            self.stages.append(Stage(embed, blocks))
        self.norm = nn.LayerNorm(self.num_features)
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = r"^stages\.0\.patch_embed"
        if coarse:
            return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^stages\.(\d+)\.patch_embed", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    def set_input_size(self, img_size: int | Size) -> None:
        """Stretch the tables of agents for images of another size, as new parameters."""
        for i, stage in enumerate(self.stages):
            for attn in stage.modules():
                if isinstance(attn, AgentStripes):
                    attn.set_size(stripe(map_size(img_size, 4 * 2**i), attn.width, attn.level))

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = images
        for stage in self.stages:
            x = stage.patch_embed(x)
            x = checkpoint_seq(stage.blocks, x) if self.grad_checkpointing else stage.blocks(x)
            yield x
            x = x.permute(0, 3, 1, 2)
        yield self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the map of the last stage."""
        return self.norm(x) if norm and stage == len(self.stages) - 1 else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut_off = stages < len(self.stages)
        self.stages = self.stages[:stages]
        if norm or cut_off:
            self.norm = nn.Identity()
        if head or cut_off:
            self.reset_classifier(0, "")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AgentCSwin) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names and its tables stretched to the model's size; ours
    passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    return fit_checkpoint(state_dict, model, our_name)


def our_name(key: str) -> str:
    """Of a parameter of the authors' network or of a layer of it."""
    key = re.sub(r"^stage1_conv_embed\.0\.", "stages.0.patch_embed.conv.", key)
    key = re.sub(r"^stage1_conv_embed\.2\.", "stages.0.patch_embed.norm.", key)
    key = re.sub(r"^merge(\d)\.", r"stages.\1.patch_embed.", key)
    if match := re.match(r"stage(\d)\.(\d+\.)((?:qkv|proj|attns)\.)?", key):
        attn = f"attn.{match[3]}" if match[3] else ""
        key = f"stages.{int(match[1]) - 1}.blocks.{match[2]}{attn}{key[match.end() :]}"
    return key.replace("get_v.", "dwc.")


def _cfg(top1: float, size: int = 224) -> dict[str, Any]:
    return imagenet_cfg(top1, size, first_conv="stages.0.patch_embed.conv")


default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny": _cfg(83.1),
        "agent_cswin_small": _cfg(83.9),
        "agent_cswin_base": _cfg(84.7),
        "agent_cswin_base_384": _cfg(85.8, 384),
    }
)


def _create_agent_cswin(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(AgentCSwin, variant, pretrained, checkpoint_filter_fn, unpublished=UNPUBLISHED, **kwargs)


BASE: dict[str, Any] = {"embed_dim": 96, "depth": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """20.5 M parameters, 4.3 GMACs at 224 x 224."""
    return _create_agent_cswin("agent_cswin_tiny", pretrained, **kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """32.8 M parameters, 6.7 GMACs at 224 x 224."""
    return _create_agent_cswin("agent_cswin_small", pretrained, **{"depth": (3, 6, 29, 2), **kwargs})


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """73.2 M parameters, 14.9 GMACs at 224 x 224."""
    return _create_agent_cswin("agent_cswin_base", pretrained, **{**BASE, **kwargs})


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """73.3 M parameters, 46.2 GMACs at 384 x 384."""
    size = {"img_size": 384, "split_size": (1, 2, 12, 12)}
    return _create_agent_cswin("agent_cswin_base_384", pretrained, **{**BASE, **size, **kwargs})
