"""BiFormer: a pyramid of transformer blocks whose attention is routed, first between regions, then between tokens.

Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, https://arxiv.org/abs/2303.08810.
Same functions and argument names as the authors' code, https://github.com/rayleizhu/BiFormer (MIT licence). Special:
- routing attention in the first three stages, scaled by the width of all heads together; global attention in the last;
- local context from depthwise convolutions: 3x3 before attention, 5x5 beside it ("LePE", which crosses region borders);
- batch norm outside the blocks, layer norm inside.
`biformer_stl` has the layout of Swin-T. `biformer_stl_nchw` is the authors' second implementation of that, here called
refactored: it differs at sizes that its regions do not divide, and in the last stage.

Maps are (B, C, H, W) between blocks and (B, H, W, C) inside them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypedDict, Unpack

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    calculate_drop_path_rates,
    register_notrace_module,
    to_ntuple,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.ops import Permute

from visionattn.backbones._twins import unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import DepthwiseConv, check_in_chans, init_linear, linear, missing, pad_map_to_multiple
from visionattn.kernels import _record, routing_attention
from visionattn.kernels._packed import unpack
from visionattn.kernels._plain import crop

__all__ = ["BiFormer"]


def check_heads(dim: int, qk_dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
        raise ValueError(
            f"embed_dim {dim} and qk_dims {qk_dim} of a stage must be multiples of its number of heads, {num_heads}"
            " (that is qk_dims // head_dim, in global attention 8)"
        )


class QKVLinear(nn.Module):
    """Map (B, H, W, dim) -> q, k (B, H, W, heads, qk_dim / heads) and v (B, H, W, heads, dim / heads)."""

    def __init__(self, dim: int, qk_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.widths = [qk_dim, qk_dim, dim]
        self.qkv = nn.Linear(dim, sum(self.widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (self.num_heads, -1)) for y in linear(self.qkv, x).split(self.widths, -1)]


class TopkRouting(nn.Module):
    """Chooses the regions that each of n_win x n_win regions attends to, and weighs them.

    param_routing: a linear layer on the means of q and k over each region; diff_routing: the gradient reaches them.
    """

    def __init__(
        self, n_win: int, qk_dim: int, topk: int, scale: float, param_routing: bool = False, diff_routing: bool = False
    ) -> None:
        super().__init__()
        self.n_win, self.topk, self.scale, self.diff_routing = n_win, topk, scale, diff_routing
        self.emb = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B, H, W, heads, dim) -> numbers of the chosen regions (B, regions, topk), best first, and weights."""
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        q, k = (self.emb(self._means(x)) for x in (q, k))
        logits, routes = (q * self.scale @ k.mT).topk(self.topk)
        return routes, logits.softmax(-1)

    def _means(self, x: Tensor) -> Tensor:
        """(B, H, W, heads, dim) -> (B, regions, heads * dim)"""
        return x.unflatten(2, (self.n_win, -1)).unflatten(1, (self.n_win, -1)).mean((2, 4)).flatten(3).flatten(1, 2)


