"""MoH: attention whose heads are experts: a router weighs them at each position, and some of them count nothing there.

Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, 2024, https://arxiv.org/abs/2410.11842. Same
functions as the authors' code, https://github.com/SkyworkAI/MoH (Apache-2.0). Special:
- the networks are TransNeXt's (see `transnext.py`); each block has a router besides, of what its attention takes;
- a position takes all shared heads, and of the others the few that the router finds likeliest;
- a loss of their balance keeps all heads in use: `network(images, auxiliary=True)`, `loss.auxiliary` in a recipe.

As in the authors' code all heads are computed everywhere, and those that were not chosen count 0. To leave them out
does not pay on a CPU, see `benchmarks/README.md`.

Any size of image, as TransNeXt. Maps are (B, H, W, C).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, Unpack

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.backbones import transnext
from visionattn.backbones._twins import check_checkpoint, unwrap
from visionattn.backbones.backbone import create
from visionattn.backbones.layers import check_image_size
from visionattn.backbones.transnext import BASE, SMALL, TransNeXt, init_weights
from visionattn.kernels._check import precise

__all__ = ["MoHTransNeXt"]


@register_notrace_module
class Router(nn.Module):
    """What each head counts at each position of a map (B, H, W, dim), and the loss of their balance.

    The first `shared` heads count everywhere, at each position another share of their sum; of the others the `active`
    likeliest. Without `active` heads all have to be shared.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, active: int) -> None:
        super().__init__()
        self.shared, self.active = shared, active
        self.of_routed = nn.Linear(dim, num_heads - shared, bias=False) if active else None
        self.of_kinds = nn.Linear(dim, 2, bias=False) if active and shared else None
        self.of_shared = nn.Linear(dim, shared, bias=False) if shared > 1 else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """-> (B, H, W, heads), whose sum over heads is about that of heads that count, and the loss, 0 in evaluation.

        The loss is E^2 times the mean over routed heads of (their mean probability) x (the share of positions that
        choose them), over all positions of a batch: that of `active` heads in balance is `active`.
        """
        shared = x.new_ones(*x.shape[:-1], self.shared)
        if self.of_shared is not None:
            shared = self.shared * _softmax(self.of_shared, x)
        if self.of_routed is None:
            return shared, 0.0
        likely = _softmax(self.of_routed, x)
        best, index = likely.topk(self.active, -1)
        nothing, least = torch.zeros_like(likely), torch.finfo(likely.dtype).eps
        gates = nothing.scatter(-1, index, self.active * best / best.sum(-1, keepdim=True).clamp_min(least))
        if self.of_kinds is not None:
            kinds = 2 * _softmax(self.of_kinds, x)
            gates = torch.cat([shared * kinds[..., :1], gates * kinds[..., 1:]], -1)
        if not self.training:
            return gates, 0.0
        chosen = nothing.scatter(-1, index, torch.ones_like(best))
        mean, share = (y.flatten(0, -2).mean(0) for y in (likely, chosen))
        return gates, likely.shape[-1] ** 2 * (mean * share).mean()


def _softmax(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).softmax(-1, dtype=precise(x))


class RoutedBlock(nn.Module):
    """A block of TransNeXt whose heads a router weighs: a map and the sum of losses so far -> the same after it."""

    def __init__(self, block: transnext.Block, router: Router) -> None:
        super().__init__()
        self.block, self.router = block, router

    def forward(self, state: tuple[Tensor, Tensor | float]) -> tuple[Tensor, Tensor | float]:
        (x, losses), block = state, self.block
        norm = block.norm1(x)
        gates, loss = self.router(norm)
        x = x + block.drop_path(block.attn(norm, gates))
        return x + block.drop_path(block.mlp(block.norm2(x))), losses + loss


class Options(TypedDict, total=False):
    """Of TransNeXt."""

    in_chans: int
    num_classes: int
    global_pool: str
    embed_dims: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]
    mlp_ratios: Sequence[float]
    sr_ratios: Sequence[int]
    window_size: int | Sequence[int | None]
    qkv_bias: bool
    pretrain_size: int
    pool_size: int | None
    drop_rate: float
    drop_path_rate: float
    img_size: int | tuple[int, int] | None


