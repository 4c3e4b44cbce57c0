"""The detection task: one step for training and validation, views fused, scores chosen on validation."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch import distributed as dist

from visionattn import recipe as recipes
from visionattn.data import formats
from visionattn.data.boxes import Boxes
from visionattn.data.loaders import default_workers
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Dataset, Reading, Sample, Window
from visionattn.errors import UserError, listed, nearest
from visionattn.inference.fusion import fuse
from visionattn.inference.masks import pasted
from visionattn.inference.views import View, views
from visionattn.models.adapters import adapt
from visionattn.models.detectors import (
    DETECTORS,
    MISSED,
    Detector,
    Objects,
    make_detector,
    measured_levels,
    refuse_unusable,
)
from visionattn.models.networks import arguments_of, started
from visionattn.tasks import base
from visionattn.tasks.base import Task, predict_in_batches
from visionattn.tasks.detection.losses import DetectionLoss
from visionattn.tasks.detection.metrics import best_scores, coco, limit_of, match, overall
from visionattn.tasks.detection.recipe import Data, Recipe
from visionattn.tasks.detection.transforms import TrainingCrops, WholeImages, collate, factor_of, merged, tiles_of
from visionattn.writers import Writer, of_objects

__all__ = [
    "DetectorTask",
    "class_names",
    "collate",
    "detector_args",
    "evaluation_set",
    "make",
    "open_writer",
    "predictions",
    "refuse_names",
    "refuse_other",
    "resolve",
    "training_objects",
    "training_set",
    "unreached",
    "whole",
]

log = logging.getLogger(__name__)
LOGGED = ("map", "map_50", "map_75", "f1", "froc")  # after each epoch
LEAST_LIMIT = 100  # COCO's number of detections in an image
LOOKED_AT = 20  # images that are asked whether objects have masks
PROVED = 100  # images or tiles whose truth goes through the network's codes and the metric before training
FUSED = 0.55  # IoU from which detections of several views are of one object


class DetectorTask(Task):
    """A network that finds objects.

    Args:
        network: as `visionattn.models.detectors.Detector`.
        loss: of the network's losses by name.
        classes: names.
        rule: what makes a detection right, see `visionattn.tasks.detection.metrics`.
        score: least score of what is reported, of each class; None: chosen on validation.
        limit: most objects that are found in an image.
        tta: names of views whose detections are fused.
        scales: of the images in each view.

    Attributes:
        chosen: the scores with the best F1 of each class in the last validation.
    """

    evaluates_last = True

    def __init__(
        self,
        network: Detector,
        loss: nn.Module,
        classes: list[str],
        rule: float | Literal["centre"],
        score: list[float] | None,
        limit: int,
        tta: Sequence[str],
        scales: Sequence[float] = (1.0,),
        **task: Any,
    ) -> None:
        super().__init__(network, **task)
        self.loss, self.classes, self.rule, self.score, self.limit = loss, classes, rule, score, limit
        self.views, self.chosen = list(product(views(tta), scales)), score
        self._seen: list[_Seen] = []

    def forward(self, image: Tensor | Sequence[Tensor], **options: Any) -> Any:
        return self.network(image, **options)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.log_loss(self.loss(self(batch["image"], targets=batch["objects"])), batch, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        network: Any = self.network
        losses, found = network.measured(batch["image"], batch["objects"])
        found = self._in_native(batch, found if self._plain else self._fused(batch["image"]))
        for n, (index, boxes, truth) in enumerate(zip(batch["index"].tolist(), found, batch["truth"], strict=True)):
            known = truth and _boxes(truth.xyxy, truth.labels, ignore=truth.ignore)
            self._seen.append(_Seen(index, _window(batch, n), batch["whole"][n], boxes, known))
        self.log_validation_loss(self.loss(losses), len(found))

    def on_validation_epoch_end(self) -> None:
        """Every process measures what all of them have seen."""
        shares = [self._seen]
        if dist.is_initialized():
            shares = [[]] * dist.get_world_size()
            dist.all_gather_object(shares, self._seen)
        seen: dict[int, list[_Seen]] = {}
        for part in sorted((part for share in shares for part in share), key=lambda part: part.index):
            seen.setdefault(part.index, []).append(part)
        self._seen = []
        network: Any = self.network
        found = [
            merged([(part.window, part.found) for part in parts], parts[0].size, network.head.agnostic)
            for parts in seen.values()
        ]
        truths = [truth for parts in seen.values() for *_, truth in parts if truth is not None]
        values, _ = coco(found, truths, len(self.classes), limit_of(truths, self.limit))
        matchings = [match(*pair, len(self.classes), self.rule) for pair in zip(found, truths, strict=True)]
        self.chosen = self.score or best_scores(matchings, len(self.classes))
        values |= overall(matchings, self.chosen)
        known = {f"val/{name}": value for name in LOGGED if (value := values[name]) is not None}
        self.log_dict(known, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> list[Prediction]:
        """Everything that is found, however unsure."""
        found = self._in_native(batch, self._fused(batch["image"]))
        return [
            Prediction(int(index), boxes, _window(batch, n))
            for n, (index, boxes) in enumerate(zip(batch["index"], found, strict=True))
        ]

    def _fused(self, images: list[Tensor]) -> list[Any]:
        """What is found in each image; of several views their boxes, labels and scores together."""
        if self._plain:
            return self(images)
        network: Any = self.network
        seen = [self._viewed(images, *view) for view in self.views]
        fused = (fuse(of_image, FUSED, network.head.agnostic) for of_image in zip(*seen, strict=True))
        return [tuple(values[: self.limit] for values in found) for found in fused]

    @property
    def _plain(self) -> bool:
        """Whether images are looked at once, as they are."""
        return len(self.views) == 1 and self.views[0][1] == 1

    def _viewed(self, images: list[Tensor], view: View, scale: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = self([view.forth(_scaled(image, scale)) for image in images])
        results = []
        for one, image in zip(found, images, strict=True):
            height, width = _scaled_size(image, scale)
            back = one.xyxy.new_tensor([image.shape[-1] / width, image.shape[-2] / height] * 2)
            results.append((view.boxes_back(one.xyxy, (height, width)) * back, one.labels, one.scores))
        return results

    def _in_native(self, batch: dict[str, Any], found: Sequence[Any]) -> list[Boxes]:
        """In the pixels of the images as they are stored."""
        results = []
        for image, size, (xyxy, labels, scores, *shapes) in zip(batch["image"], batch["size"], found, strict=True):
            across, along = size[1] / image.shape[-1], size[0] / image.shape[-2]
            scale = torch.tensor([across, along, across, along], device=xyxy.device)
            boxes = _boxes(xyxy.float() * scale, labels, scores=scores.float())
            if shapes and shapes[0] is not None:
                boxes = replace(boxes, masks=pasted(shapes[0].cpu(), boxes.xyxy))
            results.append(boxes)
        return results

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The recipe inside says which scores validation has chosen."""
        super().on_save_checkpoint(checkpoint)
        if self.chosen and "recipe" in self.provenance:
            scores = {"evaluate.score": [float(f"{score:.6g}") for score in self.chosen]}
            text = recipes.dump(recipes.loads(self.provenance["recipe"], "recipe", scores))
            checkpoint["visionattn"] = self.provenance | {"recipe": text}


