"""The head of two-stage detectors: regions that may hold an object are proposed, then each is looked at by itself.

Faster R-CNN (Ren et al. 2015, arXiv 1506.01497) and, with masks, Mask R-CNN (He et al. 2017, arXiv 1703.06870), of
torchvision's parts. What torchvision does not know is added here: regions that are ignored, classes numbered from 0.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, nms
from torchvision.ops.poolers import initLevelMapper

from visionattn.models.dense_heads import FLOOR, OCTAVES, Detections, Objects, Places, RetinaNet, inside

__all__ = ["FasterRCNN", "MaskRCNN"]

HIDDEN = 1024  # features of a region
POOLED, MASK = 7, 14  # places of a region each way: for its class and box, and for its mask
SAMPLED = 256, 512  # anchors and regions of an image that the losses are taken of


class Proposals(RegionProposalNetwork):
    """Torchvision's, which learns nothing of anchors in regions that are not labelled."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, boxes, target in zip(labels, anchors, targets, strict=True):
            label[(label == 0) & inside(boxes, target["ignored"])] = -1
        return labels, matched


class Regions(RoIHeads):
    """Torchvision's, which learns nothing of proposals in regions that are not labelled."""

    ignored: Sequence[Tensor] = ()  # of the images at hand

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for label, boxes, regions in zip(labels, proposals, self.ignored, strict=True):
            label[(label == 0) & inside(boxes, regions)] = -1
        return matched, labels


