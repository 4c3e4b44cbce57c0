"""Batches of labelled images, and of images with masks, for Lightning."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionattn.data.labelled import LabelledImages
from visionattn.data.loaders import EpochSampler, ImageDataset, make_loader
from visionattn.data.masked import SegmentationImages
from visionattn.errors import UserError
from visionattn.recipe import ClassificationData, SegmentationData
from visionattn.tasks.classification.transforms import eval_transform, mix_transform, train_transform
from visionattn.tasks.segmentation.transforms import TrainingCrops, WholeImages, collate

__all__ = ["ClassificationDataModule", "SegmentationDataModule", "SplitDataModule"]


class SplitDataModule(pl.LightningDataModule, ABC):
    """Loaders over the splits of a data set, in the same order for the same seed, epoch and number of processes.

    Args:
        images, data: as the task's `prepare` returns them.
        seed: the order of epoch e and the augmentation of image i in it depend on (seed, e, i) only.
    """

    weights: Tensor | None = None  # chances to draw, of the training samples
    collate: Any = None

    def __init__(self, images: Any, data: Any, seed: int = 0) -> None:
        super().__init__()
        self.images, self.data, self.seed = images, data, seed

    @abstractmethod
    def training_set(self) -> Dataset:
        """Samples (epoch, index) of the train split, changed at random."""

    @abstractmethod
    def evaluation_set(self, split: str) -> Dataset:
        """Samples (epoch, index) of a split in order, without augmentation."""

    def train_dataloader(self) -> DataLoader:
        dataset = self.training_set()
        sampler = EpochSampler(len(dataset), self.seed, shuffle=True, weights=self.weights)
        loader = make_loader(dataset, sampler, self.data.batch_size, self.data.workers)
        if len(loader) == 0:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}, but each of {sampler.num_replicas} processes has only "
                f"{len(sampler)} training images"
            )
        if self.trainer is not None:  # on a resume, workers start before Lightning tells the sampler the epoch
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return loader

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    def loader(self, split: str) -> DataLoader:
        """A split in order, without augmentation; in a distributed run this process's share of it."""
        if split not in self.images.splits:
            raise UserError(f"the data have no {split} images; there are: {', '.join(self.images.splits)}")
        dataset = self.evaluation_set(split)
        return make_loader(dataset, EpochSampler(len(dataset)), self.data.batch_size, self.data.workers, self.collate)


class ClassificationDataModule(SplitDataModule):
    """Loaders over the splits of a classification data set.

    A batch is {"image": (B, C, H, W) float32, "label": (B,) int64 or (B, classes) float32, "index": (B,) int64}; index
    is the image's position in its split. With mixup or cutmix the labels of training batches are (B, classes) float32;
    these two draw from torch's global generator, which the task seeds for each epoch.

    Raises:
        UserError: an augmentation that these images cannot take, balanced sampling of several labels an image.
    """

    def __init__(self, images: LabelledImages, data: ClassificationData, seed: int = 0) -> None:
        super().__init__(images, data, seed)
        if data.balanced_sampling and images.multi_label:
            raise UserError(
                "data.balanced_sampling is true, but images have several labels; use loss.class_weights instead"
            )
        self.mix = mix_transform(data.augment, len(images.classes))
        self.augmentation = train_transform(data)
        self.weights = self._weights()

    def training_set(self) -> ImageDataset:
        return self._dataset("train", self.augmentation)

    def evaluation_set(self, split: str) -> ImageDataset:
        return self._dataset(split, eval_transform(self.data))

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.mix is None or not self.trainer.training:
            return batch
        image, label = self.mix(batch["image"], batch["label"])
        return batch | {"image": image, "label": label}

    def _dataset(self, name: str, transform: Callable[[Tensor], Tensor]) -> ImageDataset:
        split = self.images.splits[name]
        return ImageDataset(split.images, split.labels, split.names, self.data.channels, transform, self.seed)

    def _weights(self) -> Tensor | None:
        if not self.data.balanced_sampling:
            return None
        labels = self.images.splits["train"].labels
        return torch.from_numpy(1 / np.bincount(labels)[labels])


class SegmentationDataModule(SplitDataModule):
    """Loaders over the splits of a segmentation data set.

    A training batch is {"image": (B, C, H, W) float32, "mask": (B, H, W) int64, "index": (B,) int64}; index is the
    image's position in its split. Other batches are lists of parts, see `visionattn.crops.WholeImages`.
    """

    images: SegmentationImages
    data: SegmentationData
    collate = staticmethod(collate)

    def training_set(self) -> TrainingCrops:
        return TrainingCrops(self.images.splits["train"], self.data, self.seed)

    def evaluation_set(self, split: str) -> WholeImages:
        return WholeImages(self.images.splits[split].items, self.data)
