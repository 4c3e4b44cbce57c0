"""What is shown while a network trains: a bar in a terminal, elsewhere a line an epoch; both with the time left."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks

from visionattn.progress import duration

__all__ = ["callback"]


def callback() -> pl.Callback:
    return Bar() if sys.stdout.isatty() else Lines()


class _Clock:
    """How long the epochs that are left will take, by those that this process has trained."""

    def __init__(self) -> None:
        self.began, self.first = time.monotonic(), 0

    def start(self, trainer: pl.Trainer) -> None:
        self.began, self.first = time.monotonic(), trainer.current_epoch

    def left(self, trainer: pl.Trainer, done: int) -> float:
        """Seconds, after `done` whole epochs of the run."""
        seconds = (time.monotonic() - self.began) / max(done - self.first, 1)
        return seconds * max((trainer.max_epochs or done) - done, 0)


class Bar(callbacks.TQDMProgressBar):
    """Lightning's bar over the batches of an epoch, with the time that the whole run still takes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = _Clock()

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        super().on_train_start(trainer, task)
        self.clock.start(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")

    def get_metrics(self, trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, task)
        metrics.pop("v_num", None)
        done = trainer.current_epoch
        return metrics | (
            {"run": f"{duration(self.clock.left(trainer, done))} left"} if done > self.clock.first else {}
        )


class Lines(pl.Callback):
    """A line an epoch: losses, the monitored value, seconds, and the time that the run still takes."""

    def __init__(self) -> None:
        self.clock = _Clock()
        self.epoch_began = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.clock.start(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.epoch_began = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        done, metrics = trainer.current_epoch + 1, trainer.callback_metrics
        names = dict.fromkeys(["train/loss", "val/loss", getattr(task, "monitored", "val/loss")])
        shown = ", ".join(f"{name} {metrics[name].item():.4g}" for name in names if name in metrics)
        seconds = time.monotonic() - self.epoch_began
        left = duration(self.clock.left(trainer, done))
        print(f"epoch {done} of {trainer.max_epochs}: {shown}; {seconds:.1f} s, {left} left", flush=True)
