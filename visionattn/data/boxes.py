"""Objects of an image: boxes in pixels, with labels, scores where they are predicted, and masks where there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Self

import numpy as np
from pydantic import Field

from visionattn.data.sample import Window
from visionattn.data.splits import GroupSection

__all__ = ["BoxSection", "Boxes", "pixels_of"]

VISIBLE = 0.25  # an object of which a crop shows less is left out ...
WHOLE = 0.5  # ... and one of which it shows less than this is ignored there


class BoxSection(GroupSection):
    """What every source of images with boxes shares."""

    classes: list[str] | None = Field(None, description="class names in order; unset: as found in the data")
    ignored: list[str] = Field(
        [], description="names of the data that are no classes: there nothing is learned, and nothing counts as wrong"
    )


@dataclass(eq=False)  # not frozen, which Lightning refuses among predictions
class Boxes:
    """N objects of an image, or of a window of it.

    Attributes:
        xyxy: (N, 4) float32 left, top, right, bottom in pixels; a box of one pixel at the origin is 0, 0, 1, 1.
        labels: (N,) int64 class indices; -1 of ignored objects that may be of any class.
        ignore: (N,) bool: a crowd, a doubtful or unlabelled region, neither learned nor counted as wrong.
        scores: (N,) float32 of predictions, None of labels.
        masks: of each object a bool crop (h, w) of the pixels that its box touches, see `pixels_of`; None where objects
            are boxes only.
    """

    xyxy: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ignore: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    scores: np.ndarray | None = None
    masks: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, chosen: np.ndarray) -> Self:
        """The objects at these positions, or where a (N,) bool array is true."""
        places = np.arange(len(self))[chosen]
        return replace(
            self,
            xyxy=self.xyxy[places],
            labels=self.labels[places],
            ignore=self.ignore[places],
            scores=None if self.scores is None else self.scores[places],
            masks=None if self.masks is None else [self.masks[i] for i in places],
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All objects of several; with scores or masks only if all parts with objects have them."""
        parts = [part for part in parts if len(part)] or list(parts[:1])
        if not parts:
            return cls()
        scores = [part.scores for part in parts if part.scores is not None]
        masks = [part.masks for part in parts if part.masks is not None]
        return cls(
            np.concatenate([part.xyxy for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.ignore for part in parts]),
            np.concatenate(scores) if len(scores) == len(parts) else None,
            list(chain.from_iterable(masks)) if len(masks) == len(parts) else None,
        )

    @property
    def areas(self) -> np.ndarray:
        """(N,) of the boxes, in pixels."""
        return (self.xyxy[:, 2:] - self.xyxy[:, :2]).prod(1)

    def of_window(self, window: Window) -> Self:
        """The same objects of a window of an image counted from the corner of the image.

        What rounding would move to another pixel stays on its own, since masks are of these.
        """
        corner = np.array([window[1].start, window[0].start] * 2)
        pixels = np.concatenate([np.floor(self.xyxy[:, :2]) + 1, np.ceil(self.xyxy[:, 2:]) - 1], 1) + corner
        inside = np.nextafter(pixels.astype(np.float32), np.array([-np.inf, -np.inf, np.inf, np.inf], np.float32))
        moved = (self.xyxy + corner).astype(np.float32)
        low, high = np.minimum(moved, inside)[:, :2], np.maximum(moved, inside)[:, 2:]
        return replace(self, xyxy=np.concatenate([low, high], axis=1))

    def within(self, window: Window) -> Self:
        """What a crop of the image shows, counted from its corner: boxes clipped, hardly visible objects left out.

        Of an object at least a quarter must be visible (of its mask where there is one, else of its box), and it is
        ignored if less than half of it is. What is ignored stays as long as anything of it is visible.
        """
        rows, columns = window
        low, high = [columns.start, rows.start] * 2, [columns.stop, rows.stop] * 2
        boxes = self.xyxy.clip(low, high)
        touched = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        if not touched.all():
            return self[touched].within(window)
        visible = (boxes[:, 2:] - boxes[:, :2]).prod(1) / np.maximum(self.areas, 1e-12)
        masks = self.masks
        if masks is not None:
            boxes, masks, visible = boxes.copy(), list(masks), visible.copy()
            for i in np.flatnonzero(visible < 1):
                whole = masks[i]
                inner, outer = pixels_of(boxes[i]), pixels_of(self.xyxy[i])
                part = whole[
                    tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))
                ]
                visible[i] = part.sum() / max(whole.sum(), 1)
                if part.any():
                    ys, xs = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
                    masks[i] = part[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
                    top, left = inner[0].start + ys[0], inner[1].start + xs[0]
                    boxes[i] = left, top, left + masks[i].shape[1], top + masks[i].shape[0]
        cut = replace(
            self,
            xyxy=(boxes - low).astype(np.float32),
            ignore=self.ignore | (visible < WHOLE),
            masks=masks,
        )
        return cut[np.where(self.ignore, visible > 0, visible >= VISIBLE)]


def pixels_of(box: np.ndarray) -> Window:
    """Rows and columns of the pixels that a box (4,) touches, at least one each way."""
    left, top = np.floor(box[:2]).astype(int).tolist()
    right, bottom = np.ceil(box[2:]).astype(int).tolist()
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))
