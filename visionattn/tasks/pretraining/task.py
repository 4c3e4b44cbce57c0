"""The pretraining task: hidden pixels or common features, watched by signs of collapse and by probes.

What is random in a step (which cells are hidden) depends on the seed, the epoch and the item only.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import default_collate
from torchmetrics import CatMetric, MeanMetric

from visionattn.data import formats
from visionattn.data.loaders import default_workers, make_loader, seed_of, seeded
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Dataset, Sample
from visionattn.errors import UserError, listed
from visionattn.models.networks import arguments_of
from visionattn.models.pretrainers import MaskedPixels, Pretrainer, make_pretrainer
from visionattn.models.teacher import Teacher, feature_channels, make_teacher
from visionattn.report.evaluation import Evaluation
from visionattn.tasks import base
from visionattn.tasks.base import Task, predict_in_batches, refuse_names
from visionattn.tasks.pretraining.losses import VICReg, masked_error, of_cells
from visionattn.tasks.pretraining.metrics import collapsed, signs
from visionattn.tasks.pretraining.probe import Probe, trained_on
from visionattn.tasks.pretraining.recipe import Data, Recipe
from visionattn.tasks.pretraining.transforms import Crops, Views, Windows, hidden_cells
from visionattn.writers import Writer, table

__all__ = [
    "Pretraining",
    "Seen",
    "collate",
    "evaluation_set",
    "make",
    "open_writer",
    "predictions",
    "refuse_names",
    "refuse_other",
    "resolve",
    "training_set",
]

log = logging.getLogger(__name__)
collate = None  # torch's own
CALIBRATION = 1024  # whole images that statistics of batch norms are taken from
LARGEST_CELL, SMALLEST_CELL = 32, 4  # pixels
EPSILON = 1e-6


class Seen:
    """What a network makes of a window: features (D,), which numpy reads, and how hidden pixels were predicted.

    Attributes:
        error, of_mean: of the hidden pixels, and of predicting the mean; None where nothing is predicted.
        picture: (3, C, H, W) the window, what was seen of it, and it as it was predicted; of some windows.
    """

    def __init__(
        self, features: np.ndarray, item: int, error: float | None, of_mean: float | None, picture: np.ndarray | None
    ) -> None:
        self.features, self.item, self.error, self.of_mean, self.picture = features, item, error, of_mean, picture

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.features.astype(dtype or np.float32)


class Pretraining(Task):
    """A backbone that learns without labels.

    Args:
        network: a `Pretrainer`.
        loss: of two views, or None.
        teacher: whose features are learned, or None.
        cell, step: side of hidden cells, and what their grid is shifted by multiples of, in pixels.
        ratio: share that is hidden.
        target: "pixels", or "norm_patch".
        calibration: whole training images, for the statistics of batch norms.
        probe: makes the probe, or None.
        untrained: makes the same network with random weights.
    """

    def __init__(
        self,
        network: Pretrainer,
        loss: nn.Module | None,
        teacher: Teacher | None,
        cell: int,
        step: int,
        ratio: float,
        target: str,
        calibration: TorchDataset | None,
        probe: Callable[[], Probe] | None,
        untrained: Callable[[], Pretrainer],
        **task: Any,
    ) -> None:
        super().__init__(network, **task)
        self.network: Pretrainer = network
        self.masks, self.teacher = isinstance(network.objective, MaskedPixels), teacher
        self.facts = {"teacher": teacher.about} if teacher else {}
        self.loss, self.cell, self.step, self.ratio, self.target = loss, cell, step, ratio, target
        self.calibration, self.make_probe, self.untrained = calibration, probe, untrained
        self.probe = probe() if probe and calibration is not None else None
        self.probed, self.warned, self.baselines = dict[str, float](), set[str](), dict[str, dict[str, float]]()
        self.val_error, self.val_of_mean, self.val_features = MeanMetric(), MeanMetric(), CatMetric()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.loss is not None:
            both, places = (
                torch.cat([batch[k] for k in keys]) for keys in (("image", "other"), ("places", "other_places"))
            )
            views, maps = self(both)
            places = F.adaptive_avg_pool2d(places, tuple(maps.shape[1:3])).flatten(2).transpose(1, 2)
            loss = self.loss(*(x.chunk(2) for x in (views, maps.flatten(1, 2), places)))
            return self.log_loss(loss, batch, batch_idx)
        if self.teacher is not None:
            return self.log_loss(self.imitated(batch["image"]), batch, batch_idx)
        error, of_mean, _ = self.predicted(batch, self.train_spec.seed, self.current_epoch + 1)
        size = len(batch["image"])
        share = error.mean().detach() / of_mean.mean().clamp_min(EPSILON)
        self.log("train/ratio", share, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return self.log_loss(error.mean(), batch, batch_idx)

    def predicted(self, batch: dict[str, Tensor], *key: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image the error of its hidden pixels and that of the mean (B,), and it with these as predicted.

        key: numbers that decide, with the item's, what is hidden.
        """
        image = batch["image"]
        hidden = self.hidden(image.shape[2:], batch["item"].tolist(), *key).to(image.device)
        made = self(image, hidden=hidden)
        mean, std = of_cells(image, self.cell) if self.target == "norm_patch" else (0.0, 1.0)
        error, of_mean, count = masked_error(made, (image - mean) / std, hidden, batch["valid"])
        return error / (count + EPSILON), of_mean / (count + EPSILON), torch.where(hidden, made * std + mean, image)

    def hidden(self, size: Sequence[int], items: Sequence[int], *key: int) -> Tensor:
        """(B, 1, H, W) bool."""
        seeds = [seed_of(*key, item) for item in items]
        return hidden_cells((size[0], size[1]), self.cell, self.ratio, self.step, seeds)

    def imitated(self, images: Tensor) -> Tensor:
        """How far features are from the teacher's."""
        assert self.teacher is not None
        objective: Any = self.network.objective
        return objective.loss(*self(images), self.teacher.features(images))

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)
            if self.trainer.is_global_zero:
                log.info(self.teacher)
        if self.trainer.is_global_zero and (
            idle := [n for n, p in self.network.named_parameters() if not p.requires_grad]
        ):
            log.info(
                "not trained, since the objective does not reach it or model.freeze says so: %s", listed(idle, most=8)
            )

    def on_validation_epoch_start(self) -> None:
        assert self.calibration is not None
        batches = make_loader(self.calibration, self.trainer.datamodule.data.batch_size, 0)  # type: ignore[attr-defined]
        self.network.clean_up(batch["image"].to(self.device) for batch in batches)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if self.teacher is not None:
            self.val_error.update(self.imitated(batch["image"]), len(batch["image"]))
        if self.masks:
            error, of_mean, _ = self.predicted(batch, 0)
            self.val_error.update(error)
            self.val_of_mean.update(of_mean)
        with self.network.cleaned():
            self.val_features.update(self.network.encoder.pooled(batch["image"])[0].float())

    def on_validation_epoch_end(self) -> None:
        values = signs(self.val_features.compute())
        if self.loss is None:
            values["loss"] = self.val_error.compute().item()
        if self.masks:
            values["ratio"] = values["loss"] / max(self.val_of_mean.compute().item(), EPSILON)
        if self.loss is not None:
            values["epoch"] = float(self.current_epoch + 1)
        for metric in (self.val_error, self.val_of_mean, self.val_features):
            metric.reset()
        epochs = self.train_spec.epochs
        if self.probe and (self.current_epoch % self.probe.every == 0 or self.current_epoch == epochs - 1):
            self.probed = self.probe.of(self.network, self.device)
        self.log_dict({f"val/{name}": value for name, value in (values | self.probed).items()})
        for line in collapsed({**values}, (self.current_epoch + 1) / epochs):
            kind = line.split(":")[0]
            if kind not in self.warned and self.trainer.is_global_zero:
                log.warning("epoch %d: %s", self.current_epoch + 1, line)
            self.warned.add(kind)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["probed"] = self.probed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.probed = checkpoint["probed"]

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> list[Prediction]:
        """What is `Seen` in each window."""
        with self.network.cleaned():
            features = self.network.encoder.pooled(batch["image"])[0].float().cpu().numpy()
        count = len(features)
        errors: Any = [(None, None)] * count
        pictures: list[np.ndarray | None] = [None] * count
        if self.masks:
            error, of_mean, made = self.predicted(batch, 0)
            image = batch["image"]
            hidden = self.hidden(image.shape[2:], batch["item"].tolist(), 0).to(image.device)
            shown = torch.stack([image, image.masked_fill(hidden, 0.0), made], 1)
            errors = torch.stack([error, of_mean], 1).tolist()
            wanted = batch["shown"].tolist()
            pictures = [x.cpu().numpy() if want else None for x, want in zip(shown, wanted, strict=True)]
        items = zip(features, batch["item"].tolist(), errors, pictures, strict=True)
        seen = [Seen(x, item, pair[0], pair[1], picture) for x, item, pair, picture in items]
        return [Prediction(int(i), x) for i, x in zip(batch["index"], seen, strict=True)]

    def complete(self, evaluation: Evaluation) -> None:
        """The probe, beside what the same labels are worth without any pretraining."""
        if self.make_probe is None:
            return
        probe = self.probe or self.make_probe()
        values = probe.of(self.network, self.device)
        evaluation.overall |= values
        chosen = self.monitored.removeprefix("val/")
        evaluation.headline = chosen if chosen in values else evaluation.headline
        if not self.baselines:
            self.baselines = probe.baselines(self.untrained().to(self.device), self.device)
        evaluation.more["probe"] = {"this network": values} | self.baselines
        evaluation.more["probe_images"] = [len(probe.bank), len(probe.told)]


