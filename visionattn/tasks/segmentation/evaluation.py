"""What is written about a segmenter on held-out images: the last step of `fit`, and `visionattn evaluate`.

A folder for each evaluated split holds metrics.json, cases.csv (a row per image, volume or scene), pictures.csv and
pictures/*.png, the worst and best cases by mean Dice.
"""

import csv
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import distributed as dist
from tqdm import tqdm

from visionattn.data.datamodule import SplitDataModule
from visionattn.data.sample import IGNORE, Item
from visionattn.data.survey import SECONDS_BEFORE_PROGRESS
from visionattn.recipe import SegmentationRecipe
from visionattn.report.gallery import case_picture, class_colors
from visionattn.tasks.base import Task
from visionattn.tasks.classification.evaluation import fresh_folder
from visionattn.tasks.segmentation.metrics import (
    MEASURES,
    calibration_error,
    measure_case,
    summarize,
    surfaces_available,
)

__all__ = ["assemble", "counted", "evaluate_split"]

PICTURES = 12  # worst cases, and as many of the best
NOUNS = {"image_mask": "image", "builtin": "image", "nifti": "volume", "dicom": "volume", "geotiff": "scene"}


def counted(spec: SegmentationRecipe) -> list[int]:
    """The classes that count in means over classes: all but those of `evaluate.leave_out`."""
    return [k for k, name in enumerate(spec.data.class_names) if name not in spec.evaluate.leave_out]


def headline(spec: SegmentationRecipe) -> str:
    """The metric that stands for a run."""
    monitor = spec.train.monitor
    return monitor if monitor not in (None, "loss") else "dice"


