"""The lightning.Trainer of a run: what the recipe's sections decide, and what `trainer` hands over as it is."""

import importlib.util
import inspect
import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.plugins.environments import LightningEnvironment

from visionattn.errors import UserError, nearest
from visionattn.recipe import Recipe
from visionattn.runs import progress
from visionattn.runs.checkpoints import AtomicCheckpointIO, ModelCheckpoint
from visionattn.runs.directory import History, RunDirectory
from visionattn.runs.sharding import FullySharded
from visionattn.tasks.base import Task

__all__ = ["check_limits", "check_trainer", "make_trainer", "on_cuda"]

ELSEWHERE = {  # arguments of lightning.Trainer that another key of a recipe decides, or nobody
    "max_epochs": "train.epochs",
    "precision": "train.precision",
    "deterministic": "train.deterministic",
    "accumulate_grad_batches": "optim.accumulate",
    "gradient_clip_val": "optim.clip_grad",
    "logger": "log",
    "default_root_dir": "--run",
    "plugins": None,
    "enable_checkpointing": None,
    "num_sanity_val_steps": None,
    "enable_model_summary": None,
    "barebones": None,
    "limit_predict_batches": None,
    "limit_test_batches": None,
    "max_steps": "train.epochs",
    "max_time": "train.epochs",
    "fast_dev_run": "fit --dry-run",
}


def check_trainer(spec: Recipe) -> None:
    """Raises UserError for what `trainer` and `log` ask for in vain."""
    options = _options(spec)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    try:
        trainer = pl.Trainer(max_epochs=spec.train.epochs, precision=spec.train.precision, **options | quiet)
    except Exception as error:  # Lightning raises its own for each
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"trainer is {spec.trainer}: lightning.Trainer cannot be made with it: {reason}") from None
    started = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(started, LightningEnvironment) and "NODE_RANK" not in os.environ:
        raise UserError(
            f"trainer.num_nodes is {trainer.num_nodes}, but this command was started on one node only, and would wait "
            "for the others for ever: start it on each by torchrun or by SLURM's srun"
        )
    for name in ("wandb", "tensorboard"):
        if getattr(spec.log, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name} is true, but {name} is not installed: pip install 'visionattn[track]'")


def check_limits(spec: Recipe, trained: int, validated: int) -> None:
    """Raises UserError where `trainer` leaves no batch of so many samples."""
    batches = {
        "limit_train_batches": trained // spec.data.batch_size,
        "limit_val_batches": -(-validated // spec.data.batch_size),
    }
    for key, count in batches.items():
        limit = spec.trainer.get(key, count)
        if count and not (limit if isinstance(limit, int) else int(limit * count)):
            raise UserError(f"trainer.{key} is {limit}, which leaves none of the {count} batches of an epoch")


def on_cuda(spec: Recipe) -> bool:
    """Whether a run trains on NVIDIA's or AMD's devices."""
    return torch.cuda.is_available() and spec.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")


def make_trainer(spec: Recipe, task: Task, directory: RunDirectory) -> pl.Trainer:
    options = _options(spec)
    chosen = _callbacks(spec, task, directory) + options["callbacks"]
    if options.get("enable_progress_bar", True) and not any(isinstance(c, callbacks.ProgressBar) for c in chosen):
        chosen.append(shown := progress.callback())
        options["enable_progress_bar"] = isinstance(shown, callbacks.ProgressBar)
    return pl.Trainer(
        default_root_dir=directory.path,
        max_epochs=spec.train.epochs,
        precision=spec.train.precision,
        accumulate_grad_batches=spec.optim.accumulate,
        gradient_clip_val=spec.optim.clip_grad,
        deterministic=spec.train.deterministic or None,
        logger=_loggers(spec, directory) or False,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **options | {"callbacks": chosen},
    )


def _options(spec: Recipe) -> dict[str, Any]:
    """The recipe's `trainer` section with callbacks made."""
    known = [key for key in inspect.signature(pl.Trainer.__init__).parameters if key != "self" and key not in ELSEWHERE]
    options = dict(spec.trainer)
    for key in options:
        if key in ELSEWHERE:
            said = f"say it as {ELSEWHERE[key]}" if ELSEWHERE[key] else "every run decides this itself, leave it out"
            raise UserError(f"trainer.{key}: {said}")
        if key not in known:
            raise UserError(f"trainer.{key}: lightning.Trainer has no such key{nearest(key, known)}")
    if options.get("limit_val_batches", 1) == 0 or options.get("overfit_batches", 0):
        raise UserError("trainer.limit_val_batches and overfit_batches: every run is validated, to find its best epoch")
    every = options.get("check_val_every_n_epoch", 1)
    if not isinstance(every, int) or not 1 <= every <= spec.train.epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {every}, but train.epochs is {spec.train.epochs}: the run would never "
            "be validated, so no epoch would be the best"
        )
    if options.get("strategy") == "fsdp":
        options["strategy"] = FullySharded()
    options["callbacks"] = [_callback(entry) for entry in options.get("callbacks", [])]
    return options


def _callback(entry: Any) -> pl.Callback:
    """A callback of Lightning's own, as `RichProgressBar` or `{RichProgressBar: {refresh_rate: 5}}`."""
    name, arguments = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
    if name not in callbacks.__all__:
        hint = nearest(str(name), callbacks.__all__)
        raise UserError(f"trainer.callbacks: {name!r} is none of lightning's{hint}")
    try:
        return getattr(callbacks, name)(**arguments)
    except TypeError as error:
        raise UserError(f"trainer.callbacks: {error}") from None


def _callbacks(spec: Recipe, task: Task, directory: RunDirectory) -> list[pl.Callback]:
    mode = "max" if task.maximize else "min"
    folder: dict[str, Any] = {"dirpath": directory.best.parent, "save_top_k": 1, "enable_version_counter": False}
    chosen: list[pl.Callback] = [
        History(directory.path / "metrics.csv"),
        ModelCheckpoint(filename="best", monitor=task.monitored, mode=mode, **folder),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **folder),
    ]
    if spec.train.ema is not None:
        chosen.append(callbacks.EMAWeightAveraging(decay=spec.train.ema))
    if spec.train.early_stopping is not None:
        chosen.append(callbacks.EarlyStopping(task.monitored, mode=mode, patience=spec.train.early_stopping))
    return chosen


def _loggers(spec: Recipe, directory: RunDirectory) -> list[loggers.Logger]:
    chosen: list[loggers.Logger] = []
    if spec.log.tensorboard:
        chosen.append(loggers.TensorBoardLogger(directory.path, name="", version="tensorboard"))
    if spec.log.wandb:
        import wandb

        offline = wandb.api.api_key is None  # tracked on this machine, sent later with `wandb sync`
        name, folder = directory.path.name, directory.path
        chosen.append(loggers.WandbLogger(name=name, save_dir=folder, project=spec.log.project, offline=offline))
    return chosen
