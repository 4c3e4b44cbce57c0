"""Looking through a data set before training: what is in it, and what is wrong with it."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from visionattn.data.images import listed
from visionattn.data.labelled import equal_images, find, scan_splits, too_small
from visionattn.data.survey import Scan, mean_std
from visionattn.recipe import ClassificationData

__all__ = ["Findings", "check", "format_findings"]

RATIO_WORTH_A_NOTE = 3


@dataclass(frozen=True)
class Findings:
    """What `check` found.

    Attributes:
        classes: names, in order.
        counts: for each split (classes,) readable images of each class.
        images: for each split the number of readable images.
        sizes: for each split (3, 2): smallest, median and largest height and width.
        kinds: for each split how many images there are of each kind (Pillow's mode of files, type of an array).
        mean, std: per channel over the readable training images, of values in 0..1.
        unreadable: for each split the reasons.
        duplicates: groups of names of equal images within a split.
        leakage: groups of names of equal images in different splits.
        conflicts: groups of names of equal images with different labels.
        problems: what has to be mended before training, one message each.
        notes: what is worth knowing.
    """

    classes: list[str]
    counts: dict[str, np.ndarray]
    images: dict[str, int]
    sizes: dict[str, np.ndarray]
    kinds: dict[str, Counter[str]]
    mean: list[float]
    std: list[float]
    unreadable: dict[str, list[str]]
    duplicates: list[list[str]]
    leakage: list[list[str]]
    conflicts: list[list[str]]
    problems: list[str]
    notes: list[str]


def check(data: ClassificationData) -> Findings:
    """Read every image of a data section and say what there is.

    Equal means pixel for pixel after decoding, whatever the files are called; the same picture compressed or scaled
    anew is not found.

    Raises:
        UserError: the data section cannot be read as labelled splits at all (see `visionattn.data.find`).
    """
    found = find(data)
    scans = scan_splits(found, data)
    readable = {name: split.take(np.flatnonzero(scans[name].channels)) for name, split in found.splits.items()}
    counts = {name: split.counts(len(found.classes)) for name, split in readable.items()}
    duplicates, leakage, conflicts = equal_images(found, scans)
    channels = data.channels or max(int(s.channels.max()) for s in scans.values())
    mean, std = mean_std(scans["train"], channels) if len(readable["train"]) else ([], [])
    reasons = [reason for s in scans.values() for reason in s.unreadable.values()]
    absent = [found.classes[k] for k in np.flatnonzero(counts["train"] == 0)]
    problems = [
        *_message(reasons, "cannot be read", "\n"),
        *_message(too_small(found, scans, data), "smaller than data.image_size, with data.resize none"),
        *_message(absent, "classes without a readable training image"),
        *_message(leakage, "images in more than one split: results on held-out images would be too good", "\n"),
        *_message(conflicts, "images with contradicting labels", "\n"),
    ]
    notes = [
        *_message(duplicates, "images more than once in a split", "\n"),
        *_imbalance(found.classes, counts["train"], found.multi_label),
        *_absences(found.classes, counts),
        *_mixtures(scans),
    ]
    return Findings(
        classes=found.classes,
        counts=counts,
        images={name: len(split) for name, split in readable.items()},
        sizes={name: _sizes(s) for name, s in scans.items()},
        kinds={name: Counter(filter(None, s.kinds)) for name, s in scans.items()},
        mean=mean,
        std=std,
        unreadable={name: list(s.unreadable.values()) for name, s in scans.items()},
        duplicates=duplicates,
        leakage=leakage,
        conflicts=conflicts,
        problems=problems,
        notes=notes,
    )


def format_findings(findings: Findings) -> str:
    """The findings as text for a terminal."""
    splits = list(findings.counts)
    rows = [["class", *splits]]
    rows += [[c, *(str(findings.counts[s][k]) for s in splits)] for k, c in enumerate(findings.classes)]
    rows += [["images", *(str(findings.images[s]) for s in splits)]]
    rows += [["unreadable", *(str(len(findings.unreadable[s])) for s in splits)]]
    for row, what in enumerate(("smallest", "median", "largest")):
        rows += [[f"{what} height x width", *("{:.0f} x {:.0f}".format(*findings.sizes[s][row]) for s in splits)]]
    rows += [["kinds", *(", ".join(f"{n} {kind}" for kind, n in findings.kinds[s].items()) for s in splits)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines += ["", f"training images, per channel: mean {findings.mean}, std {findings.std}"]
    for title, messages in (("PROBLEM", findings.problems), ("note", findings.notes)):
        lines += ["", *(f"{title}: {message}".replace("\n", "\n    ") for message in messages)] if messages else []
    return "\n".join([*lines, "", f"problems: {len(findings.problems) or 'none'}"])


def _sizes(s: Scan) -> np.ndarray:
    sizes = s.sizes[s.channels > 0]
    return np.stack([f(sizes, axis=0) for f in (np.min, np.median, np.max)]) if len(sizes) else np.zeros((3, 2))


def _message(items: list[str] | list[list[str]], what: str, separator: str = ", ") -> list[str]:
    """One message where there are items, else none."""
    texts = [item if isinstance(item, str) else " = ".join(item) for item in items]
    return [f"{len(items)} {what}:{separator.replace(', ', ' ')}{listed(texts, separator)}"] if items else []


def _imbalance(classes: list[str], train: np.ndarray, multi_label: bool) -> list[str]:
    most, least = train.argmax(), train.argmin()
    if multi_label or train[least] == 0 or train[most] < RATIO_WORTH_A_NOTE * train[least]:
        return []
    return [
        f"classes are unbalanced in training: {train[most]} of {classes[most]}, {train[least]} of {classes[least]}; "
        "see loss.class_weights and data.balanced_sampling"
    ]


def _absences(classes: list[str], counts: dict[str, np.ndarray]) -> list[str]:
    return [
        f"no readable {name} image of: {listed([classes[k] for k in np.flatnonzero(n == 0)])}"
        for name, n in counts.items()
        if name != "train" and (n == 0).any()
    ]


def _mixtures(scans: dict[str, Scan]) -> list[str]:
    channels = np.concatenate([s.channels for s in scans.values()])
    kinds = {kind for s in scans.values() for kind in s.kinds if kind}
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
