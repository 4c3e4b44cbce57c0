"""`visionattn calibrate`, and the end of `fit`: what held-out images say of how far a network can be trusted.

What is fitted goes into the recipe inside the checkpoint, as evaluate.fitted; features of training images, which others
are compared with, stand beside it.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from visionattn import recipe
from visionattn.data.loaders import SplitDataModule
from visionattn.data.sample import Dataset
from visionattn.environment import silence
from visionattn.errors import UserError
from visionattn.models.weights import load_checkpoint
from visionattn.recipe import Recipe, part_of
from visionattn.recipe.sections import Calibrated, Fitted
from visionattn.runs.checkpoints import AtomicCheckpointIO, load_trained
from visionattn.runs.evaluate import labelled, lone_trainer
from visionattn.tasks.base import Evidence, Task, refuse_in_vain

__all__ = ["asked", "calibrate", "fit_trust", "keep_trust"]

MOST = 2000  # training images that others are compared with


class _Witness(pl.LightningModule):
    """Has a trainer ask a task what labelled images say of it."""

    def __init__(self, task: Task, method: str) -> None:
        super().__init__()
        self.task, self.method = task, method

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return getattr(self.task, self.method)(batch)


def asked(spec: Recipe) -> bool:
    """Whether a recipe wants to know how far its network can be trusted."""
    evaluate = spec.evaluate
    return isinstance(evaluate, Calibrated) and bool(
        evaluate.calibration or evaluate.conformal or getattr(evaluate, "ood", None)
    )


def fit_trust(trainer: pl.Trainer, task: Task, data: SplitDataModule, spec: Recipe, part: str, source: str) -> Recipe:
    """What the samples of a split say, as `evaluate.fitted` of the recipe; the task predicts by it from then on.

    Each process sees its share of them, and comes to the same end.
    """
    evaluate: Any = spec.evaluate
    trust = part_of(spec.task, "trust")
    task.fitted = None
    if task.bank is None and getattr(evaluate, "ood", None):
        task.bank = _bank(trainer, task, data)
    evidence = _evidence(trainer, task, data, part)
    samples = data.dataset.splits[part]
    fitted = Fitted(images=len({samples[seen.index].case for seen in evidence}), source=source)
    if evaluate.calibration:
        fitted = fitted.model_copy(update={"temperature": trust.temperature(evidence)})
    if evaluate.conformal or task.bank is not None:
        task.fitted = fitted
        evidence = _evidence(trainer, task, data, part)
        fitted = trust.completed(fitted, evidence, samples, evaluate)
    task.fitted = fitted
    return spec.model_copy(update={"evaluate": evaluate.model_copy(update={"fitted": fitted})})


def _bank(trainer: pl.Trainer, task: Task, data: SplitDataModule) -> Tensor:
    """(N, D) float16 features of training images, at most MOST, drawn."""
    train = data.dataset.splits["train"]
    kept = np.sort(np.random.default_rng(0).permutation(len(train))[:MOST])
    some = SplitDataModule(
        Dataset(data.dataset.classes, {"train": [train[i] for i in kept]}), data.data, None, data.evaluation_set
    )
    seen = _gathered(trainer, _Witness(task, "indexed_features"), some, "train")
    return torch.stack([features for _, features in sorted(seen, key=lambda pair: pair[0])]).half()


def _evidence(trainer: pl.Trainer, task: Task, data: SplitDataModule, part: str) -> list[Evidence]:
    return sorted(_gathered(trainer, _Witness(task, "evidence"), data, part), key=lambda seen: seen.index)


def _gathered(trainer: pl.Trainer, witness: _Witness, data: SplitDataModule, part: str) -> list[Any]:
    mine = [seen for batch in trainer.predict(witness, data.loader(part)) or () for seen in batch]
    if not dist.is_initialized():
        return mine
    shares: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return [seen for share in shares for seen in share]


def keep_trust(task: Task, spec: Recipe, checkpoint: Path) -> None:
    """Write what was fitted into a checkpoint, which stays whole in whichever moment that is stopped."""
    content = load_checkpoint(checkpoint)
    content["visionattn"] |= {"recipe": recipe.dump(spec)}
    content |= {} if task.bank is None else {"bank": task.bank}
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)


def calibrate(
    model: Path,
    data: Path | None = None,
    split: str | None = None,
    conformal: float | None = None,
    ood: str | None = None,
) -> Fitted:
    """Fit temperature, and what else is asked for, on labelled samples, and keep it in the model's checkpoint.

    Args:
        model: run directory or checkpoint.
        data: other labelled samples, laid out as those of the recipe; None: the run's own.
        split: the part to take; None: val, of other data all of them where they are not split.
        conformal: share of the truth that sets may miss; None: as the recipe says.
        ood: "knn", or None: as the recipe says.

    Raises:
        UserError: a task without probabilities, or samples that cannot say it.
    """
    silence()
    trained = load_trained(model)
    spec = trained.recipe
    if not isinstance(spec.evaluate, Calibrated):
        raise UserError(f"{model}: a model for {spec.task} has no probabilities of classes that could be calibrated")
    given = {"evaluate.calibration": "temperature", "evaluate.conformal": conformal, "evaluate.ood": ood}
    spec = recipe.loads(
        recipe.dump(spec), str(model), {key: value for key, value in given.items() if value is not None}
    )
    module, part = labelled(trained, data, split, ("val", "all"))
    if trained.task.bank is None and "train" not in module.dataset.splits and getattr(spec.evaluate, "ood", None):
        raise UserError("--ood compares with the images that were trained on: calibrate without --data first")
    if part == "train":
        raise UserError("--split train: the network has learned from these, and nothing can be promised by them")
    refuse_in_vain(spec.evaluate, module.dataset.splits[part])  # type: ignore[arg-type]
    spec = fit_trust(lone_trainer(spec), trained.task, module, spec, part, str(data) if data else part)
    keep_trust(trained.task, spec, trained.checkpoint)
    evaluate: Any = spec.evaluate
    return evaluate.fitted