class RegionPool(nn.Module):
    """Pools k or v (B, H, W, heads, dim) inside each of n_win x n_win regions.

    mode: `ada_avgpool`, `ada_maxpool`: to kv_per_win x kv_per_win tokens; `avgpool`, `maxpool`: by kv_downsample_ratio.
    """

    def __init__(self, n_win: int, mode: str, kv_per_win: int, kv_downsample_ratio: int) -> None:
        super().__init__()
        layers = {
            "ada_avgpool": (nn.AdaptiveAvgPool2d, kv_per_win),
            "ada_maxpool": (nn.AdaptiveMaxPool2d, kv_per_win),
            "avgpool": (nn.AvgPool2d, kv_downsample_ratio),
            "maxpool": (nn.MaxPool2d, kv_downsample_ratio),
        }
        if mode not in layers:
            raise ValueError(f"kv_downsample_mode={mode!r}: expected 'identity' or one of {list(layers)}")
        layer, size = layers[mode]
        if size < 1:
            raise ValueError(f"kv_downsample_mode={mode!r}: got a pooling size of {size}, expected at least 1")
        self.n_win = n_win
        self.pool = layer(size)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, heads, _ = x.shape
        n = self.n_win
        x = x.reshape(b, n, h // n, n, w // n, -1).permute(0, 1, 3, 5, 2, 4)  # (B, n, n, C, h, w)
        x = self.pool(x.flatten(0, 2)).unflatten(0, (b, n, n)).permute(0, 1, 4, 2, 5, 3)
        return x.flatten(3, 4).flatten(1, 2).unflatten(-1, (heads, -1))


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Routing attention on a map (B, H, W, dim).

    Where n_win does not divide the map, it is zero padded below and to the right before the projection, and the padded
    tokens take part: the authors' rule for dense prediction (auto_pad).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        kv_downsample_mode: str = "identity",
        kv_per_win: int = -1,
        kv_downsample_ratio: int = 1,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        check_heads(dim, qk_dim, num_heads)
        if topk > n_win**2:
            raise ValueError(f"topks: {topk} regions asked for, but n_win={n_win} makes only {n_win**2}")
        if diff_routing > soft_routing or param_routing > diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True, which needs soft_routing=True")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention={param_attention!r}: expected 'qkvo' or 'qkv'")
        self.n_win, self.topk, self.soft_routing = n_win, topk, soft_routing
        self.scale = qk_scale or qk_dim**-0.5
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv else None
        self.qkv = QKVLinear(dim, qk_dim, num_heads)
        self.router = self.kv_down = None
        if kv_downsample_mode != "identity":
            self.kv_down = RegionPool(n_win, kv_downsample_mode, kv_per_win, kv_downsample_ratio)
        if soft_routing or self.kv_down is not None:  # else the kernel routes as TopkRouting does
            self.router = TopkRouting(n_win, qk_dim, topk, self.scale, param_routing, diff_routing)
        self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        q, k, v = self.qkv(pad_map_to_multiple(x, self.n_win, self.n_win))
        lepe = 0 if self.lepe is None else self.lepe(v.flatten(3))
        routes, weights = (None, None) if self.router is None else self.router(q, k)
        if self.kv_down is not None:
            k, v = self.kv_down(k), self.kv_down(v)
        if not self.soft_routing:
            weights = None
        if _record.active():
            _record.place()
        out = routing_attention(q, k, v, self.n_win, self.topk, self.scale, routes=routes, route_weights=weights)
        return linear(self.wo, crop(out.flatten(3) + lepe, (height, width)))


