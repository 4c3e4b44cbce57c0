"""`visionattn check`: a recipe and its data before training, what is in them and what is wrong with them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from visionattn.data import formats
from visionattn.data.ground import same_ground
from visionattn.data.images import unused
from visionattn.data.sample import Dataset, Sample
from visionattn.data.splits import split
from visionattn.data.survey import across_splits, contradicting, equal_images, mean_std, not_looked_at, read_through
from visionattn.environment import silence
from visionattn.errors import UserError, listed
from visionattn.models.handover import with_bands
from visionattn.recipe import Recipe, part_of
from visionattn.recipe.sections import Data
from visionattn.runs.fit import rehearse

__all__ = ["Findings", "check"]

SHOWN = 20  # messages


@dataclass(frozen=True)
class Findings:
    """What `check` found; as text the table, problems and notes.

    Attributes:
        dataset: the samples in their splits, with what reading them has shown.
        rows: of the table: a title and a text for each split.
        mean, std: per channel over the readable training images, in the values that the network's input is made from.
        problems: what has to be mended before training, one message each.
        notes: what is worth knowing.
    """

    dataset: Dataset
    rows: list[list[str]]
    mean: list[float]
    std: list[float]
    problems: list[str]
    notes: list[str]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in self.rows]
        lines += ["", f"training images, per channel: mean {self.mean}, std {self.std}"]
        for title, messages in (("PROBLEM", self.problems), ("note", self.notes)):
            shown = [f"{title}: {message}".replace("\n", "\n    ") for message in messages[:SHOWN]]
            lines += ["", *shown] if messages else []
            lines += [f"{title}: and {len(messages) - SHOWN} more"] if len(messages) > SHOWN else []
        return "\n".join([*lines, "", f"problems: {len(self.problems) or 'none'}"])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def check(spec: Recipe) -> Findings:
    """Read every sample of a recipe's data, build what `fit` would train, and say what there is.

    Equal images are equal pixel for pixel after decoding, whatever the files are called; the same picture compressed or
    scaled anew is not found.

    Raises:
        UserError: the data cannot be read as labelled splits at all.
    """
    silence()
    spec = spec.model_copy(update={"data": with_bands(spec.data, spec.model)})
    samples, classes, problems = formats.find(spec.data)
    dataset, more = split(samples, classes, spec.data)
    problems = [*problems, *more]
    problems += [f"data: no images in {name}" for name, part in dataset.splits.items() if not part]
    dataset = read_through(dataset, spec.data.survey, spec.data.split_seed)
    readings = [reading for part in dataset.readings.values() for reading in part]
    unreadable = [reading.error for reading in readings if reading.error]
    problems += [f"{len(unreadable)} cannot be read:\n{listed(unreadable, chr(10))}"] if unreadable else []
    rows, of_task, notes = part_of(spec.task, "check").findings(dataset, spec)
    within, across, conflicts = _equal(dataset)
    problems += of_task
    problems += _message(across, "images in more than one split: results on held-out images would be too good")
    problems += _message(conflicts, "images with contradicting labels") + same_ground(dataset)
    notes = not_looked_at(dataset) + _message(within, "images more than once in a split") + notes
    notes += _left_out(spec.data, samples)
    if noted := getattr(formats.module_of(spec.data), "notes", None):
        notes += noted(dataset.samples)
    if not problems:
        problems += _refusal(spec, dataset)
    mean, std = _statistics(dataset)
    return Findings(dataset, [*rows, *_rows(dataset)], mean, std, problems, notes)


def _left_out(section: Data, samples: Sequence[Sample]) -> list[str]:
    """How many files of the data folder are in no sample."""
    root = getattr(section, "root", None)
    if root is None or not root.is_dir():
        return []
    others = unused(root, (file for sample in samples for file in sample.files))
    return [f"files below {root} that are neither an image nor a target of one: {others}"] if others else []


def _refusal(spec: Recipe, dataset: Dataset) -> list[str]:
    """What `fit` would say of the recipe."""
    try:
        rehearse(spec, dataset)
    except UserError as error:
        return [str(error)]
    return []


def _statistics(dataset: Dataset) -> tuple[list[float], list[float]]:
    try:
        mean, std = mean_std(dataset.readings["train"])
    except UserError:
        return [], []
    return mean.round(6).tolist(), std.round(6).tolist()


def _rows(dataset: Dataset) -> list[list[str]]:
    """How many samples and groups there are, their sizes, and how they are stored."""
    readable = {name: [r for r in part if r.sound] for name, part in dataset.readings.items()}
    grouped = any(sample.group != sample.name for sample in dataset.samples)
    rows = [["images", *(str(sum(not r.error for r in part)) for part in dataset.readings.values())]]
    if grouped:
        rows.append(["groups", *(str(len({sample.group for sample in part})) for part in dataset.splits.values())])
    rows.append(["unreadable", *(str(sum(r.error is not None for r in p)) for p in dataset.readings.values())])
    sizes = [np.array([r.size for r in part]) if part else np.zeros((1, 2)) for part in readable.values()]
    for what, function in (("smallest", np.min), ("median", np.median), ("largest", np.max)):
        rows.append([f"{what} height x width", *("{:.0f} x {:.0f}".format(*function(size, axis=0)) for size in sizes)])
    kinds = [Counter(r.kind for r in part if r.kind) for part in readable.values()]
    if any(kinds):
        rows.append(["kinds", *(", ".join(f"{n} {kind}" for kind, n in kind.items()) for kind in kinds)])
    return rows


def _equal(dataset: Dataset) -> tuple[list[str], list[str], list[str]]:
    """Names of equal images, joined by =: within a split, in different splits, with different targets."""
    within, across, conflicts = [], [], []
    for group in equal_images(dataset):
        text = " = ".join(_titled(dataset, *place) for place in group)
        if across_splits(group):
            across.append(text)
        if contradicting(dataset, group):
            conflicts.append(text)
        for name in dataset.splits:
            same = [place for place in group if place[0] == name]
            if len(same) > 1:
                within.append(" = ".join(_titled(dataset, *place) for place in same))
    return within, across, conflicts


def _titled(dataset: Dataset, split: str, i: int) -> str:
    sample = dataset.splits[split][i]
    title = sample.name if sample.name.startswith((f"{split}/", f"{split}[")) else f"{split}: {sample.name}"
    if sample.label is None:
        return title
    label = np.flatnonzero(sample.label) if np.ndim(sample.label) else [sample.label]
    return f"{title} ({';'.join(dataset.classes[k] for k in label)})"


def _message(items: Sequence[str], what: str) -> list[str]:
    """One message where there are items, else none."""
    return [f"{len(items)} {what}:\n{listed(items, chr(10))}"] if items else []