def resolve(spec: Recipe, dataset: Dataset) -> tuple[Recipe, Dataset]:
    """What the recipe leaves open, from the samples; provisional mean and std where these have not been read yet.

    Raises:
        UserError: the data set cannot be trained on.
    """
    data, objective = spec.data, spec.objective
    two = objective.name == "vicreg"
    scale = [1.0, 1.0] if data.resize == "none" and not two else [0.3, 1.0] if two else [0.67, 1.0]
    augment = data.augment.model_copy(
        update={
            "crop_scale": data.augment.crop_scale or scale,
            "jitter": (0.3 if two else 0.0) if data.augment.jitter is None else data.augment.jitter,
        }
    )
    data = data.model_copy(update={"augment": augment, **base.statistics(spec, dataset)})
    width = feature_channels(spec.model.teacher) if spec.model.teacher else objective.width
    size = objective.mask_size or _cell(min(data.side))
    if size >= min(data.side):
        raise UserError(
            f"objective.mask_size is {size}, but images have {min(data.side)} pixels: nothing would be seen"
        )
    spec = spec.model_copy(
        update={"data": data, "objective": objective.model_copy(update={"mask_size": size, "width": width})}
    )
    return spec, replace(dataset, warnings=[*dataset.warnings, *trained_on(spec, dataset)])