def _scaled_size(image: Tensor, scale: float) -> tuple[int, int]:
    return max(1, round(image.shape[-2] * scale)), max(1, round(image.shape[-1] * scale))


def _scaled(image: Tensor, scale: float) -> Tensor:
    """(C, h, w) by this factor."""
    size = _scaled_size(image, scale)
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


class _Seen(NamedTuple):
    """What is found in a tile of a validation image."""

    index: int  # type: ignore[assignment]  # in place of tuple.index, which nobody calls
    window: Window
    size: tuple[int, int]
    found: Boxes
    truth: Boxes | None


def _window(batch: dict[str, Any], n: int) -> Window:
    top, bottom, left, right = batch["window"][n]
    return slice(top, bottom), slice(left, right)


def _boxes(xyxy: Tensor, labels: Tensor, scores: Tensor | None = None, ignore: Tensor | None = None) -> Boxes:
    """On the CPU, as numpy has it."""
    return Boxes(
        xyxy.cpu().numpy(),
        labels.cpu().numpy(),
        np.zeros(len(xyxy), bool) if ignore is None else ignore.cpu().numpy(),
        None if scores is None else scores.cpu().numpy(),
    )


def refuse_names(spec: Recipe) -> None:
    """Raises UserError for a model, an optimizer or a detector that there is not, or that is not installed."""
    base.refuse_names(spec)
    refuse_unusable(spec.model.detector)


