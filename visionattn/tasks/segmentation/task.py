"""The segmentation task: one step for training and validation, prediction by windows with views averaged."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from visionattn.backbones.encoder_decoder import EncoderDecoder
from visionattn.data import formats
from visionattn.data.colors import class_colors
from visionattn.data.labels import MaskCode
from visionattn.data.loaders import default_workers
from visionattn.data.prediction import PackedMask, Prediction
from visionattn.data.sample import IGNORE, Dataset, Sample, Window, cases, unit_range
from visionattn.errors import UserError, listed
from visionattn.files import Unwritable
from visionattn.inference.sliding import predict_windows, slide, strips
from visionattn.inference.uncertainty import entropy, tempered
from visionattn.inference.views import views
from visionattn.models.adapters import adapt
from visionattn.models.networks import arguments_of, refuse_unknown, started
from visionattn.models.segmenters import DECODERS, make_segmenter
from visionattn.tasks import base
from visionattn.tasks.base import Evidence, Task, predict_in_batches
from visionattn.tasks.segmentation.losses import balanced_weights, make_loss
from visionattn.tasks.segmentation.metrics import CaseCounts, calibration, surfaces_available
from visionattn.tasks.segmentation.recipe import Data, Recipe
from visionattn.tasks.segmentation.transforms import TrainingCrops, WholeImages, collate
from visionattn.tasks.segmentation.trust import PIXELS, bounds_of, counts_by_belief, doubts_of, missed
from visionattn.writers import Writer

__all__ = [
    "Segmenter",
    "collate",
    "counted",
    "evaluation_set",
    "make",
    "open_writer",
    "predictions",
    "refuse_names",
    "refuse_other",
    "resolve",
    "training_set",
]

MULTIPLE = 32  # sides of a resized batch
NO_SURFACES = (
    "HD95 and normalised surface distance are not measured, since MONAI is not installed: "
    "pip install 'visionattn[medical]', or set evaluate.surface=false"
)


class Segmenter(Task):
    """A network that names the class of every pixel.

    Args:
        network: `forward` gives logits (B, classes, H, W) at input size, `forward_deep` a list of such.
        loss: of logits, or of the list that `forward_deep` gives, and masks.
        classes: names.
        kept: classes that count in means.
        window: (height, width) that larger images are cut into.
        overlap: share of a window that the next one covers again.
        tta: names of views that predictions are averaged over.
        turnable: images may be turned by a quarter.
        cases: the case of each validation image.
        empty: rule for empty classes, see `visionattn.tasks.segmentation.metrics`.
        deep: supervise every output.
        multi_scale: factors, one of which each training batch is resized by.
    """

    evaluates_last = True

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        classes: list[str],
        kept: list[int],
        window: tuple[int, int],
        overlap: float,
        tta: Sequence[str],
        turnable: bool,
        cases: list[int],
        empty: str,
        deep: bool,
        multi_scale: list[float],
        **task: Any,
    ) -> None:
        super().__init__(network, **task)
        self.loss, self.classes, self.window, self.overlap = loss, classes, window, overlap
        self.views, self.cases, self.deep, self.multi_scale = views(tta, turnable), cases, deep, multi_scale
        self.val_counts = CaseCounts(max(cases, default=-1) + 1, len(classes), kept, empty)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, mask = self._rescaled(batch["image"], batch["mask"])
        return self.log_loss(self.loss(self(image, deep=True) if self.deep else self(image), mask), batch, batch_idx)

    def _rescaled(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if not self.multi_scale:
            return image, mask
        factor = self.multi_scale[int(torch.randint(len(self.multi_scale), (1,)))]
        size = [max(1, round(side * factor / MULTIPLE)) * MULTIPLE for side in image.shape[2:]]
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
        return image, F.interpolate(mask[:, None].double(), size, mode="nearest-exact")[:, 0].long()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        losses = []
        parts = zip(self.probabilities(batch), batch["mask"], batch["index"].tolist(), strict=True)
        for probabilities, mask, index in parts:
            losses.append(self.loss(probabilities.clamp_min(1e-7).log()[None], mask[None]))
            self.val_counts.update(probabilities.argmax(0), mask, self.cases[index])
        self.log_validation_loss(torch.stack(losses).mean(), len(losses))

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.val_counts.compute().items()})
        self.val_counts.reset()

    @property
    def looks(self) -> int:
        return len(self.views) * getattr(self.network, "count", 1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> list[Prediction]:
        """The mask of each part, with `bins` (see `calibration`) where there is a truth, and doubts where wanted."""
        predictions = []
        for i, (probabilities, doubts) in enumerate(map(self.trusted, self.looked(batch))):
            top, bottom, left, right = batch["window"][i]
            mask = PackedMask(probabilities.argmax(0).to(torch.uint8).cpu().numpy())
            known: dict[str, Any] = {}
            if "mask" in batch:
                truth = batch["mask"][i]
                known["bins"] = calibration(probabilities, truth).cpu().numpy()
                known |= {"missed": missed(probabilities, truth, bounds)} if (bounds := bounds_of(self.fitted)) else {}
            window = slice(top, bottom), slice(left, right)
            predictions.append(Prediction(int(batch["index"][i]), mask, window, doubts=doubts, **known))
        return predictions

    def trusted(self, looked: Tensor) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Of what `looked` gives of an image: the probabilities (classes, H, W), and each doubt (H, W)."""
        probabilities = looked[: len(self.classes)]
        if self.fitted is not None:
            probabilities = tempered(probabilities, self.fitted.temperature, False, dim=0)
        if not self.doubting:
            return probabilities, {}
        maps = [entropy(probabilities, several=False, dim=0), *([looked[-1]] if self.looks > 1 else [])]
        maps += [(probabilities[k] >= threshold).float() for k, threshold in bounds_of(self.fitted)]
        names = doubts_of(self.classes, self.fitted, self.looks)
        return probabilities, {name: values.cpu().numpy() for name, values in zip(names, maps, strict=True)}

    def evidence(self, batch: dict[str, Any]) -> list[Evidence]:
        """Of each part up to PIXELS labelled pixels, drawn, and how probable those of each class are held."""
        found = []
        for index, looked, mask in zip(batch["index"].tolist(), self.looked(batch), batch["mask"], strict=True):
            probabilities = self.trusted(looked)[0].flatten(1).T.cpu()
            labelled = (mask.flatten().cpu() != IGNORE).nonzero()[:, 0]
            counts = counts_by_belief(probabilities[labelled], mask.flatten().cpu()[labelled])
            drawn = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(index))[:PIXELS]
            kept = labelled[drawn]
            found.append(Evidence(index, probabilities[kept], mask.flatten().cpu()[kept].long(), counts))
        return found

    def probabilities(self, batch: dict[str, Any]) -> list[Tensor]:
        """Of each part of a batch (see `transforms.WholeImages`): (classes, H, W) in native pixels."""
        return [self.trusted(looked)[0] for looked in self.looked(batch)]

    def looked(self, batch: dict[str, Any]) -> list[Tensor]:
        """What `averaged` gives of each part of a batch, in native pixels."""
        images: list[Tensor] = batch["image"]
        if len({image.shape for image in images}) == 1 and self._fits(images[0]):
            maps = list(self.averaged(torch.stack(images)))
        else:
            maps = [self._whole(image) for image in images]
        return [_native(*part) for part in zip(maps, batch["extent"], batch["inner"], strict=True)]

    def _fits(self, image: Tensor) -> bool:
        return all(side <= limit for side, limit in zip(image.shape[1:], self.window, strict=True))

    def _whole(self, image: Tensor) -> Tensor:
        """Probabilities (classes, h, w) of an image of any size."""
        if self._fits(image):
            return self.averaged(image[None])[0]
        return predict_windows(self.averaged, image, self.window, self.overlap, more=self.doubting)

    def averaged(self, image: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) of images (B, C, H, W), averaged over networks and views.

        Where doubts are wanted a plane follows, of what those that were averaged disagree on.
        """
        seen = (view.back(x.float().softmax(1)) for view in self.views for x in self.each(view.forth(image)))
        total, doubt = torch.zeros(()), torch.zeros(())
        for probabilities in seen:  # one by one, since a stack of them takes memory
            total = total.to(image.device) + probabilities / self.looks
            if self.doubting:
                doubt = doubt.to(image.device) - entropy(probabilities, several=False) / self.looks
        if not self.doubting:
            return total
        return torch.cat([total, (doubt + entropy(total, several=False)).clamp_min(0)[:, None]], 1)


def _native(probabilities: Tensor, extent: tuple[int, int], inner: list[int]) -> Tensor:
    if tuple(probabilities.shape[1:]) != tuple(extent):
        probabilities = F.interpolate(probabilities[None], tuple(extent), mode="bilinear")[0]
    top, bottom, left, right = inner
    return probabilities[:, top:bottom, left:right]


def counted(spec: Recipe) -> list[int]:
    """The classes that count in means over classes: all but those of `evaluate.leave_out`."""
    return [k for k, name in enumerate(spec.data.class_names) if name not in spec.evaluate.leave_out]


def refuse_names(spec: Recipe) -> None:
    """Raises UserError for a model, an optimizer or a decoder that there is not."""
    base.refuse_names(spec)
    if spec.model.decoder is not None:
        where = f"visionattn list --decoders: {', '.join(DECODERS)}"
        refuse_unknown("model.decoder", spec.model.decoder, DECODERS, where)


def resolve(spec: Recipe, dataset: Dataset) -> tuple[Recipe, Dataset]:
    """What the recipe leaves open, from the samples; provisional mean and std where these have not been read yet.

    Returns:
        the recipe with `data.classes` as a list, `mean` and `std`, and the data set with what makes results doubtful.

    Raises:
        UserError: the data set cannot be trained on.
    """
    base.refuse_in_vain(spec.evaluate, dataset.splits["val"])
    data = spec.data.model_copy(update={"classes": dataset.classes, **base.statistics(spec, dataset)})
    if dataset.readings:
        dataset = replace(dataset, warnings=[*dataset.warnings, *_doubts(spec, dataset)])
    return spec.model_copy(update={"data": data}), dataset


def _refuse_untrainable(spec: Recipe, dataset: Dataset) -> None:
    base.refuse_few_crops(spec.data, dataset)
    if dataset.readings and not _pixels(dataset).any():
        raise UserError("data: no training mask has a labelled pixel")


def _pixels(dataset: Dataset) -> np.ndarray:
    """(classes,) labelled pixels of each class in training."""
    return np.sum([reading.counts[:-1] for reading in dataset.readings["train"]], axis=0)


def _doubts(spec: Recipe, dataset: Dataset) -> list[str]:
    absent = np.flatnonzero(_pixels(dataset) == 0)
    texts = [f"no training mask has a pixel of {listed([dataset.classes[k] for k in absent])}"] if len(absent) else []
    return texts + ([NO_SURFACES] if spec.evaluate.surface and not surfaces_available() else [])


def make(spec: Recipe, dataset: Dataset | None = None) -> Segmenter:
    """The task of a resolved recipe: with its data to train it, without to use a checkpoint's weights.

    Raises:
        UserError: anything that cannot be trained.
    """
    data = spec.data
    network = _network(spec, len(data.class_names), len(data.mean))
    known = timm.get_pretrained_cfg(spec.model.name)
    heads = network.get_classifier()
    deep = len(heads) > 1 if spec.loss.deep is None else spec.loss.deep
    for head in () if deep else heads[1:]:  # which nothing trains
        head.requires_grad_(False)
    if dataset:
        _refuse_untrainable(spec, dataset)
    if dataset and spec.model.adapter:
        adapt(network, spec.model.adapter.lora.rank, spec.model.name, (len(data.mean), *data.side))
    validated = dataset.splits["val"] if dataset else []
    order = {case: n for n, case in enumerate(cases(validated))}
    task = Segmenter(
        network,
        _loss(spec, dataset) if dataset else nn.Identity(),
        data.class_names,
        kept=counted(spec),
        window=data.side,
        overlap=spec.evaluate.overlap,
        tta=spec.evaluate.tta,
        turnable=data.side[0] == data.side[1] or known is None or not known.fixed_input_size,
        cases=[order[sample.case] for sample in validated],
        empty=spec.evaluate.empty,
        deep=deep,
        multi_scale=data.augment.multi_scale,
        optim=spec.optim,
        train=spec.train,
        frozen=spec.model.freeze if dataset else None,
        monitored=f"val/{spec.train.monitor or 'dice'}",
        names=[sample.name for sample in dataset.splits["train"]].__getitem__ if dataset else str,
    )
    task.fitted = None if dataset else spec.evaluate.fitted
    return task


def _network(spec: Recipe, classes: int, channels: int) -> EncoderDecoder:
    """The encoder with its decoder, or a whole segmenter of timm's registry."""
    model = spec.model
    arguments = arguments_of(model, spec.data.side)
    network = make_segmenter(
        model.name, model.decoder, classes, channels, model.pretrained, arguments, model.decoder_args
    )
    return started(network, model, arguments)


