"""What is measured of a segmenter on held-out images.

Tables: cases.csv (a row per image, volume or scene), pictures.csv and pictures/*.png, the worst and best cases by mean
Dice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data import formats
from visionattn.data.colors import class_colors
from visionattn.data.prediction import Prediction
from visionattn.data.sample import IGNORE, Sample, cases
from visionattn.progress import progress
from visionattn.report.evaluation import Evaluation
from visionattn.report.gallery import case_picture
from visionattn.tasks.segmentation.metrics import (
    MEASURES,
    calibration_error,
    measure_case,
    summarize,
    surfaces_available,
)
from visionattn.tasks.segmentation.recipe import Recipe
from visionattn.tasks.segmentation.task import counted
from visionattn.tasks.segmentation.trust import bounds_of

__all__ = ["measure"]

PICTURES = 12  # worst cases, and as many of the best


def measure(predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe, split: str) -> Evaluation:
    """Everything that is reported about the predictions of a split, parts of images in any order."""
    kept = counted(spec)
    measured = _Cases(predictions, samples, spec)
    groups = [samples[members[0]].group for members in measured.members.values()]
    resamples = spec.evaluate.bootstrap
    summary = summarize(measured.counts, measured.values, groups, measured.classes, kept, resamples)
    bins = np.sum([np.asarray(prediction.bins) for prediction in predictions], axis=0)
    summary["overall"]["calibration_error"] = calibration_error(bins)
    surface = spec.evaluate.surface and surfaces_available()
    monitor = spec.train.monitor
    pictures, rows = measured.pictures(kept)
    return Evaluation(
        task=spec.task,
        split=split,
        noun=formats.module_of(spec.data).KIND.noun,
        samples=len(measured.members),
        classes=measured.classes,
        headline="dice" if monitor in (None, "loss") else monitor,
        **summary,
        more={
            "confusion": measured.confusion.tolist(),
            "calibration": bins.tolist(),
            "colors": [color and "#{:02x}{:02x}{:02x}".format(*color) for color in class_colors(spec.data, kept)],
            "rules": {
                "empty": spec.evaluate.empty,
                "left_out": [name for k, name in enumerate(measured.classes) if k not in kept],
                "surface": surface,
                "tolerance": spec.evaluate.tolerance if surface else None,
                "unit": samples[0].unit,
            },
            "slices": len(samples[0].spacing) == 3,
            "bootstrap": {"resamples": resamples, "groups": len(set(groups))},
        }
        | _trust(predictions, samples, spec),
        tables={"cases.csv": measured.table(kept), "pictures.csv": rows},
        pictures=pictures,
    )


def _trust(predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe) -> dict[str, Any]:
    """What was fitted, and the share of each class that its threshold misses here, in the mean over cases."""
    fitted = spec.evaluate.fitted
    if fitted is None:
        return {}
    trust: dict[str, Any] = {"fitted": fitted.model_dump()}
    counts: dict[str, np.ndarray] = {}
    for prediction in predictions:
        if prediction.missed is not None:
            case = samples[prediction.index].case
            counts[case] = counts.get(case, 0) + prediction.missed
    if counts:
        of_cases = np.array(list(counts.values()))
        has = of_cases[..., 1] > 0
        shares = np.where(has, of_cases[..., 0] / np.maximum(of_cases[..., 1], 1), 0).sum(0)
        known = {k for k, _ in bounds_of(fitted)}
        trust["missed"] = {
            name: float(shares[k] / n)
            for k, (name, n) in enumerate(zip(spec.data.class_names, has.sum(0), strict=True))
            if n and k in known
        }
        trust["promised"] = spec.evaluate.conformal
    return trust


class _Cases:
    """The predictions of a split, case by case, and what they measure."""

    def __init__(self, predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe) -> None:
        self.samples, self.spec, self.classes = samples, spec, spec.data.class_names
        self.parts: dict[int, list[Prediction]] = {}
        for prediction in predictions:
            self.parts.setdefault(prediction.index, []).append(prediction)
        self.members = cases(samples)
        self.counts = np.zeros((len(self.members), len(self.classes), 3), np.int64)
        self.values = {name: np.full((len(self.members), len(self.classes)), np.nan) for name in MEASURES}
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)
        for c, members in enumerate(progress(self.members.values(), "measuring", len(self.members))):
            self._measure(c, members)

    def _measure(self, c: int, members: list[int]) -> None:
        evaluate = self.spec.evaluate
        prediction = np.stack([self.prediction(i) for i in members])
        truth = np.stack([self.samples[i].target() for i in members])
        spacing = self.samples[members[0]].spacing
        if len(spacing) == 2:
            prediction, truth = prediction[0], truth[0]
        tolerance = evaluate.tolerance if evaluate.surface else None
        counts, values = measure_case(prediction, truth, spacing, len(self.classes), evaluate.empty, tolerance)
        self.counts[c] = counts
        for name, value in values.items():
            self.values[name][c] = value
        labelled, width = truth != IGNORE, len(self.classes)
        pairs = truth[labelled] * width + prediction[labelled]
        self.confusion += np.bincount(pairs, minlength=width**2).reshape(width, width)

    def prediction(self, i: int) -> np.ndarray:
        """The mask (H, W) uint8 of a sample, put together from its parts."""
        mask = np.full(self.samples[i].size, IGNORE, np.uint8)
        for part in self.parts[i]:
            mask[part.window] = np.asarray(part.value)
        return mask

    def _means(self, kept: list[int]) -> dict[str, np.ndarray]:
        """Each measure (cases,), the mean over the classes that a case has; NaN where it has none."""
        means = {}
        for name, value in self.values.items():
            seen = np.isfinite(value[:, kept])
            total = np.where(seen, value[:, kept], 0).sum(1)
            means[name] = np.where(seen.any(1), total / np.maximum(seen.sum(1), 1), np.nan)
        return means

    def table(self, kept: list[int]) -> Iterator[dict[str, Any]]:
        """A row per case: means over its classes, then each measure of each class; empty where nothing is measured."""
        means = self._means(kept)
        shown = [name for name in MEASURES if np.isfinite(self.values[name]).any()]
        for c, (case, members) in enumerate(self.members.items()):
            cells = {measure: means[measure][c] for measure in shown}
            cells |= {f"{m}:{name}": self.values[m][c, k] for m in shown for k, name in enumerate(self.classes)}
            texts = {key: "" if np.isnan(value) else f"{value:.6f}" for key, value in cells.items()}
            yield {"case": case, "group": self.samples[members[0]].group} | texts

    def pictures(self, kept: list[int]) -> tuple[dict[str, Image.Image], list[dict[str, Any]]]:
        """The worst and the best cases by their mean Dice, no case twice, and a row about each picture."""
        dice, names = self._means(kept)["dice"], list(self.members)
        order = [c for c in np.argsort(dice, kind="stable") if np.isfinite(dice[c])]
        worst = order[: min(PICTURES, -(-len(order) // 2))]
        best = [c for c in reversed(order[-PICTURES:]) if c not in worst]
        colors = class_colors(self.spec.data, kept)
        pictures, rows = {}, []
        for kind, chosen in (("worst", worst), ("best", best)):
            for rank, c in enumerate(chosen):
                members = self.members[names[c]]
                file = f"pictures/{kind}-{rank:02d}.png"
                masks = [self.prediction(i) for i in members]
                pictures[file] = case_picture([self.samples[i] for i in members], masks, colors)
                rows.append({"file": file, "kind": kind, "case": names[c], "dice": f"{dice[c]:.6f}"})
        return pictures, rows
