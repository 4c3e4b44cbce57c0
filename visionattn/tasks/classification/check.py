"""What `visionattn check` says of labelled images, beside what it says of all data."""

from collections.abc import Sequence

import numpy as np

from visionattn.data.sample import Dataset, Reading
from visionattn.errors import listed
from visionattn.tasks.classification.labels import Labelling, MultiLabel, SingleLabel
from visionattn.tasks.classification.recipe import Recipe

__all__ = ["findings", "too_small"]

RATIO_WORTH_A_NOTE = 3


def findings(dataset: Dataset, spec: Recipe) -> tuple[list[list[str]], list[str], list[str]]:
    """Rows of the table (a title and a text for each split; the first is the heading), problems and notes."""
    several = np.ndim(dataset.samples[0].label) == 1
    labelling: Labelling = MultiLabel(dataset.classes) if several else SingleLabel(dataset.classes)
    counts = {name: _counts(labelling, samples, dataset.readings[name]) for name, samples in dataset.splits.items()}
    rows = [["class", *counts]]
    rows += [[name, *(str(n[k]) for n in counts.values())] for k, name in enumerate(dataset.classes)]
    problems, notes = [], []
    absent = [dataset.classes[k] for k in np.flatnonzero(counts["train"] == 0)]
    problems += [f"{len(absent)} classes without a readable training image: {listed(absent)}"] if absent else []
    small = too_small(dataset, spec)
    if small:
        problems.append(f"{len(small)} smaller than data.image_size, with data.resize none: {listed(small)}")
    if not several:
        notes += _imbalance(dataset.classes, counts["train"])
    for name, count in counts.items():
        if name != "train" and (count == 0).any():
            notes.append(
                f"no readable {name} image of: {listed([dataset.classes[k] for k in np.flatnonzero(count == 0)])}"
            )
    return rows, problems, notes + _mixtures(dataset)


def _counts(labelling: Labelling, samples: Sequence, readings: Sequence[Reading]) -> np.ndarray:
    """(K,) readable images of each class."""
    readable = [sample for sample, reading in zip(samples, readings, strict=True) if not reading.error]
    return labelling.counts(readable) if readable else np.zeros(len(labelling.classes), np.int64)


def too_small(dataset: Dataset, spec: Recipe) -> list[str]:
    """Where nothing is resized: names and sizes of the images that a crop of `data.image_size` does not fit into."""
    if spec.data.resize != "none":
        return []
    height, width = spec.data.side
    return [
        f"{sample.name} ({reading.size[0]}x{reading.size[1]})"
        for name, samples in dataset.splits.items()
        for sample, reading in zip(samples, dataset.readings[name], strict=True)
        if reading.sound and (reading.size[0] < height or reading.size[1] < width)
    ]


def _imbalance(classes: list[str], train: np.ndarray) -> list[str]:
    most, least = train.argmax(), train.argmin()
    if train[least] == 0 or train[most] < RATIO_WORTH_A_NOTE * train[least]:
        return []
    return [
        f"classes are unbalanced in training: {train[most]} of {classes[most]}, {train[least]} of {classes[least]}; "
        "see loss.class_weights and data.balanced_sampling"
    ]


def _mixtures(dataset: Dataset) -> list[str]:
    readings = [reading for part in dataset.readings.values() for reading in part if reading.sound]
    channels = np.array([reading.channels for reading in readings])
    kinds = {reading.kind for reading in readings}
    deep = {kind for kind in kinds if kind.startswith(("I", "F"))}
    notes = []
    if {1, 3} <= set(channels.tolist()):
        notes.append(f"{(channels == 1).sum()} grey images among {(channels == 3).sum()} in colour")
    reduced = {kind for kind in kinds if kind.endswith(";16") and not kind.startswith("I")}
    if reduced:
        notes.append(f"16-bit colour ({listed(sorted(reduced))}): only the upper 8 bits are read")
    if deep and deep != kinds:
        notes.append(
            f"images deeper than 8 bits ({listed(sorted(deep))}) among 8-bit ones ({listed(sorted(kinds - deep))})"
        )
    return notes