def resolve(spec: Recipe, dataset: Dataset) -> tuple[Recipe, Dataset]:
    """What the recipe leaves open, from the samples; provisional where these have not been read yet.

    Returns:
        the recipe with `data.classes`, `mean` and `std`, with the maps and queries of the detector and the number of
        objects that it may find, and the data set with what makes results doubtful.

    Raises:
        UserError: the data set cannot be trained on.
    """
    resolved = {"classes": dataset.classes, "instances": _instances(spec, dataset), **base.statistics(spec, dataset)}
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=resolved)})
    _refuse_scores(spec)
    if dataset.readings:
        _refuse_absent(dataset)
        _refuse_overlap(spec, dataset)
        dataset = replace(dataset, warnings=[*dataset.warnings, *unreached(spec, dataset)])
    return _with_levels(_with_queries(_with_limit(spec, dataset), dataset), dataset), dataset


def _instances(spec: Recipe, dataset: Dataset) -> str:
    """What the detector learns of objects: boxes, or masks.

    Raises:
        UserError: the other is asked for, or objects have no masks.
    """
    name, masks = spec.model.detector, DETECTORS[spec.model.detector].head.masks
    learned = "masks" if masks else "boxes"
    if spec.data.instances not in (None, learned):
        others = [other for other, kind in DETECTORS.items() if kind.head.masks != masks]
        raise UserError(
            f"data.instances is {spec.data.instances}, but {name} learns {learned}; others: {listed(others)}"
        )
    if masks and (spec.evaluate.tta or spec.evaluate.scales != [1.0]):
        key = "tta" if spec.evaluate.tta else "scales"
        given = getattr(spec.evaluate, key)
        raise UserError(f"evaluate.{key} is {given}, but the masks of {name} are not averaged over views")
    targets = (sample.target() for sample in dataset.splits["train"][:LOOKED_AT]) if masks else ()
    if any(len(target) and target.masks is None for target in targets):
        raise UserError(f"model.detector {name} learns masks, but the objects are boxes only: choose faster_rcnn")
    return learned


def _refuse_scores(spec: Recipe) -> None:
    scores = spec.evaluate.score
    if isinstance(scores, list) and len(scores) != len(spec.data.classes):
        raise UserError(f"evaluate.score has {len(scores)} scores, but there are {len(spec.data.classes)} classes")


def _refuse_absent(dataset: Dataset) -> None:
    """Classes without a training object, splits without any object."""
    counts = {name: sum(r.counts[:-1] for r in readings) for name, readings in dataset.readings.items()}
    for name, count in counts.items():
        if not np.any(count):
            raise UserError(f"data: no {name} image has an object")
    absent = [dataset.classes[k] for k in np.flatnonzero(counts["train"] == 0)]
    if absent:
        raise UserError(
            f"data: no training image has an object of {listed(absent)}; leave such classes out by data.classes, or "
            "draw another split by data.split_seed"
        )


