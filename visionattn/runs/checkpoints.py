"""Checkpoints: written whole, explained by the recipe inside, and read whichever version wrote them."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.io import TorchCheckpointIO

from visionattn import __version__, recipe
from visionattn.data import formats
from visionattn.errors import UserError
from visionattn.files import make_folder, new_file
from visionattn.models import adapters
from visionattn.models.ensemble import Ensemble, Member
from visionattn.models.weights import load_checkpoint
from visionattn.recipe import Recipe, part_of
from visionattn.recipe.sections import Calibrated, Fitted
from visionattn.report.evaluation import RENAMED
from visionattn.tasks.base import Task

__all__ = ["AtomicCheckpointIO", "ModelCheckpoint", "Trained", "load_ensemble", "load_trained", "provenance"]

FORMAT = 2
PREPARED = ("resize", "crop_pct", "interpolation", "bands", "axis", "window", "level")  # keys of `data` on what is seen


def provenance(spec: Recipe) -> dict[str, Any]:
    """What every checkpoint says of itself, under the key "visionattn"."""
    unit_range = formats.module_of(spec.data).KIND.unit_range
    return {"format": FORMAT, "version": __version__, "recipe": recipe.dump(spec), "unit_range": unit_range}


def _migrated(about: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint of any version says of itself, as this version says it.

    Raises:
        UserError: it was made by a newer version.
    """
    if about["format"] > FORMAT:
        raise UserError(
            f"{path}: made by visionattn {about.get('version', '?')}, newer than this one ({__version__}): upgrade"
        )
    if about["format"] == 1:  # of 0.1.0, which said beside the recipe whether images have several labels
        content = yaml.safe_load(about["recipe"])
        if "multi_label" in about:
            content["data"]["multi_label"] = about["multi_label"]
        if (train := content.get("train", {})).get("monitor") in RENAMED:
            train["monitor"] = RENAMED[train["monitor"]]
        about = {"format": 2, "version": "0.1.0", "recipe": yaml.safe_dump(content, sort_keys=False)}
    return about


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole or not at all, in whichever moment the process is killed.

    Lightning's pass through the folder for temporary files, which may be full, and is not cleared after a kill.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if Path(path).parents[1].is_dir():  # a run directory that somebody has removed is not made anew
            make_folder(Path(path).parent)
        buffer = io.BytesIO()  # torch tells a full disk as an error of its own
        torch.save(checkpoint, buffer)
        with new_file(Path(path), replace=True) as unfinished:
            unfinished.write_bytes(buffer.getbuffer())


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's, which goes on after its folder has been moved: its own forgets which checkpoint was the best."""

    @property
    def _legacy_state_key(self) -> str:  # type: ignore[override]  # where Lightning looks for the state of older runs
        names = {f"val/{now}": f"val/{before}" for before, now in RENAMED.items()}
        return self.state_key.replace(repr(self.monitor), repr(names.get(self.monitor or "", self.monitor)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here: dict[str, Any] = {"dirpath": self.dirpath} | {name: moved(state_dict[name]) for name in paths}
        here["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | here)


class Trained(NamedTuple):
    """A trained network and what it was trained by."""

    task: Task
    recipe: Recipe
    checkpoint: Path
    epoch: int  # from 1


def load_trained(path: Path) -> Trained:
    """The network of a run directory (its best checkpoint) or of a checkpoint file.

    Raises:
        UserError: neither a run nor a checkpoint of ours.
    """
    file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: no checkpoints/best.ckpt in it; expected a run directory or a checkpoint file")
    checkpoint = load_checkpoint(file)
    about = checkpoint.get("visionattn")
    if not isinstance(about, dict) or not about.keys() >= {"format", "recipe"} or "state_dict" not in checkpoint:
        raise UserError(
            f"{file}: not a checkpoint of visionattn fit (use model.checkpoint in a recipe to start from weights)"
        )
    spec = recipe.loads(_migrated(about, file)["recipe"], name=str(file))
    start = spec.model.model_copy(update={"pretrained": False, "checkpoint": None, "bands": None})
    train = spec.train.model_copy(update={"grad_checkpointing": False})
    task = part_of(spec.task, "task").make(spec.model_copy(update={"model": start, "train": train}))
    task.load_state_dict(checkpoint["state_dict"])
    task.bank = checkpoint.get("bank")
    return Trained(task.eval(), spec, file, checkpoint["epoch"] + 1)


def load_ensemble(paths: Sequence[Path]) -> Trained:
    """The networks of several runs or checkpoints as one, whose probabilities are the mean of theirs.

    Raises:
        UserError: they do not say the same of the same images, or have no probabilities of classes.
    """
    all_trained = [load_trained(path) for path in paths]
    first, *others = all_trained
    if not others:
        return first
    if not isinstance(first.recipe.evaluate, Calibrated):
        raise UserError(f"{paths[0]}: models for {first.recipe.task} have no probabilities that could be averaged")
    for path, other in zip(paths[1:], others, strict=True):
        for what, own in _facts(first).items():
            if (its := _facts(other)[what]) != own:
                raise UserError(f"{paths[0]} and {path} cannot be averaged: {what} {own} and {its}")
    task, evaluate = first.task, first.recipe.evaluate
    task.network = Ensemble([_member(trained) for trained in all_trained], _facts(first)["labels an image"] != "one")
    task.bank, task.fitted = None, _common(all_trained)
    of_one = ("ood",) if task.fitted else ("calibration", "conformal", "ood")
    kept = {name: None for name in of_one if name in type(evaluate).model_fields}
    averaged = evaluate.model_copy(update=kept | {"fitted": task.fitted})
    return first._replace(recipe=first.recipe.model_copy(update={"evaluate": averaged}))


def _common(members: Sequence[Trained]) -> Fitted | None:
    """What was fitted for all of them together, of the mean of their probabilities; None where there is no such."""
    first, *others = (one.task.fitted and one.task.fitted.model_copy(update={"unfamiliar": None}) for one in members)
    if first is None or any(other != first for other in others):
        return None
    return first.model_copy(update={"temperature": 1.0})


def _member(trained: Trained) -> Member:
    data, fitted = trained.recipe.data, trained.task.fitted
    assert data.mean is not None  # of a resolved recipe
    assert data.std is not None
    return Member(trained.task.network, data.mean, data.std, fitted.temperature if fitted else 1.0)


def _facts(trained: Trained) -> dict[str, Any]:
    """What networks that are averaged have in common: they see the images that the first one's recipe prepares."""
    spec, data = trained.recipe, trained.recipe.data
    prepared = {f"data.{name}": getattr(data, name) for name in PREPARED if hasattr(data, name)}
    return {
        "task": spec.task,
        "classes": part_of(spec.task, "task").class_names(spec),
        "channels": len(data.mean or ()),
        "image_size": data.side,
        "labels an image": "several" if getattr(data, "multi_label", False) else "one",
        "images scaled to 0..1": formats.module_of(data).KIND.unit_range,
        **prepared,
    }


def epoch_of(path: Path) -> int:
    """The epoch that a checkpoint was written after, counted from 1."""
    return load_checkpoint(path)["epoch"] + 1


def load_weights(task: Task, path: Path) -> tuple[int, Recipe]:
    """Give a task the weights of a checkpoint; returns its epoch, and the recipe with what training has settled."""
    checkpoint = load_checkpoint(path)
    adapters.remove(task.network)
    task.load_state_dict(checkpoint["state_dict"])
    spec = recipe.loads(_migrated(checkpoint["visionattn"], path)["recipe"], name=str(path))
    task.fitted, task.bank = getattr(spec.evaluate, "fitted", None), checkpoint.get("bank")
    return checkpoint["epoch"] + 1, spec
