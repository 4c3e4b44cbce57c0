"""`visionattn evaluate`: measuring a trained model on labelled samples."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import distributed as dist

from visionattn.data import formats
from visionattn.data.loaders import SplitDataModule
from visionattn.data.sample import SPLITS, Dataset
from visionattn.data.splits import given_splits, split
from visionattn.data.survey import read_through, usable
from visionattn.environment import silence
from visionattn.errors import UserError, listed
from visionattn.files import Unwritable, refuse_existing
from visionattn.recipe import Recipe, part_of
from visionattn.recipe.sections import Data
from visionattn.report.evaluation import Evaluation
from visionattn.report.page import write_report
from visionattn.runs.checkpoints import Trained, load_trained
from visionattn.runs.explained import add_explanations
from visionattn.tasks.base import Task

__all__ = ["evaluate", "evaluate_split", "evaluate_trained", "labelled", "lone_trainer"]

log = logging.getLogger(__name__)


def evaluate(model: Path, data: Path | None, part: str | None, out: Path | None) -> Evaluation:
    """Evaluate a run or checkpoint on its own held-out samples or on other labelled ones, into a folder.

    Args:
        model: run directory or checkpoint.
        data: other labelled samples with the same classes, laid out as those of the recipe; for classification a
            folder of class folders (or of splits), .npz or .csv.
        part: the split to take; None: test where there is one, else val, else all.
        out: folder to make for the results; None: a new one in the run's evaluation/.
    """
    trained = load_trained(model)
    if out is not None:
        refuse_existing(out)
    evaluation = evaluate_trained(trained, data, part)
    if out is None:
        out = _free((model if model.is_dir() else Path()) / "evaluation" / (data.stem if data else evaluation.split))
    evaluation.write(out)
    if model.is_dir():
        try:
            write_report(model)
        except Unwritable as error:  # of a run that is not ours to write; the results are elsewhere
            log.warning(error)
    return evaluation


def evaluate_trained(trained: Trained, data: Path | None = None, part: str | None = None) -> Evaluation:
    """What `evaluate` measures, nothing written."""
    silence()
    spec = trained.recipe
    if data is not None and str(data) in SPLITS and not data.exists():
        raise UserError(
            f"data is {data}, but there is no such file or folder; for that split of the model's own data: --split "
            f'{data}, from Python split="{data}"'
        )
    module, part = labelled(trained, data, part, ("test", "val", "all"))
    about = {"checkpoint": str(trained.checkpoint), "epoch": trained.epoch, "data": str(data) if data else None}
    evaluation = evaluate_split(lone_trainer(spec), trained.task, module, part, spec, about)
    assert evaluation is not None  # on a single process
    return evaluation


def lone_trainer(spec: Recipe) -> pl.Trainer:
    """Of one process, in the precision of a recipe, which writes nothing."""
    return pl.Trainer(
        precision=spec.train.precision,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def labelled(
    trained: Trained, data: Path | None, part: str | None, preferred: Sequence[str]
) -> tuple[SplitDataModule, str]:
    """Labelled samples for a trained model, and the split to take: the one asked for, else the first preferred one.

    Args:
        data: other samples, laid out as those of the recipe; None: the model's own.

    Raises:
        UserError: they are not labelled as the recipe's, or there is no such split.
    """
    kind = part_of(trained.recipe.task, "task")
    section = trained.recipe.data if data is None else formats.elsewhere(trained.recipe.data, data)
    dataset = _labelled(section, trained, elsewhere=data is not None)
    splits = dataset.splits
    part = part or next(name for name in (*preferred, *splits) if name in splits)
    if part not in splits:
        raise UserError(f"--split {part}: the images have {', '.join(splits)}")
    if not splits[part]:
        raise UserError(f"{data or 'data'}: no images in {part}")
    return SplitDataModule(dataset, section, None, kind.evaluation_set, kind.collate), part


def _labelled(section: Data, trained: Trained, elsewhere: bool) -> Dataset:
    """The samples of a section with the classes and channels of the trained model; others are not split by drawing.

    Raises:
        UserError: they are not labelled as the recipe's.
    """
    samples, classes, problems = formats.find(section)
    if elsewhere:
        splits, more = given_splits(samples, section)
        dataset = Dataset(classes, splits)
    else:
        dataset, more = split(samples, classes, section)
    if problems := [*problems, *more]:
        raise UserError(f"the data have problems:\n{listed(problems, chr(10))}")
    part_of(trained.recipe.task, "task").refuse_other(trained.recipe, dataset)
    if elsewhere or section.skip_bad:  # the others were read through before training
        dataset = usable(read_through(dataset), section.skip_bad)
    return dataset


def evaluate_split(
    trainer: pl.Trainer, task: Task, data: SplitDataModule, part: str, spec: Recipe, about: dict[str, Any]
) -> Evaluation | None:
    """Predict one split, each process its share; the first one measures, the others give None."""
    mine = [prediction for batch in trainer.predict(task, data.loader(part)) or () for prediction in batch]
    shares = [mine]
    if dist.is_initialized():
        shares = [mine] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
    if not trainer.is_global_zero:
        return None
    predictions = [prediction for share in shares for prediction in share]
    samples = data.dataset.splits[part]
    evaluation = part_of(spec.task, "evaluation").measure(predictions, samples, spec, part)
    task.complete(evaluation)
    evaluation.about |= about | {"tta": spec.evaluate.tta}
    last_look = part == "test" or "test" not in data.dataset.splits
    if spec.evaluate.explain and last_look and not Path(str(about["checkpoint"])).name.startswith("last"):
        add_explanations(evaluation, task, spec, samples, predictions)
    return evaluation


def _free(folder: Path) -> Path:
    """The folder, or where it is taken the same with the next free number."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