def _loss(spec: Recipe, dataset: Dataset) -> nn.Module:
    """The loss of the recipe; balanced weights are 1 as long as the masks have not been read."""
    weights = spec.loss.class_weights
    if weights == "balanced":
        weights = balanced_weights(_pixels(dataset).tolist()) if dataset.readings else None
    settings = {name: getattr(spec.loss, name) for name in ("ce_weight", "dice_weight", "gamma", "alpha")}
    return make_loss(spec.loss.name, len(dataset.classes), weights, **settings)


def training_set(dataset: Dataset, spec: Recipe) -> TrainingCrops:
    """Random crops with their masks."""
    return TrainingCrops(dataset.splits["train"], dataset.readings.get("train", ()), spec.data, spec.train.seed)


def evaluation_set(samples: Sequence[Sample], data: Data) -> WholeImages:
    """Images in order, large ones in parts, without anything random."""
    return WholeImages(samples, data)


def predictions(task: Segmenter, samples: Sequence[Sample], spec: Recipe, fabric: Fabric) -> Iterator[Prediction]:
    """The masks of unlabelled samples in order: scenes by bands of rows, all else in batches of parts."""
    if samples[0].windowed:
        for index, sample in enumerate(samples):
            try:
                yield from _scene(task, sample, spec, fabric, index)
            except Unwritable:
                raise
            except UserError as error:
                yield Prediction(index, error=str(error))
        return
    data = spec.data
    workers = default_workers(samples) if data.workers is None else data.workers
    yield from predict_in_batches(task, WholeImages(samples, data), collate, data.batch_size, workers, fabric)


