"""What is measured of a split: of masks too, also where objects reach over the border."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from visionattn import recipe
from visionattn.data.boxes import Boxes
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.tasks.detection.evaluation import measure

RECIPE = """\
task: detection
model: {name: biformer_tiny, detector: mask_rcnn}
data: {format: instances, root: here, classes: [a, b], image_size: 64, mean: [0.0], std: [1.0], instances: masks}
evaluate: {bootstrap: 20, max_objects: 100}
"""
WHOLE = slice(0, 48), slice(0, 64)


@dataclass(frozen=True)
class Shapes(Sample):
    """Objects with masks."""

    boxes: Boxes = field(default_factory=Boxes)

    def image(self, window=None) -> np.ndarray:
        return np.zeros((1, *self.size), np.uint8)

    def target(self, window=None) -> Boxes:
        return self.boxes if window is None else self.boxes.within(window)


def shapes(*corners: tuple[int, int], side: int = 10) -> Boxes:
    """Discs of this side, those of even numbers of class 0."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    xyxy = np.array([[x0, y0, x0 + side, y0 + side] for x0, y0 in corners], np.float32).reshape(-1, 4)
    masks = [x**2 + y**2 <= (side / 2) ** 2 for _ in corners]
    return Boxes(xyxy, np.arange(len(corners)) % 2, np.zeros(len(corners), bool), masks=masks)


def test_masks_are_measured_beside_boxes():
    """Found as they are; found with masks of whole boxes, whose IoU is that of a disc in its square."""
    samples = [
        Shapes(name, name, name, 1, (48, 64), boxes=shapes(*corners))
        for name, corners in (("one", [(3, 4), (30, 20), (59, 30)]), ("other", [(10, 10), (40, 9)]), ("none", []))
    ]
    spec = recipe.loads(RECIPE, "recipe")
    inside = [sample.boxes.within(WHOLE) for sample in samples]
    right = [replace(boxes, scores=np.full(len(boxes), 0.9, np.float32)) for boxes in inside]
    squares = [replace(boxes, masks=[np.ones_like(mask) for mask in boxes.masks]) for boxes in right]
    exact, coarse = (
        measure([Prediction(i, boxes, WHOLE) for i, boxes in enumerate(found)], samples, spec, "test").overall
        for found in (right, squares)
    )
    assert exact["map"] == exact["mask_map"] == 1
    assert coarse["map"] == 1
    assert coarse["mask_map_50"] == 1
    assert coarse["mask_map"] == pytest.approx(0.6, abs=0.1)  # IoU of 0.79: at six of ten thresholds
