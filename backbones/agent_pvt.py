"""Agent-PVT: the Pyramid Vision Transformer with Agent Attention, see `agent.py`, at full resolution in all stages.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024,
https://arxiv.org/abs/2312.08874; Wang et al., Pyramid Vision Transformer, ICCV 2021, https://arxiv.org/abs/2102.12122.
Special: every stage adds a table of positions; there is no class token and no norm at the end.

Maps are (B, H, W, C).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, register_notrace_module, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones.agent import (
    UNPUBLISHED,
    AgentAttention,
    Block,
    PatchEmbed,
    Size,
    agent_blocks,
    fit_checkpoint,
    imagenet_cfg,
    map_size,
    positions,
)
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import check_in_chans, init_linear, linear, pad_map_to_multiple
from visionattn.kernels import routing_attention

__all__ = ["AgentPVT"]


class Reduced(nn.Module):
    """Keys and values of a map (B, H, W, dim), reduced: maps (B, H / ratio, W / ratio, heads, head_dim), rounded up."""

    def project(self, dim: int, num_heads: int, ratio: int) -> None:
        self.num_heads, self.ratio = num_heads, ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = linear(self.q, x).unflatten(-1, (self.num_heads, -1))
        if self.sr is not None and self.norm is not None:
            x = pad_map_to_multiple(x, self.ratio, self.ratio).permute(0, 3, 1, 2)
            x = self.norm(self.sr(x).permute(0, 2, 3, 1))
        k, v = linear(self.kv, x).unflatten(-1, (2, self.num_heads, -1)).unbind(3)
        return q, k, v


@register_notrace_module
class ReducedAgentAttention(AgentAttention, Reduced):
    """Agent attention on a map (B, H, W, dim)."""

    def __init__(self, dim: int, num_heads: int, agents: int, size: Size, ratio: int) -> None:
        super().__init__(dim, num_heads, agents, size, (-(-size[0] // ratio), -(-size[1] // ratio)))
        self.project(dim, num_heads, ratio)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.proj, self.attend(*self.projected(x)))


@register_notrace_module
class ReducedAttention(Reduced):
    """Every position of a map (B, H, W, dim) attends to all of the reduced one."""

    def __init__(self, dim: int, num_heads: int, ratio: int) -> None:
        super().__init__()
        self.project(dim, num_heads, ratio)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.proj, routing_attention(*self.projected(x), regions=1, topk=1).flatten(3))


class Stage(nn.Module):
    """What makes the map of a stage, the table of its positions, and its blocks."""

    def __init__(self, patch_embed: nn.Module, dim: int, grid: Size, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.patch_embed, self.grid = patch_embed, grid
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))
        self.blocks = nn.Sequential(*blocks)

    def set_size(self, grid: Size) -> None:
        table = positions(self.pos_embed.detach(), self.grid, grid).flatten(1, 2).clone()
        self.pos_embed, self.grid = nn.Parameter(table, self.pos_embed.requires_grad), grid
        for block in self.blocks:
            if isinstance(block.attn, ReducedAgentAttention):
                ratio = block.attn.ratio
                block.attn.set_size(grid, (-(-grid[0] // ratio), -(-grid[1] // ratio)))


class AgentPVT(MapClassifier):
    """PVT with Agent Attention for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden channels over channels of each
            stage.
        agent_num: agents of each stage, square numbers.
        attn_type: A, B or M for each stage: all, none or the first of its blocks have agents; then a digit for each M.
        agent_sr_ratios: how much smaller than the map that of keys is, of the blocks with agents of each stage.
        sr_ratios: the same of the others.
        img_size: the size that tables are made for; any other size works too.
    """

    stages: Any  # nn.ModuleList of Stage

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agent_num: Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AAAA",
        agent_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
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
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}.blocks"} for i, dim in enumerate(embed_dims)
        ]
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        source = in_chans
        for i, have_agents in enumerate(agent_blocks(attn_type, depths)):
            dim, heads, grid = embed_dims[i], num_heads[i], map_size(img_size, 4 * 2**i)
            blocks = []
            for has_agents in have_agents:
                attn: nn.Module = ReducedAttention(dim, heads, sr_ratios[i])
                if has_agents:
                    attn = ReducedAgentAttention(dim, heads, agent_num[i], grid, agent_sr_ratios[i])
                blocks.append(Block(dim, attn, mlp_ratios[i], next(drop_paths)))
            self.stages.append(Stage(PatchEmbed(source, dim, 2 if i else 4), dim, grid, blocks))
            source = dim
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {f"stages.{i}.pos_embed" for i in range(len(self.stages))}

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = r"^stages\.0\.(?:patch_embed|pos_embed)"
        if coarse:
            return {"stem": stem, "blocks": r"^stages\.(\d+)"}
        blocks = [(r"^stages\.(\d+)\.(?:patch_embed|pos_embed)", (-1,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": stem, "blocks": blocks}

    def set_input_size(self, img_size: int | Size) -> None:
        """Stretch all tables for images of another size, as new parameters."""
        for i, stage in enumerate(self.stages):
            stage.set_size(map_size(img_size, 4 * 2**i))

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = images
        for stage in self.stages:
            x = stage.patch_embed(x)
            x = x + positions(stage.pos_embed, stage.grid, (x.shape[1], x.shape[2]))
            x = checkpoint_seq(stage.blocks, x) if self.grad_checkpointing else stage.blocks(x)
            yield x
            x = x.permute(0, 3, 1, 2)
        yield x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.stages)
        self.stages = self.stages[:stages]
        if head or cut:
            self.reset_classifier(0, "")


torch.fx.wrap("positions")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AgentPVT) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names and its tables stretched to the model's size; ours
    passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    return fit_checkpoint(state_dict, model, _our_name)


def _our_name(key: str) -> str:
    if match := re.match(r"(patch_embed|pos_embed|block)(\d)", key):
        name = "blocks" if match[1] == "block" else match[1]
        return f"stages.{int(match[2]) - 1}.{name}{key[match.end() :]}"
    return key


def _cfg(top1: float, size: int = 224) -> dict[str, Any]:
    return imagenet_cfg(top1, size, first_conv="stages.0.patch_embed.proj")


default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny": _cfg(78.4),
        "agent_pvt_small": _cfg(82.2),
        "agent_pvt_medium": _cfg(83.4),
        "agent_pvt_medium_256": _cfg(83.8, 256),
        "agent_pvt_large": _cfg(83.7),
    }
)


def _create_agent_pvt(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(AgentPVT, variant, pretrained, checkpoint_filter_fn, unpublished=UNPUBLISHED, **kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """11.6 M parameters, 2.0 GMACs at 224 x 224."""
    return _create_agent_pvt("agent_pvt_tiny", pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """20.6 M parameters, 4.0 GMACs at 224 x 224."""
    return _create_agent_pvt("agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """35.9 M parameters, 7.0 GMACs at 224 x 224."""
    return _create_agent_pvt("agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """36.1 M parameters, 9.1 GMACs at 256 x 256."""
    size = {"depths": (3, 4, 18, 3), "img_size": 256}
    return _create_agent_pvt("agent_pvt_medium_256", pretrained, **{**size, **kwargs})


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """48.7 M parameters, 10.3 GMACs at 224 x 224."""
    return _create_agent_pvt("agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
