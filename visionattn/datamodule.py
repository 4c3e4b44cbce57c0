"""Batches of labelled images for Lightning."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visionattn.data import LabelledImages
from visionattn.errors import UserError
from visionattn.loaders import EpochSampler, ImageDataset, make_loader
from visionattn.recipe import ClassificationData
from visionattn.transforms import eval_transform, mix_transform, train_transform

__all__ = ["ClassificationDataModule"]


class ClassificationDataModule(pl.LightningDataModule):
    """Loaders over the splits of a classification data set.

    A batch is {"image": (B, C, H, W) float32, "label": (B,) int64 or (B, classes) float32, "index": (B,) int64}; index
    is the image's position in its split. With mixup or cutmix the labels of training batches are (B, classes) float32;
    these two draw from torch's global generator, which the task seeds for each epoch.

    Args:
        images, data: as `visionattn.data.prepare` returns them.
        seed: the order of epoch e and the augmentation of image i in it depend on (seed, e, i) only.

    Raises:
        UserError: an augmentation that these images cannot take, balanced sampling of several labels an image.
    """

    def __init__(self, images: LabelledImages, data: ClassificationData, seed: int = 0) -> None:
        super().__init__()
        if data.balanced_sampling and images.multi_label:
            raise UserError(
                "data.balanced_sampling is true, but images have several labels; use loss.class_weights instead"
            )
        self.images, self.data, self.seed = images, data, seed
        self.mix = mix_transform(data.augment, len(images.classes))
        self.augmentation = train_transform(data)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(len(self.images.splits["train"]), self.seed, shuffle=True, weights=self._weights())
        loader = self._loader("train", self.augmentation, sampler)
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
        return self._loader(split, eval_transform(self.data), EpochSampler(len(self.images.splits[split])))

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.mix is None or not self.trainer.training:
            return batch
        image, label = self.mix(batch["image"], batch["label"])
        return batch | {"image": image, "label": label}

    def _loader(self, name: str, transform: Callable[[Tensor], Tensor], sampler: EpochSampler) -> DataLoader:
        split = self.images.splits[name]
        dataset = ImageDataset(split.images, split.labels, split.names, self.data.channels, transform, self.seed)
        return make_loader(dataset, sampler, self.data.batch_size, self.data.workers)

    def _weights(self) -> Tensor | None:
        if not self.data.balanced_sampling:
            return None
        labels = self.images.splits["train"].labels
        return torch.from_numpy(1 / np.bincount(labels)[labels])
