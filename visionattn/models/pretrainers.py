"""A backbone under an objective that needs no labels: hidden pixels, what two views of an image have in common, or what
a teacher makes of it.

The backbone is a whole classifier of timm without its classifier; what it has learned is taken over by any other task
(see `visionattn.models.handover`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionattn.backbones.encoder_decoder import EncoderDecoder, OverEncoder
from visionattn.errors import UserError
from visionattn.models.handover import CLEAN
from visionattn.models.networks import arguments_of, create, started
from visionattn.models.teacher import Imitation
from visionattn.recipe.sections import Model

__all__ = ["Expander", "MaskedPixels", "Pretrainer", "make_pretrainer"]

WIDEST, NARROWEST = 512, 64  # channels in which the maps are added up


class Maps(nn.Module):
    """A classifier of timm whose maps are asked for.

    Args:
        model: without its classifier.
        indices: of its maps.
        multiple: images are padded at the bottom and on the right by zeros, the mean, to sides that are multiples.
    """

    def __init__(self, model: Any, indices: list[int], multiple: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.model, self.indices, self.multiple = model, indices, multiple
        self.strides: list[int] = [model.feature_info[i]["reduction"] for i in indices]
        self.channels: list[int] = [model.feature_info[i]["num_chs"] for i in indices]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> maps (B, channels, ceil(H / stride), ceil(W / stride)), fine to coarse."""
        return self.model.forward_intermediates(
            self.padded(images), indices=self.indices, norm=True, intermediates_only=True
        )

    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What a classifier would see (B, D), the means of all maps joined (B, sum of channels), and the maps."""
        final, maps = self.model.forward_intermediates(self.padded(images), indices=self.indices, norm=True)
        last = self.model.forward_head(final, pre_logits=True).flatten(1)
        return last, torch.cat([x.mean((2, 3)) for x in maps], 1), maps

    def padded(self, images: Tensor) -> Tensor:
        below, right = (-side % multiple for side, multiple in zip(images.shape[2:], self.multiple, strict=True))
        return F.pad(images, (0, right, 0, below)) if below or right else images


class MaskedPixels(nn.Module):
    """Hidden pixels are predicted from the maps that the backbone makes of the visible ones.

    SimMIM (Xie et al. 2022, arXiv 2111.09886) on pixels, so that any backbone takes it: the image is filled with a
    learned value of each channel where it is hidden. The maps are added up from the coarsest to the finest, of stride
    r, and a linear layer predicts the r x r pixels of each place.

    Args:
        strides, channels: of the maps, fine to coarse.
        bands: channels of the image.
    """

    def __init__(self, strides: Sequence[int], channels: Sequence[int], bands: int) -> None:
        super().__init__()
        self.stride, predicted = strides[0], strides[0] ** 2 * bands
        width = min(max(predicted, NARROWEST), WIDEST)
        self.fill = nn.Parameter(torch.zeros(bands))
        self.project = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.predict = nn.Linear(width, predicted)

    def hide(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Images (B, C, H, W) without what is hidden (B, 1, H, W)."""
        return torch.where(hidden, self.fill[:, None, None].to(images.dtype), images)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """(B, bands, H, W), normalised pixels."""
        layers = zip(self.project, maps, strict=True)
        projected = [layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for layer, x in layers]
        z = projected[-1]
        for x in reversed(projected[:-1]):
            z = x + (z if z.shape[2:] == x.shape[2:] else F.interpolate(z, x.shape[2:], mode="bilinear"))
        pixels = self.predict(F.gelu(z).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(pixels, self.stride)[..., : size[0], : size[1]]


class Expander(nn.Module):
    """What VICReg's loss is taken of: pooled features, and the last map place by place, in more channels.

    Bardes et al. 2022, arXiv 2105.04906 and, the local term, arXiv 2210.01571.
    """

    def __init__(self, features: int, channels: int, width: int) -> None:
        super().__init__()
        self.overall, self.local = _expander(features, width), _expander(channels, width)

    def forward(self, last: Tensor, coarsest: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and a map (B, C, h, w) -> (B, width) and (B, h, w, width)."""
        places = coarsest.permute(0, 2, 3, 1)
        return self.overall(last), self.local(places.flatten(0, 2)).unflatten(0, places.shape[:3])


def _expander(features: int, width: int) -> nn.Sequential:
    """Three linear layers; in training its batch norms see the whole batch, as the loss does."""
    layers: list[nn.Module] = []
    for count in (features, width):
        layers += [nn.Linear(count, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, width))


HEADS: dict[str, type[Expander] | type[Imitation]] = {
    "vicreg": Expander,
    "distill": Imitation,
}  # of pooled features and the last map


class Pretrainer(OverEncoder):
    """Images (B, C, H, W) -> what the objective makes of them.

    `clean` holds statistics of the backbone's batch norms on whole images: in training they are those of masked ones.
    """

    def __init__(self, encoder: Maps, objective: MaskedPixels | Expander | Imitation) -> None:
        super().__init__()
        self.encoder, self.objective, self.clean = encoder, objective, nn.Module()
        self.pretrained_cfg = self.default_cfg = {**encoder.model.pretrained_cfg, "classifier": ()}
        for key, value in self._statistics():
            self.clean.register_buffer(key, value.clone())

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Predicted pixels (B, C, H, W) where `hidden` (B, 1, H, W) are; else what the objective makes of features."""
        if not isinstance(self.objective, MaskedPixels):
            last, _, maps = self.encoder.pooled(images)
            return self.objective(last, maps[-1])
        seen = images if hidden is None else self.objective.hide(images, hidden)
        return self.objective(self.encoder(seen), images.shape[2:])

    def _norms(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.encoder.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                yield name, module

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._norms():
            for kind in ("running_mean", "running_var"):
                yield f"encoder.{name}.{kind}".replace(".", "/"), getattr(module, kind)

    @torch.no_grad()
    def clean_up(self, batches: Iterable[Tensor]) -> None:
        """Take statistics of the backbone's batch norms from whole images; training goes on with its own."""
        norms = [module for _, module in self._norms()]
        if not norms:
            return
        modes, momenta = [module.training for module in self.modules()], [module.momentum for module in norms]
        counts = [module.num_batches_tracked for module in norms]
        masked = [value.clone() for _, value in self._statistics()]
        self.eval()
        for module in norms:
            module.train()
            module.momentum, module.num_batches_tracked = None, torch.tensor(0, device=module.running_mean.device)
        for images in batches:
            self.encoder.pooled(images)
        for (key, value), before in zip(self._statistics(), masked, strict=True):
            self.clean.get_buffer(key).copy_(value)
            value.copy_(before)
        for module, momentum, count in zip(norms, momenta, counts, strict=True):
            module.momentum, module.num_batches_tracked = momentum, count
        for part, mode in zip(self.modules(), modes, strict=True):
            part.training = mode

    @contextmanager
    def cleaned(self) -> Iterator[None]:
        """Inside, batch norms have the statistics of whole images."""
        kept = [value.clone() for _, value in self._statistics()]
        for key, value in self._statistics():
            value.copy_(self.clean.get_buffer(key))
        try:
            yield
        finally:
            for (_, value), before in zip(self._statistics(), kept, strict=True):
                value.copy_(before)


assert CLEAN == "clean."  # by which the hand-over finds these statistics


def make_pretrainer(
    spec: Model, channels: int, side: tuple[int, int], objective: str, width: int = WIDEST
) -> Pretrainer:
    """The network of a recipe's `model` section under an objective, "mim", "vicreg" or "distill".

    Args:
        channels: of the images.
        side: height and width of the images.
        width: of the expander, or of a teacher's features.

    Raises:
        UserError: a network without maps, or one that does not take such images.
    """
    encoder = _make_maps(spec, channels, side)
    if objective in HEADS:
        with torch.no_grad():
            last, _, maps = encoder.eval().pooled(torch.zeros(1, channels, *side))
        head: MaskedPixels | Expander | Imitation = HEADS[objective](last.shape[1], maps[-1].shape[1], width)
    else:
        head = MaskedPixels(encoder.strides, encoder.channels, channels)
    network = Pretrainer(encoder, head)
    return started(network.train(), spec, arguments_of(spec, side))


def _make_maps(spec: Model, channels: int, side: tuple[int, int]) -> Maps:
    """The encoder; images are padded where it gives no maps of ceil(size / stride) rows and columns otherwise."""
    with torch.device("meta"):
        trial = create(spec.name, arguments_of(spec, side))
    if isinstance(trial, EncoderDecoder):
        raise UserError(f"model {spec.name} is a whole segmenter: name its encoder alone, and decode it afterwards")
    if not hasattr(trial, "forward_intermediates"):
        raise UserError(f"model {spec.name} gives no maps (it has no forward_intermediates): take another network")
    strides = [info["reduction"] for info in trial.feature_info]
    indices = _chosen(strides)
    reasons = []
    for multiple in (1, strides[-1], 2 * strides[-1]):
        height, width = (math.ceil(length / multiple) * multiple for length in side)
        arguments = arguments_of(spec, (height, width))
        try:
            model = create(spec.name, arguments, pretrained=spec.pretrained, num_classes=0, in_chans=channels)
            maps = Maps(model, indices, (height, width) if multiple > 1 else (1, 1))
            with torch.no_grad():
                shapes = [tuple(x.shape[2:]) for x in maps.eval()(torch.zeros(1, channels, *side))]
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, UserError) and multiple == 1:
                raise
            reasons.append(str(error))
            continue
        expected = [(math.ceil(height / s), math.ceil(width / s)) for s in maps.strides]
        if shapes == expected:
            return maps
        reasons.append(f"maps of {shapes}, expected {expected}")
    raise UserError(f"model {spec.name} does not take images of {side[0]} x {side[1]}: {reasons[0]}")


def _chosen(strides: Sequence[int]) -> list[int]:
    """Which maps are looked at: the last one of each stride from 4; of a network of one stride four of them."""
    if len(set(strides)) == 1:
        return sorted({max(0, len(strides) * k // 4 - 1) for k in range(1, 5)})
    last = {stride: i for i, stride in enumerate(strides) if stride >= 4 or max(strides) < 4}
    return sorted(last.values())
