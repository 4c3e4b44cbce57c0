"""Any encoder under any detector: a feature pyramid (FPN), and a head that finds objects in its maps.

Images keep their size: what differs in size is padded at the bottom and on the right with zeros, which are the mean.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from visionattn.backbones.encoder_decoder import OverEncoder
from visionattn.errors import UserError
from visionattn.models.dense_heads import FCOS, Detections, Objects, RetinaNet
from visionattn.models.extras import refuse_without
from visionattn.models.networks import refuse_unknown
from visionattn.models.pyramids import Pyramid, make_pyramid
from visionattn.models.set_based import DFINE, LEAST_VERSION, RTDETR, Projections
from visionattn.models.two_stage import FasterRCNN, MaskRCNN

__all__ = [
    "DETECTORS",
    "MISSED",
    "Detections",
    "Detector",
    "Levels",
    "Objects",
    "make_detector",
    "measured_levels",
    "refuse_unusable",
]

COMMON = ("overlap", "agnostic", "limit")  # arguments of every head
MISSED = 0.02  # share of a class that may be out of reach
MULTIPLE = 32  # of the sides of padded images


class Features(nn.Module):
    """An encoder's maps, fine to coarse -> maps of equal channels at these strides and, by convolutions, coarser ones.

    Lin et al. 2017, arXiv 1612.03144; the coarser ones as in RetinaNet.
    """

    def __init__(self, channels: Sequence[int], width: int, coarser: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(channels), width)
        self.coarser = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in range(coarser))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = list(self.fpn({str(i): x for i, x in enumerate(maps)}).values())
        for i, layer in enumerate(self.coarser):
            merged.append(layer(F.relu(merged[-1]) if i else merged[-1]))
        return merged


class Detector(OverEncoder):
    """Images (C, H, W) of any sizes from 32 x 32 -> what is found in each.

    Args:
        pyramid: encoder and neck.
        decoder: their maps -> maps of the head.
        head: of those maps, a `DenseHead` or what has the same methods.
        least: smallest height and width that images are padded to.
    """

    decoder: Any

    def __init__(self, pyramid: Pyramid, decoder: nn.Module, head: Any, least: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        self.encoder, self.neck = pyramid.encoder, pyramid.neck or nn.Identity()
        self.decoder, self.head, self.least = decoder, head, least
        self.multiple = math.lcm(MULTIPLE, pyramid.multiple)
        classifier = tuple(f"head.{name}" for name in head.classifier_names)
        self.pretrained_cfg = self.default_cfg = {**self.encoder.pretrained_cfg, "classifier": classifier}

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Objects] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """The losses, scalars by name, where there are targets; else what is found in each image.

        Args:
            images: (B, C, H, W), or B images (C, H, W), normalised, so that the mean is 0.
            targets: the objects of each image.
        """
        sizes = _sizes(images)
        if targets is not None:
            return self.head.losses(self.predicted(images), sizes, targets)
        found: dict[int, Detections] = {}
        for alike in self._of_one_canvas(sizes):
            own = [images[i] for i in alike]
            found |= zip(alike, self.head.found(self.predicted(own), [sizes[i] for i in alike]), strict=True)
        return [found[i] for i in range(len(sizes))]

    def _of_one_canvas(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Images that are padded alike, so that what is found in one does not depend on others."""
        members: dict[tuple[int, ...], list[int]] = {}
        for i, size in enumerate(sizes):
            canvas = tuple(self._side(side, least) for side, least in zip(size, self.least, strict=True))
            members.setdefault(canvas, []).append(i)
        return list(members.values())

    def predicted(self, images: Tensor | Sequence[Tensor]) -> dict[str, Any]:
        """What the head says of the maps of the images."""
        return self.head(self.decoder(self.neck(self.encoder(self.padded(images)))))

    def measured(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Objects]
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        """The mean losses, and what is found, image by image, so that neither depends on the batch or its padding."""
        losses: list[dict[str, Tensor]] = []
        found: list[Detections] = []
        for image, target in zip(images, targets, strict=True):
            raw, sizes = self.predicted([image]), _sizes([image])
            losses.append(self.head.losses(raw, sizes, [target]))
            found += self.head.found(raw, sizes)
        return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}, found

    def padded(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """One batch (B, C, h, w), sides a multiple of what the encoder takes."""
        height, width = (
            self._side(max(image.shape[axis] for image in images), least)
            for axis, least in zip((-2, -1), self.least, strict=True)
        )
        padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        return torch.stack(padded)

    def _side(self, side: int, least: int) -> int:
        return least if side <= least else math.ceil(side / self.multiple) * self.multiple

    def get_classifier(self) -> nn.Module:
        return self.head.classifier


def _sizes(images: Tensor | Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(image.shape[-2], image.shape[-1]) for image in images]


class Kind(NamedTuple):
    """A detector that is asked for by name.

    Attributes:
        description: one line.
        head: its class, see `Detector`.
        factors: what `sizes` may be in strides, the first one where it does.
        arguments: of `make_detector` that the head takes, besides those that all do.
        coarsest: largest stride of its maps.
        queries: it finds at most as many objects as it has queries, and is of transformers.
    """

    description: str
    head: Any
    factors: tuple[float, ...]
    arguments: tuple[str, ...] = ()
    coarsest: int = 128
    queries: bool = False


DETECTORS = {
    "fcos": Kind(
        "FCOS (2019): no anchors; every place tells how far the sides of its object are", FCOS, (8,), ("convs", "gamma")
    ),
    "retinanet": Kind(
        "RetinaNet (2017): anchors of three sizes and some ratios at every place",
        RetinaNet,
        (4, 3, 2),
        ("convs", "gamma", "ratios"),
    ),
    "faster_rcnn": Kind(
        "Faster R-CNN (2015): regions are proposed from anchors, then looked at one by one",
        FasterRCNN,
        (4, 3, 2),
        ("ratios",),
    ),
    "mask_rcnn": Kind("Mask R-CNN (2017): Faster R-CNN with the mask of each object", MaskRCNN, (4, 3, 2), ("ratios",)),
    "rt_detr": Kind(
        "RT-DETR v2 (2024), of transformers: queries become objects, without anchors",
        RTDETR,
        (4,),
        ("gamma", "queries", "layers"),
        coarsest=32,
        queries=True,
    ),
    "d_fine": Kind(
        "D-FINE (2024), of transformers: as rt_detr, with sides refined layer by layer",
        DFINE,
        (4,),
        ("gamma", "queries", "layers"),
        coarsest=32,
        queries=True,
    ),
}


class Levels(NamedTuple):
    """The maps that a detector looks at.

    Attributes:
        finest, coarsest: strides.
        sizes: side of the objects that each map is for, in pixels as the network sees them.
    """

    finest: int
    coarsest: int
    sizes: list[float]

    @property
    def strides(self) -> list[int]:
        return [self.finest * 2**i for i in range(round(math.log2(self.coarsest / self.finest)) + 1)]


def refuse_unusable(detector: str) -> None:
    """Raises UserError for a detector that there is not, or that is not installed."""
    refuse_unknown("model.detector", detector, DETECTORS, f"visionattn list --detectors: {', '.join(DETECTORS)}")
    if DETECTORS[detector].queries:
        refuse_without("transformers", "detr", f"model.detector {detector}", LEAST_VERSION)


def measured_levels(
    detector: str,
    objects: Objects,
    finest: int | None = None,
    coarsest: int | None = None,
    sizes: Sequence[float] | None = None,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
) -> tuple[Levels, dict[int, float]]:
    """Maps for these objects: the cheapest that reach all but 2 % of each class well, else those that reach most.

    Args:
        objects: of the training images, as the network sees them.
        finest, coarsest, sizes: where they are given.

    Returns:
        the maps, and of each class the share of objects that they do not reach at all.
    """
    kind = DETECTORS[detector]
    longest = (objects.xyxy[:, 2:] - objects.xyxy[:, :2]).amax(1) if len(objects.xyxy) else objects.xyxy.new_ones(1)
    large = longest.quantile(0.95).item() if len(longest) < 10**7 else longest.max().item()
    tried = []
    for fine in [finest] if finest else [8, 4]:
        for factor in kind.factors:
            end = next((s for s in (32, 64) if s >= fine and 2 * factor * s >= large), 128)
            end = coarsest or min(end, kind.coarsest)
            levels = Levels(fine, max(end, fine), [])
            levels = levels._replace(sizes=list(sizes or [factor * float(stride) for stride in levels.strides]))
            if len(levels.sizes) != len(levels.strides):
                continue
            well, at_all = (_missed(kind, objects, levels, ratios, well) for well in (True, False))
            if max(well.values(), default=0.0) < MISSED:
                return levels, at_all
            tried.append((max(well.values()), levels, at_all))
    if not tried:
        raise UserError(f"model.detector_args.sizes has {len(sizes or ())} sizes: expected one for each stride")
    _, levels, missed = min(tried, key=lambda one: one[0])
    return levels, missed


def _missed(kind: Kind, objects: Objects, levels: Levels, ratios: Sequence[float], well: bool) -> dict[int, float]:
    """The share of each class that is not reached."""
    reached = kind.head.reached(objects.xyxy, levels.strides, levels.sizes, ratios, well)
    return {k: 1 - reached[objects.labels == k].float().mean().item() for k in objects.labels.unique().tolist()}


def make_detector(
    name: str,
    detector: str,
    classes: int,
    channels: int = 3,
    pretrained: bool = False,
    args: dict[str, Any] | None = None,
    detector_args: dict[str, Any] | None = None,
) -> Detector:
    """An encoder under a detector; the classes are numbered from 0.

    Args:
        name: of a model of timm's registry, ours included.
        detector: a key of `DETECTORS`.
        pretrained: start from the encoder's published weights.
        args: keyword arguments for `timm.create_model`.
        detector_args: `finest` and `coarsest` stride (8, 32), `sizes` of objects for each, fine to coarse (some
            strides), `fpn_channels` (128), `overlap`, `agnostic` and `limit` of `DenseHead`, and of some detectors
            `convs` of the head (4), `gamma` of the focal loss (2), `ratios` (height / width) of anchors, `queries`
            (100) and `layers` of the decoder (6).

    Raises:
        UserError: an unknown encoder or detector, one that is not installed, or an encoder that does not fit.
    """
    args, given = args or {}, dict(detector_args or {})
    refuse_unusable(detector)
    kind = DETECTORS[detector]
    strides = Levels(given.pop("finest", 8), given.pop("coarsest", 32), []).strides
    sizes = given.pop("sizes", [kind.factors[0] * stride for stride in strides])
    width = given.pop("fpn_channels", 128)
    if len(sizes) != len(strides):
        raise UserError(f"model.detector_args.sizes has {len(sizes)} sizes, expected one for each stride of {strides}")
    if strides[-1] > kind.coarsest:
        raise UserError(f"model.detector_args.coarsest is {strides[-1]}, but {detector} has maps to {kind.coarsest}")
    if kind.queries and width % 4:
        raise UserError(f"model.detector_args.fpn_channels is {width}: {detector} needs a multiple of 4")
    pyramid = make_pyramid(name, [stride for stride in strides if stride <= 32], channels, pretrained, args)
    ours = {key: given[key] for key in (*COMMON, *kind.arguments) if key in given}
    head = kind.head(width, classes, strides, sizes, **ours)
    size = args.get("img_size")
    least = (32, 32) if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])
    coarser = len(strides) - len(pyramid.channels)
    decoder = Projections(pyramid.channels, width) if kind.queries else Features(pyramid.channels, width, coarser)
    return Detector(pyramid, decoder, head, least)
