"""`visionattn fit`: from a recipe to a run directory with checkpoints, metrics, evaluations and a report.

Everything that can be refused is refused before the run directory is made, and what needs no pixels before the images
are read. `resume` continues a run after a kill at any moment, to the same weights as the uninterrupted run: every epoch
starts from a seed of its own and the last checkpoint is written whole at its end.
"""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from visionattn.data import formats
from visionattn.data.loaders import SplitDataModule
from visionattn.data.sample import Dataset
from visionattn.data.splits import split
from visionattn.data.survey import doubts, read_through, usable
from visionattn.environment import silence
from visionattn.errors import UserError, listed
from visionattn.models.adapters import trained_parameters
from visionattn.models.determinism import refuse_nondeterministic
from visionattn.models.handover import about, save_backbone, with_bands
from visionattn.models.networks import try_out
from visionattn.recipe import Recipe, part_of
from visionattn.report.page import write_report
from visionattn.runs.calibrate import asked, fit_trust, keep_trust
from visionattn.runs.checkpoints import epoch_of, load_weights, provenance
from visionattn.runs.directory import RunDirectory
from visionattn.runs.evaluate import evaluate_split
from visionattn.runs.processes import forget_handover, from_first, is_first, offer
from visionattn.runs.sharding import FullySharded, refuse_sharded
from visionattn.runs.trainer import check_limits, check_trainer, make_trainer, on_cuda
from visionattn.tasks.base import Task

__all__ = ["fit", "prepare", "rehearse", "resume"]

log = logging.getLogger(__name__)


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
    path = run or RunDirectory.name_for(name)

    def begin() -> tuple[RunDirectory, Recipe, Dataset]:
        directory = RunDirectory(path)
        directory.refuse_existing()
        log.info("run: %s", path)
        resolved, dataset, task = prepare(spec)
        for warning in dataset.warnings:
            log.warning(warning)
        if resolved.model.checkpoint is not None:
            log.info(f"{task.network.start}; {_statistics(resolved)}")
        directory.make(resolved, dataset, monitor=task.monitored.removeprefix("val/"), **task.facts)
        return directory, resolved, dataset

    return _train(*from_first(begin))


def resume(run: Path) -> Path:
    """Continue a run from its last whole epoch; a finished one is evaluated and reported again.

    Raises:
        UserError: not a run directory, or its images have changed since it began.
    """

    def begin() -> tuple[RunDirectory, Recipe, Dataset]:
        directory = RunDirectory.existing(run)
        spec, dataset, task = prepare(directory.recipe)
        directory.refuse_other_data(dataset)
        directory.refuse_other_facts(task.facts)
        if directory.last.is_file():
            log.info("continuing %s after epoch %d of %d", run, epoch_of(directory.last), spec.train.epochs)
        return directory, spec, dataset

    return _train(*from_first(begin))


def prepare(spec: Recipe) -> tuple[Recipe, Dataset, Task]:
    """A recipe that has met its data: resolved, with the samples and the network to train.

    Raises:
        UserError: anything that cannot be trained.
    """
    silence()
    check_trainer(spec)
    kind = part_of(spec.task, "task")
    kind.refuse_names(spec)
    if getattr(spec.evaluate, "fitted", None) is not None:
        raise UserError("evaluate.fitted is of other weights, which fit and calibrate write it beside: leave it out")
    spec = spec.model_copy(update={"data": with_bands(spec.data, spec.model)})
    samples, classes, problems = formats.find(spec.data)
    dataset, more = split(samples, classes, spec.data)
    _refuse([*problems, *more], dataset)
    rehearse(spec, dataset)
    dataset = usable(read_through(dataset, spec.data.survey, spec.data.split_seed), spec.data.skip_bad)
    dataset = replace(dataset, warnings=doubts(dataset))
    spec, dataset = kind.resolve(spec, dataset)
    return spec, dataset, make_task(spec, dataset)


def _statistics(spec: Recipe) -> str:
    """Whether the mean and std of a resolved recipe are those that its starting weights were trained with."""
    assert spec.model.checkpoint is not None
    source = about(spec.model.checkpoint)
    if source is None:
        return "it does not say with which mean and std it was trained"
    same = (spec.data.mean, spec.data.std) == (source.mean, source.std)
    return "mean and std are its own" if same else "mean and std are this recipe's or measured, not its own"


