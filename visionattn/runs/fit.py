"""`visionattn fit`: from a recipe to a run directory with checkpoints, metrics, evaluations and a report.

Everything that can be refused is refused before the run directory is made. A run directory holds recipe.yaml (the
resolved recipe, the one that ran), environment.json, metrics.csv (a row per epoch), checkpoints/{best,last}.ckpt,
evaluation/{val,test}/ and report.html. `resume` continues one after a kill at any moment, to the same weights as the
uninterrupted run: every epoch starts from a seed of its own and the last checkpoint is written whole at its end.
"""

import csv
import datetime
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from visionattn import quiet, recipe
from visionattn.data.datamodule import SplitDataModule
from visionattn.data.labelled import LabelledImages
from visionattn.data.masked import SegmentationImages
from visionattn.environment import describe
from visionattn.errors import UserError
from visionattn.recipe import Recipe
from visionattn.report.run import write_report
from visionattn.runs.evaluate import format_table
from visionattn.tasks.base import AtomicCheckpointIO, Task, check_names, load_checkpoint, module_of

__all__ = ["fit", "resume"]


@dataclass
class Experiment:
    """A recipe that has met its data: what `fit` and `resume` train."""

    recipe: Recipe
    images: LabelledImages | SegmentationImages
    data: SplitDataModule
    task: Task
    options: dict[str, Any]  # further arguments of lightning.Trainer


def fit(spec: Recipe, name: str, run: Path | None = None) -> Path:
    """Train, evaluate and report.

    Args:
        spec: the recipe.
        name: start of the run directory's name where `run` is None: runs/NAME-DATE-TIME.
        run: the run directory to make.

    Returns:
        the run directory.

    Raises:
        UserError: anything the user can mend; before the run directory exists, unless the loss stops being a number.
    """
    run = run or Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    first = rank_zero_only.rank == 0
    if first and run.exists():
        raise UserError(f"{run} exists and is never overwritten: give another --run, or go on with fit --resume {run}")
    experiment = _prepare(spec)
    for warning in experiment.images.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if first:
        run.mkdir(parents=True)
        _write(run / "recipe.yaml", recipe.dump(experiment.recipe))
        facts = describe() | {"started": _now(), "seed": spec.train.seed, "data": _describe_data(experiment.images)}
        _write(run / "environment.json", json.dumps(facts, indent=1))
    return _train(experiment, run)


def resume(run: Path) -> Path:
    """Continue a run from its last whole epoch; a finished one is evaluated and reported again.

    Raises:
        UserError: not a run directory, or its images have changed since it began.
    """
    if not (run / "environment.json").is_file():
        raise UserError(f"{run}: not a run directory (no environment.json and recipe.yaml in it)")
    experiment = _prepare(recipe.load(run / "recipe.yaml"))
    began_with = json.loads((run / "environment.json").read_text(encoding="utf-8"))["data"]["fingerprint"]
    if _describe_data(experiment.images)["fingerprint"] != began_with:
        raise UserError(
            f"{run}: the images are not those the run began with; start a new run with fit {run / 'recipe.yaml'}"
        )
    return _train(experiment, run)


def _prepare(spec: Recipe) -> Experiment:
    quiet.silence()
    options = _trainer_options(spec)
    _check_trackers(spec.log)
    check_names(spec)
    return Experiment(*module_of(spec).build(spec), options)


def _train(experiment: Experiment, run: Path) -> Path:
    spec, task = experiment.recipe, experiment.task
    last = run / "checkpoints" / "last.ckpt"
    began = time.monotonic()
    trainer = pl.Trainer(
        default_root_dir=run,
        max_epochs=spec.train.epochs,
        precision=spec.train.precision,
        accumulate_grad_batches=spec.optim.accumulate,
        gradient_clip_val=spec.optim.clip_grad,
        deterministic=spec.train.deterministic or None,
        logger=_loggers(spec, run),
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **experiment.options | {"callbacks": _callbacks(spec, task, run) + experiment.options["callbacks"]},
    )
    resumed = last if last.is_file() else None
    if resumed:
        print(f"continuing {run} after epoch {load_checkpoint(last)['epoch'] + 1} of {spec.train.epochs}")
    trainer.fit(task, datamodule=experiment.data, ckpt_path=resumed, weights_only=True)
    _finish(experiment, trainer, run, time.monotonic() - began)
    return run


