"""`visionattn calibrate`, and the end of `fit`: what held-out images say of how far a network can be trusted.

What is fitted goes into the recipe inside the checkpoint, as evaluate.fitted; features of training images, which others
are compared with, stand beside it.
"""

from collections.abc import Sequence
from itertools import accumulate
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
from visionattn.errors import UserError, listed
from visionattn.models.weights import load_checkpoint
from visionattn.recipe import Recipe, part_of
from visionattn.recipe.sections import Calibrated, Fitted
from visionattn.runs.checkpoints import AtomicCheckpointIO, Trained, load_trained
from visionattn.runs.evaluate import labelled, lone_trainer
from visionattn.tasks.base import Evidence, Task, refuse_in_vain

__all__ = ["asked", "calibrate", "calibrate_folds", "fit_trust", "keep_trust"]

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


def calibrate_folds(models: Sequence[Path], conformal: float | None = None) -> Fitted:
    """Fit one temperature, and least probabilities, for runs of all folds together, each on what it has not seen.

    It goes into the checkpoint of each; their mean promises the same.

    Args:
        models: run directories or checkpoints, one of each `data.fold`.
        conformal: share of the truth that sets may miss; None: as the first recipe says.

    Raises:
        UserError: they are not all folds of the same samples, or these cannot say it.
    """
    silence()
    members = [load_trained(model) for model in models]
    _refuse_no_folds(models, members)
    first: Any = members[0].recipe.evaluate
    given = {"calibration": "temperature", "conformal": first.conformal if conformal is None else conformal}
    evaluate = first.model_copy(update=given | {"ood": None} if hasattr(first, "ood") else given)
    trust, modules = part_of(members[0].recipe.task, "trust"), [labelled(one, None, "val", ())[0] for one in members]
    parts = [module.dataset.splits["val"] for module in modules]
    samples, starts = [sample for part in parts for sample in part], [0, *accumulate(map(len, parts[:-1]))]
    refuse_in_vain(evaluate, samples)

    def evidence(fitted: Fitted | None) -> list[Evidence]:
        seen: list[Evidence] = []
        for trained, module, start in zip(members, modules, starts, strict=True):
            trained.task.fitted = fitted
            own = _evidence(lone_trainer(trained.recipe), trained.task, module, "val")
            seen += [one._replace(index=one.index + start) for one in own]
        return seen

    pooled = evidence(None)
    images = len({samples[one.index].case for one in pooled})
    fitted = Fitted(images=images, source=f"val of {len(members)} folds", temperature=trust.temperature(pooled))
    if evaluate.conformal:
        fitted = trust.completed(fitted, evidence(fitted), samples, evaluate)
    for trained in members:
        own: Any = trained.recipe.evaluate
        known = fitted.model_copy(update={"unfamiliar": own.fitted and own.fitted.unfamiliar})
        spec = trained.recipe.model_copy(update={"evaluate": own.model_copy(update=given | {"fitted": known})})
        keep_trust(trained.task, spec, trained.checkpoint)
    return fitted


def _refuse_no_folds(models: Sequence[Path], members: Sequence[Trained]) -> None:
    """Raises UserError where models are not of each fold of the same samples."""
    split = ("root", "format", "folds", "split_seed")
    first: Any = members[0].recipe
    if not isinstance(first.evaluate, Calibrated):
        raise UserError(
            f"{models[0]}: a model for {first.task} has no probabilities of classes that could be calibrated"
        )
    for model, trained in zip(models, members, strict=True):
        data: Any = trained.recipe.data
        other = [name for name in split if getattr(data, name) != getattr(first.data, name)]
        if trained.recipe.task != first.task or data.fold is None or other:
            why = "has no data.fold" if data.fold is None else f"has another {other[0] if other else 'task'}"
            raise UserError(f"{model} {why}: runs are calibrated together where they are the folds of one data set")
    folds = sorted(trained.recipe.data.fold for trained in members if trained.recipe.data.fold is not None)
    if folds != list(range(first.data.folds)):
        raise UserError(f"the runs are of the folds {listed(folds)}, expected each of 0 to {first.data.folds - 1} once")


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
