"""`visionattn fit --dry-run`: everything up to the first training steps, on real batches, and nothing left behind."""

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from visionattn.data.loaders import SplitDataModule
from visionattn.progress import duration
from visionattn.recipe import Recipe, part_of
from visionattn.runs.directory import RunDirectory
from visionattn.runs.fit import prepare
from visionattn.runs.trainer import make_trainer

__all__ = ["dry_run"]

STEPS = 2


class _Times(pl.Callback):
    """When each training and validation batch was done."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.train.append(time.monotonic())

    def on_train_batch_end(self, *args: Any) -> None:
        self.train.append(time.monotonic())

    def on_validation_batch_start(self, *args: Any) -> None:
        self.val.append(time.monotonic())

    def on_validation_batch_end(self, *args: Any) -> None:
        self.val.append(time.monotonic())


def dry_run(spec: Recipe) -> str:
    """Train two batches and validate one as `fit` would; how much memory that takes, and how long the run would.

    Raises:
        UserError: what `fit` would raise.
    """
    spec, dataset, task = prepare(spec)
    kind = part_of(spec.task, "task")
    data = SplitDataModule(
        dataset, spec.data, kind.training_set(dataset, spec), kind.evaluation_set, kind.collate, spec.train.seed
    )
    batches, checked = len(data.train_dataloader()), len(data.val_dataloader())
    short = {"limit_train_batches": min(STEPS, batches), "limit_val_batches": 1, "enable_progress_bar": False}
    small = spec.model_copy(
        update={
            "train": spec.train.model_copy(update={"epochs": 1}),
            "optim": spec.optim.model_copy(update={"warmup_epochs": 0}),
            "log": spec.log.model_copy(update={"wandb": False, "tensorboard": False}),
            "trainer": spec.trainer | short,
        }
    )
    times = _Times()
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = make_trainer(small, task, RunDirectory(Path(folder)))
        trainer.callbacks.append(times)
        trainer.fit(task, datamodule=data)
    step, check = times.train[-1] - times.train[-2], times.val[-1] - times.val[0]
    seconds = spec.train.epochs * (batches * step + checked * check)
    counts = ", ".join(f"{len(samples):,} {name}" for name, samples in dataset.splits.items())
    return (
        f"images: {counts}\n"
        f"a step of {spec.data.batch_size}: {step:.2f} s\n"
        f"an epoch: {batches:,} steps and {checked:,} validation batches\n"
        f"memory: {_memory()}\n"
        f"the run of {spec.train.epochs} epochs: about {duration(seconds)}"
    )


def _memory() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on {torch.cuda.get_device_name()}"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB in this process"