def _cell(side: int) -> int:
    """The largest power of two up to a sixth of an image's side, so that hidden pixels are 10 to 20 from seen ones."""
    cell = SMALLEST_CELL
    while 2 * cell <= min(side / 6, LARGEST_CELL):
        cell *= 2
    return cell


def make(spec: Recipe, dataset: Dataset | None = None) -> Pretraining:
    """The task of a resolved recipe: with its data to train it, without to use a checkpoint's weights.

    Raises:
        UserError: anything that cannot be trained.
    """
    data, objective = spec.data, spec.objective
    channels, unstarted = len(data.mean), {"pretrained": False, "checkpoint": None, "bands": None}

    def network_of(model: Any) -> Pretrainer:
        return make_pretrainer(model, channels, data.side, objective.name, objective.width)

    def untrained() -> Pretrainer:
        with seeded(spec.train.seed):
            return network_of(spec.model.model_copy(update=unstarted))

    network = network_of(spec.model)
    calibration, teacher = None, None
    if dataset:
        base.refuse_few_crops(data, dataset)
        train = dataset.splits["train"]
        calibration = Windows(train[:: max(1, len(train) // CALIBRATION)][:CALIBRATION], data)
        _rest_idle(network, channels, data.side)
        if spec.model.teacher:
            unit_range = formats.module_of(data).KIND.unit_range
            teacher = make_teacher(spec.model.teacher, (data.mean, data.std), unit_range=unit_range)
    cell, step = _grid(spec, network)
    default = (
        "loss"
        if objective.name == "mim"
        else "linear"
        if spec.probe
        else "epoch"
        if objective.name == "vicreg"
        else "loss"
    )
    return Pretraining(
        network,
        VICReg(objective.local) if objective.name == "vicreg" else None,
        teacher,
        cell=cell,
        step=step,
        ratio=objective.mask_ratio,
        target=objective.target,
        calibration=calibration,
        probe=(lambda: Probe(spec, dataset is None or bool(dataset.readings))) if spec.probe else None,
        untrained=untrained,
        optim=spec.optim,
        train=spec.train,
        frozen=spec.model.freeze if dataset else None,
        monitored=f"val/{spec.train.monitor or default}",
        names=[sample.name for sample in dataset.splits["train"]].__getitem__ if dataset else str,
    )


def _rest_idle(network: Pretrainer, channels: int, side: tuple[int, int]) -> None:
    """Parameters that the objective does not reach, such as what stands behind the last map, are not trained."""
    result = network.eval()(torch.randn(2, channels, *side))
    parts = [result] if isinstance(result, Tensor) else result
    torch.stack([part.square().mean() for part in parts]).sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is None and name != "objective.fill":
            parameter.requires_grad_(False)
        parameter.grad = None
    network.train()


def _grid(spec: Recipe, network: Pretrainer) -> tuple[int, int]:
    """Side of hidden cells, and the step of their shifts: of a network of one stride multiples of it."""
    cell, strides = spec.objective.mask_size or _cell(min(spec.data.side)), set(network.encoder.strides)
    if len(strides) > 1 or spec.objective.name == "vicreg":
        return cell, 1
    (stride,) = strides
    return max(stride, cell // stride * stride), stride


def training_set(dataset: Dataset, spec: Recipe) -> Crops:
    """Random crops, or two of each image."""
    kind = Views if spec.objective.name == "vicreg" else Crops
    return kind(dataset.splits["train"], spec.data, spec.train.seed)


def evaluation_set(samples: Sequence[Sample], data: Data) -> Windows:
    """Windows in order, without anything random."""
    return Windows(samples, data)


def predictions(task: Pretraining, samples: Sequence[Sample], spec: Recipe, fabric: Fabric) -> Iterator[Prediction]:
    """The features of unlabelled images, in order; those of several windows averaged."""
    data = spec.data
    workers = default_workers(samples) if data.workers is None else data.workers
    predicted = predict_in_batches(task, Windows(samples, data), default_collate, data.batch_size, workers, fabric)
    for index, windows in groupby(predicted, key=lambda prediction: prediction.index):
        parts = list(windows)
        error = next((part.error for part in parts if part.error), None)
        features = None if error else np.mean([np.asarray(part.value) for part in parts], axis=0)
        yield Prediction(index, features, error=error)


def open_writer(spec: Recipe, out: Path, polygons: bool = False) -> Writer:
    """What writes the last features of each image into a table."""
    if polygons:
        raise UserError("--polygons is for segmenters of scenes")
    with torch.device("meta"):
        model: Any = timm.create_model(spec.model.name, **arguments_of(spec.model, spec.data.side))
    count = model.head_hidden_size
    names = [f"f{k}" for k in range(1, count + 1)]
    return table.open(out, names, lambda prediction: [f"{value:.6g}" for value in np.asarray(prediction.value)])


def refuse_other(spec: Recipe, dataset: Dataset) -> None:
    """Raises UserError where images are not of the kind that the model was trained on."""
    if dataset.channels != len(spec.data.mean):
        raise UserError(f"images of {dataset.channels} channels, the model takes {len(spec.data.mean)}")


def class_names(spec: Recipe) -> list[str]:
    """There are none."""
    return []


def described(case: Sequence[Sample], parts: Sequence[Prediction], spec: Recipe) -> dict[str, Any]:
    """The features of an image."""
    return {"features": np.mean([np.asarray(part.value) for part in parts], axis=0)}