@register_notrace_module
class RefactoredRoutingAttention(nn.Module):
    """Routing attention on a map (B, H, W, dim), as the authors' second implementation (nchwBRA) has it.

    A region is H // n_win x W // n_win tokens, so there can be more than n_win x n_win of them. Where they do not
    divide the map, q, k and v are zero padded after the projection, and the padded keys take part; the means that
    choose regions leave them out.
    """

    def __init__(self, dim: int, num_heads: int, n_win: int = 7, topk: int = 4, side_dwconv: int = 5) -> None:
        super().__init__()
        check_heads(dim, dim, num_heads)
        self.num_heads, self.n_win, self.topk = num_heads, n_win, topk
        self.scale = dim**-0.5
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv else None
        self.qkv_linear = nn.Linear(dim, 3 * dim)
        self.output_linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size = max(1, height // self.n_win), max(1, width // self.n_win)
        regions = -(-height // size[0]), -(-width // size[1])
        topk = min(self.topk, regions[0] * regions[1])
        qkv = linear(self.qkv_linear, x)
        lepe = 0 if self.lepe is None else self.lepe(qkv.chunk(3, -1)[2])
        routes = None
        if height % size[0] or width % size[1]:
            routes = self.routes(qkv, size, topk)
            qkv = pad_map_to_multiple(qkv, *size)
        q, k, v = unpack(qkv.unflatten(-1, (3, self.num_heads, -1)))
        if _record.active():
            _record.place()
        out = routing_attention(q, k, v, regions, topk, self.scale, routes=routes).flatten(3)
        return linear(self.output_linear, crop(out, (height, width)) + lepe)

    @staticmethod
    def routes(qkv: Tensor, size: tuple[int, int], topk: int) -> Tensor:
        """Regions (B, regions, topk), best first, by means over the tokens that they have before padding."""
        q, k, _ = qkv.detach().permute(0, 3, 1, 2).chunk(3, 1)
        q, k = (F.avg_pool2d(x, size, size, ceil_mode=True, count_include_pad=False).flatten(2) for x in (q, k))
        return (q.mT @ k).topk(topk).indices


@register_notrace_module
class GlobalAttention(nn.Module):
    """Every token of the map (B, H, W, dim) attends to every other.

    lepe_of: what the 5x5 convolution beside attention is of, `input` or, in the refactored networks, `v`.
    """

    def __init__(self, dim: int, num_heads: int = 8, side_dwconv: int = 0, lepe_of: str = "input") -> None:
        super().__init__()
        check_heads(dim, dim, num_heads)
        self.num_heads, self.lepe_of = num_heads, lepe_of
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, side_dwconv) if side_dwconv else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        out = routing_attention(q, k, v, regions=1, topk=1).flatten(3)
        if self.lepe is not None:
            out = out + self.lepe(x if self.lepe_of == "input" else v.flatten(3))
        return linear(self.proj, out)


def create_attention(
    dim: int, topk: int, head_dim: int = 32, side_dwconv: int = 5, refactored: bool = False, **routing: Any
) -> nn.Module:
    """The attention of a stage, which the authors choose by topk: > 0 routing, -2 global, -1 global without LePE,
    0 convolutions only. In the refactored networks -1 means global with LePE.

    routing: arguments of `BiLevelRoutingAttention`, or if refactored n_win alone."""
    if topk > 0 and refactored:
        return RefactoredRoutingAttention(dim, dim // head_dim, topk=topk, side_dwconv=side_dwconv, **routing)
    if topk > 0:
        num_heads = (routing.get("qk_dim") or dim) // head_dim
        return BiLevelRoutingAttention(dim, num_heads, topk=topk, side_dwconv=side_dwconv, **routing)
    if topk == 0:
        convs = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1)
        return nn.Sequential(Permute([0, 3, 1, 2]), *convs, Permute([0, 2, 3, 1]))
    if topk == -2 or refactored:
        return GlobalAttention(dim, side_dwconv=side_dwconv, lepe_of="v" if refactored else "input")
    if topk == -1:
        return GlobalAttention(dim)
    raise ValueError(f"topks: got {topk}, expected a number of regions, 0, -1 or -2")


class Block(nn.Module):
    """Local convolution, attention and MLP on a map (B, dim, H, W), each with a residual.

    attn: maps (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 3.0,
        mlp_dwconv: bool = False,
        before_attn_dwconv: int = 3,
        pre_norm: bool = True,
        layer_scale_init_value: float = -1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        scaled = layer_scale_init_value > 0
        self.pre_norm = pre_norm
        self.pos_embed = (
            nn.Conv2d(dim, dim, before_attn_dwconv, padding=before_attn_dwconv // 2, groups=dim)
            if before_attn_dwconv
            else None
        )
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.Sequential(OrderedDict(dwconv=DepthwiseConv(hidden, 3))) if mlp_dwconv else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden, dim),
        )
        self.gamma1 = LayerScale(dim, layer_scale_init_value) if scaled else nn.Identity()
        self.gamma2 = LayerScale(dim, layer_scale_init_value) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        if self.pre_norm:
            x = x + self.drop_path(self.gamma1(self.attn(self.norm1(x))))
            x = x + self.drop_path(self.gamma2(self.mlp(self.norm2(x))))
        else:
            x = self.norm1(x + self.drop_path(self.gamma1(self.attn(x))))
            x = self.norm2(x + self.drop_path(self.gamma2(self.mlp(x))))
        return x.permute(0, 3, 1, 2)


class PatchConv(nn.Conv2d):
    """Convolution of non-overlapping patches; with `pad`, a map that they do not divide is zero padded first."""

    def __init__(self, in_chans: int, dim: int, size: int, pad: bool) -> None:
        super().__init__(in_chans, dim, size, stride=size)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            rows, columns = self.kernel_size
            x = F.pad(x, (0, missing(x.shape[3], columns), 0, missing(x.shape[2], rows)))
        return self._conv_forward(x, self.weight, self.bias)


def _overlapping_convs(in_chans: int, dims: Sequence[int]) -> list[nn.Sequential]:
    """Stride 4, then 2, 2, 2: rounding up."""

    def conv(source: int, target: int) -> list[nn.Module]:
        return [nn.Conv2d(source, target, 3, stride=2, padding=1), nn.BatchNorm2d(target)]

    stem = nn.Sequential(*conv(in_chans, dims[0] // 2), nn.GELU(), *conv(dims[0] // 2, dims[0]))
    return [stem] + [nn.Sequential(*conv(a, b)) for a, b in pairwise(dims)]


def _patch_convs(in_chans: int, dims: Sequence[int], pad: bool) -> list[nn.Sequential]:
    """Swin's: stride 4, then 2, 2, 2, rounding up with `pad` and down without."""
    stem = nn.Sequential(PatchConv(in_chans, dims[0], 4, pad), nn.BatchNorm2d(dims[0]))
    merges = [nn.Sequential(nn.BatchNorm2d(a), PatchConv(a, b, 2, pad)) for a, b in pairwise(dims)]
    return [stem, *merges]


class Routing(TypedDict, total=False):
    """Arguments of `BiLevelRoutingAttention` in a network. Each is one value, or one for each stage."""

    qk_dims: int | Sequence[int]
    kv_per_wins: int | Sequence[int]
    kv_per_win: int
    kv_downsample_ratios: int | Sequence[int]
    kv_downsample_ratio: int
    kv_downsample_mode: str
    qk_scale: float
    param_attention: str
    param_routing: bool
    diff_routing: bool
    soft_routing: bool


class BiFormer(MapClassifier):
    """BiFormer for classification, and as a backbone with maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32. Arguments for which a sequence is allowed take one value
    for all stages or one for each.

    Args:
        depth: blocks of each stage.
        embed_dim: channels of each stage.
        mlp_ratios: hidden channels of the MLP over embed_dim.
        topks: regions that each region attends to; -2: global attention, -1: the same without LePE, 0: convolutions
            only (see `create_attention`). For each stage.
        n_win: the map is cut into n_win x n_win regions. One value, or one for each stage.
        head_dim: channels of q and k of each head. Global attention has 8 heads instead.
        side_dwconv: kernel size of LePE, 0 for none.
        before_attn_dwconv: kernel size of the convolution before attention, 0 for none.
        mlp_dwconv: put a 3x3 depthwise convolution inside the MLP.
        pre_norm: normalise what enters attention and MLP; if False, normalise after the residual.
        layer_scale_init_value: initial value of the learned scale of each residual branch; none unless positive.
        overlapping: 3x3 convolutions between stages; if False, Swin's patches.
        refactored: the authors' second implementation of attention (see the top of this file).
        extra_norms: a layer norm of each map that `features_only` and `forward_intermediates` return, as the authors'
            dense models have; not for classification, where these layers would have no gradient.
        img_size: accepted and not used: any size will do.
        routing: arguments of `BiLevelRoutingAttention`, by the names in `Routing`; not if refactored.
    """

    map_format = "NCHW"
    norm: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depth: Sequence[int] = (2, 2, 8, 2),
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        mlp_ratios: float | Sequence[float] = 3.0,
        topks: Sequence[int] = (1, 4, 16, -2),
        n_win: int | Sequence[int] = 7,
        head_dim: int = 32,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        mlp_dwconv: bool = False,
        pre_norm: bool = True,
        layer_scale_init_value: float = -1,
        overlapping: bool = True,
        refactored: bool = False,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        **routing: Unpack[Routing],
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        if refactored and routing:
            raise ValueError(f"{', '.join(routing)}: refactored=True has nothing of that to set")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(embed_dim)
        ]
        if overlapping:
            convs = _overlapping_convs(in_chans, embed_dim)
        else:
            convs = _patch_convs(in_chans, embed_dim, pad=not refactored)
        self.downsample_layers = nn.ModuleList(convs)

        per_stage = {"embed_dim": embed_dim, "topks": topks, "mlp_ratios": mlp_ratios, "n_win": n_win, **routing}
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depth)))
        self.stages = nn.ModuleList()
        for blocks, options in zip(depth, _split_by_stage(len(depth), per_stage), strict=True):
            dim, topk, mlp_ratio = (options.pop(name) for name in ("embed_dim", "topks", "mlp_ratios"))
            options = {name.removesuffix("s"): value for name, value in options.items()}  # qk_dims -> qk_dim
            stage = nn.Sequential()
            for _ in range(blocks):
                attn = create_attention(dim, topk, head_dim, side_dwconv, refactored, **options)
                local = mlp_dwconv, before_attn_dwconv
                stage.append(Block(dim, attn, mlp_ratio, *local, pre_norm, layer_scale_init_value, next(drop_paths)))
            self.stages.append(stage)
        self.extra_norms = nn.ModuleList(map(LayerNorm2d, embed_dim)) if extra_norms else None
        self.norm = nn.BatchNorm2d(self.num_features)
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        if coarse:
            return {"stem": r"^downsample_layers\.0", "blocks": r"^(?:downsample_layers|stages)\.(\d+)"}
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),  # with the first block of the stage
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^(?:extra_norms|norm)\b", (99999,)),
        ]
        return {"stem": r"^downsample_layers\.0", "blocks": blocks}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            yield x
        yield self.norm(x)

    def intermediate(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """By the stage's own norm, if there are extra_norms; else norm is for the map of the last stage."""
        if self.extra_norms is not None:
            return self.extra_norms[stage](x)
        return self.norm(x) if norm and stage == len(self.stages) - 1 else x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.stages)
        self.downsample_layers = self.downsample_layers[:stages]
        self.stages = self.stages[:stages]
        if self.extra_norms is not None:
            self.extra_norms = self.extra_norms[:stages]
        if norm or cut:
            self.norm = nn.Identity()
        if head or cut:
            self.reset_classifier(0, "")


