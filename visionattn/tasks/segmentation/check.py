"""What `visionattn check` says of images with masks, beside what it says of all data."""

from collections.abc import Sequence

import numpy as np

from visionattn.data.sample import Dataset, Reading, Sample, cases
from visionattn.errors import listed
from visionattn.tasks.segmentation.recipe import Recipe

__all__ = ["findings"]

RATIO_WORTH_A_NOTE = 20
MOSTLY_MISSING = 0.5


def findings(dataset: Dataset, spec: Recipe) -> tuple[list[list[str]], list[str], list[str]]:
    """Rows of the table (a title and a text for each split; the first is the heading), problems and notes."""
    counts = {name: np.stack([reading.counts for reading in part]) for name, part in dataset.readings.items()}
    rows = [["class: share of the labelled pixels (images)", *counts]]
    for k, title in enumerate(dataset.classes):
        rows.append([title, *(_share(n[:, k], n[:, :-1]) + f" ({(n[:, k] > 0).sum()})" for n in counts.values())])
    rows.append(["no label, of all pixels", *(_share(n[:, -1], n) for n in counts.values())])
    rows.append(["cases", *(str(len(cases(samples))) for samples in dataset.splits.values())])
    notes: list[str] = []
    for name, samples in dataset.splits.items():
        notes += _masks_worth_a_note(name, samples, dataset.readings[name], dataset.classes)
    if not any(reading.error for part in dataset.readings.values() for reading in part):
        notes += _absences(dataset, counts) + _imbalance(dataset, counts["train"][:, :-1].sum(0))
    return rows, [], notes


def _share(some: np.ndarray, all_of: np.ndarray) -> str:
    return f"{some.sum() / max(int(all_of.sum()), 1):.2%}"


def _masks_worth_a_note(
    name: str, samples: Sequence[Sample], readings: Sequence[Reading], classes: list[str]
) -> list[str]:
    """Masks of one class or without labels, images with hardly any value."""
    unlabelled, single, missing = [], [], []
    for sample, reading in zip(samples, readings, strict=True):
        present = np.flatnonzero(reading.counts[:-1])
        if reading.sound and len(present) == 0:
            unlabelled.append(sample.name)
        if reading.sound and present.tolist() == [0]:
            single.append(sample.name)
        if reading.missing > MOSTLY_MISSING:
            missing.append(sample.name)
    texts = {
        f"{name} masks have no labelled pixel": unlabelled,
        f"{name} masks have nothing but {classes[0]}": single,
        f"{name} images have values in less than half of their pixels": missing,
    }
    return [f"{len(names)} {text}: {listed(names, most=8)}" for text, names in texts.items() if names]


def _absences(dataset: Dataset, counts: dict[str, np.ndarray]) -> list[str]:
    texts = []
    for name, count in counts.items():
        absent = np.flatnonzero(count[:, :-1].sum(0) == 0)
        texts += (
            [f"no {name} mask has a pixel of {listed([dataset.classes[k] for k in absent])}"] if len(absent) else []
        )
    return texts


def _imbalance(dataset: Dataset, pixels: np.ndarray) -> list[str]:
    most, least = pixels.argmax(), np.where(pixels > 0, pixels, pixels.max() + 1).argmin()
    if pixels[most] < RATIO_WORTH_A_NOTE * pixels[least] or not pixels.any():
        return []
    return [
        f"classes are unbalanced in training: {dataset.classes[most]} has {pixels[most] / pixels[least]:.0f} times the "
        f"pixels of {dataset.classes[least]}; see loss.class_weights and data.rare_crops"
    ]
