"""The built-in scenes of digits with boxes."""

import numpy as np

from visionattn.data import formats
from visionattn.data.formats.builtin_boxes import STROKE
from visionattn.tasks.detection.recipe import DATA


def test_boxes_are_around_the_strokes_and_some_scenes_are_empty():
    found = formats.find(DATA["builtin"](format="builtin"))
    assert len(found.samples) == 1250
    assert not found.problems
    counts = np.bincount([len(sample.target()) for sample in found.samples], minlength=5)
    assert (counts > 50).all()
    for sample in found.samples[:50]:
        image, boxes = sample.image()[0], sample.target()
        outside = image.copy()
        for left, top, right, bottom in boxes.xyxy.astype(int):
            part = image[top:bottom, left:right] >= STROKE
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            outside[top:bottom, left:right] = 0
        assert (outside < STROKE).all()
        assert ((boxes.labels >= 0) & (boxes.labels < 10)).all()
    assert len({sample.image().tobytes() for sample in found.samples}) == 1250
    part = found.samples[3].target((slice(0, 32), slice(0, 32)))
    assert len(part) <= len(found.samples[3].target())