def training_objects(readings: Sequence[Reading], data: Data) -> Objects:
    """The objects of all images together, as the network sees them without augmentation."""
    parts = [(reading.boxes, factor_of(reading.size, data)) for reading in readings if reading.boxes is not None]
    known = [(boxes[~boxes.ignore], factor) for boxes, factor in parts]
    xyxy = np.concatenate(
        [boxes.xyxy * np.float32(factor) for boxes, factor in known] or [np.zeros((0, 4), np.float32)]
    )
    labels = np.concatenate([boxes.labels for boxes, _ in known] or [np.zeros(0, np.int64)])
    return Objects(torch.from_numpy(xyxy), torch.from_numpy(labels), torch.zeros(len(labels), dtype=torch.bool))


def _levels(spec: Recipe, dataset: Dataset) -> tuple[Any, dict[int, float]]:
    args = spec.model.detector_args
    objects = training_objects(dataset.readings.get("train", ()), spec.data)
    return measured_levels(spec.model.detector, objects, args.finest, args.coarsest, args.sizes, args.ratios)


def _with_levels(spec: Recipe, dataset: Dataset) -> Recipe:
    levels, _ = _levels(spec, dataset)
    if dataset.readings:
        sizes, strides = (", ".join(f"{x:g}" for x in values) for values in (levels.sizes, levels.strides))
        log.info("%s: maps at strides %s for objects of %s pixels", spec.model.detector, strides, sizes)
    args = spec.model.detector_args.model_copy(update=levels._asdict())
    return spec.model_copy(update={"model": spec.model.model_copy(update={"detector_args": args})})


def _with_queries(spec: Recipe, dataset: Dataset) -> Recipe:
    """Raises UserError for fewer than an image has objects."""
    if not DETECTORS[spec.model.detector].queries:
        return spec
    densest, queries = _densest_of(dataset, spec.data), spec.model.detector_args.queries
    if queries is not None and queries < densest:
        raise UserError(f"model.detector_args.queries is {queries}, but the network sees {densest} objects at once")
    queries = queries or max(LEAST_LIMIT, 2 * densest)
    if dataset.readings:
        log.info("%s: %d queries, for at most %d objects at once", spec.model.detector, queries, densest)
    args = spec.model.detector_args.model_copy(update={"queries": queries})
    return spec.model_copy(update={"model": spec.model.model_copy(update={"detector_args": args})})


def unreached(spec: Recipe, dataset: Dataset) -> list[str]:
    """A line where the maps of the detector do not reach some training objects."""
    _, missed = _levels(spec, dataset)
    shares = [f"{share:.0%} of {dataset.classes[k]}" for k, share in missed.items() if share >= MISSED]
    if not shares:
        return []
    return [
        f"training objects are too small or of too odd a shape to be learned: {listed(shares)}; enlarge "
        "data.image_size, or see model.detector_args"
    ]


def _with_limit(spec: Recipe, dataset: Dataset) -> Recipe:
    limit, densest = spec.evaluate.max_objects, _densest_of(dataset, spec.data)
    if limit == "auto":
        limit = max(LEAST_LIMIT, 2 * densest)
    elif limit < densest:
        raise UserError(f"evaluate.max_objects is {limit}, but an image has {densest} objects")
    return spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"max_objects": limit})})


def _densest_of(dataset: Dataset, data: Data) -> int:
    """Most objects that the network sees at once of any image."""
    return max((_densest(reading, data) for part in dataset.readings.values() for reading in part), default=0)


def _densest(reading: Reading, data: Data) -> int:
    """Most objects that the network sees at once of an image."""
    if reading.boxes is None:
        return 0
    x, y = ((reading.boxes.xyxy[:, :2] + reading.boxes.xyxy[:, 2:]) / 2).T
    inside = (
        (y >= rows.start) & (y < rows.stop) & (x >= columns.start) & (x < columns.stop)
        for rows, columns in tiles_of(reading.size, data)
    )
    return max((int(there.sum()) for there in inside), default=0)


