"""TransNeXt: each position looks sharply at its neighbours and coarsely at the whole map, in one softmax.

Shi, TransNeXt: Robust Foveal Visual Perception for Vision Transformers, CVPR 2024, https://arxiv.org/abs/2311.17132.
Same functions as the authors' code, https://github.com/DaiShiResearch/TransNeXt (Apache-2.0). Special:
- aggregated attention: the keys of a position are the 3 x 3 around it and a pooled map; its last stage has all keys;
- attention by cosine, scaled by the logarithm of the number of keys, with a learned embedding added to all queries;
- a query also gives its neighbours weights directly, by learned tokens, beside the softmax;
- a position bias from an MLP over logarithmic distances, so that it holds at other sizes than that of training;
- a gated MLP with a depthwise convolution in the gate.

Any size of image, by the rule of the authors' dense networks: distances count in positions of the training size, bins
of pooling adapt. The authors' classifiers are built for one square size each; at that size these are the same.

Maps are (B, H, W, C), and in attention (B, heads, H, W, C / heads).
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import channels_last, check_in_chans, linear, no_autocast, pool_to
from visionattn.kernels import _record, window_attention
from visionattn.kernels._check import at_least, autocasting, known, precise
from visionattn.kernels._dispatch import takes_plain
from visionattn.kernels._packed import unpack
from visionattn.kernels._plain import keep

__all__ = ["TransNeXt"]

CHUNK = 32 * 2**20  # bytes of logits that attention computes at a time on a CPU, without gradients
NORM = 1e-12  # least norm of queries and keys
PLACES = 2**15  # distances that the MLP of the position bias takes at a time there


class PatchEmbed(nn.Module):
    """(B, source, H, W) -> (B, H / stride, W / stride, dim), rounded up."""

    def __init__(self, source: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(source, dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(channels_last(x)).permute(0, 2, 3, 1))


class CosineAttention(nn.Module):
    """What both kinds of attention on a map (B, H, W, dim) share.

    side: of the map at the size of training, or its rows and columns, which distances are counted by.
    """

    def __init__(self, dim: int, num_heads: int, side: int | tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.side = num_heads, to_2tuple(side)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, dim // num_heads), std=0.02))
        self.proj = nn.Linear(dim, dim)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_act = nn.ReLU()
        self.cpb_fc2 = nn.Linear(512, num_heads)

    def join(self, heads: Tensor, gates: Tensor | None) -> Tensor:
        """Results of heads (B, H, W, heads, head_dim) -> (B, H, W, dim); gates: (B, H, W, heads), what each counts."""
        heads = heads if gates is None else heads * gates[..., None].to(heads.dtype)
        return linear(self.proj, heads.flatten(3))

    def queries(self, q: Tensor, log_keys: Tensor) -> Tensor:
        """Of q (B, heads, H, W, head_dim), normalised, what is multiplied with keys, by the number of keys."""
        factor = (F.softplus(self.temperature)[:, None] * log_keys).to(q.dtype)
        return (q + self.query_embedding[:, None].to(q.dtype)) * factor

    def distances(self, x: Tensor, keys: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The bias (heads, R, C) of all distances by row and by column from a map like x to keys.

        And for each row and each row of keys (H * keys[0],), and for each column, where in it their distance is.
        """
        dtype = self.temperature.dtype
        rows, columns = (_steps(x, x.shape[1 + i], keys[i], self.side[i], dtype) for i in (0, 1))
        size = (rows[0].shape[0], columns[0].shape[0])
        places = torch.stack([rows[0][:, None].expand(size), columns[0].expand(size)], -1).flatten(0, 1)
        trained = torch.is_grad_enabled() and self.cpb_fc1.weight.requires_grad
        parts = [places] if takes_plain(x) or trained else places.split(PLACES)
        with no_autocast(x):  # of few numbers: casts would take longer
            of_parts = [self.cpb_fc2(self.cpb_act(self.cpb_fc1(part))) for part in parts]
        bias: Tensor = of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts)
        return bias.T.unflatten(1, size), rows[1], columns[1]


def position_bias(
    bias: Tensor, rows: Tensor, columns: Tensor, queries: tuple[int, int], keys: tuple[int, int]
) -> Tensor:
    """Of `distances`, perhaps for some of its rows, the bias (heads, H * W, keys) of so many queries and keys."""
    bias = bias.index_select(1, rows).index_select(2, columns)
    bias = bias.unflatten(2, (queries[1], keys[1])).unflatten(1, (queries[0], keys[0]))
    return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@keep
