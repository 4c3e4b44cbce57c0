"""NiNformer: a transformer whose attention is replaced by a small mixer network that gates its values.

Abdullah et al., NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, 2024,
https://arxiv.org/abs/2403.02411. Same functions and argument names as the authors' code,
https://github.com/Abdullah-88/NiNformer (BSD 3-clause licence). Special:
- a whole MLP-mixer block makes the gate: an element-wise factor, without sigmoid, of a linear projection;
- no positions and no class token: the mixer's weights belong to positions of the map;
- one norm for both halves of a block, none at the end.

Any size of image: the weights that mix positions are a map for each hidden unit. For images that make another map than
`img_size` does they act as if resized to it (bicubic), and those that sum over positions divided by how many more these
are. At `img_size` itself nothing is resized. `set_input_size` resizes them for good, and checkpoints of another size
are resized as they are loaded.

Maps are (B, H, W, C) inside the network, and (B, C, H, W) where it returns them.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones._twins import unwrap
from visionattn.backbones.backbone import MapClassifier, create, make_classifier
from visionattn.backbones.layers import Mlp, check_in_chans, linear

__all__ = ["NiNformer"]

Size = tuple[int, int]


def resize_mixing(weights: Sequence[Tensor], grid: Size, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (hidden, positions), (positions, hidden) and bias (positions,) for maps of `grid`, resized for `size`."""

    def resize(weight: Tensor) -> Tensor:
        maps = weight.unflatten(1, grid)[None]
        return F.interpolate(maps, size, mode="bicubic", antialias=True)[0].flatten(1)

    read, write, bias = weights
    more = math.prod(size) / math.prod(grid)
    return resize(read) / more, resize(write.T).T, resize(bias[None])[0]


def _bicubic(source: int, target: int, like: Tensor) -> Tensor:
    """(target, source): the matrix that resizes `source` values to `target`."""
    units = torch.eye(source, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(units[None, None], (target, source), mode="bicubic", antialias=True)[0, 0].to(like.dtype)


@register_notrace_module
class TokenMlp(nn.Module):
    """MLP over the positions of a map (B, H, W, dim), the same for every channel. grid: the map it has weights for."""

    def __init__(self, grid: Size, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.grid = grid
        self.fc1 = nn.Linear(math.prod(grid), hidden)
        self.fc2 = nn.Linear(hidden, math.prod(grid))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:3])
        if size != self.grid:  # the map is resized in place of the weights, with the same result
            rows, columns = (_bicubic(*lengths, like=x) for lengths in zip(self.grid, size, strict=True))
            x = torch.einsum("bhwc,hi,wj->bijc", x, rows, columns) * (math.prod(self.grid) / math.prod(size))
        y = self.drop(F.gelu(self.fc1(x.flatten(1, 2).mT)))
        y = self.fc2(y).unflatten(2, self.grid)
        if size != self.grid:
            y = torch.einsum("bcij,hi,wj->bchw", y, rows, columns)
        return self.drop(y).permute(0, 2, 3, 1)

    def set_grid(self, size: Size) -> None:
        old = self.fc1.weight, self.fc2.weight, self.fc2.bias
        resized = resize_mixing([x.detach() for x in old], self.grid, size)
        new = (nn.Parameter(x.clone(), y.requires_grad) for x, y in zip(resized, old, strict=True))
        self.fc1.weight, self.fc2.weight, self.fc2.bias = new
        self.grid = size
        self.fc1.in_features = self.fc2.out_features = math.prod(size)


