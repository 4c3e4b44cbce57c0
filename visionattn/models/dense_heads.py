"""Heads of one-stage detectors: what each place of a feature pyramid says of objects, and which objects it learns.

A head sees maps (B, C, h, w) at several strides, fine to coarse. Its P places are those of all maps, row by row; the
centre of place (i, j) of a map is ((j + 0.5) stride, (i + 0.5) stride) in pixels. Layers and losses are torchvision's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.ops import (
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    nms,
    sigmoid_focal_loss,
)

__all__ = [
    "FCOS",
    "FLOOR",
    "OCTAVES",
    "DenseHead",
    "Detections",
    "Objects",
    "Places",
    "RetinaNet",
    "group_norm",
    "inside",
]

IGNORED = 0.5  # of an anchor inside a region that is not labelled: nothing is learned there
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of RetinaNet's anchors, in `sizes`
FLOOR = 0.02  # lower scores are no detections
CANDIDATES = 1000  # before duplicates are removed, and at least five times as many as are kept
LARGEST_STEP = math.log(1000 / 16)  # of the logarithm of a side, so that no prediction overflows


class Objects(NamedTuple):
    """The labelled objects of an image.

    Attributes:
        xyxy: (N, 4) float32, left, top, right, bottom in pixels.
        labels: (N,) int64 from 0.
        ignore: (N,) bool: neither learned nor counted as wrong.
        masks: (N, h, w) uint8 of the image, 1 where the object is; None where objects are boxes only.
    """

    xyxy: Tensor
    labels: Tensor
    ignore: Tensor
    masks: Tensor | None = None


class Detections(NamedTuple):
    """What is found in an image, the surest first.

    Attributes:
        xyxy: (N, 4) left, top, right, bottom in pixels, inside the image.
        labels: (N,) class indices.
        scores: (N,) in 0..1.
        masks: (N, 28, 28) in 0..1, of each box stretched to a square; None of detectors of boxes.
    """

    xyxy: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None


class Places(NamedTuple):
    """What objects of an image come from, whatever else its image may show: places, regions or queries.

    Attributes:
        scores: (N, K) in 0..1, before duplicates are removed.
        boxes: (N, 1, 4) in pixels, or (N, K, 4) where each class has its own.
        follow: a number -> what tells of other pixels, from what the head's `forward` gives, the logits and the scores
            (B, K) there.
    """

    scores: Tensor
    boxes: Tensor
    follow: Callable[[int], Callable[[Any], tuple[Tensor, Tensor]]]


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or as many as divide the channels, each of two channels at least: a map may be one pixel."""
    groups = math.gcd(32, channels)
    return nn.GroupNorm(groups if groups < channels else max(1, channels // 2), channels)


class DenseHead(nn.Module, ABC):
    """What the heads have in common.

    Args:
        strides: of the maps.
        sizes: the side, in pixels, of the objects that each map is for.
        gamma: of the focal loss (Lin et al. 2017, arXiv 1708.02002).
        overlap: IoU above which the less sure of two detections is a duplicate.
        agnostic: detections of different classes can be duplicates of each other too.
        limit: most objects that are found in an image.
    """

    masks = False
    classifier_names: tuple[str, ...] = ("classification.cls_logits",)
    classification: FCOSClassificationHead

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[float],
        gamma: float = 2.0,
        overlap: float = 0.6,
        agnostic: bool = False,
        limit: int = 100,
    ) -> None:
        super().__init__()
        self.strides, self.sizes, self.gamma = tuple(strides), tuple(sizes), gamma
        self.overlap, self.agnostic, self.limit = overlap, agnostic, limit

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Any]:
        """What is said of every place, see `predictions`, and the `shapes` of the maps."""
        return self.predictions(maps) | {"shapes": [(x.shape[2], x.shape[3]) for x in maps]}

    @property
    def classifier(self) -> nn.Module:
        return self.classification.cls_logits

    @abstractmethod
    def predictions(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Predictions float32 with the axes (B, P * A, ...) for A anchors at a place; `logits` (B, P * A, classes)."""

    @abstractmethod
    def anchors(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """(P * A, 4) left, top, right, bottom, for maps of these shapes."""

    @abstractmethod
    def scores(self, raw: dict[str, Tensor]) -> Tensor:
        """(B, P * A, classes) in 0..1."""

    @abstractmethod
    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Predicted `boxes` (N, 4) of these anchors (N, 4) in pixels."""

    @abstractmethod
    def encode(self, xyxy: Tensor, anchors: Tensor) -> Tensor:
        """What `decode` makes these boxes of."""

    @abstractmethod
    def assign(self, xyxy: Tensor, anchors: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """(P * A,) the object that each anchor learns; -1: that there is none; -2: nothing."""

    @abstractmethod
    def box_losses(self, raw: dict[str, Tensor], chosen: Tensor, anchors: Tensor, xyxy: Tensor) -> dict[str, Tensor]:
        """Sums over the N places that are chosen (B, P * A), with their anchors (N, 4) and objects (N, 4)."""

    @classmethod
    @abstractmethod
    def reached(
        cls, xyxy: Tensor, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float], well: bool
    ) -> Tensor:
        """(N,) which of these objects a head with such maps can learn, or can learn well."""

    def losses(
        self, raw: dict[str, Any], sizes: Sequence[Sequence[int]], targets: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """`class` and what a head adds, each per place that learns an object.

        Args:
            raw: what `forward` gives.
            sizes: (h, w) of each image before it was padded.
            targets: the objects of each image.
        """
        logits, shapes = raw["logits"], raw["shapes"]
        anchors = self.anchors(shapes, logits.device)
        wanted, learned, owners = torch.zeros_like(logits), torch.ones_like(logits[..., 0], dtype=torch.bool), []
        chosen, boxes = torch.zeros_like(learned), []
        for i, target in enumerate(targets):
            objects = target.xyxy[~target.ignore], target.labels[~target.ignore]
            matched = self.assign(objects[0], anchors, shapes)
            chosen[i] = matched >= 0
            places, owner = torch.where(chosen[i])[0], matched[chosen[i]]
            wanted[i, places, objects[1][owner]] = 1.0
            learned[i] = chosen[i] | ((matched == -1) & ~inside(anchors, target.xyxy[target.ignore]))
            boxes.append(objects[0][owner])
            owners.append(anchors[places])
        focal = sigmoid_focal_loss(logits[learned], wanted[learned], gamma=self.gamma, reduction="sum")
        losses = {"class": focal} | self.box_losses(raw, chosen, torch.cat(owners), torch.cat(boxes))
        return {name: loss / chosen.sum().clamp(min=1) for name, loss in losses.items()}

    def found(self, raw: dict[str, Any], sizes: Sequence[Sequence[int]]) -> list[Detections]:
        """What is found in each image, the surest first; arguments as of `losses`."""
        anchors = self.anchors(raw["shapes"], raw["logits"].device)
        triples = zip(sizes, self.scores(raw), raw["boxes"], strict=True)
        return [self._found(scores, boxes, anchors, size) for size, scores, boxes in triples]

    def places(self, raw: dict[str, Any], size: Sequence[int]) -> Places:
        """Of an image of (h, w) pixels."""
        anchors = self.anchors(raw["shapes"], raw["logits"].device)

        def follow(place: int) -> Callable[[Any], tuple[Tensor, Tensor]]:
            return lambda raw: (raw["logits"][:, place], self.scores(raw)[:, place])

        return Places(self.scores(raw)[0], self.decode(raw["boxes"][0], anchors)[:, None], follow)

    def _found(self, scores: Tensor, boxes: Tensor, anchors: Tensor, size: Sequence[int]) -> Detections:
        flat = scores.flatten()
        order = flat.argsort(descending=True, stable=True)[: max(CANDIDATES, 5 * self.limit)]
        order = order[flat[order] > FLOOR]
        place, labels, sure = order // scores.shape[1], order % scores.shape[1], flat[order]
        xyxy = clip_boxes_to_image(self.decode(boxes[place], anchors[place]), (size[0], size[1]))
        there = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
        xyxy, labels, sure = xyxy[there], labels[there], sure[there]
        if self.agnostic:
            kept = nms(xyxy, sure, self.overlap)
        else:
            kept = batched_nms(xyxy, sure, labels, self.overlap)
        kept = kept[: self.limit]
        return Detections(xyxy[kept], labels[kept], sure[kept])

    def round_trip(self, objects: Objects, size: Sequence[int]) -> float:
        """The largest error, in pixels, of the objects of an image of (H, W) pixels after `encode` and `decode`."""
        shapes = [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in self.strides]
        anchors = self.anchors(shapes, objects.xyxy.device)
        owner = self.assign(objects.xyxy, anchors, shapes)
        chosen = owner >= 0
        xyxy = objects.xyxy[owner[chosen]]
        back = self.decode(self.encode(xyxy, anchors[chosen]), anchors[chosen])
        return (back - xyxy).abs().max().item() if len(xyxy) else 0.0

    def _centres(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """(P, 2) x and y of the places, and (P,) which map each is of."""
        centres, level = [], []
        for n, ((height, width), stride) in enumerate(zip(shapes, self.strides, strict=True)):
            y, x = ((torch.arange(side, device=device) + 0.5) * stride for side in (height, width))
            centres.append(torch.cartesian_prod(y, x).flip(1))
            level.append(torch.full((height * width,), n, device=device))
        return torch.cat(centres), torch.cat(level)


def inside(anchors: Tensor, regions: Tensor) -> Tensor:
    """(N,) whether an anchor is mostly in one of the regions."""
    low = torch.maximum(anchors[:, None, :2], regions[None, :, :2])
    high = torch.minimum(anchors[:, None, 2:], regions[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return (shared >= IGNORED * (anchors[:, 2:] - anchors[:, :2]).prod(1)[:, None]).any(1)


class FCOS(DenseHead):
    """FCOS (Tian et al. 2019, arXiv 1904.01355): a place inside an object tells its distances from the four sides.

    An object is learned by the map whose size is nearest to twice its largest distance from the place, around its
    centre only.
    """

    RADIUS = 1.5  # around the centre, in strides

    def __init__(
        self,
        channels: int,
        classes: int,
        strides: Sequence[int],
        sizes: Sequence[float],
        convs: int = 4,
        **common: Any,
    ) -> None:
        super().__init__(strides, sizes, **common)
        self.classification = FCOSClassificationHead(channels, 1, classes, convs, norm_layer=group_norm)
        self.regression = FCOSRegressionHead(channels, 1, convs, norm_layer=group_norm)

    def predictions(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        maps = list(maps)
        boxes, centredness = self.regression(maps)
        raw = {"logits": self.classification(maps), "boxes": boxes, "centredness": centredness[..., 0]}
        return {name: value.float() for name, value in raw.items()}

    def anchors(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Of one stride's side."""
        centres, level = self._centres(shapes, device)
        half = centres.new_tensor(self.strides)[level, None] / 2
        return torch.cat([centres - half, centres + half], 1)

    def scores(self, raw: dict[str, Tensor]) -> Tensor:
        return (raw["logits"].sigmoid() * raw["centredness"].sigmoid()[..., None]).sqrt()

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        centre, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:] - anchors[:, :2])
        return torch.cat([centre - boxes[:, :2] * stride, centre + boxes[:, 2:] * stride], 1)

    def encode(self, xyxy: Tensor, anchors: Tensor) -> Tensor:
        centre, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:] - anchors[:, :2])
        return torch.cat([(centre - xyxy[:, :2]) / stride, (xyxy[:, 2:] - centre) / stride], 1)

    def assign(self, xyxy: Tensor, anchors: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        if not len(xyxy):
            return torch.full((len(anchors),), -1, device=anchors.device)
        centres, level = self._centres(shapes, anchors.device)
        stride, low, high = (
            centres.new_tensor(values)[level, None] for values in (self.strides, *ranges_of(self.sizes))
        )
        x, y = centres.T[..., None]
        left, top, right, bottom = xyxy.T[:, None]
        nearest = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
        furthest = torch.maximum(torch.maximum(x - left, right - x), torch.maximum(y - top, bottom - y))
        off_centre = torch.maximum((x - (left + right) / 2).abs(), (y - (top + bottom) / 2).abs())
        matches = (nearest > 0) & (off_centre < self.RADIUS * stride) & (furthest >= low) & (furthest < high)
        area = (xyxy[:, 2:] - xyxy[:, :2]).prod(1).expand(len(centres), -1)
        smallest, owner = torch.where(matches, area, math.inf).min(1)
        return torch.where(smallest < math.inf, owner, -1)

    @classmethod
    def reached(
        cls, xyxy: Tensor, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float], well: bool
    ) -> Tensor:
        """Those that surely have a place of the finest map, or at least two each way."""
        return (xyxy[:, 2:] - xyxy[:, :2] >= (2 if well else 1) * strides[0]).all(1)

    def box_losses(self, raw: dict[str, Tensor], chosen: Tensor, anchors: Tensor, xyxy: Tensor) -> dict[str, Tensor]:
        boxes = self.decode(raw["boxes"][chosen], anchors)
        sides = self.encode(xyxy, anchors)
        across, along = sides[:, [0, 2]], sides[:, [1, 3]]
        centred = (across.amin(1) / across.amax(1) * (along.amin(1) / along.amax(1))).sqrt()
        return {
            "box": generalized_box_iou_loss(boxes, xyxy, reduction="sum"),
            "centredness": F.binary_cross_entropy_with_logits(raw["centredness"][chosen], centred, reduction="sum"),
        }


class RetinaNet(DenseHead):
    """RetinaNet (Lin et al. 2017, arXiv 1708.02002): each place has anchors of three sizes and some ratios.

    An anchor learns the object with which its IoU is at least 0.5, none below 0.4; every object is learned by the
    anchors that fit it best.
    """

    POSITIVE, NEGATIVE = 0.5, 0.4

    def __init__(
        self,
        channels: int,
        classes: int,
        strides: Sequence[int],
        sizes: Sequence[float],
        convs: int = 4,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        **common: Any,
    ) -> None:
        super().__init__(strides, sizes, **common)
        self.ratios = tuple(ratios)
        count = len(OCTAVES) * len(self.ratios)
        self.classification = FCOSClassificationHead(channels, count, classes, convs, norm_layer=group_norm)
        self.regression = RetinaNetRegressionHead(channels, count, norm_layer=group_norm)
        self.regression.conv = self.regression.conv[:convs]

    def predictions(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        maps = list(maps)
        return {"logits": self.classification(maps).float(), "boxes": self.regression(maps).float()}

    def anchors(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Of height / width in `ratios` and of three sizes an octave."""
        centres, level = self._centres(shapes, device)
        half = centres.new_tensor([sides_of(size, self.ratios) for size in self.sizes])[level] / 2
        return torch.cat([centres[:, None] - half, centres[:, None] + half], 2).flatten(0, 1)

    def scores(self, raw: dict[str, Tensor]) -> Tensor:
        return raw["logits"].sigmoid()

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        size = anchors[:, 2:] - anchors[:, :2]
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + boxes[:, :2] * size
        half = boxes[:, 2:].clamp(max=LARGEST_STEP).exp() * size / 2
        return torch.cat([centre - half, centre + half], 1)

    def encode(self, xyxy: Tensor, anchors: Tensor) -> Tensor:
        size = anchors[:, 2:] - anchors[:, :2]
        away = (xyxy[:, :2] + xyxy[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
        return torch.cat([away / size, ((xyxy[:, 2:] - xyxy[:, :2]) / size).log()], 1)

    def assign(self, xyxy: Tensor, anchors: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        if not len(xyxy):
            return torch.full((len(anchors),), -1, device=anchors.device)
        iou = box_iou(anchors, xyxy)
        best, owner = iou.max(1)
        matched = torch.where(best >= self.POSITIVE, owner, torch.where(best < self.NEGATIVE, -1, -2))
        fits_best = (iou == iou.amax(0)) & (iou > 0)
        return torch.where(fits_best.any(1), owner, matched)

    @classmethod
    def reached(
        cls, xyxy: Tensor, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float], well: bool
    ) -> Tensor:
        """Those with which an anchor of the grid has the IoU of a positive one."""
        sides, centre = xyxy[:, None, 2:] - xyxy[:, None, :2], (xyxy[:, :2] + xyxy[:, 2:]) / 2
        fits = torch.zeros(len(xyxy), dtype=torch.bool)
        for stride, size in zip(strides, sizes, strict=True):
            away = (centre % stride - stride / 2).abs()[:, None]  # from the nearest place
            anchors = xyxy.new_tensor(sides_of(size, ratios))[None]
            shared = torch.minimum(torch.minimum(sides, anchors), (sides + anchors) / 2 - away).clamp(min=0).prod(2)
            fits |= (shared / (sides.prod(2) + anchors.prod(2) - shared) >= cls.POSITIVE).any(1)
        return fits

    def box_losses(self, raw: dict[str, Tensor], chosen: Tensor, anchors: Tensor, xyxy: Tensor) -> dict[str, Tensor]:
        return {"box": F.l1_loss(raw["boxes"][chosen], self.encode(xyxy, anchors), reduction="sum")}


def sides_of(size: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Width and height of RetinaNet's anchors at a place of the map for objects of this size."""
    return [(size * octave / math.sqrt(r), size * octave * math.sqrt(r)) for r in ratios for octave in OCTAVES]


def ranges_of(sizes: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of each of FCOS' maps the smallest and largest distance of a place from the furthest side of its object."""
    between = [math.sqrt(one * other) / 2 for one, other in pairwise(sizes)]
    return [0.0, *between], [*between, math.inf]
