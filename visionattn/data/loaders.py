"""Loaders whose batches depend on (seed, epoch, index) only: not on workers, nor on what ran before, nor on a resume.

The sampler hands (epoch, index) to the dataset, which seeds torch's generator with them around the random transform of
that one sample; so an epoch's number reaches persistent workers too. In a distributed run each process takes every
n-th sample of the same order; Lightning leaves a `DistributedSampler` as it is and tells it the epoch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset

from visionattn.data.sample import Dataset, Sample
from visionattn.errors import UserError
from visionattn.recipe.sections import Data

__all__ = ["EpochSampler", "SplitDataModule", "default_workers", "make_loader", "seed_of", "seeded"]


def seed_of(*numbers: int) -> int:
    """One 64-bit seed from several integers."""
    words = [n % 2**64 for n in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Torch's generator seeded by these numbers, and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*numbers))
        yield


class EpochSampler(DistributedSampler):
    """(draw, index) pairs: all samples in order, shuffled each epoch, or drawn by weight with replacement.

    What is random about a sample depends on its draw, which is the epoch, or counts on where samples are repeated.

    Args:
        count: number of samples.
        shuffle: a new order each epoch, of equal length in every process (the last ones of the order are left out
            where the processes do not divide it); else the samples in order, none left out and none twice.
        weights: (count,) chances to draw, for shuffle.
        repeats: times that each sample of the order stands there, of which an epoch then has the fewer (Hoffer et al.,
            Augment your batch, CVPR 2020); one after the other, so that each process has another one.
    """

    def __init__(
        self, count: int, seed: int = 0, shuffle: bool = False, weights: Tensor | None = None, repeats: int = 1
    ) -> None:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        dataset: Any = range(count)  # of which only the length is looked at
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        self.count, self.weights, self.repeats = count, weights, repeats

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count = self.count
        if not self.shuffle:
            order = torch.arange(count)
        else:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            if self.weights is None:
                order = torch.randperm(count, generator=generator)
            else:
                order = torch.multinomial(self.weights, count, replacement=True, generator=generator)
            order = order.repeat_interleave(self.repeats)[: count - count % self.num_replicas]
        draws = [self.epoch * self.repeats + k % self.repeats for k in range(len(order))]
        return islice(zip(draws, order.tolist(), strict=True), self.rank, None, self.num_replicas)

    def __len__(self) -> int:
        count = self.count
        return count // self.num_replicas if self.shuffle else len(range(self.rank, count, self.num_replicas))


def default_workers(samples: Sequence[Sample]) -> int:
    """0 for samples in memory, else one for each core but one, at most 4."""
    if samples and samples[0].in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1)


def make_loader(
    dataset: TorchDataset,
    batch_size: int,
    workers: int,
    sampler: EpochSampler | None = None,
    collate: Callable[[list], Any] | None = None,
) -> DataLoader:
    """Batches of a dataset; in training (a sampler that shuffles) the last incomplete one is left out."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=sampler is not None and sampler.shuffle,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that making an iterator leaves the global one alone
    )


class SplitDataModule(pl.LightningDataModule):
    """Loaders over the splits of a data set, in the same order for the same seed, epoch and number of processes.

    Args:
        dataset: with train, val and perhaps test.
        data: the resolved section of the recipe.
        training_set: of training samples; has `weights`, chances to draw each, or None, and where its items are not
            all of one shape `collate`.
        evaluation_set: makes one of samples as they are measured.
        collate: of batches of an evaluation set.
        seed: the order of epoch e and the augmentation of sample i in it depend on (seed, e, i) only.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: Data,
        training_set: Any,
        evaluation_set: Callable[[Sequence[Sample], Data], Any],
        collate: Callable[[list], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.data, self.training_set, self.seed = dataset, data, training_set, seed
        self.evaluation_set, self.collate = evaluation_set, collate

    def _workers(self, split: str) -> int:
        return default_workers(self.dataset.splits[split]) if self.data.workers is None else self.data.workers

    def train_dataloader(self) -> DataLoader:
        whole, repeats = self.training_set, getattr(self.training_set, "repeats", 1)
        sampler = EpochSampler(len(whole), self.seed, shuffle=True, weights=whole.weights, repeats=repeats)
        collate = getattr(self.training_set, "collate", None)
        loader = make_loader(self.training_set, self.data.batch_size, self._workers("train"), sampler, collate)
        if len(loader) == 0:
            raise UserError(
                f"data.batch_size is {self.data.batch_size}, but each of {sampler.num_replicas} processes has only "
                f"{len(sampler)} training images"
            )
        if self.trainer is not None:  # on a resume, workers start before Lightning tells the sampler the epoch
            epochs: Any = self.trainer.fit_loop.epoch_progress.current  # which Lightning declares as a base class
            sampler.set_epoch(epochs.processed)
        return loader

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def loader(self, split: str) -> DataLoader:
        """A split in order, without augmentation; in a distributed run this process's share of it."""
        dataset = self.evaluation_set(self.dataset.splits[split], self.data)
        sampler = EpochSampler(len(dataset))
        if len(dataset) < sampler.num_replicas:  # a process without samples would let the others wait
            raise UserError(
                f"the {split} split has {len(dataset)} images for {sampler.num_replicas} processes: "
                "set trainer.devices lower"
            )
        return make_loader(dataset, self.data.batch_size, self._workers(split), sampler, self.collate)