class MoHTransNeXt(TransNeXt):
    """TransNeXt with a mixture of heads, for classification and as a backbone.

    Args:
        shared_heads: how many heads of each stage count everywhere.
        active_heads: how many of the other heads of each stage count at a position; 0 where there are no others.
        options: those of `TransNeXt`.
    """

    def __init__(
        self,
        shared_heads: Sequence[int] = (2, 4, 2, 2),
        active_heads: Sequence[int] = (0, 0, 4, 10),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        for name, values in (("shared_heads", shared_heads), ("active_heads", active_heads)):
            if len(values) != len(self.stages):
                raise ValueError(f"{name}: {len(values)} values were given for {len(self.stages)} stages")
        for stage, shared, active in zip(self.stages, shared_heads, active_heads, strict=True):
            dim, heads = stage.norm.normalized_shape[0], stage.blocks[0].attn.num_heads
            if not (0 <= shared <= heads and min(1, heads - shared) <= active <= heads - shared):
                raise ValueError(
                    f"shared_heads, active_heads: {shared} and {active} of the {heads} heads of a stage: expected at"
                    " most all of them, and at least one active head if not all are shared"
                )
            routers = [Router(dim, heads, shared, active).apply(init_weights) for _ in stage.blocks]
            stage.blocks = nn.Sequential(*map(RoutedBlock, stage.blocks, routers))

    def forward(self, x: Tensor, auxiliary: bool = False) -> Any:
        """Logits; where `auxiliary` also, in training, the mean loss of balance of the blocks that have one, else 0.

        The authors add 0.01 times that loss to the one of logits.
        """
        if auxiliary is not True:  # under torch.fx it is a proxy, which has no truth
            return super().forward(x)
        check_image_size(x, self.min_size)
        *_, (features, losses) = self._run(x)
        routed = sum(isinstance(module, Router) and module.active > 0 for module in self.modules())
        return self.forward_head(features), losses / max(1, routed)

    def forward_stages(self, images: Tensor) -> Iterator[Tensor]:
        for x, _ in self._run(images):
            yield x

    def _run(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor | float]]:
        """As `forward_stages`, with the sum of losses so far."""
        x: Tensor = images
        losses: Tensor | float = 0.0
        for stage in self.stages:
            state = stage.patch_embed(x), losses
            x, losses = checkpoint_seq(stage.blocks, state) if self.grad_checkpointing else stage.blocks(state)
            x = stage.norm(x)
            yield x, losses
            x = x.permute(0, 3, 1, 2)
        yield x, losses


ROUTERS = {"wg": "of_routed", "wg_0": "of_kinds", "wg_1": "of_shared"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: MoHTransNeXt) -> dict[str, Tensor]:
    """The authors' checkpoint, bare or wrapped, with our key names; ours passes unchanged. It holds for any size.

    Raises ValueError for a checkpoint of a network of other widths or depths.
    """
    state_dict = in_our_names(unwrap(state_dict))
    check_checkpoint(state_dict, model)
    return state_dict


def in_our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' network with our key names."""
    renamed = {}
    for key, value in state_dict.items():
        if match := re.match(r"(block\d\.\d+\.)(?:attn\.(wg\w*))?", key):
            rest = key[match.end() :]
            key = f"{match[1]}router.{ROUTERS[match[2]]}{rest}" if match[2] else f"{match[1]}block.{rest}"
        renamed[key] = value
    return transnext.in_our_names(renamed)


WEIGHTS = "https://huggingface.co/Chat-UniVi/MoH-ViT-"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/SkyworkAI/MoH",
        "paper_name": "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "paper_ids": "arXiv:2410.11842",
        **kwargs,
    }


NAMES = ("small_75", "small_80", "base_75", "base_50")  # the share of heads that count, in per cent
default_cfgs = generate_default_cfgs({f"moh_transnext_{name}": _cfg() for name in NAMES})


def _create_moh(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    size, share = variant.split("_")[2:]
    address = f"{WEIGHTS}{size[0].upper()}-{share}"
    unpublished = f"the file that its weights are in is not known here; they are at {address}"
    return create(MoHTransNeXt, variant, pretrained, checkpoint_filter_fn, unpublished=unpublished, **kwargs)


@register_model
def moh_transnext_small_75(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """49.9 M parameters, 10.3 GMACs at 224 x 224."""
    heads = {"shared_heads": (3, 6, 3, 4), "active_heads": (0, 0, 6, 12)}
    return _create_moh("moh_transnext_small_75", pretrained, **{**SMALL, **heads, **kwargs})


@register_model
def moh_transnext_small_80(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """49.9 M parameters, 10.3 GMACs at 224 x 224."""
    heads = {"shared_heads": (3, 6, 3, 8), "active_heads": (0, 0, 6, 12)}
    return _create_moh("moh_transnext_small_80", pretrained, **{**SMALL, **heads, **kwargs})


@register_model
def moh_transnext_base_75(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """90.0 M parameters, 18.3 GMACs at 224 x 224."""
    heads = {"shared_heads": (4, 8, 4, 5), "active_heads": (0, 0, 8, 16)}
    return _create_moh("moh_transnext_base_75", pretrained, **{**BASE, **heads, **kwargs})


@register_model
def moh_transnext_base_50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """90.0 M parameters, 18.4 GMACs at 224 x 224."""
    heads = {"shared_heads": (2, 2, 2, 4), "active_heads": (2, 4, 6, 8)}
    return _create_moh("moh_transnext_base_50", pretrained, **{**BASE, **heads, **kwargs})
