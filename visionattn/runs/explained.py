"""What the worst and the best images of an evaluation depend on, for its section of the report."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.recipe import Recipe, part_of
from visionattn.report.evaluation import Evaluation
from visionattn.runs.checkpoints import Trained
from visionattn.tasks.base import Task

__all__ = ["add_explanations"]

log = logging.getLogger(__name__)
EACH = 3  # worst images, and best ones
METHOD = "layercam"  # which takes one pass forwards and backwards


def add_explanations(
    evaluation: Evaluation, task: Task, spec: Recipe, samples: Sequence[Sample], predictions: Sequence[Prediction]
) -> None:
    """Put pictures and a row about each, explained.csv, into an evaluation that is not written yet."""
    from visionattn.tools.explained_files import picture, row_of
    from visionattn.tools.explanations import Wanted, explained

    chosen = part_of(spec.task, "explain").chosen(evaluation, predictions, samples)
    rows: list[dict[str, Any]] = []
    for kind, members in chosen.items():
        for n, i in enumerate(members[:EACH]):
            try:
                (found,) = explained(Trained(task, spec, Path(), 0), [samples[i]], Wanted((METHOD,)))
            except UserError as error:
                log.info("the report does not show what %s depends on: %s", samples[i].name, error)
                return
            file = f"explained/{kind}-{n:02d}.png"
            evaluation.pictures[file] = picture(found)
            rows.append({"file": file, "kind": kind, **row_of(found)})
    if rows:
        evaluation.tables["explained.csv"] = rows
