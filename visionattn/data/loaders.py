"""Loaders whose batches depend on (seed, epoch, index) only: not on workers, nor on what ran before, nor on a resume.

The sampler hands (epoch, index) to the dataset, which seeds torch's generator with them around the random transform of
that one sample; so an epoch's number reaches persistent workers too. In a distributed run each process takes every
n-th image of the same order; Lightning leaves a `DistributedSampler` as it is and tells it the epoch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from visionattn.data.images import array_to_image, match_channels, read_image

__all__ = ["EpochSampler", "ImageDataset", "default_workers", "make_loader", "seed_of"]


def seed_of(*numbers: int) -> int:
    """One 64-bit seed from several integers."""
    words = [n % 2**64 for n in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs: all images in order, shuffled each epoch, or drawn by weight with replacement.

    Args:
        count: number of images.
        shuffle: a new order each epoch, of equal length in every process (the last images of the order are left
            out where the processes do not divide it); else the images in order, none left out and none twice.
        weights: (count,) chances to draw, for shuffle.
    """

    def __init__(self, count: int, seed: int = 0, shuffle: bool = False, weights: Tensor | None = None) -> None:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        super().__init__(range(count), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.weights = weights

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count = len(self.dataset)
        if not self.shuffle:
            order = torch.arange(count)
        else:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            if self.weights is None:
                order = torch.randperm(count, generator=generator)
            else:
                order = torch.multinomial(self.weights, count, replacement=True, generator=generator)
            order = order[: count - count % self.num_replicas]
        return iter([(self.epoch, i) for i in order[self.rank :: self.num_replicas].tolist()])

    def __len__(self) -> int:
        count = len(self.dataset)
        return count // self.num_replicas if self.shuffle else len(range(self.rank, count, self.num_replicas))


class ImageDataset(Dataset):
    """Images with labels, transformed; item (epoch, index), or index for epoch 0, is {"image", "label", "index"}.

    Args:
        images: files, or an array (N, H, W) or (N, H, W, C).
        labels: (N, ...), turned into tensors item by item.
        names: what to call an image in a message.
    """

    def __init__(
        self,
        images: Sequence[Path] | np.ndarray,
        labels: np.ndarray,
        names: Sequence[str],
        channels: int,
        transform: Callable[[Tensor], Tensor],
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.names, self.channels = images, torch.as_tensor(labels), names, channels
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        image = self.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            image = self.transform(image)
        return {"image": image, "label": self.labels[index], "index": index}

    def read(self, index: int) -> Tensor:
        """The image as it is in the file or array: (channels, H, W), uint8 or float32 in 0..1."""
        if isinstance(self.images, np.ndarray):
            name = self.names[index]
            return match_channels(array_to_image(self.images[index], name), self.channels, name)
        return read_image(self.images[index], self.channels)


def default_workers(images: Sequence[Path] | np.ndarray) -> int:
    """0 for images in memory, else one for each core but one, at most 4."""
    if isinstance(images, np.ndarray):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1)


def make_loader(
    dataset: Dataset,
    sampler: EpochSampler,
    batch_size: int,
    workers: int | None,
    collate: Callable[[list], Any] | None = None,
) -> DataLoader:
    """Batches of a dataset with `images`; in training (a sampler that shuffles) the last incomplete one is left out."""
    workers = default_workers(dataset.images) if workers is None else workers
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=sampler.shuffle,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that making an iterator leaves the global one alone
    )