class FasterRCNN(nn.Module):
    """Maps (B, C, h, w) of a feature pyramid, fine to coarse -> objects.

    Args:
        channels: of the maps.
        classes: number of them.
        strides: of the maps.
        sizes: the side, in pixels, of the objects that each map is for.
        ratios: height / width of the anchors.
        overlap: IoU above which the less sure of two detections is a duplicate.
        agnostic: detections of different classes can be duplicates of each other too.
        limit: most objects that are found in an image.
    """

    masks = False
    classifier_names: tuple[str, ...] = ("regions.box_predictor.cls_score",)

    def __init__(
        self,
        channels: int,
        classes: int,
        strides: Sequence[int],
        sizes: Sequence[float],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        overlap: float = 0.5,
        agnostic: bool = False,
        limit: int = 100,
    ) -> None:
        super().__init__()
        self.strides, self.overlap, self.agnostic, self.limit = tuple(strides), overlap, agnostic, limit
        of_maps = tuple(tuple(float(size * octave) for octave in OCTAVES) for size in sizes)
        anchors = AnchorGenerator(of_maps, (tuple(map(float, ratios)),) * len(of_maps))
        kept = {"training": max(2000, 5 * limit), "testing": max(1000, 5 * limit)}
        self.proposals = Proposals(
            anchors, RPNHead(channels, len(OCTAVES) * len(ratios)), 0.7, 0.3, SAMPLED[0], 0.5, kept, kept, 0.7
        )
        self.regions = Regions(
            _pool(POOLED, strides),
            TwoMLPHead(channels * POOLED**2, HIDDEN),
            FastRCNNPredictor(HIDDEN, classes + 1),
            *(0.5, 0.5, SAMPLED[1], 0.25, None, FLOOR, overlap, limit),
            mask_roi_pool=_pool(MASK, strides) if self.masks else None,
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1) if self.masks else None,
            mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1) if self.masks else None,
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps: what is said of them depends on what is asked."""
        return list(maps)

    @property
    def classifier(self) -> nn.Module:
        return self.regions.box_predictor.cls_score

    @classmethod
    def reached(
        cls, xyxy: Tensor, strides: Sequence[int], sizes: Sequence[float], ratios: Sequence[float], well: bool
    ) -> Tensor:
        """See `RetinaNet.reached`, which has the same anchors."""
        return RetinaNet.reached(xyxy, strides, sizes, ratios, well)

    def losses(self, maps: Sequence[Tensor], sizes: Sequence[Any], targets: Sequence[Objects]) -> dict[str, Tensor]:
        """`class` and `box` of the regions, `objectness` and `proposal` of the anchors, `mask` where there are masks.

        Args:
            sizes: (h, w) of each image before it was padded.
            targets: the objects of each image.
        """
        given = [self._target(objects) for objects in targets]
        anchors, objectness, deltas, proposed = self._propose(maps, sizes)
        labels, matched = self.proposals.assign_targets_to_anchors(anchors, given)
        codes = self.proposals.box_coder.encode(matched, anchors)
        sure, proposal = self.proposals.compute_loss(objectness.float(), deltas.float(), labels, list(codes))
        self.regions.ignored = [target["ignored"] for target in given]
        regions, owners, classes, codes = self.regions.select_training_samples(proposed, given)
        logits, boxes = self._looked_at(maps, regions)
        named, box = fastrcnn_loss(logits.float(), boxes.float(), classes, codes)
        if not len(torch.cat(classes)):  # all is ignored: means of nothing
            named, box = logits.sum() * 0.0, boxes.sum() * 0.0
        if not any((label >= 0).any() for label in labels):
            sure, proposal = objectness.sum() * 0.0, deltas.sum() * 0.0
        losses = {"class": named, "box": box, "objectness": sure, "proposal": proposal}
        if self.masks:
            chosen = [torch.where(label > 0)[0] for label in classes]
            of_objects = [region[i] for region, i in zip(regions, chosen, strict=True)]
            owner = [own[i] for own, i in zip(owners, chosen, strict=True)]
            shapes = self._shapes(maps, of_objects).float()
            truth = [target["masks"] for target in given], [target["labels"] for target in given]
            losses["mask"] = maskrcnn_loss(shapes, of_objects, *truth, owner)
        return losses

    def found(self, maps: Sequence[Tensor], sizes: Sequence[Any]) -> list[Detections]:
        """What is found in each image, the surest first."""
        *_, proposed = self._propose(maps, sizes)
        logits, codes = self._looked_at(maps, proposed)
        sizes = [tuple(size) for size in sizes]
        boxes, scores, labels = self.regions.postprocess_detections(logits.float(), codes.float(), proposed, sizes)
        if self.agnostic:
            kept = [nms(*pair, self.overlap) for pair in zip(boxes, scores, strict=True)]
            boxes, scores, labels = ([x[i] for x, i in zip(xs, kept, strict=True)] for xs in (boxes, scores, labels))
        parts = [None] * len(boxes)
        if self.masks:
            wanted = torch.cat(labels)
            places = torch.arange(len(wanted), device=wanted.device)
            shapes = self._shapes(maps, boxes).float().sigmoid()[places, wanted]
            parts = list(shapes.split([len(label) for label in labels]))
        return [Detections(*of_image) for of_image in zip(boxes, [n - 1 for n in labels], scores, parts, strict=True)]

    def places(self, maps: Sequence[Tensor], size: Sequence[int]) -> Places:
        """The regions that are proposed of an image of (h, w) pixels, which are looked at in others too."""
        *_, (regions,) = self._propose(maps, [size])
        logits, codes = self._looked_at(maps, [regions])
        boxes = self.regions.box_coder.decode(codes, [regions])

        def follow(place: int) -> Callable[[Any], tuple[Tensor, Tensor]]:
            def looked_at(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
                logits, _ = self._looked_at(maps, [regions[place][None]] * len(maps[0]))
                return logits[:, 1:], logits.softmax(-1)[:, 1:]

            return looked_at

        return Places(logits.softmax(-1)[:, 1:], boxes[:, 1:], follow)

    def round_trip(self, objects: Objects, size: Sequence[int]) -> float:
        """The largest error, in pixels, of the objects of an image after they are coded and decoded."""
        xyxy = objects.xyxy
        boxes = xyxy + (xyxy[:, 2:] - xyxy[:, :2]).repeat(1, 2) * xyxy.new_tensor([-0.1, 0.1, 0.2, -0.1])  # proposals
        coder = self.regions.box_coder
        back = coder.decode(torch.cat(coder.encode([xyxy], [boxes])), [boxes])[:, 0]
        return (back - xyxy).abs().max().item() if len(xyxy) else 0.0

    def _target(self, objects: Objects) -> dict[str, Any]:
        """As torchvision wants it: classes from 1, of what is learned; and the boxes of what is not."""
        learned = ~objects.ignore
        target = {"boxes": objects.xyxy[learned], "labels": objects.labels[learned] + 1}
        if self.masks:
            if objects.masks is None:
                raise ValueError("mask_rcnn needs the masks of the objects")
            target["masks"] = objects.masks[learned]
        return target | {"ignored": objects.xyxy[objects.ignore]}

    def _propose(
        self, maps: Sequence[Tensor], sizes: Sequence[Any]
    ) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
        """The anchors of each image, what is said of all of them together, and the proposals of each image."""
        maps, sizes = list(maps), [tuple(size) for size in sizes]
        anchors = [self.anchors(maps)] * len(sizes)
        objectness, deltas = self.proposals.head(maps)
        counts = [x[0].numel() for x in objectness]
        sure, codes = _in_one(objectness, 1), _in_one(deltas, 4)
        boxes = self.proposals.box_coder.decode(codes.detach().float(), anchors).view(len(sizes), -1, 4)
        proposed, _ = self.proposals.filter_proposals(boxes, sure.detach().float(), sizes, counts)
        return anchors, sure, codes, proposed

    def anchors(self, maps: Sequence[Tensor]) -> Tensor:
        """(A, 4) in pixels, of all places of the maps of an image."""
        padded = [side * self.strides[0] for side in maps[0].shape[-2:]]
        image = ImageList(maps[0].new_empty(1, 0, *padded), [(padded[0], padded[1])])
        return self.proposals.anchor_generator(image, list(maps))[0]

    def _looked_at(self, maps: Sequence[Tensor], regions: list[Tensor]) -> Any:
        pooled = self.regions.box_roi_pool(_named(maps), regions, [])
        return self.regions.box_predictor(self.regions.box_head(pooled))

    def _shapes(self, maps: Sequence[Tensor], regions: list[Tensor]) -> Tensor:
        """(N, classes + 1, 28, 28) logits of masks."""
        pooled = self.regions.mask_roi_pool(_named(maps), regions, [])
        return self.regions.mask_predictor(self.regions.mask_head(pooled))


class MaskRCNN(FasterRCNN):
    """With the mask of each object."""

    masks = True


def _pool(side: int, strides: Sequence[int]) -> MultiScaleRoIAlign:
    """Of maps of these strides, which torchvision would guess from the sizes of the first images, without padding."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, 2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(round(math.log2(strides[0])), round(math.log2(strides[-1])))
    return pool


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return OrderedDict((str(i), x) for i, x in enumerate(maps))


def _in_one(maps: Sequence[Tensor], width: int) -> Tensor:
    """(B, A * width, h, w) of each map -> (all anchors of all images, width), image by image."""
    parts = [x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).reshape(len(x), -1, width) for x in maps]
    return torch.cat(parts, 1).reshape(-1, width)
