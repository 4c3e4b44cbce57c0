"""What is written about a classifier on held-out images: the last step of `fit`, and `visionattn evaluate`.

A folder for each evaluated split holds metrics.json, predictions.csv (a row per image), mistakes.csv and
mistakes/*.png, the most confident mistakes.
"""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch import distributed as dist

from visionattn.data.datamodule import SplitDataModule
from visionattn.data.images import array_to_image, read_image
from visionattn.data.labelled import Split
from visionattn.recipe import ClassificationRecipe
from visionattn.tasks.base import Task
from visionattn.tasks.classification.metrics import evaluate_predictions, headline

__all__ = ["evaluate_split", "fresh_folder", "name_of"]

MISTAKES = 12
THUMBNAIL = 160  # pixels of the longer side


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` once all is written."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(out, ignore_errors=True)  # the same evaluation of an interrupted run
    partial.rename(out)


def evaluate_split(
    trainer: pl.Trainer,
    task: Task,
    data: SplitDataModule,
    split: str,
    spec: ClassificationRecipe,
    out: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Predict one split, each process its share; the first one writes the evaluation folder.

    Returns:
        the content of metrics.json.
    """
    probabilities = _gather(trainer.predict(task, data.loader(split)))
    images, classes = data.images.splits[split], data.images.classes
    labels = torch.as_tensor(images.labels)
    result = {"split": split, "samples": len(images), "multi_label": task.multi_label, "classes": classes}
    result |= {"headline": headline(task.multi_label), "tta": spec.evaluate.tta, **about}
    result |= evaluate_predictions(probabilities, labels, classes, spec.evaluate.bootstrap)
    result["overall"]["loss"] = _log_loss(probabilities, labels).item()
    if trainer.is_global_zero:
        _write(out, result, images, probabilities)
    return result


def _gather(batches: list[dict[str, Tensor]]) -> Tensor:
    """Probabilities in the split's order, from every process of a distributed run."""
    mine = tuple(torch.cat([batch[key].cpu() for batch in batches]) for key in ("index", "probabilities"))
    parts = [mine]
    if dist.is_initialized():
        parts = [mine] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    index, probabilities = (torch.cat(items) for items in zip(*parts, strict=True))
    return probabilities[index.argsort()]


def _write(out: Path, result: dict[str, Any], images: Split, probabilities: Tensor) -> None:
    classes = result["classes"]
    with fresh_folder(out) as partial:
        (partial / "mistakes").mkdir()
        (partial / "metrics.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        _write_predictions(partial / "predictions.csv", images, classes, probabilities)
        _write_mistakes(partial, images, classes, probabilities)


def _log_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return F.binary_cross_entropy(probabilities, labels)
    return F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)


def _write_predictions(path: Path, images: Split, classes: list[str], probabilities: Tensor) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label", "predicted", "correct", "confidence", *(f"p:{name}" for name in classes)])
        for name, label, row in zip(images.names, images.labels, probabilities.numpy(), strict=True):
            truth, guess = name_of(label, classes), name_of(row >= 0.5 if np.ndim(label) else row.argmax(), classes)
            confidence = "" if np.ndim(label) else f"{row.max():.6f}"
            writer.writerow([name, truth, guess, int(truth == guess), confidence, *(f"{p:.6f}" for p in row)])


def name_of(label: np.ndarray | int, classes: list[str]) -> str:
    """A class index as its name, a 0/1 vector as the names joined by ';'."""
    return ";".join(classes[i] for i in np.flatnonzero(label)) if np.ndim(label) else classes[label]


def _write_mistakes(folder: Path, images: Split, classes: list[str], probabilities: Tensor) -> None:
    """The images whose prediction is furthest from the truth, with what was believed instead."""
    belief = probabilities.numpy()
    if images.labels.ndim == 2:
        wrong = np.abs(belief - images.labels)
        worst, confidence = wrong.argmax(1), wrong.max(1)
        mistaken = confidence > 0.5
    else:
        worst, confidence = belief.argmax(1), belief.max(1)
        mistaken = worst != images.labels
    order = [i for i in np.argsort(-confidence, kind="stable") if mistaken[i]][:MISTAKES]
    with (folder / "mistakes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "name", "label", "predicted", "confidence", "p_label"])
        for rank, i in enumerate(order):
            _thumbnail(images, i).save(folder / "mistakes" / f"{rank:02d}.png")
            truth = name_of(images.labels[i], classes)
            if images.labels.ndim == 2:
                guess, p_label = name_of(belief[i] >= 0.5, classes), 1 - confidence[i]
            else:
                guess, p_label = classes[worst[i]], belief[i, images.labels[i]]
            row = [f"mistakes/{rank:02d}.png", images.names[i], truth, guess, f"{confidence[i]:.6f}", f"{p_label:.6f}"]
            writer.writerow(row)


def _thumbnail(images: Split, i: int) -> Image.Image:
    """A small picture for people: three or one channels, at most THUMBNAIL pixels, stretched if deeper than 8 bits."""
    stored = isinstance(images.images, np.ndarray)
    pixels = (array_to_image(images.images[i]) if stored else read_image(images.images[i])).float()
    pixels = pixels[:1] if len(pixels) == 2 else pixels[:3]
    top = 255.0 if pixels.max() > 1 else max(pixels.max().item(), 1e-6)
    array = (pixels / top * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
    scale = THUMBNAIL / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
