"""Agent-Swin: Swin with Agent Attention on whole maps in its first stages, see `agent.py`.

Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024,
https://arxiv.org/abs/2312.08874; Liu et al., Swin Transformer, ICCV 2021, https://arxiv.org/abs/2103.14030. Special:
blocks without agents are Swin's, in windows that every other one shifts; what is padded is no key of theirs.

Maps are (B, H, W, C).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, register_notrace_module, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, get_relative_position_index
from torch import Tensor, nn

from visionattn.backbones.agent import (
    UNPUBLISHED,
    Block,
    MapAttention,
    PatchEmbed,
    Size,
    agent_blocks,
    fit_checkpoint,
    imagenet_cfg,
    map_size,
)
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import check_in_chans, init_linear, linear
from visionattn.kernels import window_attention
from visionattn.kernels._check import decided
from visionattn.kernels._packed import unpack

__all__ = ["AgentSwin"]

SEVERAL = "maps of at most {} places a side have windows that are not shifted, larger ones are"


@register_notrace_module
class WindowAttention(nn.Module):
    """Swin's attention in windows of a map (B, H, W, dim), which `shift` moves where there are several."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        table = torch.empty((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))
        index = get_relative_position_index(window, window)
        self.register_buffer("relative_position_index", index.flatten(), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        bias = self.relative_position_bias_table.index_select(0, self.relative_position_index)
        bias = bias.T.unflatten(1, (self.window**2, -1)).contiguous()
        shift = 0, 0
        if self.shift:
            several = [decided(side > self.window, SEVERAL.format(self.window)) for side in x.shape[1:3]]
            shift = self.shift * several[0], self.shift * several[1]
        return linear(self.proj, window_attention(q, k, v, self.window, shift, bias=bias).flatten(3))


class Stage(nn.Module):
    """The blocks of a stage, and what makes the map of the next one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class AgentSwin(MapClassifier):
    """Swin with Agent Attention for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dim: channels of the first stage, doubled in each further one.
        depths, num_heads: blocks, and heads of each, of each stage.
        agent_num: agents of each stage, square numbers.
        attn_type: A, B or M for each stage: all, none or the first of its blocks have agents; then a digit for each M.
        window_size: rows and columns of windows, of blocks without agents.
        agent_window: the same of blocks with agents; None, or no less than the map at `img_size`, for whole maps.
        img_size: the size that tables are made for; any other size works too.
    """

    layers: Any  # nn.ModuleList of Stage
    norm: nn.Module

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agent_num: Sequence[int] = (9, 16, 49, 49),
        attn_type: str = "AAAB",
        window_size: int = 7,
        agent_window: int | None = None,
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
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"} for i, dim in enumerate(dims)
        ]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, 4)
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for i, have_agents in enumerate(agent_blocks(attn_type, depths)):
            dim, heads, grid = dims[i], num_heads[i], map_size(img_size, 4 * 2**i)
            blocks = []
            for j, has_agents in enumerate(have_agents):
                window = min(window_size, *grid)
                attn: nn.Module = WindowAttention(dim, heads, window, window // 2 * (j % 2))
                if has_agents and (agent_window is None or agent_window >= max(grid)):
                    attn = MapAttention(dim, heads, agent_num[i], grid)
                elif has_agents and agent_window is not None:
                    side = agent_window, agent_window
                    attn = MapAttention(dim, heads, agent_num[i], grid, side, agent_window // 2 * (j % 2))
                blocks.append(Block(dim, attn, mlp_ratio, next(drop_paths), eps=1e-5))
            last = i == len(depths) - 1
            self.layers.append(Stage(blocks, None if last else PatchMerging(dim)))
        self.norm = nn.LayerNorm(self.num_features)
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {key for key, _ in self.named_parameters() if key.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict:
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_input_size(self, img_size: int | Size) -> None:
        """Stretch the tables of agents for images of another size, as new parameters."""
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                if isinstance(block.attn, MapAttention) and block.attn.window is None:
                    block.attn.set_size(map_size(img_size, 4 * 2**i))

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        for stage in self.layers:
            x = checkpoint_seq(stage.blocks, x) if self.grad_checkpointing else stage.blocks(x)
            yield x
            if stage.downsample is not None:
                x = stage.downsample(x)
        yield self.norm(x).permute(0, 3, 1, 2)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the map of the last stage."""
        return self.norm(x) if norm and stage == len(self.layers) - 1 else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.layers)
        self.layers = self.layers[:stages]
        self.layers[-1].downsample = None
        if norm or cut:
            self.norm = nn.Identity()
        if head or cut:
            self.reset_classifier(0, "")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AgentSwin) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, its tables stretched to the model's size; ours passes unchanged.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    return fit_checkpoint(state_dict, model)


default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny": imagenet_cfg(82.6),
        "agent_swin_small": imagenet_cfg(83.7),
        "agent_swin_small_288": imagenet_cfg(84.1, 288),
        "agent_swin_base": imagenet_cfg(84.0),
        "agent_swin_base_384": imagenet_cfg(84.9, 384),
    }
)


def _create_agent_swin(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(AgentSwin, variant, pretrained, checkpoint_filter_fn, unpublished=UNPUBLISHED, **kwargs)


SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2), "attn_type": "AABB"}
BASE: dict[str, Any] = {
    "embed_dim": 128,
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
    "attn_type": "AAMB2",
}


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28.9 M parameters, 4.5 GMACs at 224 x 224."""
    return _create_agent_swin("agent_swin_tiny", pretrained, **kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """49.7 M parameters, 8.7 GMACs at 224 x 224."""
    return _create_agent_swin("agent_swin_small", pretrained, **{**SMALL, **kwargs})


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """49.7 M parameters, 14.5 GMACs at 288 x 288."""
    size = {"img_size": 288, "window_size": 9}
    return _create_agent_swin("agent_swin_small_288", pretrained, **{**SMALL, **size, **kwargs})


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """88.1 M parameters, 15.4 GMACs at 224 x 224."""
    return _create_agent_swin("agent_swin_base", pretrained, **{**BASE, **kwargs})


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """88.3 M parameters, 46.2 GMACs at 384 x 384."""
    size = {"img_size": 384, "window_size": 12}
    return _create_agent_swin("agent_swin_base_384", pretrained, **{**BASE, **size, **kwargs})
