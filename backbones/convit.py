"""ConViT: a vision transformer whose first blocks start as convolutions, and can learn to forget it.

d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, ICML 2021,
https://arxiv.org/abs/2103.10697. Same functions, argument names and state-dict keys as timm's `convit_*`, from
https://github.com/facebookresearch/convit. Special:
- in the first blocks a gate of each head mixes attention by content with attention by relative position alone;
- each of these heads starts by attending to a neighbour of its own, as an entry of a convolution's kernel does;
- the class token joins after them, and the last blocks have plain attention.

Any size of image. It is zero padded below and to the right to whole patches. Relative positions are counted in patches,
so that a head's neighbour stays its neighbour. The table of absolute positions is stretched over the image (see
`layers.position_embedding`); at the size it was made for it is used as it is.

Maps are (B, H, W, C), tokens (B, 1 + H * W, C) with the class token first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_module,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, twin_cfgs, unwrap
from visionattn.backbones.backbone import TokenClassifier, create
from visionattn.backbones.layers import (
    Mlp,
    check_in_chans,
    init_linear,
    is_plain,
    linear,
    position_embedding,
)
from visionattn.kernels import gated_positional_attention, routing_attention
from visionattn.kernels._check import known
from visionattn.kernels._packed import unpack
from visionattn.kernels._plain import keep

__all__ = ["ConViT"]

torch.fx.wrap("position_embedding")

PATCH = 16  # pixels
SMALL = 49  # places of a map, up to which what takes time are operators, not what they do


@register_notrace_module
class GatedPositionalAttention(nn.Module):
    """Attention on a map (B, H, W, dim) by content and by relative position, mixed by a gate of each head.

    locality_strength: how sharply a head attends to its neighbour before training.
    """

    def __init__(self, dim: int, num_heads: int, locality_strength: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.locality_strength = num_heads, locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))

    @torch.no_grad()
    def local_init(self) -> None:
        """Values pass unchanged, and each head attends around a neighbour: one of the positions of a square kernel.

        Heads are numbered down the kernel's columns. Those beyond the largest square keep what they have.
        """
        nn.init.eye_(self.v.weight)
        side = int(self.num_heads**0.5)
        positions = torch.arange(side) - (side - 1) / 2
        weight = self.pos_proj.weight
        weight[: side**2, 0] = 2 * positions.repeat_interleave(side)
        weight[: side**2, 1] = 2 * positions.repeat(side)
        weight[: side**2, 2] = -1
        weight *= self.locality_strength

    def position_logits(self, height: int, width: int) -> Tensor | tuple[Tensor, Tensor]:
        """(heads, H, H) and (heads, W, W), queries first, to be added: linear in the step and in its square.

        On small maps their sum, (heads, H * W, H * W), by fewer operators.
        """
        weight, bias = self._position_weights()
        places = height * width
        if known(places <= SMALL):
            sums = torch.addmm(bias[:, None], weight, _steps_of_both(bias, height, width, bias.dtype))
            return sums.unflatten(1, (places, places))
        of_rows, of_columns = (_steps(bias, length, axis, bias.dtype) for axis, length in ((1, height), (0, width)))
        rows = torch.addmm(bias[:, None], weight, of_rows).unflatten(1, (height, height))
        return rows, (weight @ of_columns).unflatten(1, (width, width))

    def _position_weights(self) -> tuple[Tensor, Tensor]:
        """Weight (heads, 3) and bias of `pos_proj`.

        Whatever stands in the layer's place, or watches it, is called, on unit vectors.
        """
        if is_plain(self.pos_proj, nn.Linear):
            return self.pos_proj.weight, self.pos_proj.bias
        units = torch.eye(4, 3, device=self.gating_param.device, dtype=self.gating_param.dtype)
        sums = self.pos_proj(units)
        return (sums[:3] - sums[3]).T, sums[3]

    def forward(self, x: Tensor) -> Tensor:
        q, k = unpack(linear(self.qk, x).unflatten(-1, (2, self.num_heads, -1)))
        v = linear(self.v, x).unflatten(-1, (self.num_heads, -1))
        x = gated_positional_attention(q, k, v, self.position_logits(*x.shape[1:3]), self.gating_param)
        return linear(self.proj, x.flatten(3))


@keep
def _steps(length: int, axis: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, length * length): from each position of an axis to each, what `pos_proj` sees of it: the steps to the right
    (axis 0) or down (1), the other being 0, and their squares."""
    position = torch.arange(length, device=device, dtype=dtype)
    steps = (position - position[:, None]).flatten()
    none = torch.zeros_like(steps)
    return torch.stack([none, steps, steps**2] if axis else [steps, none, steps**2])


@keep
def _steps_of_both(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, (H * W) ** 2): of both axes together, from each place to each."""
    y, x = (torch.arange(length, device=device, dtype=dtype) for length in (height, width))
    down, right = (y - y[:, None])[:, None, :, None], (x - x[:, None])[:, None]
    return torch.stack(torch.broadcast_tensors(right, down, right**2 + down**2)).flatten(1)


@register_notrace_module
class Attention(nn.Module):
    """Each of the tokens (B, N, dim) attends to all."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(self.qkv, x[:, :, None]).unflatten(-1, (3, self.num_heads, -1)))
        return linear(self.proj, routing_attention(q, k, v, regions=1, topk=1)[:, :, 0].flatten(2))