def _refuse_overlap(spec: Recipe, dataset: Dataset) -> None:
    """Raises UserError where tiles share less than the size of objects: those on a border would not be whole in any."""
    data, least = spec.data, min(spec.data.side)
    cut = any(len(tiles_of(r.size, data)) > 1 for part in dataset.readings.values() for r in part if r.sound)
    xyxy = training_objects(dataset.readings["train"], data).xyxy.numpy()
    if not cut or not len(xyxy):
        return
    largest = float(np.percentile((xyxy[:, 2:] - xyxy[:, :2]).max(1), 99))
    if largest > data.overlap * least:
        share = math.ceil(100 * largest / least) / 100
        mend = f"set data.overlap to {share:.2f}" if share <= 0.5 else "enlarge data.image_size"
        raise UserError(
            f"data.overlap {data.overlap:g} of tiles of {least} pixels is {data.overlap * least:.0f} pixels, but the "
            f"larger training objects have {largest:.0f}: {mend}"
        )


def make(spec: Recipe, dataset: Dataset | None = None) -> DetectorTask:
    """The task of a resolved recipe: with its data to train it, without to use a checkpoint's weights.

    Raises:
        UserError: anything that cannot be trained.
    """
    data, evaluate, limit = spec.data, spec.evaluate, spec.evaluate.max_objects
    assert isinstance(limit, int)  # once the recipe is resolved
    network = _network(spec, limit)
    if dataset:
        base.refuse_few_crops(data, dataset)
        _prove(network, spec, dataset)
    if dataset and spec.model.adapter:
        adapt(network, spec.model.adapter.lora.rank, spec.model.name, (len(data.mean), *data.side))
    score = evaluate.score
    return DetectorTask(
        network,
        DetectionLoss(spec.loss.class_weight, spec.loss.box_weight),
        data.classes,
        rule=evaluate.match,
        score=None if score == "auto" else score if isinstance(score, list) else [score] * len(data.classes),
        limit=limit,
        tta=evaluate.tta,
        scales=evaluate.scales,
        optim=spec.optim,
        train=spec.train,
        frozen=spec.model.freeze if dataset else None,
        monitored=f"val/{spec.train.monitor or 'map'}",
        names=[sample.name for sample in dataset.splits["train"]].__getitem__ if dataset else str,
    )


def _network(spec: Recipe, limit: int) -> Detector:
    model, data, args = spec.model, spec.data, detector_args(spec, limit)
    arguments = arguments_of(model, data.side)
    network = make_detector(
        model.name, model.detector, len(data.classes), len(data.mean), model.pretrained, arguments, args
    )
    return started(network, model, arguments)


def detector_args(spec: Recipe, limit: int) -> dict[str, Any]:
    """What a resolved recipe says of the detector, as `make_detector` takes it."""
    args = spec.model.detector_args.model_dump() | {"gamma": spec.loss.gamma, "limit": limit}
    return args | {"overlap": args.pop("nms")}


def _prove(network: Detector, spec: Recipe, dataset: Dataset) -> None:
    """The truth comes back from the codes that the network learns, and has an AP of 1.

    Raises:
        UserError: it does not, so that no training could succeed.
    """
    for name in ("train", "val"):
        readings = list(islice(_tiles(dataset.readings.get(name, ()), spec.data), PROVED))
        truths = [r.boxes for r in readings if r.boxes is not None]
        for reading in readings:
            objects = training_objects([reading], spec.data)
            error = network.head.round_trip(
                objects, [round(s * factor_of(reading.size, spec.data)) for s in reading.size]
            )
            if not error < 0.01:
                raise UserError(f"data: boxes of a {name} image cannot be coded, {error:.3g} pixels are lost")
        found = [replace(t[~t.ignore], scores=np.ones(int((~t.ignore).sum()), np.float32)) for t in truths]
        values, _ = coco(found, truths, len(spec.data.classes), limit_of(truths, network.head.limit))
        if truths and (values["map"] is None or values["map"] < 1 - 1e-6):
            raise UserError(f"data: the labels of {name} measured as predictions have an AP of {values['map']}, not 1")


