"""Looking through images with masks before training: what is in them, and what is wrong with them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from visionattn.data.images import listed
from visionattn.data.masked import ItemSplit, SegmentationImages, find, look_through, mean_std, same_ground
from visionattn.recipe import SegmentationData

__all__ = ["Findings", "check", "format_findings"]

RATIO_WORTH_A_NOTE = 20
MOSTLY_MISSING = 0.5
SHOWN = 20  # messages


@dataclass(frozen=True)
class Findings:
    """What `check` found.

    Attributes:
        classes: names, in order.
        images, cases, groups: how many there are in each split.
        pixels: for each split (classes + 1,) pixels of each class, and last those without label.
        present: for each split (classes,) images that have a pixel of the class.
        sizes: for each split (3, 2): smallest, median and largest height and width.
        channels: of the images.
        mean, std: per channel of the training images, in the values that the network's input is made from.
        problems: what has to be mended before training, one message each.
        notes: what is worth knowing.
    """

    classes: list[str]
    images: dict[str, int]
    cases: dict[str, int]
    groups: dict[str, int]
    pixels: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]
    channels: int
    mean: list[float]
    std: list[float]
    problems: list[str]
    notes: list[str]


def check(data: SegmentationData) -> Findings:
    """Read every image and mask of a data section and say what there is.

    Raises:
        UserError: the data section cannot be read as splits of images with masks at all.
    """
    found, problems = find(data)
    found = look_through(found)
    splits = found.splits
    problems += [look.error for split in splits.values() for look in split.looks if look.error]
    within, across = _equal_images(found)
    problems += _message(across, "images are in different splits") + same_ground(found)
    notes = _message(within, "images are more than once in a split")
    for name, split in splits.items():
        notes += _masks_worth_a_note(name, split, found.classes)
    if not any(look.error for split in splits.values() for look in split.looks):
        notes += _absences(found) + _imbalance(found)
    if data.format == "geotiff":
        from visionattn.data.formats.geotiff import notes as notes_of_scenes

        notes += notes_of_scenes([item for split in splits.values() for item in split.items])
    readable = [look for look in splits["train"].looks if not look.error]
    mean, std = mean_std(readable) if readable else ([], [])
    return Findings(
        classes=found.classes,
        images={name: len(split) for name, split in splits.items()},
        cases={name: len(split.cases) for name, split in splits.items()},
        groups={name: len({item.group for item in split.items}) for name, split in splits.items()},
        pixels={name: split.counts.sum(0) for name, split in splits.items()},
        present={name: (split.counts[:, :-1] > 0).sum(0) for name, split in splits.items()},
        sizes={name: _sizes(split) for name, split in splits.items()},
        channels=found.channels,
        mean=mean,
        std=std,
        problems=problems,
        notes=notes,
    )


def format_findings(findings: Findings) -> str:
    """The findings as text for a terminal."""
    splits = list(findings.images)
    rows = [["class: share of the labelled pixels (images)", *splits]]
    totals = {name: max(int(findings.pixels[name][:-1].sum()), 1) for name in splits}
    for k, title in enumerate(findings.classes):
        cells = [f"{findings.pixels[s][k] / totals[s]:.2%} ({findings.present[s][k]})" for s in splits]
        rows.append([title, *cells])
    rows.append(
        ["no label, of all pixels", *(f"{findings.pixels[s][-1] / _all(findings.pixels[s]):.2%}" for s in splits)]
    )
    for title in ("images", "cases", "groups"):
        rows.append([title, *(str(getattr(findings, title)[s]) for s in splits)])
    for row, what in enumerate(("smallest", "median", "largest")):
        rows += [[f"{what} height x width", *("{:.0f} x {:.0f}".format(*findings.sizes[s][row]) for s in splits)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines += ["", f"training images, per channel: mean {findings.mean}, std {findings.std}"]
    for title, messages in (("PROBLEM", findings.problems), ("note", findings.notes)):
        lines += ["", *(f"{title}: {message}" for message in messages[:SHOWN])] if messages else []
        lines += [f"{title}: and {len(messages) - SHOWN} more"] if len(messages) > SHOWN else []
    return "\n".join([*lines, "", f"problems: {len(findings.problems) or 'none'}"])


def _all(pixels: np.ndarray) -> int:
    return max(int(pixels.sum()), 1)


def _sizes(split: ItemSplit) -> np.ndarray:
    sizes = np.array([item.size for item in split.items])
    return np.stack([f(sizes, axis=0) for f in (np.min, np.median, np.max)])


def _message(items: Iterable[str], what: str) -> list[str]:
    items = list(items)
    return [f"{len(items)} {what}: {listed(items, most=8)}"] if items else []


def _equal_images(found: SegmentationImages) -> tuple[list[str], list[str]]:
    """Names of images with equal values, within a split and in different ones, joined by =."""
    places: dict[bytes, list[tuple[str, str]]] = {}
    for name, split in found.splits.items():
        for item, look in zip(split.items, split.looks, strict=True):
            if not look.error:
                places.setdefault(look.image, []).append((name, item.name))
    equal = [group for group in places.values() if len(group) > 1]
    texts = [(len({split for split, _ in group}) > 1, " = ".join(f"{s}: {n}" for s, n in group)) for group in equal]
    return [text for across, text in texts if not across], [text for across, text in texts if across]


def _masks_worth_a_note(name: str, split: ItemSplit, classes: list[str]) -> list[str]:
    """Masks of one class or without labels, images with hardly any value."""
    counts, names = split.counts, np.array(split.names)
    fine = np.array([not look.error for look in split.looks])
    labelled, kinds = counts[:, :-1].sum(1) > 0, (counts[:, :-1] > 0).sum(1)
    empty = fine & labelled & (kinds == 1) & (counts[:, 0] > 0)
    missing = np.array([look.missing > MOSTLY_MISSING for look in split.looks])
    return [
        *_message(names[fine & ~labelled], f"{name} masks have no labelled pixel"),
        *_message(names[empty], f"{name} masks have nothing but {classes[0]}"),
        *_message(names[missing], f"{name} images have values in less than half of their pixels"),
    ]


def _absences(found: SegmentationImages) -> list[str]:
    texts = []
    for name, split in found.splits.items():
        absent = np.flatnonzero(split.counts[:, :-1].sum(0) == 0)
        texts += [f"no {name} mask has a pixel of {listed([found.classes[k] for k in absent])}"] if len(absent) else []
    return texts


def _imbalance(found: SegmentationImages) -> list[str]:
    pixels = found.splits["train"].counts[:, :-1].sum(0)
    most, least = pixels.argmax(), np.where(pixels > 0, pixels, pixels.max() + 1).argmin()
    if pixels[most] < RATIO_WORTH_A_NOTE * pixels[least] or not pixels.any():
        return []
    return [
        f"classes are unbalanced in training: {found.classes[most]} has {pixels[most] / pixels[least]:.0f} times the "
        f"pixels of {found.classes[least]}; see loss.class_weights and data.rare_crops"
    ]
