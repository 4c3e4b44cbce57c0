"""Measuring a trained classifier on labelled images: `visionattn evaluate`, and the last step of `fit`.

A folder is made for each evaluated split: metrics.json, predictions.csv (a row per image), mistakes.csv and
mistakes/*.png, the most confident mistakes.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch import distributed as dist

from visionattn import quiet, recipe
from visionattn.classification import ClassificationLoss, Classifier
from visionattn.data import Split, find_labelled
from visionattn.datamodule import ClassificationDataModule
from visionattn.errors import UserError
from visionattn.images import array_to_image, read_image
from visionattn.metrics import evaluate_predictions, headline
from visionattn.recipe import ClassificationRecipe
from visionattn.report import write_report
from visionattn.task import load_checkpoint, make_network

__all__ = ["Trained", "evaluate", "evaluate_split", "format_table", "load_trained", "name_of", "predictor"]

MISTAKES = 12
THUMBNAIL = 160  # pixels of the longer side


class Trained(NamedTuple):
    """A trained classifier and what it was trained by."""

    task: Classifier
    recipe: ClassificationRecipe
    checkpoint: Path
    epoch: int


def load_trained(path: Path) -> Trained:
    """The classifier of a run directory (its best checkpoint) or of a checkpoint file.

    Raises:
        UserError: neither a run nor a checkpoint of ours.
    """
    quiet.silence()
    file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: no checkpoints/best.ckpt in it; expected a run directory or a checkpoint file")
    checkpoint = load_checkpoint(file)
    if "visionattn" not in checkpoint:
        raise UserError(
            f"{file}: not a checkpoint of visionattn fit (use model.checkpoint in a recipe to start from weights)"
        )
    about = checkpoint["visionattn"]
    spec = recipe.loads(about["recipe"], name=str(file))
    start = spec.model.model_copy(update={"pretrained": False, "checkpoint": None})
    size = spec.data.image_size if isinstance(spec.data.image_size, list) else [spec.data.image_size] * 2
    classes = spec.data.classes
    task = Classifier(
        make_network(start, len(classes), spec.data.channels, (size[0], size[1])),
        ClassificationLoss("bce" if about["multi_label"] else "cross_entropy", len(classes)),
        classes,
        about["multi_label"],
        spec.evaluate.tta,
        optim=spec.optim,
        train=spec.train.model_copy(update={"grad_checkpointing": False}),
        freeze=None,
        monitored="val/loss",
        names=str,
        provenance=about,
    )
    task.load_state_dict(checkpoint["state_dict"])
    return Trained(task, spec, file, checkpoint["epoch"])


def predictor(spec: ClassificationRecipe, **options: Any) -> pl.Trainer:
    """A Lightning trainer that only predicts, on the best device there is."""
    return pl.Trainer(
        precision=spec.train.precision, logger=False, enable_checkpointing=False, enable_model_summary=False, **options
    )


def evaluate(model: Path, data: Path | None, split: str | None, out: Path | None) -> Path:
    """Evaluate a run or checkpoint on its own held-out images or on other labelled ones, and print the metrics.

    Args:
        model: run directory or checkpoint.
        data: other labelled images with the same classes: a folder of class folders (or of splits), .npz or .csv.
        split: the split to take; None: test where there is one, else val, else all.
        out: folder to make for the results; None: a new one in the run's evaluation/.

    Returns:
        the folder.
    """
    trained = load_trained(model)
    images = find_labelled(trained.recipe.data, data)
    if images.multi_label != trained.task.multi_label:
        kinds = {True: "several labels an image", False: "one class an image"}
        raise UserError(f"{data}: has {kinds[images.multi_label]}, the model gives {kinds[trained.task.multi_label]}")
    split = split or next(name for name in ("test", "val", "all") if name in images.splits)
    if split not in images.splits:
        raise UserError(f"--split {split}: the images have {', '.join(images.splits)}")
    out = out or _fresh((model if model.is_dir() else Path()) / "evaluation" / (data.stem if data else split))
    if out.exists():
        raise UserError(f"{out} exists; results are never overwritten: give another --out")
    about = {"checkpoint": str(trained.checkpoint), "epoch": trained.epoch, "data": str(data) if data else None}
    module = ClassificationDataModule(images, trained.recipe.data)
    trainer = predictor(trained.recipe)
    result = evaluate_split(trainer, trained.task, module, split, trained.recipe, out, about)
    print(f"\n{format_table([result])}\n\nresults: {out}")
    if model.is_dir():
        print(f"report: {write_report(model)}")
    return out


def _fresh(folder: Path) -> Path:
    taken = 1
    while folder.exists():
        taken += 1
        folder = folder.with_name(f"{folder.name.rsplit('-', 1)[0] if taken > 2 else folder.name}-{taken}")
    return folder


def evaluate_split(
    trainer: pl.Trainer,
    task: Classifier,
    data: ClassificationDataModule,
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
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "mistakes").mkdir(parents=True)
    (partial / "metrics.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    _write_predictions(partial / "predictions.csv", images, classes, probabilities)
    _write_mistakes(partial, images, classes, probabilities)
    shutil.rmtree(out, ignore_errors=True)  # the same evaluation of an interrupted run
    partial.rename(out)


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


def format_table(results: list[dict[str, Any]]) -> str:
    """The overall metrics, a column for each evaluated split."""
    names = list(dict.fromkeys(name for result in results for name in result["overall"]))
    lines = ["".join(f"{text:>22}" for text in ["", *(f"{r['split']} ({r['samples']} images)" for r in results)])]
    for name in names:
        cells = []
        for result in results:
            value, interval = result["overall"].get(name), result["interval"]
            text = "-" if value is None else f"{value:.4f}"
            if interval and interval["metric"] == name:
                text += f" [{interval['low']:.3f}, {interval['high']:.3f}]"
            cells.append(text)
        lines.append("".join(f"{text:>22}" for text in [name.replace("_", " "), *cells]))
    return "\n".join(lines)
