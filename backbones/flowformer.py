"""Flowformer: attention as a flow from keys to queries, linear in positions, whose conservation replaces the softmax.

Wu et al., Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022, https://arxiv.org/abs/2202.06258.
Same functions as the authors' vision network, https://github.com/thuml/Flowformer (MIT licence). Special:
- what flows from a key to a query is the product of their sigmoids; each key's outgoing flow being fixed, queries keep
  what comes in, and each query's incoming flow being fixed, keys compete for what they give, by a softmax over all;
- twelve heads in every stage of a plain pyramid: patches of 4 pixels, then of 2 x 2 positions;
- positions are learned once, for the first map; only the MLP's branch has a learned scale.

Any size of image: the position embedding is stretched over it (see `layers.position_embedding`), at the size it was
made for it is used as it is. Maps of odd sizes are padded before they are halved; the authors' code, for one
square size, leaves their last row and column out. The two are the same where 32 divides the sides of the image.

Maps are (B, H, W, C).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_module,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import Mlp, check_in_chans, init_linear, linear, position_embedding
from visionattn.kernels import linear_attention
from visionattn.kernels._check import precise

__all__ = ["Flowformer"]

torch.fx.wrap("position_embedding")

EPSILON = 1e-6  # which keeps flows above 0
STRIDE = 4  # of the first map


def conserved(qk: Tensor) -> Tensor:
    """Positive queries and keys (2, B, heads, N, head_dim) -> the same, whose flows are conserved.

    Queries are multiplied by what each lets in, keys by what each gives, by competition, so that `linear_attention` of
    them is the paper's. Of means in place of its sums, so that no number grows with the map.
    """
    tokens, dtype = qk.shape[3], precise(qk)

    def with_mean_of_other(mean: Tensor, epsilon: float) -> Tensor:
        """Products of queries with a mean of keys, and of keys with one of queries, (2, B, heads, N): of two factors
        that EPSILON and `epsilon` are added to, as in the authors' code."""
        mean = mean.flip(0) + epsilon
        products = (qk @ mean.mT.to(qk.dtype)).to(dtype)
        return (products + (EPSILON * mean.sum(-1, True) + epsilon)).squeeze(-1)

    flows = 1 / with_mean_of_other(qk.mean(3, True, dtype=dtype), EPSILON / tokens)  # into queries, out of keys
    root = tokens**-0.5  # twice: neither the flows nor their sums leave the range of float16
    mean = ((flows * root).to(qk.dtype)[..., None, :] @ qk).to(dtype) * root
    let_in, given = with_mean_of_other(mean, EPSILON)
    weights = torch.stack([let_in.sigmoid() * flows[0], given.clamp(-1, 1).softmax(-1) * tokens])
    return qk * weights[..., None].to(qk.dtype)


@register_notrace_module
class FlowAttention(nn.Module):
    """Linear attention on a map (B, H, W, dim), by flows."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        qk, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], 3)
        qk = qk.flatten(1, 2).permute(2, 0, 3, 1, 4).contiguous().sigmoid()  # head by head, as all that follows reads
        q, k = (y.transpose(1, 2).unflatten(1, size) for y in conserved(qk))
        return linear(self.proj, linear_attention(q, k, v.squeeze(3)).flatten(3))


class Block(nn.Module):
    """Attention and MLP on a map (B, H, W, dim), each with a residual, that of the MLP scaled.

    layer_scale: initial value of that learned scale.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = FlowAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return torch.addcmul(x, self.gamma, self.drop_path(self.mlp(self.norm2(x))))


class Flowformer(MapClassifier):
    """Flowformer for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dims, depths, mlp_ratios: channels, blocks and hidden channels over channels of each stage.
        num_heads: of all stages.
        layer_scale: initial value of the learned scale of the branch of each MLP.
        img_size: the size that the position embedding is made for; any other size works too.
    """

    pos_embed: nn.Parameter
    norm: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        layer_scale: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        for name, values in {"embed_dims": embed_dims, "mlp_ratios": mlp_ratios}.items():
            if len(values) != len(depths):
                raise ValueError(f"{name}: {len(values)} values were given for {len(depths)} stages (length of depths)")
        if num_heads < 1 or any(dim % num_heads for dim in embed_dims):
            raise ValueError(f"embed_dims={tuple(embed_dims)}: expected multiples of num_heads={num_heads}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": STRIDE * 2**i, "module": f"blocks.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, *_table_size(img_size), embed_dims[0]), std=0.02))
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed, self.blocks = nn.ModuleList(), nn.ModuleList()
        source = in_chans
        for i, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True)):
            size = 2 if i else STRIDE
            self.patch_embed.append(
                PatchEmbed(None, size, source, dim, flatten=False, output_fmt="NHWC", dynamic_img_pad=True)
            )
            blocks = (Block(dim, num_heads, ratio, layer_scale, next(drop_paths)) for _ in range(depth))
            self.blocks.append(nn.Sequential(*blocks))
            source = dim
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        stem = r"^(?:pos_embed|patch_embed\.0)"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:patch_embed|blocks)\.(\d+)"}
        blocks = [
            (r"^patch_embed\.(\d+)", (0,)),  # with the first block of the stage
            (r"^blocks\.(\d+)\.(\d+)", None),
            (r"^norm\b", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position embedding for images of another size, as a new parameter."""
        table = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), _table_size(img_size))
        self.pos_embed = nn.Parameter(table.clone(), self.pos_embed.requires_grad)

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        table = position_embedding(self.pos_embed, images.shape[-2], images.shape[-1], STRIDE)
        x = images
        for i, (patch_embed, blocks) in enumerate(zip(self.patch_embed, self.blocks, strict=True)):
            x = patch_embed(x)
            x = x if i else x + table
            x = checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)
            yield x
            x = x.permute(0, 3, 1, 2)
        yield self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """norm is for the map of the last stage."""
        return self.norm(x) if norm and stage == len(self.blocks) - 1 else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.blocks)
        self.patch_embed, self.blocks = self.patch_embed[:stages], self.blocks[:stages]
        if norm or cut:
            self.norm = nn.Identity()
        if head or cut:
            self.reset_classifier(0, "")


def _table_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = to_2tuple(img_size)
    if min(size) < 32:
        raise ValueError(f"img_size={img_size}: expected at least 32 x 32 pixels")
    return size[0] // STRIDE, size[1] // STRIDE


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Flowformer) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped; the position embedding is resampled to the model's size.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = dict(unwrap(state_dict))
    table = state_dict.get("pos_embed")
    if table is not None:
        if table.ndim == 3:  # the authors', for square images
            side = round(table.shape[1] ** 0.5)
            table = table.unflatten(1, (side, side))
        state_dict["pos_embed"] = resample_abs_pos_embed_nhwc(table, list(model.pos_embed.shape[1:3]))
    check_checkpoint(state_dict, model, r"blocks\.\d+\.\d+\.")
    return state_dict


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/thuml/Flowformer",
        "paper_name": "Flowformer: Linearizing Transformers with Conservation Flows",
        "paper_ids": "arXiv:2202.06258",
    }


default_cfgs = generate_default_cfgs({"flowformer": _cfg()})


@register_model
def flowformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """43.3 M parameters, 6.9 GMACs at 224 x 224."""
    place = "https://cloud.tsinghua.edu.cn/d/82d93375f97f4ca58886/"
    unpublished = f"a program cannot fetch its weights; download the file by hand from {place}"
    return create(Flowformer, "flowformer", pretrained, checkpoint_filter_fn, unpublished=unpublished, **kwargs)
