"""Agent-DeiT: DeiT with Agent Attention, see `agent.py`; linear in the number of patches.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024,
https://arxiv.org/abs/2312.08874. Special: the class token is a key of agents and a query, with biases of its own, and
neither averaged into agents nor convolved.

Maps are (B, H, W, C), tokens (B, 1 + H * W, C) with the class token first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, register_notrace_module, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones.agent import (
    UNPUBLISHED,
    AgentAttention,
    Block,
    PatchEmbed,
    Size,
    fit_checkpoint,
    imagenet_cfg,
    map_size,
    positions,
)
from visionattn.backbones.backbone import TokenClassifier, create
from visionattn.backbones.layers import check_in_chans, init_linear, linear
from visionattn.kernels import agent_attention, routing_attention
from visionattn.kernels._packed import unpack

__all__ = ["AgentDeiT"]

AGENTS_OF = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3)  # which of agent_num blocks have; the last for all after it


@register_notrace_module
class TokenAttention(AgentAttention):
    """Agent attention of tokens (B, 1 + H * W, dim) of a map of H x W = size."""

    def __init__(self, dim: int, num_heads: int, agents: int, size: Size) -> None:
        super().__init__(dim, num_heads, agents, size)
        self.ac_bias = nn.Parameter(trunc_normal_(torch.empty(1, num_heads, agents, 1), std=0.02))
        self.ca_bias = nn.Parameter(trunc_normal_(torch.empty(1, num_heads, 1, agents), std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        q, k, v = _projected(self.qkv, x, self.num_heads)
        of_keys, of_queries = self.biases((height, width), (height, width))
        of_keys = torch.cat([self.ac_bias[0], of_keys], 2)
        of_queries = torch.cat([self.ca_bias[0], of_queries], 1)
        agents = self.pooled(q[:, 1:].unflatten(1, (height, width)))
        local = self.local(v[:, 1:].unflatten(1, (height, width)), (height, width)).flatten(1, 2)
        x = agent_attention(q, k, v, agents, of_keys, of_queries).flatten(2)
        return linear(self.proj, x + F.pad(local, (0, 0, 1, 0)))


@register_notrace_module
class FullAttention(nn.Module):
    """All tokens (B, N, dim) attend to all; sizes of the map are of no effect."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        q, k, v = (y[:, :, None] for y in _projected(self.qkv, x, self.num_heads))
        return linear(self.proj, routing_attention(q, k, v, regions=1, topk=1)[:, :, 0].flatten(2))


def _projected(layer: nn.Module, x: Tensor, num_heads: int) -> list[Tensor]:
    """Queries, keys and values (B, N, heads, head_dim)."""
    return [y[:, 0] for y in unpack(linear(layer, x[:, None]).unflatten(-1, (3, num_heads, -1)))]


class AgentDeiT(TokenClassifier):
    """DeiT with Agent Attention for classification, and as a backbone with a map at stride 16 after every block.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dim, depth, num_heads: channels, blocks, and heads of each.
        agent_num: agents of the first blocks and of those further up, of four kinds.
        agent_layer: how many of the first blocks have agents; None for all.
        img_size: the size that tables are made for; any other size works too.
        global_pool: `token` (the class token), `avg` or `ggem` (of all others) or "" (no pooling).
    """

    output_formats = ("NCHW", "NLC")
    cls_token: Any  # never None here
    norm: nn.Module

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_num: Sequence[int] = (49, 49, 49, 49),
        agent_layer: int | None = None,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if len(agent_num) != 4:
            raise ValueError(f"agent_num={agent_num}: expected 4 numbers")
        self.num_classes, self.in_chans, self.patch_size = num_classes, in_chans, patch_size
        self.num_features = self.head_hidden_size = embed_dim
        self.set_pool(global_pool)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.grid = map_size(img_size, patch_size)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, tokens, embed_dim), std=0.02))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, eps=None)
        self.blocks = nn.Sequential()
        rates: Sequence[Any] = calculate_drop_path_rates(drop_path_rate, depth)
        for i, rate in enumerate(rates):
            attn: nn.Module = FullAttention(embed_dim, num_heads)
            if agent_layer is None or i < agent_layer:
                agents = agent_num[AGENTS_OF[min(i, len(AGENTS_OF) - 1)]]
                attn = TokenAttention(embed_dim, num_heads, agents, self.grid)
            self.blocks.append(Block(embed_dim, attn, mlp_ratio, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(self, img_size: int | Size) -> None:
        """Stretch all tables for images of another size, as new parameters."""
        grid, table = map_size(img_size, self.patch_size), self.pos_embed.detach()
        patches = positions(table[:, 1:], self.grid, grid).flatten(1, 2)
        self.pos_embed = nn.Parameter(torch.cat([table[:, :1], patches], 1), self.pos_embed.requires_grad)
        self.grid = grid
        for module in self.modules():
            if isinstance(module, AgentAttention):
                module.set_size(grid)

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        size = x.shape[1], x.shape[2]
        x = (x + positions(self.pos_embed[:, 1:], self.grid, size)).flatten(1, 2)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = checkpoint(block, x, *size) if self.grad_checkpointing else block(x, *size)
            yield x[:, 1:].unflatten(1, size)
        yield self.norm(x)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the maps of all blocks."""
        return self.norm(x) if norm else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        self.blocks = self.blocks[:stages]
        if norm:
            self.norm = nn.Identity()
        if head:
            self.reset_classifier(0, "")


torch.fx.wrap("positions")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AgentDeiT) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, its tables stretched to the model's size; ours passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    return fit_checkpoint(state_dict, model)


def _cfg(top1: float, size: int = 224) -> dict[str, Any]:
    return imagenet_cfg(top1, size, pool_size=(size // 16, size // 16))


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny": _cfg(74.9),
        "agent_deit_small": _cfg(80.5),
        "agent_deit_small_448": _cfg(83.1, 448),
        "agent_deit_base": _cfg(82.0),
    }
)


def _create_agent_deit(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(
        AgentDeiT, variant, pretrained, checkpoint_filter_fn, default_indices=3, unpublished=UNPUBLISHED, **kwargs
    )


SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """6.0 M parameters, 1.2 GMACs at 224 x 224."""
    return _create_agent_deit("agent_deit_tiny", pretrained, **kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """22.6 M parameters, 4.4 GMACs at 224 x 224."""
    return _create_agent_deit("agent_deit_small", pretrained, **{**SMALL, **kwargs})


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """23.1 M parameters, 17.6 GMACs at 448 x 448."""
    return _create_agent_deit("agent_deit_small_448", pretrained, **{**SMALL, "img_size": 448, **kwargs})


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """87.2 M parameters, 17.5 GMACs at 224 x 224; agents in the first four blocks."""
    size = {"embed_dim": 768, "num_heads": 12, "agent_num": (81, 81, 81, 81), "agent_layer": 4}
    return _create_agent_deit("agent_deit_base", pretrained, **{**size, **kwargs})
