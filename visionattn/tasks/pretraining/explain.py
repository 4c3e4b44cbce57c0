"""What of a network that learns without labels could be explained: nothing that has a name."""

from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.tasks.pretraining.recipe import Recipe
from visionattn.tasks.pretraining.task import Pretraining
from visionattn.tasks.targets import Asked, Seen

__all__ = ["seen"]


def seen(task: Pretraining, sample: Sample, spec: Recipe, asked: Asked) -> list[Seen]:
    raise UserError("this network has learned without labels, so it says nothing that could be explained: train it on")