def _finish(experiment: Experiment, trainer: pl.Trainer, run: Path, seconds: float) -> None:
    """Evaluate the best weights on val and test, and the last ones where the task does; report; print the table."""
    task, results, done = experiment.task, [], set()
    for name in ("best", "last") if task.evaluates_last else ("best",):
        checkpoint = load_checkpoint(run / "checkpoints" / f"{name}.ckpt")
        if checkpoint["epoch"] in done:
            continue
        done.add(checkpoint["epoch"])
        task.load_state_dict(checkpoint["state_dict"])
        about = {"checkpoint": f"checkpoints/{name}.ckpt", "epoch": checkpoint["epoch"]}
        for split in [split for split in ("val", "test") if split in experiment.images.splits]:
            title = split if name == "best" else f"{split}-last"
            evaluate_split, out = module_of(experiment.recipe).evaluate_split, run / "evaluation" / title
            result = evaluate_split(trainer, task, experiment.data, split, experiment.recipe, out, about)
            results.append(result | {"split": title})
    if trainer.is_global_zero:
        facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        facts |= {"finished": _now(), "seconds": facts.get("seconds", 0) + seconds}
        _write(run / "environment.json", json.dumps(facts, indent=1))
        print(f"\n{format_table(results)}\n\nreport: {write_report(run)}")


def _trainer_options(spec: Recipe) -> dict[str, Any]:
    """The recipe's `trainer` section with callbacks made.

    Raises:
        UserError: a key that lightning.Trainer does not have, or that another section of the recipe decides.
    """
    elsewhere = {
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
    }
    known = [key for key in inspect.signature(pl.Trainer.__init__).parameters if key != "self" and key not in elsewhere]
    options = dict(spec.trainer)
    for key in options:
        if elsewhere.get(key):
            raise UserError(f"trainer.{key}: say it as {elsewhere[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"trainer.{key}: lightning.Trainer has no such key{f'; did you mean {near[0]}?' if near else ''}"
            )
    options["callbacks"] = [_callback(entry) for entry in options.get("callbacks", [])]
    return options


def _callback(entry: Any) -> pl.Callback:
    """A callback of Lightning's own, as `RichProgressBar` or `{RichProgressBar: {refresh_rate: 5}}`."""
    name, arguments = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
    if name not in lightning_callbacks.__all__:
        near = difflib.get_close_matches(str(name), lightning_callbacks.__all__, n=1)
        raise UserError(
            f"trainer.callbacks: {name!r} is none of lightning's{f'; did you mean {near[0]}?' if near else ''}"
        )
    try:
        return getattr(lightning_callbacks, name)(**arguments)
    except TypeError as error:
        raise UserError(f"trainer.callbacks: {error}") from None


def _callbacks(spec: Recipe, task: Task, run: Path) -> list[pl.Callback]:
    mode = "max" if task.maximize else "min"
    checkpoints = {"dirpath": run / "checkpoints", "save_top_k": 1, "enable_version_counter": False}
    found = [
        History(run / "metrics.csv"),
        ModelCheckpoint(filename="best", monitor=task.monitored, mode=mode, **checkpoints),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **checkpoints),
    ]
    if spec.train.ema is not None:
        found.append(lightning_callbacks.EMAWeightAveraging(decay=spec.train.ema))
    if spec.train.early_stopping is not None:
        found.append(lightning_callbacks.EarlyStopping(task.monitored, mode=mode, patience=spec.train.early_stopping))
    return found


def _check_trackers(log: recipe.Log) -> None:
    for name in ("wandb", "tensorboard"):
        if getattr(log, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name} is true, but {name} is not installed: pip install 'visionattn[track]'")


def _loggers(spec: Recipe, run: Path) -> list[loggers.Logger] | bool:
    found: list[loggers.Logger] = []
    if spec.log.tensorboard:
        found.append(loggers.TensorBoardLogger(run, name="", version="tensorboard"))
    if spec.log.wandb:
        import wandb

        offline = wandb.api.api_key is None  # tracked on this machine, sent later with `wandb sync`
        found.append(loggers.WandbLogger(name=run.name, save_dir=run, project=spec.log.project, offline=offline))
    return found or False


class History(pl.Callback):
    """metrics.csv, a row per epoch; the rows travel in the checkpoint, so a resumed run goes on with them."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        row |= {name: value.item() for name, value in trainer.callback_metrics.items()}
        row["seconds"] = round(time.monotonic() - self._began, 2)
        self.rows.append(row)
        if trainer.is_global_zero:
            self._save()

    def _save(self) -> None:
        columns = [*dict.fromkeys(name for row in self.rows for name in row if name != "seconds"), "seconds"]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


class ModelCheckpoint(lightning_callbacks.ModelCheckpoint):
    """Lightning's, which goes on after its folder has been moved: its own forgets which checkpoint was the best."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return os.path.join(self.dirpath, os.path.basename(path)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {"dirpath": self.dirpath} | {name: moved(state_dict[name]) for name in paths}
        here["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | here)


def _describe_data(images: LabelledImages | SegmentationImages) -> dict[str, Any]:
    """Counts, and a fingerprint of names, labels and contents, to notice changed data."""
    digest = hashlib.sha256()
    for name, split in sorted(images.splits.items()):
        digest.update(name.encode() + split.digest())
    counts = {name: len(split) for name, split in images.splits.items()}
    return {
        "images": counts,
        "fingerprint": digest.hexdigest()[:16],
        "skipped": list(images.skipped),
        "warnings": list(images.warnings),
    }


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