def _steps(length: int, keys: int, side: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    if known(length < 2**62):
        values, places = _axis(int(length), int(keys), side)
        return torch.tensor(values, dtype=dtype, device=device), torch.tensor(places, device=device)
    key = torch.arange(keys, device=device)  # of a symbol all distances there can be: multiples of a half
    doubled = key * length // keys + ((key + 1) * length + keys - 1) // keys - 1
    step = torch.arange(2 - 2 * length, 2 * length - 1, device=device) / 2
    scaled = step.to(dtype) / (side - 1) * 8
    places = 2 * torch.arange(length, device=device)[:, None] - doubled + 2 * length - 2
    return scaled.sign() * (scaled.abs() + 1).log2() / 3, places.flatten()


@torch.compiler.assume_constant_result
def _axis(length: int, keys: int, side: int) -> tuple[list[float], list[int]]:
    """The different distances, on a logarithmic scale, from a position of an axis to a pooled key, and which of them
    each pair has. A key is where the mean of its bin is."""
    centres = [(i * length // keys + -(-(i + 1) * length // keys) - 1) / 2 for i in range(keys)]
    steps = [place - centre for place in range(length) for centre in centres]
    different = sorted(set(steps))
    scaled = [step / (side - 1) * 8 for step in different]
    numbers = {step: number for number, step in enumerate(different)}
    return [math.copysign(math.log2(abs(x) + 1) / 3, x) for x in scaled], [numbers[step] for step in steps]


@register_notrace_module
class GlobalAttention(CosineAttention):
    """Each position attends to all."""

    def __init__(self, dim: int, num_heads: int, side: int | tuple[int, int], qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, side)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        size = x.shape[1], x.shape[2]
        q, k, v = unpack(linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)))
        keys = torch.full((), size[0] * size[1], dtype=self.temperature.dtype, device=x.device)
        q = self.queries(_unit(q).movedim(3, 1), keys.log()).movedim(1, 3)
        bias = position_bias(*self.distances(q, size), size, size)
        x = window_attention(q, _unit(k), v, size, bias=bias, scale=1.0)
        return self.join(x, gates)


@register_notrace_module
class AggregatedAttention(CosineAttention):
    """Each position attends to the window around it and to the pooled map.

    `record_attention` keeps weights (B, heads, H * W, window_size ** 2 + pooled keys): those of keys outside the map
    are 0; indices from H * W on are the pooled keys, row-major.

    pool_size: rows and columns of the pooled map; None for those of the map over sr_ratio, rounded down.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int | tuple[int, int],
        sr_ratio: int,
        window_size: int = 3,
        qkv_bias: bool = True,
        pool_size: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, side)
        self.window_size, self.sr_ratio, self.pool_size = window_size, sr_ratio, pool_size
        window = window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(num_heads, window), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(num_heads, dim // num_heads, window), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, window))

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        keys = self._pooled(x.shape[1]), self._pooled(x.shape[2])
        if autocasting(x):  # once for the three layers that take it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        q = linear(self.q, x).unflatten(-1, (self.num_heads, -1)).movedim(3, 1)
        k, v = linear(self.kv, x).unflatten(-1, (2, self.num_heads, -1)).movedim(4, 1).unbind(4)
        pooled = self.norm(pool_to(self.act(self.sr(x.permute(0, 3, 1, 2))), keys).permute(0, 2, 3, 1))
        pooled_k, pooled_v = linear(self.kv, pooled).unflatten(-1, (2, self.num_heads, -1)).movedim(4, 1).unbind(4)
        bias, rows, columns = self.distances(x, keys)
        with no_autocast(x):
            x = self._attend_in_parts(q, k, v, pooled_k, pooled_v, bias.to(q.dtype), rows, columns)
        return self.join(x.movedim(1, 3), gates)

    def _attend_in_parts(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        bias: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Of projections (B, heads, H, W, head_dim), and the pooled ones; bias, rows and columns as of `distances`."""
        height, width, keys = q.shape[2], q.shape[3], (pooled_k.shape[2], pooled_k.shape[3])
        q, k, pooled_k = _unit(q), _unit(k), _unit(pooled_k)
        margin = [self.window_size // 2] * 4
        k, v = (F.pad(y, (0, 0, *margin)) for y in (k, v))
        pooled = keys[0] * keys[1]
        inside, log_keys = _inside(q, height, width, self.window_size, pooled, self.temperature.dtype)

        def attend(
            first: int, last: int, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor, pooled_v: Tensor, bias: Tensor
        ) -> Tensor:
            with_margin = slice(first, last + self.window_size - 1)
            return self._attend(
                q[:, :, first:last],
                k[:, :, with_margin],
                v[:, :, with_margin],
                pooled_k,
                pooled_v,
                inside[first:last],
                log_keys[first:last],
                position_bias(bias, rows[first * keys[0] : last * keys[0]], columns, (last - first, width), keys),
                first,
                height,
            )

        maps = q, k, v, pooled_k, pooled_v, bias
        if _record.active():
            return _record.in_strips(attend, maps, (height, width), self.window_size**2 + pooled, self.num_heads, 2)
        if takes_plain(q) or torch.is_grad_enabled() or torch.jit.is_tracing():
            bias = position_bias(bias, rows, columns, (height, width), keys)
            return self._attend(q, k, v, pooled_k, pooled_v, inside, log_keys, bias, 0, height)
        row = q.shape[0] * self.num_heads * width * (self.window_size**2 + keys[0] * keys[1]) * q.element_size()
        step = max(1, CHUNK // max(1, row))
        parts = [attend(first, min(first + step, height), *maps) for first in range(0, height, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _pooled(self, length: int) -> int:
        if self.pool_size is None:
            return at_least(length // self.sr_ratio, 1)
        return min(self.pool_size, length)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        inside: Tensor,
        log_keys: Tensor,
        bias: Tensor,
        first: int,
        rows: int,
    ) -> Tensor:
        """Of some rows of the map, from `first` on; k and v with a margin.

        q: (B, heads, H, W, head_dim), normalised as k and pooled_k (B, heads, rows, columns, head_dim) are.
        inside, log_keys: as of `_inside`. bias: (heads, H * W, keys). rows: of the map.
        """
        height, width, window = inside.shape
        keys = tuple(pooled_k.shape[2:4])
        pooled_k, pooled_v = pooled_k.flatten(2, 3), pooled_v.flatten(2, 3)
        scaled = self.queries(q, log_keys).contiguous()
        local = torch.where(inside, self.relative_pos_bias_local[:, None, None].to(scaled.dtype), -math.inf)
        near = (self._near(scaled, k) + local).flatten(2, 3)
        far = scaled.flatten(2, 3) @ pooled_k.mT + bias
        weights = torch.cat([near.to(far.dtype), far], -1).softmax(-1)
        if _record.active():
            indices = _indices(inside, bias.shape[-1], first, rows).expand(q.shape[0], -1, -1)
            _record.keep(weights, indices, "aggregated", queries=(rows, width), keys=(rows, width), pooled=keys)
        near, far = weights.split([window, bias.shape[-1]], -1)
        learned = q.flatten(2, 3) @ self.learnable_tokens.to(q.dtype) + self.learnable_bias.to(q.dtype)
        near = (near + learned).unflatten(2, (height, width))
        return self._mixed((far @ pooled_v).unflatten(2, (height, width)), near, v)

    def _near(self, q: Tensor, k: Tensor) -> Tensor:
        """Products of queries (B, heads, H, W, head_dim) and the keys around them: (B, heads, H, W, window)"""
        if takes_plain(q):
            return (q[..., None, None, :] * self._around(k)).sum(-1).flatten(4)
        return torch.stack([(q * k[:, :, rows, columns]).sum(-1) for rows, columns in self._slices(q)], -1)

    def _mixed(self, x: Tensor, near: Tensor, v: Tensor) -> Tensor:
        """x (B, heads, H, W, head_dim), and the values around its positions by the weights `near`."""
        if takes_plain(x):
            weights = near.unflatten(-1, (self.window_size, self.window_size))[..., None]
            return x + (weights * self._around(v)).sum((4, 5))
        for i, (rows, columns) in enumerate(self._slices(x)):
            x = torch.addcmul(x, near[..., i : i + 1], v[:, :, rows, columns])
        return x

    def _around(self, x: Tensor) -> Tensor:
        """Of a map with a margin, a view: (B, heads, H, W, window_size, window_size, head_dim)"""
        return x.unfold(2, self.window_size, 1).unfold(3, self.window_size, 1).permute(0, 1, 2, 3, 5, 6, 4)

    def _slices(self, x: Tensor) -> list[tuple[slice, slice]]:
        """Where in a map with a margin each neighbour of the positions of x is."""
        shifts = itertools.product(range(self.window_size), repeat=2)
        return [(slice(i, i + x.shape[2]), slice(j, j + x.shape[3])) for i, j in shifts]


def _unit(x: Tensor) -> Tensor:
    if takes_plain(x) and not torch.compiler.is_compiling():  # in one launch
        dim = x.shape[-1]
        return F.rms_norm(x, (dim,), _root(x, dim, x.dtype), NORM**2 / dim)
    return F.normalize(x.to(precise(x)), dim=-1, eps=NORM).to(x.dtype)


@keep
def _root(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((dim,), dim**-0.5, dtype=dtype, device=device)


@keep
def _inside(
    height: int, width: int, window: int, pooled: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(H, W, window * window): whether a neighbour of a position is inside the map; (H, W, 1): the logarithm of how
    many are, and pooled keys."""
    offset = torch.arange(window, device=device) - window // 2
    rows, columns = (torch.arange(length, device=device)[:, None] + offset for length in (height, width))
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    inside = (rows[:, None, :, None] & columns[None, :, None]).flatten(2)
    return inside, (inside.sum(-1, keepdim=True) + pooled).to(dtype).log()


def _indices(inside: Tensor, pooled: int, first: int, rows: int) -> Tensor:
    """(1, H * W, neighbours + pooled): of neighbours their positions, of those outside that of the query.

    inside: of so many rows of the map of `rows`, from `first` on.
    """
    height, width, window = inside.shape
    here = torch.arange(first * width, (first + height) * width, device=inside.device)[:, None]
    offset = torch.arange(math.isqrt(window), device=inside.device) - math.isqrt(window) // 2
    near = torch.where(inside.flatten(0, 1), here + (offset[:, None] * width + offset).flatten(), here)
    far = rows * width + torch.arange(pooled, device=inside.device)
    return torch.cat([near, far.expand(len(near), -1)], 1)[None]


class ConvGLU(nn.Module):
    """A gated MLP on a map (B, H, W, dim); the gate sees the neighbours."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = int(2 * hidden / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = linear(self.fc1, x).chunk(2, -1)
        gate = self.act(self.dwconv(gate.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return linear(self.fc2, gate * x)


class Block(nn.Module):
    """Attention and MLP on a map (B, H, W, dim), each with a residual."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """What makes the map of a stage, its blocks, and the norm of what comes out."""

    def __init__(self, patch_embed: nn.Module, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)


class TransNeXt(MapClassifier):
    """TransNeXt for classification, and as a backbone with normalised maps at strides 4, 8, 16 and 32.

    Takes images (B, in_chans, H, W) of any size from 32 x 32.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden channels over channels of each
            stage.
        sr_ratios: how much smaller than the map the pooled map of each stage is; 1 for attention to all positions.
        window_size: a position attends to window_size x window_size around it, odd; or that of each stage.
        pretrain_size: pixels a side of the images that the weights were trained on, which distances are counted by.
        pool_size: rows and columns of all pooled maps; None for those of sr_ratios. A fixed size makes the cost grow
            with the number of pixels (the authors' linear mode).
        img_size: accepted and not used: any size will do.
    """

    stages: Any  # nn.ModuleList of Stage

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int | Sequence[int | None] = 3,
        qkv_bias: bool = True,
        pretrain_size: int = 224,
        pool_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        windows = [window_size] * len(depths) if isinstance(window_size, int) else window_size
        _check(depths, windows, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        if pretrain_size < 2 ** (len(depths) + 2):
            raise ValueError(f"pretrain_size={pretrain_size}: expected at least {2 ** (len(depths) + 2)} pixels")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}.norm"} for i, dim in enumerate(embed_dims)
        ]
        drop_paths: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        source = in_chans
        for i, (dim, depth, heads, ratio) in enumerate(zip(embed_dims, depths, num_heads, sr_ratios, strict=True)):
            blocks = []
            for _ in range(depth):
                attn: nn.Module
                side = pretrain_size // 2 ** (i + 2)
                if ratio == 1:
                    attn = GlobalAttention(dim, heads, side, qkv_bias)
                else:
                    attn = AggregatedAttention(dim, heads, side, ratio, windows[i] or 3, qkv_bias, pool_size)
                blocks.append(Block(dim, attn, mlp_ratios[i], next(drop_paths)))
            self.stages.append(Stage(PatchEmbed(source, dim, *((3, 2) if i else (7, 4))), blocks, dim))
            source = dim
        self.global_pool, self.head_drop, self.head = make_classifier(
            self.num_features, num_classes, global_pool, drop_rate=drop_rate
        )
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        names = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {key for key, _ in self.named_parameters() if any(name in key for name in names)}

    def group_matcher(self, coarse: bool = False) -> dict:
        if coarse:
            return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.patch_embed", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = images
        for stage in self.stages:
            x = stage.patch_embed(x)
            x = checkpoint_seq(stage.blocks, x) if self.grad_checkpointing else stage.blocks(x)
            x = stage.norm(x)
            yield x
            x = x.permute(0, 3, 1, 2)
        yield x

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        cut = stages < len(self.stages)
        self.stages = self.stages[:stages]
        if head or cut:
            self.reset_classifier(0, "")


def _check(depths: Sequence[int], windows: Sequence[int | None], **of_stages: Sequence[float]) -> None:
    for name, values in {**of_stages, "window_size": windows}.items():
        if len(values) != len(depths):
            raise ValueError(f"{name}: {len(values)} values were given for {len(depths)} stages (length of depths)")
    for dim, heads in zip(of_stages["embed_dims"], of_stages["num_heads"], strict=True):
        if heads < 1 or dim % heads:
            raise ValueError(f"num_heads: {heads} heads cannot share the {dim} channels of their stage equally")
    for window in windows:
        if window is not None and (window < 1 or window % 2 == 0):
            raise ValueError(f"window_size={window}: expected an odd number")


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: TransNeXt) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names; ours passes unchanged. It holds for any size.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = in_our_names(unwrap(state_dict))
    check_checkpoint(state_dict, model)
    return state_dict


def in_our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' network or of a layer of it, with our key names."""
    renamed = {}
    for key, value in state_dict.items():
        if match := re.match(r"(patch_embed|block|norm)(\d)\.", key):
            name = "blocks" if match[1] == "block" else match[1]
            key = f"stages.{int(match[2]) - 1}.{name}.{key[match.end() :]}"
        renamed[key.replace("dwconv.dwconv.", "dwconv.")] = value
    return renamed


def _cfg(name: str, top1: float, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": f"DaiShiResearch/transnext-{name}",
        "hf_hub_filename": f"transnext_{name.replace('-', '_').lower()}.pth",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        "paper_name": "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        "paper_ids": "arXiv:2311.17132",
        "description": f"ImageNet-1k top-1 {top1} %",
        **kwargs,
    }


AT_384: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"}
default_cfgs = generate_default_cfgs(
    {
        "transnext_micro.in1k": _cfg("micro-224-1k", 82.5),
        "transnext_tiny.in1k": _cfg("tiny-224-1k", 84.0),
        "transnext_small.in1k": _cfg("small-224-1k", 84.7),
        "transnext_small.in1k_ft_384": _cfg("small-384-1k-ft-1k", 86.0, 384, **AT_384),
        "transnext_base.in1k": _cfg("base-224-1k", 84.8),
        "transnext_base.in1k_ft_384": _cfg("base-384-1k-ft-1k", 86.2, 384, **AT_384),
    }
)


def _create_transnext(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(TransNeXt, variant, pretrained, checkpoint_filter_fn, **kwargs)


TINY: dict[str, Any] = {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24)}
SMALL: dict[str, Any] = {**TINY, "depths": (5, 5, 22, 5)}
BASE: dict[str, Any] = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """12.8 M parameters, 2.6 GMACs at 224 x 224."""
    return _create_transnext("transnext_micro", pretrained, **kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28.3 M parameters, 5.7 GMACs at 224 x 224."""
    return _create_transnext("transnext_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """49.7 M parameters, 10.3 GMACs at 224 x 224."""
    return _create_transnext("transnext_small", pretrained, **{**SMALL, **kwargs})


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """89.7 M parameters, 18.3 GMACs at 224 x 224."""
    return _create_transnext("transnext_base", pretrained, **{**BASE, **kwargs})