def make_task(spec: Recipe, dataset: Dataset) -> Task:
    """The network of a resolved recipe with its loss and metrics, the same for the same seed."""
    pl.seed_everything(spec.train.seed, verbose=False)
    task = part_of(spec.task, "task").make(spec, dataset)
    task.provenance = provenance(spec)
    return task


def _refuse(problems: list[str], dataset: Dataset) -> None:
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"the data have {count}:\n{listed(problems, chr(10))}")
    empty = [name for name, samples in dataset.splits.items() if not samples]
    if empty:
        raise UserError(f"data: no images in {listed(empty)}")


def rehearse(spec: Recipe, dataset: Dataset) -> None:
    """Build all that would be trained, once, on samples that need not have been read.

    Raises:
        UserError: anything that cannot be built.
    """
    check_trainer(spec)
    kind = part_of(spec.task, "task")
    kind.refuse_names(spec)
    spec, dataset = kind.resolve(spec, dataset)
    task = kind.make(spec, dataset)
    refuse_sharded(spec, task)
    validated = kind.evaluation_set(dataset.splits["val"], spec.data)
    check_limits(spec, len(kind.training_set(dataset, spec)), len(validated))
    image = (len(spec.data.mean or ()), *spec.data.side)
    batch = min(2, spec.data.batch_size)
    try_out(task.network, spec.model.name, image)  # alone, as a single image is predicted
    try_out(task.network, spec.model.name, image, batch, training=True)
    if spec.train.deterministic and on_cuda(spec):
        refuse_nondeterministic(task.network, spec.model.name, image, batch)


def _train(directory: RunDirectory, spec: Recipe, dataset: Dataset) -> Path:
    silence()
    kind, task = part_of(spec.task, "task"), make_task(spec, dataset)
    seed, training_set = spec.train.seed, kind.training_set(dataset, spec)
    data = SplitDataModule(dataset, spec.data, training_set, kind.evaluation_set, kind.collate, seed)
    trainer = make_trainer(spec, task, directory)
    if trainer.world_size > 1:
        offer((directory, spec, dataset))
    if is_first() and (rest := len(training_set) % (spec.data.batch_size * trainer.world_size)):
        log.info(
            "an epoch trains on %d of %d images, others each time: the last incomplete batch is left out",
            *(len(training_set) - rest, len(training_set)),
        )
    if is_first() and (table := trained_parameters(task.network)):
        log.info(table)
    resumed = directory.last if directory.last.is_file() else None
    began = time.monotonic()
    with directory.locked() if is_first() else nullcontext():
        trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
        forget_handover()
        if isinstance(trainer.strategy, FullySharded):
            task = make_task(spec, dataset)  # whole again
        _evaluate(task, data, trainer, directory)
        if trainer.is_global_zero:
            directory.finish(time.monotonic() - began)
            write_report(directory.path)
    return directory.path


def _evaluate(task: Task, data: SplitDataModule, trainer: pl.Trainer, directory: RunDirectory) -> None:
    """Evaluate the best weights on val and test, and the last ones where the task does."""
    done: set[int] = set()
    for checkpoint in (directory.best, directory.last) if task.evaluates_last else (directory.best,):
        epoch, spec = load_weights(task, checkpoint)
        if checkpoint == directory.best and trainer.is_global_zero:
            save_backbone(task.network, checkpoint)
        if checkpoint == directory.best and asked(spec) and task.fitted is None:
            spec = fit_trust(trainer, task, data, spec, "val", "val")
            if trainer.is_global_zero:
                keep_trust(task, spec, checkpoint)
        if epoch in done:
            continue
        done.add(epoch)
        about: dict[str, Any] = {"checkpoint": f"checkpoints/{checkpoint.name}", "epoch": epoch}
        for name in [name for name in ("val", "test") if name in data.dataset.splits]:
            title = name if checkpoint == directory.best else f"{name}-last"
            evaluation = evaluate_split(trainer, task, data, name, spec, about)
            if evaluation is not None:
                evaluation.split = title
                evaluation.write(directory.path / "evaluation" / title, replace=True)
