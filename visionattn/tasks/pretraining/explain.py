"""What of a network that learns without labels could be explained: nothing that has a name."""

from collections.abc import Sequence

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.pretraining.recipe import Recipe
from visionattn.tasks.pretraining.task import Pretraining
from visionattn.tasks.targets import Asked, Seen

__all__ = ["chosen", "seen"]


def chosen(
    evaluation: Evaluation, predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> dict[str, list[int]]:
    return {}


def seen(task: Pretraining, sample: Sample, spec: Recipe, asked: Asked) -> list[Seen]:
    raise UserError("this network has learned without labels, so it says nothing that could be explained: train it on")