def evaluate_split(
    trainer: pl.Trainer,
    task: Task,
    data: SplitDataModule,
    split: str,
    spec: SegmentationRecipe,
    out: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Predict one split, each process its share; the first one measures and writes the evaluation folder.

    Returns:
        the content of metrics.json; nothing in the other processes.
    """
    parts = _gather([part for batch in trainer.predict(task, data.loader(split)) for part in batch])
    if not trainer.is_global_zero:
        return {}
    items, kept = data.images.splits[split].items, counted(spec)
    cases = Cases(items, parts, spec)
    with fresh_folder(out) as folder:
        result = {
            "task": "segmentation",
            "split": split,
            "samples": len(cases.names),
            "noun": NOUNS[spec.data.format],
        }
        result |= {"classes": spec.data.class_names, "headline": headline(spec), "tta": spec.evaluate.tta, **about}
        result |= cases.measured(kept)
        (folder / "metrics.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        cases.write_table(folder / "cases.csv", kept)
        cases.write_pictures(folder, kept)
    return result


def _gather(mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of every process of a distributed run."""
    if not dist.is_initialized():
        return mine
    everyone: list[list[dict[str, Any]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [part for parts in everyone for part in parts]


def assemble(size: tuple[int, int], parts: Sequence[dict[str, Any]]) -> np.ndarray:
    """The mask (H, W) uint8 of an image from the parts that `Segmenter.predict_step` returns."""
    mask = np.full(size, IGNORE, np.uint8)
    for part in parts:
        top, bottom, left, right = part["window"]
        values = np.frombuffer(zlib.decompress(part["mask"]), np.uint8)
        mask[top:bottom, left:right] = values.reshape(bottom - top, right - left)
    return mask


class Cases:
    """The predictions of a split, case by case, and what they measure.

    Args:
        items: of the split.
        parts: what `Segmenter.predict_step` returned for them.
    """

    def __init__(self, items: list[Item], parts: list[dict[str, Any]], spec: SegmentationRecipe) -> None:
        self.items, self.spec, self.classes = items, spec, spec.data.class_names
        self.parts: dict[int, list[dict[str, Any]]] = {}
        for part in parts:
            self.parts.setdefault(part["index"], []).append(part)
        self.members: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            self.members.setdefault(item.case, []).append(i)
        self.names = list(self.members)
        self.counts = np.zeros((len(self.names), len(self.classes), 3), np.int64)
        self.values = {name: np.full((len(self.names), len(self.classes)), np.nan) for name in MEASURES}
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)
        for c in tqdm(range(len(self.names)), "measuring", leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None):
            self._measure(c)

    def _measure(self, c: int) -> None:
        evaluate, members = self.spec.evaluate, self.members[self.names[c]]
        prediction = np.stack([self.prediction(i) for i in members])
        truth = np.stack([self.items[i].mask() for i in members])
        spacing = self.items[members[0]].spacing
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
        return assemble(self.items[i].size, self.parts[i])

    def measured(self, kept: list[int]) -> dict[str, Any]:
        """The content of metrics.json that is measured."""
        evaluate = self.spec.evaluate
        groups = [self.items[members[0]].group for members in self.members.values()]
        found = summarize(self.counts, self.values, groups, self.classes, kept, evaluate.bootstrap)
        bins = sum(part["bins"] for parts in self.parts.values() for part in parts)
        found["overall"]["calibration_error"] = calibration_error(bins)
        name = headline(self.spec)
        low_high = found["intervals"].get(name)
        level = {"level": 0.95, "resamples": evaluate.bootstrap, "groups": len(set(groups))}
        found["interval"] = {"metric": name, "low": low_high[0], "high": low_high[1], **level} if low_high else None
        surface = evaluate.surface and surfaces_available()
        return found | {
            "confusion": self.confusion.tolist(),
            "calibration": bins.tolist(),
            "colors": [color and "#{:02x}{:02x}{:02x}".format(*color) for color in class_colors(self.spec.data, kept)],
            "rules": {
                "empty": evaluate.empty,
                "left_out": [name for k, name in enumerate(self.classes) if k not in kept],
                "surface": surface,
                "tolerance": evaluate.tolerance if surface else None,
                "unit": "pixels" if len({*self.items[0].spacing}) == 1 and self.items[0].spacing[0] == 1 else "mm",
            },
        }

    def _means(self, kept: list[int]) -> dict[str, np.ndarray]:
        """Each measure (cases,), the mean over the classes that a case has; NaN where it has none."""
        found = {}
        for name, value in self.values.items():
            seen = np.isfinite(value[:, kept])
            total = np.where(seen, value[:, kept], 0).sum(1)
            found[name] = np.where(seen.any(1), total / np.maximum(seen.sum(1), 1), np.nan)
        return found

    def write_table(self, path: Path, kept: list[int]) -> None:
        """A row per case: means over its classes, then each measure of each class; empty where nothing is measured."""
        means = self._means(kept)
        shown = [name for name in MEASURES if np.isfinite(self.values[name]).any()]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = [f"{measure}:{name}" for measure in shown for name in self.classes]
            writer.writerow(["case", "group", *shown, *columns])
            for c, case in enumerate(self.names):
                cells = [means[measure][c] for measure in shown]
                cells += [self.values[measure][c, k] for measure in shown for k in range(len(self.classes))]
                group = self.items[self.members[case][0]].group
                writer.writerow([case, group, *("" if np.isnan(v) else f"{v:.6f}" for v in cells)])

    def write_pictures(self, folder: Path, kept: list[int]) -> None:
        """The worst and the best cases by their mean Dice, no case twice."""
        dice = self._means(kept)["dice"]
        order = [c for c in np.argsort(dice, kind="stable") if np.isfinite(dice[c])]
        worst = order[: min(PICTURES, -(-len(order) // 2))]
        best = [c for c in reversed(order[-PICTURES:]) if c not in worst]
        colors = class_colors(self.spec.data, kept)
        (folder / "pictures").mkdir()
        with (folder / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "kind", "case", "dice"])
            for kind, chosen in (("worst", worst), ("best", best)):
                for rank, c in enumerate(chosen):
                    members = self.members[self.names[c]]
                    picture = case_picture(
                        [self.items[i] for i in members], [self.prediction(i) for i in members], colors
                    )
                    name = f"pictures/{kind}-{rank:02d}.png"
                    picture.save(folder / name)
                    writer.writerow([name, kind, self.names[c], f"{dice[c]:.6f}"])
