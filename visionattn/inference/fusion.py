"""Detections of several views of an image, or of several models, as one set.

Weighted box fusion (Solovyev et al. 2021, arXiv 1910.13302): detections of one object become their mean, weighted by
their scores, and its score is their sum over the number of views, so that what one view alone has seen is less sure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

__all__ = ["fuse"]

Found = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4), labels (N,), scores (N,)


def fuse(views: Sequence[Found], overlap: float, agnostic: bool = False) -> Found:
    """The detections of all views, the surest first.

    Args:
        views: boxes (N, 4), labels (N,) and scores (N,) of each, in the pixels of the image, without duplicates.
        overlap: IoU from which detections of one class are of one object.
        agnostic: those of different classes too, which is then of the class of the surest one.
    """
    xyxy, labels, scores = (torch.cat(parts) for parts in zip(*views, strict=True))
    kinds = torch.zeros_like(labels) if agnostic else labels
    first = batched_nms(xyxy, scores, kinds, overlap)
    if not len(first):
        return xyxy, labels, scores
    iou = box_iou(xyxy, xyxy[first]) * (kinds[:, None] == kinds[first])
    iou[first, torch.arange(len(first), device=first.device)] = 2.0  # each leads its own
    best, owner = iou.max(1)
    weights = torch.where(best >= overlap, scores, 0.0)
    total = torch.zeros_like(scores[first]).index_add_(0, owner, weights)
    boxes = torch.zeros_like(xyxy[first]).index_add_(0, owner, weights[:, None] * xyxy) / total[:, None]
    sure = (total / len(views)).clamp(max=1.0)
    order = sure.argsort(descending=True, stable=True)
    return boxes[order], labels[first][order], sure[order]
