"""What of a segmenter's output is explained: the logits of a class over a region, window by window of the image."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, Window, cases
from visionattn.errors import UserError
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.segmentation.recipe import Recipe
from visionattn.tasks.segmentation.task import Segmenter, counted
from visionattn.tasks.segmentation.transforms import factors, network_input
from visionattn.tasks.targets import Asked, Seen, box_of, class_of, mask_of

__all__ = ["chosen", "seen"]

WINDOWS = 64  # at most


def seen(task: Segmenter, sample: Sample, spec: Recipe, asked: Asked) -> list[Seen]:
    """Each window of the image that has something of the region, and the class asked for.

    Without a region it is where the class is predicted, or of what is predicted nowhere the whole image.
    """
    scaled = factors(sample.size, spec.data)
    cells = _cells(sample, spec, scaled, asked)
    windows = [window for window, _ in cells]
    images = [network_input(sample.image(window), spec.data, scaled) for window in windows]
    with torch.no_grad():
        logits = [task(image[None].to(task.device))[0].float().cpu() for image in images]
    regions: list[Tensor | None] = [None] * len(images)
    if (mask := mask_of(asked.region, sample.size)) is not None:
        regions = [_resized(mask[window], image.shape[1:]) for window, image in zip(windows, images, strict=True)]
    predicted = _predicted(logits, regions, counted(spec))
    k = class_of(asked, spec.data.class_names, predicted, None)
    whole = [_own(part[0], offsets, scaled) for part, (_, offsets) in zip(logits, cells, strict=True)]
    wanted = [part.argmax(0) == k if region is None else region for part, region in zip(logits, regions, strict=True)]
    own = [mine & region for mine, region in zip(whole, wanted, strict=True)]
    if mask is None and not any(map(torch.any, own)):
        own = whole
    name = spec.data.class_names[k]
    return [
        _seen(task, image, window, region, k, name)
        for image, window, region in zip(images, windows, own, strict=True)
        if region.any()
    ]


def chosen(
    evaluation: Evaluation, predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> dict[str, list[int]]:
    """Samples for the report: of the cases with the lowest and the highest Dice, of volumes a slice in the middle."""
    members, kinds = cases(samples), dict[str, list[int]]()
    for row in evaluation.tables["pictures.csv"]:
        own = members[row["case"]]
        kinds.setdefault(row["kind"], []).append(own[len(own) // 2])
    return kinds


def _own(like: Tensor, offsets: tuple[int, int], scaled: tuple[float, float]) -> Tensor:
    """(h, w) of a window, what is not the business of those before it."""
    top, left = (round(offset * factor) for offset, factor in zip(offsets, scaled, strict=True))
    own = torch.ones_like(like, dtype=torch.bool)
    own[:top], own[:, :left] = False, False
    return own


def _seen(task: Segmenter, image: Tensor, window: Window, region: Tensor, k: int, name: str) -> Seen:
    def logit(images: Tensor) -> Tensor:
        return (task(images)[:, k] * region.to(images)).sum((1, 2))

    def score(images: Tensor) -> Tensor:
        return (task(images).float().softmax(1)[:, k] * region.to(images)).sum((1, 2)) / region.sum()

    rows, columns = window
    place = float(rows.start), float(columns.start), float(rows.stop), float(columns.stop)
    return Seen(image, place, logit, score, name, region)


def _cells(
    sample: Sample, spec: Recipe, scaled: tuple[float, float], asked: Asked
) -> list[tuple[Window, tuple[int, int]]]:
    """Windows as large as the network is shown, those that touch the box of the region; and the rows and columns of
    each that are the business of the windows before it, since the last of a row or column is moved inside the image."""
    sides = [max(1, round(side / factor)) for side, factor in zip(spec.data.side, scaled, strict=True)]
    box = box_of(asked.region)
    top, left, bottom, right = box if box is not None else (0, 0, *sample.size)
    rows, columns = (
        [
            (
                slice(max(0, min(start, length - side)), min(start + side, length)),
                start - max(0, min(start, length - side)),
            )
            for start in range(0, length, side)
            if start < last and min(start + side, length) > first
        ]
        for length, side, first, last in zip(sample.size, sides, (top, left), (bottom, right), strict=True)
    )
    windows = [((y, x), (above, before)) for (y, above), (x, before) in itertools.product(rows, columns)]
    if not windows:
        size = f"{sample.size[0]} rows and {sample.size[1]} columns"
        raise UserError(f"region {asked.region} is outside of {sample.name}, which has {size}")
    if len(windows) > WINDOWS:
        raise UserError(
            f"{sample.name}: {len(windows)} windows of {sides[0]} x {sides[1]} pixels, at most {WINDOWS} are explained "
            "at once: give a smaller region, X,Y,X2,Y2"
        )
    return windows


def _resized(mask: np.ndarray, size: torch.Size) -> Tensor:
    """A region as the network sees it; what is smaller than a pixel there is one."""
    return F.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), tuple(size))[0] > 0


def _predicted(logits: list[Tensor], regions: list[Tensor | None], kept: list[int]) -> int:
    """The class that is predicted most often in the region, or of the kept ones in the image."""
    counts, likely = torch.zeros(len(logits[0])), torch.zeros(len(logits[0]))
    for part, region in zip(logits, regions, strict=True):
        inside = torch.ones_like(part[0], dtype=torch.bool) if region is None else region
        counts += torch.bincount(part.argmax(0)[inside], minlength=len(part))
        likely += part.softmax(0)[:, inside].sum(1)
    allowed = kept if regions[0] is None else list(range(len(counts)))
    return max(allowed, key=lambda k: (counts[k].item(), likely[k].item()))
