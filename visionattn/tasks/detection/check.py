"""What `visionattn check` says of images with boxes, beside what it says of all data."""

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Dataset, Reading
from visionattn.errors import listed
from visionattn.tasks.detection.recipe import Recipe
from visionattn.tasks.detection.task import unreached
from visionattn.tasks.detection.transforms import factor_of

__all__ = ["findings"]

SMALL = 4  # pixels of the shorter side as the network sees it
ODD = 5  # of a longer side, in shorter ones
FEW = 10  # objects of a class in validation
SAME = 0.9  # IoU of two boxes that are the same object


def findings(dataset: Dataset, spec: Recipe) -> tuple[list[list[str]], list[str], list[str]]:
    """Rows of the table (a title and a text for each split; the first is the heading), problems and notes."""
    readings = dataset.readings
    counts = {name: np.stack([reading.counts for reading in part]) for name, part in readings.items()}
    rows = [["class: objects (images)", *counts]]
    for k, title in enumerate(dataset.classes):
        rows.append([title, *(f"{n[:, k].sum():,} ({(n[:, k] > 0).sum():,})" for n in counts.values())])
    rows.append(["ignored", *(f"{n[:, -1].sum():,} ({(n[:, -1] > 0).sum():,})" for n in counts.values())])
    rows.append(["without an object", *(f"{(n[:, :-1].sum(1) == 0).sum():,}" for n in counts.values())])
    objects = [n[:, :-1].sum(1) for n in counts.values()]
    rows.append(["objects in an image, median and most", *(f"{np.median(n):.0f}, {n.max():,}" for n in objects)])
    rows.append(["size in pixels, 5, 50 and 95 %", *(_sizes(part) for part in readings.values())])
    notes = [*_rare(dataset, counts), *unreached(spec, dataset)]
    for name, part in readings.items():
        notes += _worth_a_note(name, dataset, part, spec)
    return rows, _absent(dataset, counts), notes


def _sizes(readings: Sequence[Reading]) -> str:
    sizes = np.concatenate([np.sqrt(r.boxes.areas[~r.boxes.ignore]) for r in readings if r.boxes is not None] or [[]])
    return ", ".join(f"{size:.0f}" for size in np.quantile(sizes, [0.05, 0.5, 0.95])) if len(sizes) else "-"


def _absent(dataset: Dataset, counts: dict[str, np.ndarray]) -> list[str]:
    absent = np.flatnonzero(counts["train"][:, :-1].sum(0) == 0)
    return [f"no train image has an object of {listed([dataset.classes[k] for k in absent])}"] if len(absent) else []


def _rare(dataset: Dataset, counts: dict[str, np.ndarray]) -> list[str]:
    found = {dataset.classes[k]: int(n) for k, n in enumerate(counts["val"][:, :-1].sum(0)) if n < FEW}
    texts = [f"{name} ({count})" for name, count in found.items()]
    return (
        [f"classes with fewer than {FEW} objects in val, whose results mean little: {listed(texts)}"] if texts else []
    )


def _worth_a_note(name: str, dataset: Dataset, readings: Sequence[Reading], spec: Recipe) -> list[str]:
    """Boxes over the border, of a few pixels, long ones, and the same object twice."""
    cut, small, odd, twice = list[str](), list[str](), list[str](), list[str]()
    for sample, reading in zip(dataset.splits[name], readings, strict=True):
        if reading.boxes is None:
            continue
        boxes = reading.boxes[~reading.boxes.ignore]
        sides = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
        factor = factor_of(reading.size, spec.data)
        for texts, which in (
            (cut, ((boxes.xyxy < 0) | (boxes.xyxy > [*reading.size[::-1], *reading.size[::-1]])).any(1)),
            (small, (sides * factor).min(1, initial=np.inf) < SMALL),
            (odd, sides.max(1, initial=0) > ODD * sides.min(1, initial=np.inf)),
            (twice, _doubled(boxes)),
        ):
            texts += [f"{sample.name} ({which.sum()})"] if which.any() else []
    messages = {
        "images have boxes over their border, which are clipped": cut,
        f"images have boxes of less than {SMALL} pixels as the network sees them": small,
        f"images have boxes that are {ODD} times as long as wide": odd,
        f"images have two boxes of a class at one place (IoU above {SAME})": twice,
    }
    return [f"{len(found)} {name} {text}: {listed(found, most=8)}" for text, found in messages.items() if found]


def _doubled(boxes: Boxes) -> np.ndarray:
    """(N,) which box is that of an object before it."""
    xyxy = torch.from_numpy(boxes.xyxy)
    same = (box_iou(xyxy, xyxy).numpy() > SAME) & (boxes.labels[:, None] == boxes.labels)
    return np.tril(same, -1).any(1)