class Mixer(nn.Module):
    """An MLP-mixer block on a map (B, H, W, dim): mixes positions, then channels, each with a residual."""

    def __init__(self, dim: int, grid: Size, token_dim: int, channel_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        self.token_mlp = TokenMlp(grid, token_dim, dropout)
        self.channel_norm = nn.LayerNorm(dim)
        self.channel_mlp = Mlp(dim, channel_dim, drop=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.token_norm(x))
        return x + self.channel_mlp(self.channel_norm(x))


class MixerGatingUnit(nn.Module):
    """A linear projection of a map (B, H, W, dim), gated by what a mixer makes of the same map."""

    def __init__(self, dim: int, grid: Size, token_dim: int, channel_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer = Mixer(dim, grid, token_dim, channel_dim, dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.proj, x) * self.mixer(x)


class Block(nn.Module):
    """Gating unit and MLP on a map (B, H, W, dim), each with a residual; both normalised by the same layer."""

    def __init__(self, dim: int, hidden: int, grid: Size, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mgu = MixerGatingUnit(dim, grid, hidden, hidden, dropout)
        self.mlp = Mlp(dim, hidden, drop=dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mgu(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm(x)))


class NiNformer(MapClassifier):
    """NiNformer for classification, and as a backbone with a map at stride `patch_size` after every block.

    Takes images (B, in_chans, H, W) of any size from 32 x 32, or from img_size if that is smaller; other sizes than
    img_size by resized mixing weights (see the top of this file). Images that patches do not divide are zero padded
    below and to the right.

    Args:
        img_size: size of image that the mixing weights are made for.
        patch_size: pixels on a side of a patch.
        d_model: channels.
        d_ffn: hidden units of every MLP, those over positions too.
        num_layers: number of blocks.
        dropout: inside and after every MLP. The authors train with 0.5.
        drop_path_rate: stochastic depth; the authors have none.
    """

    def __init__(
        self,
        img_size: int | Size = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        d_model: int = 256,
        d_ffn: int = 512,
        num_layers: int = 4,
        dropout: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_in_chans(in_chans)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = d_model
        self.feature_info = [
            {"num_chs": d_model, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(num_layers)
        ]
        self.patch_size = patch_size
        grid = self._grid(img_size)
        self.min_size = min(32, *to_2tuple(img_size))
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, d_model, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
        )
        rates: Sequence[Any] = calculate_drop_path_rates(drop_path_rate, num_layers)
        self.blocks = nn.ModuleList(Block(d_model, d_ffn, grid, dropout, rate) for rate in rates)
        self.global_pool, self.head_drop, self.head = make_classifier(
            d_model, num_classes, global_pool, drop_rate=drop_rate
        )

    def _grid(self, img_size: int | Size) -> Size:
        if min(to_2tuple(img_size)) < self.patch_size:
            raise ValueError(f"img_size={img_size}: expected at least a patch, {self.patch_size} pixels")
        return tuple(math.ceil(side / self.patch_size) for side in to_2tuple(img_size))

    def set_input_size(self, img_size: int | Size) -> None:
        """Resize the mixing weights for images of this size, for good: their number changes, so before training."""
        grid = self._grid(img_size)
        self.min_size = min(32, *to_2tuple(img_size))
        for module in self.modules():
            if isinstance(module, TokenMlp):
                module.set_grid(grid)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^patch_embed", "blocks": r"^blocks\.(\d+)"}

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(images)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            yield x
        yield x.permute(0, 3, 1, 2)

    def prune_stages(self, stages: int, norm: bool, head: bool) -> None:
        self.blocks = self.blocks[:stages]
        if head:
            self.reset_classifier(0, "")


FROM_AUTHORS = {
    r"^model\.": "blocks.",
    r"\bMixer\.": "mixer.",
    r"\btoken_mix\.0\.": "token_norm.",
    r"\btoken_mix\.2\.net\.0\.": "token_mlp.fc1.",
    r"\btoken_mix\.2\.net\.3\.": "token_mlp.fc2.",
    r"\bchannel_mix\.0\.": "channel_norm.",
    r"\bchannel_mix\.1\.net\.0\.": "channel_mlp.fc1.",
    r"\bchannel_mix\.1\.net\.3\.": "channel_mlp.fc2.",
    r"\bffn\.net\.0\.": "mlp.fc1.",
    r"\bffn\.net\.3\.": "mlp.fc2.",
    r"^patcher\.": "patch_embed.proj.",
    r"^classifier\.": "head.",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names, its mixing weights resized to those of the model.

    Raises ValueError for a checkpoint of a network of other widths or depth, or whose weights are not for square maps.
    """
    renamed = {}
    for key, value in unwrap(state_dict).items():
        for theirs, ours in FROM_AUTHORS.items():
            key = re.sub(theirs, ours, key)
        renamed[key] = value
    theirs, ours = _configuration(renamed), _configuration(model.state_dict())
    if theirs != ours:
        raise ValueError(
            f"the checkpoint is of a network with {theirs}, expected {ours}: create the model that it belongs to, or"
            " pass its arguments"
        )
    for name, module in model.named_modules():
        if isinstance(module, TokenMlp):
            keys = [f"{name}.{key}" for key in ("fc1.weight", "fc2.weight", "fc2.bias")]
            if all(key in renamed for key in keys):
                weights = _fit([renamed[key] for key in keys], module.grid)
                renamed.update(zip(keys, weights, strict=True))
    return renamed


def _fit(weights: list[Tensor], size: Size) -> Sequence[Tensor]:
    """Mixing weights of a checkpoint, for a map of this size."""
    positions = weights[0].shape[1]
    side = math.isqrt(positions)
    if positions == math.prod(size):
        return weights
    if side**2 != positions:
        raise ValueError(
            f"the checkpoint mixes {positions} positions, which are no square map: give img_size as it was trained, and"
            " call set_input_size after loading"
        )
    return resize_mixing(weights, (side, side), size)


def _configuration(state_dict: dict[str, Tensor]) -> str:
    norm, fc1 = (state_dict.get(f"blocks.0.{name}.weight") for name in ("norm", "mlp.fc1"))
    d_model, d_ffn = (None if weight is None else len(weight) for weight in (norm, fc1))
    num_layers = sum(bool(re.fullmatch(r"blocks\.\d+\.norm\.weight", key)) for key in state_dict)
    return f"{d_model=}, {d_ffn=}, {num_layers=}"


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "bsd-3-clause",
        "origin_url": "https://github.com/Abdullah-88/NiNformer",
        "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        "paper_ids": "arXiv:2403.02411",
        **kwargs,
    }


HALF = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
default_cfgs = generate_default_cfgs(
    {
        "ninformer_tiny_patch4_32": _cfg(32, num_classes=10, pool_size=(8, 8), **HALF),
        "ninformer_small_patch16_224": _cfg(224, num_classes=1000, pool_size=(14, 14), **HALF),
    }
)


def _create_ninformer(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create(NiNformer, variant, pretrained, checkpoint_filter_fn, default_indices=3, **kwargs)


@register_model
def ninformer_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The authors' for CIFAR-10: 2.7 M parameters, 0.2 GMACs at 32 x 32."""
    return _create_ninformer("ninformer_tiny_patch4_32", pretrained, **kwargs)


@register_model
def ninformer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, for ImageNet: 13.8 M parameters, 3.1 GMACs at 224 x 224."""
    args = {"img_size": 224, "patch_size": 16, "d_model": 384, "d_ffn": 768, "num_layers": 8}
    return _create_ninformer("ninformer_small_patch16_224", pretrained, **{**args, **kwargs})
