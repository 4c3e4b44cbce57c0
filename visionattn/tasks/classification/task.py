"""The classification task: one step for training and validation, and prediction with views averaged."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import default_collate

from visionattn.data.loaders import default_workers
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Dataset, Sample
from visionattn.data.survey import mean_std
from visionattn.errors import UserError, listed
from visionattn.inference.uncertainty import DISAGREEMENT, disagreement, distance_to, entropy, tempered
from visionattn.inference.views import views
from visionattn.models.adapters import adapt
from visionattn.models.networks import make_network, statistics_of, try_out
from visionattn.models.teacher import Teacher, make_teacher
from visionattn.tasks.base import Evidence, Task, predict_in_batches, refuse_in_vain, refuse_names
from visionattn.tasks.classification.check import too_small
from visionattn.tasks.classification.labels import (
    WIDEST,
    Labelling,
    MultiLabel,
    labelling_of,
    probability_cells,
    targets_of,
)
from visionattn.tasks.classification.losses import ClassificationLoss, distillation
from visionattn.tasks.classification.metrics import Scores, measurable
from visionattn.tasks.classification.recipe import Data, Recipe
from visionattn.tasks.classification.transforms import Images, Normalize, eval_transform, mix_transform, train_transform
from visionattn.tasks.classification.trust import doubts_of, set_of
from visionattn.writers import Writer, table

__all__ = [
    "Classifier",
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


class Classifier(Task):
    """A network that names what is in an image.

    Args:
        network: images (B, C, H, W) -> logits (B, K).
        loss: of logits and targets.
        labelling: one class an image, or several labels.
        tta: names of views that predictions are averaged over.
        turnable: images may be turned by a quarter.
        normalize: training images of the loaders -> of the network; None: the task is not trained.
        mix: mixup or cutmix of a training batch, or None.
        auxiliary: weight of the network's own loss, that `network(images, auxiliary=True)` gives besides the logits.
        teacher: whose logits are learned besides the labels, or None.
        teacher_weight: of these; 1 - teacher_weight of the labels.
        temperature: that both logits are divided by.
    """

    calls_whole = True

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        labelling: Labelling,
        tta: Sequence[str],
        turnable: bool,
        normalize: Normalize | None = None,
        mix: Any = None,
        auxiliary: float = 0.0,
        teacher: Teacher | None = None,
        teacher_weight: float = 0.5,
        temperature: float = 2.0,
        **task: Any,
    ) -> None:
        super().__init__(network, **task)
        self.loss, self.labelling, self.mix, self.auxiliary = loss, labelling, mix, auxiliary
        self.views, self.normalize = views(tta, turnable), normalize
        self.teacher, self.teacher_weight, self.temperature = teacher, teacher_weight, temperature
        self.facts = {"teacher": teacher.about} if teacher else {}
        self.val_scores = Scores(self.monitored in ("val/auroc", "val/average_precision"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.normalize is not None
        image, label = self.normalize(batch["image"]), batch["label"]
        if self.mix is not None:
            image, label = self.mix(image, label)
        logits, own = self(image, auxiliary=True) if self.auxiliary else (self(image), 0.0)
        loss = self.loss(logits, label)
        if self.teacher is not None:
            several = isinstance(self.labelling, MultiLabel)
            taught = distillation(logits, self.teacher.logits(image), self.temperature, several)
            loss = (1 - self.teacher_weight) * loss + self.teacher_weight * taught
        if self.auxiliary:
            self.log("train/auxiliary", own, on_step=False, on_epoch=True, batch_size=len(image), sync_dist=True)
            loss = loss + self.auxiliary * own
        return self.log_loss(loss, batch, batch_idx)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)
            if self.trainer.is_global_zero:
                log.info(self.teacher)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, size = self(batch["image"]), len(batch["image"])
        self.log_validation_loss(self.loss(logits, batch["label"]), size)
        self.val_scores.update(self.labelling.probabilities(logits), batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.val_scores.compute().items()})
        self.val_scores.reset()

    @property
    def looks(self) -> int:
        return len(self.views) * getattr(self.network, "count", 1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> list[Prediction]:
        """Probabilities (K,) of each image, averaged over networks and views, with what makes them doubtful."""
        probabilities, doubts = self._predicted(batch["image"])
        columns = {name: values.tolist() for name, values in doubts.items()}
        return [
            Prediction(int(index), row, doubts={name: values[i] for name, values in columns.items()})
            for i, (index, row) in enumerate(zip(batch["index"], probabilities.cpu().numpy(), strict=True))
        ]

    def _predicted(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Probabilities (B, K), and each of `doubts_of` (B,)."""
        several, fitted = isinstance(self.labelling, MultiLabel), self.fitted
        looks = [self.each(view.forth(image)) for view in self.views]
        seen = torch.stack([self.labelling.probabilities(logits) for each in looks for logits in each])
        probabilities = seen.mean(0)
        if fitted is not None:
            probabilities = tempered(probabilities, fitted.temperature, several)
        doubts: dict[str, Tensor] = {}
        if len(seen) > 1:
            told = entropy(probabilities, several), disagreement(seen, several)
            doubts |= dict(zip(DISAGREEMENT, told, strict=True))
        if self.bank is not None:
            doubts["distance"] = distance = distance_to(self.bank, self.features(image))
            if fitted is not None and fitted.unfamiliar is not None:
                doubts["unfamiliar"] = (distance > fitted.unfamiliar).int()
        return probabilities, doubts

    def features(self, image: Tensor) -> Tensor:
        """(B, D) what the classifier decides by, of each image."""
        network: Any = self.network
        return network.forward_head(network.forward_features(image), pre_logits=True)

    def indexed_features(self, batch: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """The features of each image of a batch, with its position."""
        return list(zip(batch["index"].tolist(), self.features(batch["image"]).cpu(), strict=True))

    def evidence(self, batch: dict[str, Any]) -> list[Evidence]:
        probabilities, doubts = self._predicted(batch["image"])
        distances = doubts["distance"].tolist() if "distance" in doubts else [None] * len(probabilities)
        rows = zip(batch["index"].tolist(), probabilities.cpu(), batch["label"].cpu(), distances, strict=True)
        return [Evidence(i, p[None], target[None], distance=distance) for i, p, target, distance in rows]


def resolve(spec: Recipe, dataset: Dataset) -> tuple[Recipe, Dataset]:
    """What the recipe leaves open, from the samples; provisional mean and std where these have not been read yet.

    Returns:
        the recipe with `data.channels`, `classes`, `multi_label`, `mean` and `std`, and the data set whose images have
        these channels.

    Raises:
        UserError: the data set cannot be trained on.
    """
    data, train = spec.data, dataset.splits["train"]
    several = np.ndim(train[0].label) == 1
    if data.multi_label is not None and data.multi_label != several:
        kind = "several labels" if several else "one class"
        raise UserError(f"data.multi_label is {data.multi_label}, but the images have {kind} each")
    _refuse_untrainable(spec, dataset, labelling_of(dataset.classes, several))
    refuse_in_vain(spec.evaluate, dataset.splits["val"])
    if dataset.readings and (small := too_small(dataset, spec)):
        raise UserError(f"data.resize is none, but smaller than data.image_size are: {listed(small)}")
    channels = data.channels or (dataset.channels if dataset.readings or not data.mean else len(data.mean))
    resolved: dict[str, Any] = {"mean": [0.0] * channels, "std": [1.0] * channels}
    if dataset.readings:
        mean, std = mean_std(dataset.readings["train"])
        resolved = {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
    resolved |= statistics_of(spec.model, channels, True) if data.mean is None else {}
    resolved |= {key: given for key in ("mean", "std") if (given := getattr(data, key)) is not None}
    for key, values in resolved.items():
        if len(values) != channels:
            raise UserError(f"data.{key} has {len(values)} values, but the images have {channels} channels")
    resolved |= {"channels": channels, "classes": dataset.classes, "multi_label": several}
    return spec.model_copy(update={"data": data.model_copy(update=resolved)}), dataset.with_channels(channels)


def _refuse_untrainable(spec: Recipe, dataset: Dataset, labelling: Labelling) -> None:
    """Raises UserError unless every class has training images and there are enough images to train and validate."""
    train, size, several = dataset.splits["train"], spec.data.batch_size, isinstance(labelling, MultiLabel)
    absent = np.flatnonzero(labelling.counts(train) == 0)
    if len(absent):
        raise UserError(f"data: no training image of {listed([dataset.classes[k] for k in absent])}")
    if len(train) < size:
        raise UserError(
            f"data.batch_size is {size}, but there are only {len(train)} training images: "
            f"set it to at most {len(train)}"
        )
    if spec.data.balanced_sampling and several:
        raise UserError(
            "data.balanced_sampling is true, but images have several labels; use loss.class_weights instead"
        )
    if spec.loss.name == "cross_entropy" and several:
        raise UserError("loss.name is cross_entropy, but the images have several labels each; allowed: bce, focal")
    monitored = spec.train.monitor or labelling.headline
    measured = measurable(targets_of(dataset.splits["val"]), len(dataset.classes)).get(monitored)
    if measured is not None and not measured.any():
        raise UserError(
            f"train.monitor: {monitored} cannot be measured: no class has validation images with and without it; "
            "monitor loss or accuracy, or choose another val split"
        )


def make(spec: Recipe, dataset: Dataset | None = None) -> Classifier:
    """The task of a resolved recipe: with its data to train it, without to use a checkpoint's weights.

    Raises:
        UserError: anything that cannot be trained.
    """
    data = spec.data
    labelling = labelling_of(data.classes, data.multi_label)
    network = make_network(spec.model, len(data.classes), data.channels, data.side)
    known = timm.get_pretrained_cfg(spec.model.name)
    settings: dict[str, Any] = {
        "labelling": labelling,
        "tta": spec.evaluate.tta,
        "turnable": data.side[0] == data.side[1] or known is None or not known.fixed_input_size,
        "optim": spec.optim,
        "train": spec.train,
        "monitored": f"val/{spec.train.monitor or labelling.headline}",
    }
    if dataset is None:
        loss = ClassificationLoss(labelling.loss, len(data.classes))
        task = Classifier(network, loss, **settings, frozen=None, names=str)
        task.fitted = spec.evaluate.fitted
        return task
    result = try_out(network, spec.model.name, (data.channels, *data.side))
    if tuple(result.shape) != (1, len(data.classes)):
        raise UserError(f"model {spec.model.name} gives {tuple(result.shape)} for an image: it is no classifier")
    if spec.loss.auxiliary and "auxiliary" not in inspect.signature(network.forward).parameters:
        raise UserError(
            f"loss.auxiliary is {spec.loss.auxiliary:g}, but {spec.model.name} has no loss of its own: leave it out, or"
            " use a model that has one, moh_*"
        )
    if (teacher := spec.model.teacher) is not None:
        settings["teacher"] = make_teacher(teacher, (data.mean, data.std), data.classes)
        settings |= {"teacher_weight": teacher.weight, "temperature": teacher.temperature}
    if spec.model.adapter:
        adapt(network, spec.model.adapter.lora.rank, spec.model.name, (data.channels, *data.side))
    return Classifier(
        network,
        _loss(spec, dataset, labelling),
        **settings,
        normalize=Normalize(data.mean, data.std),
        mix=mix_transform(data.augment, len(data.classes)),
        auxiliary=spec.loss.auxiliary,
        frozen=spec.model.freeze,
        names=[sample.name for sample in dataset.splits["train"]].__getitem__,
    )


def _loss(spec: Recipe, dataset: Dataset, labelling: Labelling) -> ClassificationLoss:
    """The loss with given weights, or balanced ones: inverse frequency, for bce negatives per positive."""
    name, given, weights = spec.loss.name or labelling.loss, spec.loss.class_weights, None
    if given == "balanced":
        train = dataset.splits["train"]
        counts = labelling.counts(train)
        balanced = (len(train) - counts) / counts if name == "bce" else counts.sum() / (len(counts) * counts)
        weights = torch.as_tensor(balanced, dtype=torch.float32)
    elif given is not None:
        if len(given) != len(labelling.classes):
            raise UserError(
                f"loss.class_weights has {len(given)} numbers, expected one for each of "
                f"{len(labelling.classes)} classes"
            )
        weights = torch.tensor(given)
    return ClassificationLoss(name, len(labelling.classes), spec.loss.label_smoothing, weights, spec.loss.gamma)


def training_set(dataset: Dataset, spec: Recipe) -> Images:
    """Images changed at random; raises UserError for an augmentation that they cannot take."""
    train, weights = dataset.splits["train"], None
    if spec.data.balanced_sampling:
        labels = np.array([sample.label for sample in train])
        weights = torch.from_numpy(1 / np.bincount(labels)[labels])
    return Images(train, train_transform(spec.data), spec.train.seed, weights, spec.data.augment.repeats)


def evaluation_set(samples: Sequence[Sample], data: Data) -> Images:
    """Images in order, without anything random."""
    return Images(samples, eval_transform(data))


def predictions(task: Classifier, samples: Sequence[Sample], spec: Recipe, fabric: Fabric) -> Iterator[Prediction]:
    """The probabilities of unlabelled images, in order."""
    data = spec.data
    workers = default_workers(samples) if data.workers is None else data.workers
    dataset = Images(samples, eval_transform(data))
    yield from predict_in_batches(task, dataset, default_collate, data.batch_size, workers, fabric)


def open_writer(spec: Recipe, out: Path, polygons: bool = False, looks: int = 1) -> Writer:
    """What writes the predicted class (labels joined by ;) and the probability of each class into a table.

    Of many classes the table has the likeliest ones, and an .npy file beside it the probabilities of all, row by row.
    Then come the set of classes that an image may be of, and what makes its prediction doubtful.
    """
    if polygons:
        raise UserError("--polygons is for segmenters of scenes")
    labelling, evaluate = labelling_of(spec.data.classes, spec.data.multi_label), spec.evaluate
    count, doubts = len(labelling.classes), doubts_of(evaluate, looks)

    def cells(prediction: Prediction) -> dict[str, Any]:
        probabilities = np.asarray(prediction.value)
        row: dict[str, Any] = {"predicted": labelling.name(labelling.decided(probabilities))}
        row |= probability_cells(labelling.classes, probabilities)
        if (may_be := set_of(probabilities, labelling.classes, evaluate)) is not None:
            row |= {"set": ";".join(may_be), "set_size": len(may_be)}
        return row | {name: f"{prediction.doubts[name]:.6g}" for name in doubts}

    blank = Prediction(0, np.zeros(count), doubts=dict.fromkeys(doubts, 0.0))
    return table.open(out, list(cells(blank)), lambda p: list(cells(p).values()), count if count > WIDEST else 0)


def refuse_other(spec: Recipe, dataset: Dataset) -> None:
    """Raises UserError where labelled images are not of the kind that the model was trained on."""
    several = np.ndim(dataset.samples[0].label) == 1
    if several != spec.data.multi_label:
        kinds = {True: "several labels an image", False: "one class an image"}
        raise UserError(f"the images have {kinds[several]}, the model gives {kinds[not several]}")


def class_names(spec: Recipe) -> list[str]:
    """In their order."""
    return spec.data.classes


def described(case: Sequence[Sample], parts: Sequence[Prediction], spec: Recipe) -> dict[str, Any]:
    """The label and the probabilities of an image, with how doubtful they are, as plain data."""
    labelling = labelling_of(spec.data.classes, spec.data.multi_label)
    (prediction,) = parts
    probabilities = np.asarray(prediction.value)
    by_name = dict(zip(labelling.classes, probabilities.tolist(), strict=True))
    return {
        "label": labelling.name(labelling.decided(probabilities)),
        "probabilities": by_name,
        "set": set_of(probabilities, labelling.classes, spec.evaluate),
        "doubts": prediction.doubts,
    }