def _scene(task: Segmenter, scene: Sample, spec: Recipe, fabric: Fabric, index: int) -> Iterator[Prediction]:
    """Windows of finished rows, with class numbers and these classes' probabilities in per cent (h, w) uint8."""
    data = spec.data
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (data.mean, data.std))

    def read(window: Window) -> np.ndarray | None:
        image = (unit_range(scene.image(window)) - mean) / std
        missing = np.isnan(image)
        return None if missing.all() else np.nan_to_num(image, copy=False, nan=0.0) if missing.any() else image

    def averaged(images: Tensor) -> Tensor:
        with fabric.autocast():
            return task.averaged(images)

    planes = len(data.class_names) + task.doubting
    for strip in strips(scene.size[1], 4 * planes * data.side[0]):
        bands = slide(
            averaged,
            read,
            scene.size,
            len(data.class_names),
            data.side,
            spec.evaluate.overlap,
            data.batch_size,
            strip,
            fabric.device,
            more=task.doubting,
        )
        with closing(bands):  # whose reading ends before an error closes what it reads
            for rows, looked in bands:
                probabilities, doubts = task.trusted(looked)
                confidence, numbers = probabilities.max(0)
                percent = (100 * confidence).round_().to(torch.uint8)
                yield Prediction(
                    index, numbers.to(torch.uint8).cpu().numpy(), (rows, strip), percent.cpu().numpy(), doubts=doubts
                )


