"""The segmentation task: one step for training and validation, prediction by windows with views averaged."""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from visionattn import recipe
from visionattn.data.datamodule import SegmentationDataModule
from visionattn.data.masked import SegmentationImages, find_labelled, prepare
from visionattn.errors import UserError
from visionattn.inference.sliding import predict_windows
from visionattn.models.segmenters import make_segmenter
from visionattn.recipe import SegmentationRecipe
from visionattn.tasks.base import Task, own_statistics, start_from
from visionattn.tasks.segmentation.evaluation import counted, evaluate_split
from visionattn.tasks.segmentation.losses import balanced_weights, make_loss
from visionattn.tasks.segmentation.metrics import CaseCounts, calibration, surfaces_available
from visionattn.tasks.segmentation.transforms import side_of

__all__ = ["Segmenter", "build", "evaluate_split", "labelled", "restore"]

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
        cases: the case of each validation image.
        empty: rule for empty classes, see `visionattn.segmetrics`.
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
        tta: list[str],
        cases: list[int],
        empty: str,
        deep: bool,
        multi_scale: list[float],
        **task: Any,
    ) -> None:
        super().__init__(network, **task)
        self.loss, self.classes, self.window, self.overlap = loss, classes, window, overlap
        self.tta, self.cases, self.deep, self.multi_scale = tta, cases, deep, multi_scale
        self.val_counts = CaseCounts(max(cases, default=-1) + 1, len(classes), kept, empty)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, mask = self._rescaled(batch["image"], batch["mask"])
        loss = self.loss(self.network.forward_deep(image) if self.deep else self(image), mask)
        self.check_finite(loss, batch, batch_idx)
        size = len(image)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def _rescaled(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if not self.multi_scale:
            return image, mask
        factor = self.multi_scale[int(torch.randint(len(self.multi_scale), (1,)))]
        size = [max(1, round(side * factor / MULTIPLE)) * MULTIPLE for side in image.shape[2:]]
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
        return image, F.interpolate(mask[:, None].double(), size, mode="nearest-exact")[:, 0].long()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        found = self.probabilities(batch)
        parts = zip(found, batch["mask"], batch["index"].tolist(), strict=True)
        losses = []
        for probabilities, mask, index in parts:
            losses.append(self.loss(probabilities.clamp_min(1e-7).log()[None], mask[None]))
            self.val_counts.update(probabilities.argmax(0), mask, self.cases[index])
        self.log("val/loss", torch.stack(losses).mean(), prog_bar=True, batch_size=len(found), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.val_counts.compute().items()})
        self.val_counts.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Of each part its `index`, `window`, packed `mask`, and `bins` (see `calibration`) where there is a truth."""
        parts = []
        for i, probabilities in enumerate(self.probabilities(batch)):
            part = {"index": int(batch["index"][i]), "window": batch["window"][i]}
            part["mask"] = zlib.compress(probabilities.argmax(0).to(torch.uint8).cpu().numpy().tobytes(), 1)
            if "mask" in batch:
                part["bins"] = calibration(probabilities, batch["mask"][i]).cpu().numpy()
            parts.append(part)
        return parts

    def probabilities(self, batch: dict[str, Any]) -> list[Tensor]:
        """Of each part of a batch (see `visionattn.crops.WholeImages`): (classes, H, W) in native pixels."""
        images: list[Tensor] = batch["image"]
        if len({image.shape for image in images}) == 1 and self._fits(images[0]):
            found = self.averaged(torch.stack(images))
        else:
            found = [self._whole(image) for image in images]
        return [_native(*part) for part in zip(found, batch["extent"], batch["inner"], strict=True)]

    def _fits(self, image: Tensor) -> bool:
        return all(side <= limit for side, limit in zip(image.shape[1:], self.window, strict=True))

    def _whole(self, image: Tensor) -> Tensor:
        """Probabilities (classes, h, w) of an image of any size."""
        if self._fits(image):
            return self.averaged(image[None])[0]
        return predict_windows(self.averaged, image, self.window, self.overlap)

    def averaged(self, image: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) of images (B, C, H, W), averaged over the views."""
        views = [back(self(forth(image)).float().softmax(1)) for forth, back in _views(self.tta)]
        return torch.stack(views).mean(0) if len(views) > 1 else views[0]


def _native(probabilities: Tensor, extent: tuple[int, int], inner: list[int]) -> Tensor:
    if tuple(probabilities.shape[1:]) != tuple(extent):
        probabilities = F.interpolate(probabilities[None], tuple(extent), mode="bilinear")[0]
    top, bottom, left, right = inner
    return probabilities[:, top:bottom, left:right]


