"""`visionattn predict`: probabilities of any number of images, streamed into a table; masks by `segpredict`."""

import csv
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from visionattn.data.images import image_files, listed, read_image
from visionattn.data.loaders import default_workers
from visionattn.errors import UserError
from visionattn.recipe import ClassificationRecipe
from visionattn.runs.evaluate import load_trained, predictor
from visionattn.tasks.classification.evaluation import name_of
from visionattn.tasks.classification.transforms import eval_transform

__all__ = ["predict"]


def predict(model: Path, images: list[Path], out: Path, polygons: bool = False) -> int:
    """Write a row for each image: path, the predicted class (labels joined by ';'), and a probability for each class.
    With a segmenter, write a mask for each image (see `visionattn.segpredict`).

    Images are read as they are needed, so memory does not grow with their number. The table appears whole, at the end.

    Args:
        model: run directory or checkpoint.
        images: files and folders (searched for images).
        out: the .csv to write; with a segmenter the folder to make.
        polygons: with a segmenter of scenes, write polygons too.

    Returns:
        the number of images that could not be read; they are named on stderr and have a row without probabilities.

    Raises:
        UserError: `out` exists or its folder does not, a path is missing, or there is no image at all.
    """
    if out.exists():
        raise UserError(f"{out} exists; predictions are never overwritten: give another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
    missing = [str(path) for path in images if not path.exists()]
    if missing:
        raise UserError(f"no such file or folder: {listed(missing)}")
    trained = load_trained(model)
    if trained.recipe.task == "segmentation":
        from visionattn.tasks.segmentation.predict import predict_masks

        return predict_masks(trained.task, trained.recipe, images, out, polygons)
    if polygons:
        raise UserError("--polygons is for segmenters of scenes")
    if next(image_files(images), None) is None:
        raise UserError(f"no images in {', '.join(map(str, images))}")
    writer = _TableWriter(out, trained.recipe.data.classes, trained.task.multi_label)
    workers = trained.recipe.data.workers
    workers = default_workers(images) if workers is None else workers
    batches = DataLoader(_Batches(images, trained.recipe), batch_size=None, num_workers=workers)
    predictor(trained.recipe, callbacks=[writer]).predict(trained.task, batches, return_predictions=False)
    print(f"{writer.read} images predicted, {writer.unread} unreadable: {out}")
    return writer.unread


class _Batches(IterableDataset):
    """Batches of images in order; of n workers each makes every n-th batch, so the order holds for any n."""

    def __init__(self, images: list[Path], spec: ClassificationRecipe) -> None:
        self.images, self.size, self.channels = images, spec.data.batch_size, spec.data.channels
        self.transform = eval_transform(spec.data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        files = image_files(self.images)
        for number, paths in enumerate(iter(lambda: list(islice(files, self.size)), [])):
            if number % step == first:
                yield self._batch(paths)

    def _batch(self, paths: list[Path]) -> dict[str, Any]:
        images, errors = [], {}
        for path in paths:
            try:
                images.append(self.transform(read_image(path, self.channels)))
            except UserError as error:
                errors[str(path)] = str(error)
        stacked = torch.stack(images) if images else torch.empty(0, self.channels, 32, 32)
        return {"image": stacked, "paths": [str(path) for path in paths], "errors": errors}


class _TableWriter(pl.Callback):
    def __init__(self, out: Path, classes: list[str], multi_label: bool) -> None:
        self.out, self.classes, self.multi_label = out, classes, multi_label
        self.partial = out.with_name(out.name + ".partial")
        self.read = self.unread = 0

    def on_predict_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.file = self.partial.open("w", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["path", "predicted", *(f"p:{name}" for name in self.classes)])

    def on_predict_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        probabilities = iter(outputs["probabilities"].cpu().numpy())
        for path in batch["paths"]:
            if path in batch["errors"]:
                self.unread += 1
                print(f"visionattn: {batch['errors'][path]}", file=sys.stderr)
                self.rows.writerow([path, "", *("" for _ in self.classes)])
            else:
                self.read += 1
                row = next(probabilities)
                guess = name_of(row >= 0.5 if self.multi_label else row.argmax(), self.classes)
                self.rows.writerow([path, guess, *(f"{p:.6f}" for p in row)])

    def on_predict_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.file.close()
        os.replace(self.partial, self.out)
