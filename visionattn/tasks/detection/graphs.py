"""What exported detectors compute: graphs of fixed shapes, by kind of head.

Duplicates of places and of queries are removed beside the graph. What is looked at twice is chosen by removing them, so
that of two-stage detectors both removals are in the graph; what is missing of a fixed number has probability 0.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, nms, roi_align

from visionattn.models.dense_heads import CANDIDATES, FLOOR, DenseHead
from visionattn.models.set_based import SetHead
from visionattn.models.two_stage import FasterRCNN, MaskRCNN
from visionattn.tasks.graph import Graph

__all__ = ["GRAPHS"]


class _Graph(Graph):
    def maps(self, images: Tensor) -> list[Tensor]:
        network = self.network
        return network.decoder(network.neck(network.encoder(images)))


class _Dense(_Graph):
    """Images -> of P places probabilities (B, P, K), boxes (B, P, 4) in pixels, and logits."""

    OUTPUTS = ("probabilities", "boxes", "logits")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head = self.network.head
        raw = head(self.maps(self.normalised(images)))
        anchors = head.anchors(raw["shapes"], images.device)
        boxes = head.decode(raw["boxes"].movedim(0, 2), anchors[..., None])  # of all images at once: (P, 4, B)
        return head.scores(raw), boxes.movedim(2, 0), raw["logits"]


class _Ranked(_Graph):
    """Of objects in the order of their scores, which rounding changes."""

    def matched(self, found: list[np.ndarray], expected: list[np.ndarray]) -> list[np.ndarray]:
        """Each object of an image in the place of the one that it is most like."""
        (scores, boxes), (wanted, places) = found[:2], expected[:2]
        largest = max(1.0, np.abs(places).max())
        order = np.empty(boxes.shape[:2], np.int64)
        for i in range(len(boxes)):
            apart = np.abs(places[i][:, None] - boxes[i]).max(-1) / largest
            order[i] = linear_sum_assignment(apart + np.abs(wanted[i][:, None] - scores[i]).max(-1))[1]
        return [np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1) for x in found]


class _Set(_Ranked):
    """Images -> of Q queries probabilities (B, Q, K), boxes (B, Q, 4) in pixels, and logits."""

    OUTPUTS = ("probabilities", "boxes", "logits")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, boxes = self.network.head.said(self.maps(self.normalised(images)))
        return logits.sigmoid(), boxes, logits


class _Boxes(_Ranked):
    """Images -> of the N surest objects probabilities (B, N, K), of one class each, and boxes (B, N, 4) in pixels."""

    OUTPUTS: tuple[str, ...] = ("probabilities", "boxes")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = self.normalised(images)
        return self.objects(self.maps(images), _edges(images))[:2]

    def objects(self, maps: list[Tensor], edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, boxes, and labels (B, N)."""
        head, classes = self.network.head, self.network.head.regions.box_predictor.cls_score.out_features - 1
        regions, real = self._proposed(maps, edges)
        flat = regions.flatten(0, 1)
        logits, codes = head.regions.box_predictor(
            head.regions.box_head(_cut(head.regions.box_roi_pool, maps, regions))
        )
        scores = logits.softmax(-1)[:, 1:].view(*real.shape, classes) * real[..., None]
        boxes = head.regions.box_coder.decode_single(codes, flat).view(*real.shape, classes + 1, 4)[:, :, 1:]
        scores, boxes = scores.flatten(1), _inside(boxes.flatten(1, 2), edges)
        scores = scores * (scores > FLOOR) * _has_sides(boxes, 1e-2)
        scores, order = scores.topk(min(scores.shape[1], max(CANDIDATES, 5 * head.limit)), 1)
        boxes, labels = _taken(boxes, order), order % classes
        scores, order = _distinct(boxes, scores, labels, maps, head.strides[0], head.overlap, head.limit)
        boxes, labels = _taken(boxes, order) * (scores > 0)[..., None], labels.gather(1, order)
        return F.one_hot(labels, classes) * scores[..., None], boxes, labels

    def _proposed(self, maps: list[Tensor], edges: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (B, P, 4), and which of them there are, (B, P) 0 or 1."""
        head, proposals = self.network.head, self.network.head.proposals
        regions, sure = [], []
        first = 0
        anchors = head.anchors(maps)
        for objectness, deltas in zip(*proposals.head(maps), strict=True):
            logits, codes = (
                x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3)
                for x, width in ((objectness, 1), (deltas, 4))
            )
            count = logits.shape[1]
            own = anchors[first : first + count]
            best, order = logits[..., 0].topk(min(count, proposals.pre_nms_top_n()), 1)
            codes = _taken(codes, order)
            boxes = proposals.box_coder.decode_single(codes.flatten(0, 1), own[order.flatten()]).view(codes.shape)
            boxes = _inside(boxes, edges)
            scores = best.sigmoid() * _has_sides(boxes, proposals.min_size)
            most = proposals.post_nms_top_n()
            scores, order = _distinct(boxes, scores, None, maps, head.strides[0], proposals.nms_thresh, most)
            regions.append(_taken(boxes, order))
            sure.append(scores)
            first += count
        all_regions, all_sure = torch.cat(regions, 1), torch.cat(sure, 1)
        scores, order = all_sure.topk(min(all_sure.shape[1], proposals.post_nms_top_n()), 1)
        return _taken(all_regions, order), (scores > 0).to(scores.dtype)


class _Masks(_Boxes):
    """And masks (B, N, 28, 28) of the boxes, each stretched to a square."""

    OUTPUTS = ("probabilities", "boxes", "masks")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images, regions = self.normalised(images), self.network.head.regions
        maps = self.maps(images)
        probabilities, boxes, labels = self.objects(maps, _edges(images))
        shapes = regions.mask_predictor(regions.mask_head(_cut(regions.mask_roi_pool, maps, boxes)))
        index = (labels.flatten() + 1)[:, None, None, None].expand(-1, 1, *shapes.shape[2:])
        masks = shapes.gather(1, index)[:, 0].sigmoid().view(*labels.shape, *shapes.shape[2:])
        return probabilities, boxes, masks * (probabilities.amax(-1) > 0)[..., None, None]


def _edges(images: Tensor) -> Tensor:
    """(B, 1, 4) width and height, twice, of what is not padded; normalised, padding is 0."""
    there, lengths = images != 0, []
    for axis in (3, 2):
        lines = there.any(1).any(5 - axis - 1)
        numbers = torch.arange(1, lines.shape[1] + 1, device=images.device)
        length = (lines * numbers).amax(1)
        lengths.append(torch.where(length > 0, length, lines.shape[1]))
    return torch.stack(lengths * 2, 1)[:, None].to(images.dtype)


def _inside(boxes: Tensor, edges: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), edges)


def _has_sides(boxes: Tensor, least: float) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] >= least).all(-1)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """(B, N, D), (B, M) -> (B, M, D)"""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _distinct(
    boxes: Tensor, scores: Tensor, kinds: Tensor | None, maps: list[Tensor], stride: int, overlap: float, most: int
) -> tuple[Tensor, Tensor]:
    """Of each image the surest boxes that are no duplicates, of one kind, of surer ones: scores, 0 where there are no
    more, and order, both (B, M)."""
    (batch, count), side = scores.shape, max(maps[0].shape[2:]) * stride + 1.0
    group = torch.arange(batch, device=boxes.device)[:, None].expand(-1, count)
    group = group if kinds is None else group + kinds * batch
    kept = nms((boxes + group[..., None] * side).flatten(0, 1), scores.flatten(), overlap)
    left = torch.zeros_like(scores).flatten().scatter(0, kept, torch.ones_like(kept, dtype=scores.dtype))
    best, order = (scores * left.view(batch, count)).topk(min(most, count), 1)
    return best, order


def _cut(pool: MultiScaleRoIAlign, maps: list[Tensor], regions: Tensor) -> Tensor:
    """(B, P, 4) -> (B * P, C, side, side), each of the map for its size."""
    image = torch.arange(regions.shape[0], device=regions.device)[:, None, None].expand(-1, regions.shape[1], 1)
    rows = torch.cat([image.to(regions.dtype), regions], 2).flatten(0, 1)
    assert pool.scales is not None
    parts = [
        roi_align(x, rows, pool.output_size, scale, pool.sampling_ratio)
        for x, scale in zip(maps, pool.scales, strict=True)
    ]
    levels: Any = pool.map_levels
    of_level, cut = levels([rows[:, 1:]]), parts[0]
    for level, part in enumerate(parts[1:], 1):
        cut = torch.where((of_level == level)[:, None, None, None], part, cut)
    return cut


GRAPHS: dict[type, type[_Graph]] = {  # the first that fits
    DenseHead: _Dense,
    SetHead: _Set,
    MaskRCNN: _Masks,
    FasterRCNN: _Boxes,
}
