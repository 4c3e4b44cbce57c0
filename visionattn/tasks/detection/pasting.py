"""Copy-paste: an object of one training image on another, and what it leaves visible of the objects there.

After Ghiasi et al. 2021, arXiv 2012.07177. Where objects have masks the object itself is pasted, else the rectangle of
its box, with all that is labelled in it. What is covered follows the rule of crops, see `Boxes.within`: an object of
which less than a quarter is left is gone, one of which less than half is left is ignored, and boxes end where what is
left of their objects does.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from visionattn.data.boxes import VISIBLE, WHOLE, pixels_of
from visionattn.data.sample import Window
from visionattn.models.detectors import Objects

__all__ = ["paste", "window_of"]


def window_of(box: np.ndarray, size: tuple[int, int]) -> Window:
    """The pixels of an image (H, W) that a box (4,) touches."""
    rows, columns = (
        slice(max(0, min(side.start, end - 1)), max(1, min(side.stop, end)))
        for side, end in zip(pixels_of(box), size, strict=True)
    )
    return rows, columns


def paste(
    image: Tensor,
    objects: Objects,
    patch: Tensor,
    pasted: Objects,
    corner: tuple[int, int],
    shape: Tensor | None = None,
) -> tuple[Tensor, Objects]:
    """An image (C, H, W) and its objects with a patch on it, and the patch's objects.

    Args:
        patch: (C, h, w).
        pasted: its objects, counted from its own corner.
        corner: row and column of the patch.
        shape: (h, w) bool, which pixels of the patch are pasted; None: all.
    """
    (top, left), (height, width) = corner, patch.shape[1:]
    shape = torch.ones(height, width, dtype=torch.bool) if shape is None else shape
    covered = torch.zeros(image.shape[1:], dtype=torch.bool)
    covered[top : top + height, left : left + width] = shape
    image = image.clone()
    image[:, covered] = patch[:, shape]
    moved = pasted._replace(xyxy=pasted.xyxy + pasted.xyxy.new_tensor([left, top, left, top]))
    if pasted.masks is not None:
        masks = pasted.masks.new_zeros(len(pasted.masks), *covered.shape)
        masks[:, top : top + height, left : left + width] = pasted.masks
        moved = moved._replace(masks=masks)
    return image, _joined(_left(objects, covered), moved)


def _left(objects: Objects, covered: Tensor) -> Objects:
    """What is visible of the objects where some pixels (H, W) are covered."""
    xyxy, ignore, masks = objects.xyxy.clone(), objects.ignore.clone(), objects.masks
    stays = torch.ones_like(ignore)
    for k, box in enumerate(objects.xyxy):
        rows, columns = window_of(box.numpy(), (covered.shape[0], covered.shape[1]))
        if not covered[rows, columns].any():
            continue
        whole = torch.ones_like(covered[rows, columns]) if masks is None else masks[k, rows, columns].bool()
        rest = whole & ~covered[rows, columns]
        visible = rest.sum().item() / max(whole.sum().item(), 1)
        stays[k] = visible > 0 if ignore[k] else visible >= VISIBLE
        ignore[k] |= visible < WHOLE
        if rest.any():
            ends = _bounds(rest, rows.start, columns.start)
            xyxy[k] = torch.cat([torch.maximum(box[:2], ends[:2]), torch.minimum(box[2:], ends[2:])])
    if masks is not None:
        masks = (masks * ~covered)[stays]
    return Objects(xyxy[stays], objects.labels[stays], ignore[stays], masks)


def _bounds(region: Tensor, top: int, left: int) -> Tensor:
    """(4,) left, top, right and bottom of the true pixels of a region that begins there."""
    rows, columns = (torch.where(region.any(axis))[0] for axis in (1, 0))
    return torch.stack([columns[0] + left, rows[0] + top, columns[-1] + left + 1, rows[-1] + top + 1]).float()


def _joined(one: Objects, other: Objects) -> Objects:
    masks: Sequence[Tensor] = [part.masks for part in (one, other) if part.masks is not None]
    return Objects(
        torch.cat([one.xyxy, other.xyxy]),
        torch.cat([one.labels, other.labels]),
        torch.cat([one.ignore, other.ignore]),
        torch.cat(list(masks)) if len(masks) == 2 else None,
    )