def _split_by_stage(stages: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Options with one value, or one for each stage -> the options of each stage."""
    values = {name: to_ntuple(stages)(value) for name, value in options.items()}
    for name, value in values.items():
        if len(value) != stages:
            raise ValueError(f"{name}: {len(value)} values were given for {stages} stages (the length of depth)")
    return [dict(zip(values, of_stage, strict=True)) for of_stage in zip(*values.values(), strict=True)]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names and shapes; ours passes unchanged."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    renamed = {}
    for key, value in unwrap(state_dict).items():
        if key.endswith((".gamma1", ".gamma2")):
            key += ".gamma"
        key = key.replace(".blocks.", ".").replace(".mlp.2.", ".mlp.3.")  # Swin layout
        if len(shapes.get(key, ())) == 2 and value.ndim == 4:  # 1x1 convolutions of the refactored networks
            value = value.flatten(1)
        renamed[key] = value
    return renamed


AUTHORS = "https://github.com/rayleizhu/BiFormer"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "mit",
        "origin_url": AUTHORS,
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "paper_ids": "arXiv:2303.08810",
        **kwargs,
    }


TOP1 = {"tiny": 81.4, "small": 83.8, "base": 84.3, "stl": 82.7, "stl_nchw": 82.7}  # the authors', in per cent
default_cfgs = generate_default_cfgs(
    {f"biformer_{size}": _cfg(description=f"ImageNet-1k top-1 {top1} %") for size, top1 in TOP1.items()}
)


def _create_biformer(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    unpublished = (
        "its weights are on OneDrive, from where a program cannot fetch them; download the file by hand from the links"
        f" at {AUTHORS}"
    )
    return create(BiFormer, variant, pretrained, checkpoint_filter_fn, unpublished=unpublished, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """13.1 M parameters, 2.2 GMACs at 224 x 224."""
    return _create_biformer("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """25.5 M parameters, 4.5 GMACs at 224 x 224."""
    args = {"depth": (4, 4, 18, 4)}
    return _create_biformer("biformer_small", pretrained, **{**args, **kwargs})


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """56.8 M parameters, 9.8 GMACs at 224 x 224."""
    args = {"depth": (4, 4, 18, 4), "embed_dim": (96, 192, 384, 768)}
    return _create_biformer("biformer_base", pretrained, **{**args, **kwargs})


SWIN_T = {
    "depth": (2, 2, 6, 2),
    "embed_dim": (96, 192, 384, 768),
    "mlp_ratios": 4.0,
    "before_attn_dwconv": 0,
    "overlapping": False,
}


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28.4 M parameters, 4.6 GMACs at 224 x 224."""
    return _create_biformer("biformer_stl", pretrained, **{**SWIN_T, **kwargs})


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28.4 M parameters, 4.6 GMACs at 224 x 224. Where strides do not divide the image, its maps round down."""
    args = {**SWIN_T, "topks": (1, 4, 16, -1), "refactored": True}
    return _create_biformer("biformer_stl_nchw", pretrained, **{**args, **kwargs})