def _tiles(readings: Sequence[Reading], data: Data) -> Iterator[Reading]:
    """What is looked at of each image, where it shows objects, as images of their own."""
    for reading in readings:
        if reading.boxes is None:
            continue
        for rows, columns in tiles_of(reading.size, data):
            boxes = reading.boxes.within((rows, columns))
            if not boxes.ignore.all():
                yield replace(reading, size=(rows.stop - rows.start, columns.stop - columns.start), boxes=boxes)


def training_set(dataset: Dataset, spec: Recipe) -> TrainingCrops:
    """Random crops with their objects."""
    return TrainingCrops(dataset.splits["train"], dataset.readings.get("train", ()), spec.data, spec.train.seed)


def evaluation_set(samples: Sequence[Sample], data: Data) -> WholeImages:
    """Images in order, without anything random."""
    return WholeImages(samples, data)


def reported(boxes: Boxes, spec: Recipe) -> Boxes:
    """Those that reach the score of their class."""
    assert boxes.scores is not None
    score = spec.evaluate.score
    least = np.full(len(spec.data.classes), 0.5 if score == "auto" else score)
    return boxes[boxes.scores >= least[boxes.labels]]


def whole(parts: Sequence[Prediction], sample: Sample, spec: Recipe) -> Boxes:
    """What is found in a sample, from the predictions of its tiles."""
    tiles = [(part.window, part.value) for part in parts if part.window and isinstance(part.value, Boxes)]
    return merged(tiles, sample.size, spec.model.detector_args.agnostic)


def predictions(task: DetectorTask, samples: Sequence[Sample], spec: Recipe, fabric: Fabric) -> Iterator[Prediction]:
    """The objects of unlabelled samples, in order: those that reach the scores chosen on validation."""
    data = spec.data
    workers = default_workers(samples) if data.workers is None else data.workers
    predicted = predict_in_batches(task, WholeImages(samples, data), collate, data.batch_size, workers, fabric)
    for index, tiles in groupby(predicted, key=lambda prediction: prediction.index):
        parts = list(tiles)
        if error := next((part.error for part in parts if part.error), None):
            yield Prediction(index, error=error)
        else:
            yield Prediction(index, reported(whole(parts, samples[index], spec), spec))


def open_writer(spec: Recipe, out: Path, polygons: bool = False, format: str | None = None) -> Writer:
    """What writes objects, in a format of `visionattn.writers.of_objects`.

    Without one a GeoPackage where polygons are asked for, else a table, with pictures where `out` is no file's name.

    Raises:
        UserError: there is no such format, or it cannot write there.
    """
    writer = format or ("gpkg" if polygons else formats.module_of(spec.data).KIND.writer.removeprefix("boxes_"))
    known = of_objects()
    if writer not in known:
        raise UserError(f"--format {writer}: unknown format{nearest(writer, known)}; there are {', '.join(known)}")
    if getattr(known[writer], "NEEDS_MASKS", False) and spec.data.instances != "masks":
        raise UserError(f"--format {writer} is for masks, but {spec.model.detector} finds boxes: choose another format")
    if format is None and writer == "csv" and not out.suffix:
        writer = "overlays"
    return known[writer].open(out, spec.data.classes)


def refuse_other(spec: Recipe, dataset: Dataset) -> None:
    """Raises UserError where labelled images are not of the kind that the model was trained on."""
    if dataset.channels != len(spec.data.mean):
        raise UserError(f"images of {dataset.channels} channels, the model takes {len(spec.data.mean)}")
    if dataset.classes != spec.data.classes:
        names = (listed(classes, most=8) for classes in (dataset.classes, spec.data.classes))
        raise UserError("images of the classes {}, the model knows {}".format(*names))


def class_names(spec: Recipe) -> list[str]:
    """In their order."""
    return spec.data.classes


def described(case: Sequence[Sample], parts: Sequence[Prediction], spec: Recipe) -> dict[str, Any]:
    """The objects of an image."""
    (part,) = parts
    return {"boxes": part.value}