def open_writer(
    spec: Recipe,
    out: Path,
    polygons: bool = False,
    class_numbers: bool = False,
    looks: int = 1,
    uncertainty: bool = False,
) -> Writer:
    """What writes masks in the format that the samples came in, with the values that the recipe's own masks have.

    Args:
        uncertainty: maps of what makes them doubtful too, of predictions that are means of so many `looks`.

    Raises:
        UserError: it cannot write there, or no polygons.
    """
    module = importlib.import_module(f"visionattn.writers.{formats.module_of(spec.data).KIND.writer}")
    colors = class_colors(spec.data, counted(spec))
    maps = doubts_of(spec.data.class_names, spec.evaluate.fitted, looks) if uncertainty else []
    return module.open(out, MaskCode.of(spec.data, class_numbers), colors, spec.evaluate.leave_out, polygons, maps)


def refuse_other(spec: Recipe, dataset: Dataset) -> None:
    """Raises UserError where labelled images are not of the kind that the model was trained on."""
    if dataset.channels != len(spec.data.mean):
        raise UserError(f"images of {dataset.channels} channels, the model takes {len(spec.data.mean)}")


def class_names(spec: Recipe) -> list[str]:
    """In their order."""
    return spec.data.class_names


def described(case: Sequence[Sample], parts: Sequence[Prediction], spec: Recipe) -> dict[str, Any]:
    """The mask (H, W) of an image or scene, or (slices, H, W) of a volume, and maps of what makes it doubtful."""
    masks = [np.full(sample.size, IGNORE, np.uint8) for sample in case]
    maps: dict[str, list[np.ndarray]] = {}
    for part in parts:
        masks[part.index][part.window or ()] = np.asarray(part.value)
        for name, values in part.doubts.items():
            planes = maps.setdefault(name, [np.zeros(sample.size, np.float32) for sample in case])
            planes[part.index][part.window or ()] = values
    values = {name: _together(planes) for name, planes in maps.items()}
    return {"mask": _together(masks), "doubts": values}


def _together(planes: Sequence[np.ndarray]) -> np.ndarray:
    return planes[0] if len(planes) == 1 else np.stack(planes)