def _views(tta: list[str]) -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Each view of test-time augmentation as a change of images and the way back of maps; every combination."""
    turns = range(4) if "rot90" in tta else (0,)
    flips = [dim for name, dim in (("hflip", 3), ("vflip", 2)) if name in tta]
    mirrors = [dims for n in range(len(flips) + 1) for dims in itertools.combinations(flips, n)]
    return [
        (
            lambda x, k=k, dims=dims: torch.rot90(x, k, (2, 3)).flip(dims),
            lambda x, k=k, dims=dims: torch.rot90(x.flip(dims), -k, (2, 3)),
        )
        for k in turns
        for dims in mirrors
    ]


def build(
    spec: SegmentationRecipe,
) -> tuple[SegmentationRecipe, SegmentationImages, SegmentationDataModule, Segmenter]:
    """The resolved recipe, its images, their loaders and the task, for `visionattn.fit`.

    Raises:
        UserError: anything that cannot be trained.
    """
    images = find_labelled(spec.data)
    seed_everything(spec.train.seed, verbose=False)
    network = _network(spec, len(images.classes), images.channels)  # its mistakes are told before all images are read
    images, data = prepare(images, spec.data)
    if spec.evaluate.surface and not surfaces_available():
        images = replace(images, warnings=[*images.warnings, NO_SURFACES])
    if data.format != "geotiff":  # whose values are not in 0..1
        data = data.model_copy(update=own_statistics(spec, network, len(data.mean)))
    spec = spec.model_copy(update={"data": data})
    split = images.splits["val"]
    order = {case: n for n, case in enumerate(split.cases)}
    task = _task(
        spec,
        network,
        loss=_loss(spec, images.splits["train"].counts[:, :-1].sum(0)),
        cases=[order[item.case] for item in split.items],
        freeze=spec.model.freeze,
        monitored=f"val/{spec.train.monitor or 'dice'}",
        names=images.splits["train"].names.__getitem__,
        provenance={"format": 1, "recipe": recipe.dump(spec)},
    )
    return spec, images, SegmentationDataModule(images, data, spec.train.seed), task


def restore(spec: SegmentationRecipe, about: dict[str, Any]) -> Segmenter:
    """The task of a checkpoint without its weights, to evaluate and predict with."""
    model = spec.model.model_copy(update={"pretrained": False, "checkpoint": None})
    train = spec.train.model_copy(update={"grad_checkpointing": False})
    spec = spec.model_copy(update={"model": model, "train": train})
    network = _network(spec, len(spec.data.classes), len(spec.data.mean))
    loss = nn.Identity()
    return _task(spec, network, loss, cases=[], freeze=None, monitored="val/loss", names=str, provenance=about)


def labelled(task: Segmenter, spec: SegmentationRecipe, other: Path | None) -> SegmentationDataModule:
    """Images to evaluate on: the recipe's own, or those of another root with its layout.

    Raises:
        UserError: what is wrong with them.
    """
    images = find_labelled(spec.data, other)
    if images.channels != len(spec.data.mean):
        raise UserError(f"{other}: images of {images.channels} channels, the model takes {len(spec.data.mean)}")
    return SegmentationDataModule(images, spec.data)


def _task(spec: SegmentationRecipe, network: nn.Module, loss: nn.Module, cases: list[int], **task: Any) -> Segmenter:
    classes, data = spec.data.class_names, spec.data
    return Segmenter(
        network,
        loss,
        classes,
        kept=counted(spec),
        window=side_of(data),
        overlap=spec.evaluate.overlap,
        tta=spec.evaluate.tta,
        cases=cases,
        empty=spec.evaluate.empty,
        deep=len(network.get_classifier()) > 1 if spec.loss.deep is None else spec.loss.deep,
        multi_scale=data.augment.multi_scale,
        optim=spec.optim,
        train=spec.train,
        **task,
    )


def _network(spec: SegmentationRecipe, classes: int, channels: int) -> nn.Module:
    """The encoder with its decoder, or a whole segmenter of timm's registry."""
    model = spec.model
    arguments = {name: value for name in ("drop_rate", "drop_path_rate") if (value := getattr(model, name))}
    arguments |= model.args
    if (known := timm.get_pretrained_cfg(model.name)) and known.fixed_input_size:
        arguments.setdefault("img_size", side_of(spec.data))
    network = make_segmenter(
        model.name, model.decoder, classes, channels, model.pretrained, arguments, model.decoder_args
    )
    if model.checkpoint is not None:
        start_from(network, model, classes)
    return network


def _loss(spec: SegmentationRecipe, pixels: np.ndarray) -> nn.Module:
    """The loss of the recipe; `pixels` (classes,) are those of the training masks, for balanced weights."""
    weights = spec.loss.class_weights
    if weights == "balanced":
        weights = balanced_weights(pixels.tolist())
    settings = {name: getattr(spec.loss, name) for name in ("ce_weight", "dice_weight", "gamma", "alpha")}
    return make_loss(spec.loss.name, len(pixels), weights, **settings)