class Block(nn.Module):
    """Attention and MLP, each with a residual: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(TokenClassifier):
    """ConViT for classification, and as a backbone with a map at stride 16 after every block.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dim: channels of each head.
        depth, num_heads: blocks, and heads of each.
        local_up_to_layer: the first blocks, with gated positional attention; the class token joins after them.
        locality_strength: how sharply their heads attend to their neighbours before training.
        global_pool: `token` (the class token), `avg` or `ggem` (of all others) or "" (no pooling).
        img_size: the size that the table of absolute positions is made for; any other size works too.
        mlp_ratio: hidden channels of the MLP over channels.
        drop_rate, pos_drop_rate: dropout before the head, and after the position embedding.
    """

    output_formats = ("NCHW", "NLC")
    norm: nn.Module

    def __init__(
        self,
        embed_dim: int = 48,
        depth: int = 12,
        num_heads: int = 4,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if not 0 <= local_up_to_layer < depth:
            raise ValueError(
                f"local_up_to_layer={local_up_to_layer} of {depth} blocks: expected 0 to {depth - 1}, so that the class"
                " token meets the others"
            )
        dim = embed_dim * num_heads
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = dim
        self.set_pool(global_pool)
        self.local_up_to_layer = local_up_to_layer
        self.feature_info = [{"num_chs": dim, "reduction": PATCH, "module": f"blocks.{i}"} for i in range(depth)]
        self.grid = _grid(img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.patch_embed = PatchEmbed(None, PATCH, in_chans, dim, output_fmt="NHWC", dynamic_img_pad=True)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential()
        rates: Sequence[Any] = calculate_drop_path_rates(drop_path_rate, depth)
        for i, rate in enumerate(rates):
            local = i < local_up_to_layer
            attn = GatedPositionalAttention(dim, num_heads, locality_strength) if local else Attention(dim, num_heads)
            self.blocks.append(Block(dim, attn, mlp_ratio, rate))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the table of absolute positions for images of another size, as a new parameter."""
        table = _resample(self.pos_embed.detach(), self.grid, _grid(img_size))
        self.pos_embed, self.grid = nn.Parameter(table.clone(), self.pos_embed.requires_grad), _grid(img_size)

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        table = position_embedding(self.pos_embed.unflatten(1, self.grid), images.shape[-2], images.shape[-1], PATCH)
        x = self.pos_drop(self.patch_embed(images) + table)
        size = x.shape[1:3]
        for i, block in enumerate(self.blocks):
            if i == self.local_up_to_layer and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            yield x if i < self.local_up_to_layer else x[:, 1:].unflatten(1, size)
        yield self.norm(x.flatten(1, 2) if self.cls_token is None else x)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the maps of all blocks."""
        return self.norm(x) if norm else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        self.blocks = self.blocks[:stages]
        if stages <= self.local_up_to_layer:
            self.cls_token = None
        if norm:
            self.norm = nn.Identity()
        if head or (self.cls_token is None and self.global_pool == "token"):
            self.reset_classifier(0, "")


def _grid(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the table of absolute positions."""
    size = to_2tuple(img_size)
    if min(size) < 32:
        raise ValueError(f"img_size={img_size}: expected at least 32 x 32 pixels")
    return size[0] // PATCH, size[1] // PATCH


def _resample(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """(1, positions, C) -> (1, other positions, C)"""
    return resample_abs_pos_embed_nhwc(table.unflatten(1, source), target).flatten(1, 2)


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, GatedPositionalAttention):
        module.local_init()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ConViT) -> dict[str, Tensor]:
    """The authors' or timm's checkpoint, bare or wrapped; a table for square images is resampled to the model's size.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = dict(unwrap(state_dict))
    table = state_dict.get("pos_embed")
    if table is not None and table.shape[1] != model.pos_embed.shape[1]:
        side = round(table.shape[1] ** 0.5)
        state_dict["pos_embed"] = _resample(table, (side, side), model.grid)
    check_checkpoint(state_dict, model)
    return state_dict


PAPER = {
    "origin_url": "https://github.com/facebookresearch/convit",
    "paper_name": "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    "paper_ids": "arXiv:2103.10697",
}
default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for size in ("tiny", "small", "base")
        for name, cfg in twin_cfgs(f"convit_{size}", fixed_input_size=False, pool_size=(14, 14), **PAPER).items()
    }
)


def _create_convit(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(ConViT, variant, pretrained, checkpoint_filter_fn, default_indices=3, **kwargs)


@register_model
def va_convit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_convit("va_convit_tiny", pretrained, **kwargs)


@register_model
def va_convit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_convit("va_convit_small", pretrained, **{"num_heads": 9, **kwargs})


@register_model
def va_convit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create_convit("va_convit_base", pretrained, **{"num_heads": 16, **kwargs})
