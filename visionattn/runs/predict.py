"""`visionattn predict`: what a trained model says of any number of images, written case by case."""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from visionattn.data import formats
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, cases
from visionattn.environment import silence
from visionattn.errors import UserError, listed
from visionattn.files import Unwritable
from visionattn.progress import progress
from visionattn.recipe import part_of
from visionattn.runs.checkpoints import Trained, load_ensemble
from visionattn.runs.processes import shard
from visionattn.writers import Writer

__all__ = ["predict", "predictions"]

log = logging.getLogger(__name__)


def predict(
    models: Sequence[Path],
    paths: Sequence[Path],
    out: Path,
    polygons: bool = False,
    resume: bool = False,
    class_numbers: bool = False,
    format: str | None = None,
    score: float | None = None,
    uncertainty: bool = False,
) -> tuple[int, int]:
    """Write the probabilities of images to a table, or their masks into a folder.

    Of several processes (torchrun, SLURM) each predicts its share of the cases.

    Args:
        models: run directory or checkpoint; of several the mean is predicted, with what they disagree on.
        paths: files and folders (searched for files of the format that the model was trained on).
        out: the .csv to write; of masks and objects the folder to make, or the file of a `format` that has one.
        polygons: of scenes, write a GeoPackage beside each.
        class_numbers: masks hold 0, 1, 2, ... and not what the recipe's masks say for the classes.
        format: of objects, how they are written: see `visionattn.writers.of_objects`.
        score: of objects, the least that is written, of all classes; unset: those chosen on validation.
        uncertainty: with masks, write maps of what makes them doubtful.
        resume: keep the masks that an earlier command has written, and write the others.

    Returns:
        the numbers of cases that are predicted, and of those that cannot be read, which are named in warnings.

    Raises:
        UserError: something that would only fail later; before any work.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise UserError(f"no such file or folder: {listed(missing)}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
    trained = load_ensemble(models)
    data, kind, (process, processes) = trained.recipe.data, part_of(trained.recipe.task, "task"), shard()
    if class_numbers and formats.module_of(data).KIND.target != "mask":
        raise UserError("--class-numbers is for masks, which this model does not predict")
    if uncertainty and formats.module_of(data).KIND.target != "mask":
        raise UserError("--uncertainty is for masks; a table of classes has its columns without being asked")
    if (format or score is not None) and formats.module_of(data).KIND.target != "boxes":
        raise UserError("--format and --score are for objects, which this model does not predict")
    if score is not None:
        if not 0 <= score <= 1:
            raise UserError(f"--score is {score:g}, expected 0 to 1")
        evaluate = trained.recipe.evaluate.model_copy(update={"score": score})
        trained = trained._replace(recipe=trained.recipe.model_copy(update={"evaluate": evaluate}))
    options: dict[str, Any] = {"polygons": polygons} | ({"class_numbers": True} if class_numbers else {})
    options |= {"format": format} if format else {}
    if uncertainty:
        options["uncertainty"] = trained.task.doubting = True
    options |= {"looks": looks} if (looks := trained.task.looks) > 1 else {}
    writer: Writer = kind.open_writer(trained.recipe, out, **options)
    samples, problems = formats.unlabelled(paths, data, len(data.mean or ()))
    if process > 0:
        problems = []  # which the first process tells
    for problem in problems:
        log.warning(problem)
    members = list(cases(samples).values())[process::processes]
    mine = [samples[i] for case in members for i in case]
    if resume:
        mine = writer.left(mine)
    writer.refuse(mine)
    with writer.share(process, processes), closing(predictions(trained, mine)) as predicted:
        written = _write(writer, mine, predicted)
    return written, len(cases(mine)) - written + len(problems)


def _write(writer: Writer, samples: Sequence[Sample], predicted: Iterator[Prediction]) -> int:
    """Write case by case; returns how many."""
    members, written = cases(samples), 0
    by_case = groupby(predicted, key=lambda prediction: samples[prediction.index].case)
    for case, parts in progress(by_case, "predicting", len(members)):
        first = members[case][0]
        try:
            counted_from_first = (part._replace(index=part.index - first) for part in parts)
            writer.write([samples[i] for i in members[case]], counted_from_first)
            written += 1
        except Unwritable:
            raise
        except UserError as error:
            log.warning(error)
            writer.leave_out(case)
    return written


def predictions(trained: Trained, samples: Sequence[Sample]) -> Generator[Prediction, None, None]:
    """What a trained model says of unlabelled samples, in order, on the best device there is."""
    silence()
    fabric = Fabric(accelerator="auto", devices=1, precision=trained.recipe.train.precision)
    trained.task.eval().to(fabric.device)
    kind = part_of(trained.recipe.task, "task")
    if samples:
        with closing(kind.predictions(trained.task, samples, trained.recipe, fabric)) as predicted:
            yield from predicted
