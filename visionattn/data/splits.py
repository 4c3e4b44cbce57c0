"""Which samples are trained on and which are held out: as the source says, as list files say, drawn, or by folds.

What is drawn is the same for the same seed. Samples with class labels are stratified by them; whole groups stay
together; samples with masks or boxes are drawn as groups, of which each may be one image, and as evenly by the classes
of their objects as 100 draws allow where those are known.
"""

import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Self
from unicodedata import normalize

import numpy as np
from pydantic import Field, model_validator

from visionattn.data.sample import SPLITS, Dataset, Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import Data, Section

__all__ = ["OTHER_NAMES", "GroupSection", "draw", "fold", "given_splits", "split", "split_named", "split_of_file"]

log = logging.getLogger(__name__)
OTHER_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
GROUP_DRAWS = 100


class GroupSection(Section):
    """Samples whose names say what belongs together."""

    group: str | None = Field(
        None, description="regular expression that finds in a name what is never split apart (patient, scene)"
    )

    @model_validator(mode="after")
    def _group_is_a_pattern(self) -> Self:
        try:
            re.compile(self.group or "")
        except re.error as error:
            raise ValueError(f"group is {self.group!r}, which is no regular expression: {error}") from None
        return self

    def group_of(self, name: str) -> str:
        """What `group` finds in the name; unset: the name itself. Raises UserError where it finds nothing."""
        if self.group is None:
            return name
        match = re.search(self.group, name)
        if match is None:
            raise UserError(f"{name}: data.group {self.group!r} finds nothing in this name")
        return match[1] if match.groups() else match[0]


def split_named(words: Iterable[str]) -> str:
    """The split that the first of these words is a name of; "" without one."""
    spelt = {split: split for split in SPLITS} | OTHER_NAMES
    return next((spelt[word.lower()] for word in words if word.lower() in spelt), "")


def split_of_file(path: Path) -> str:
    """The split that a relative path is named after: by the words of its own name, else by those of its folders."""
    places = [path.stem, *reversed(path.parent.parts)]
    return split_named(word for place in places for word in re.split(r"[^A-Za-z]+", place))


def split(samples: list[Sample], classes: list[str], section: Data) -> tuple[Dataset, list[str]]:
    """The splits of a data section: those that its source or its lists give, completed by drawn ones.

    Returns:
        the data set, and a line for each thing that is wrong with its splits.

    Raises:
        UserError: the samples cannot be split as asked.
    """
    splits, problems = given_splits(samples, section)
    fraction = section.val_fraction
    if "all" in splits:
        splits["train"] = splits.pop("all")
        if fraction + section.test_fraction >= 1:
            raise UserError(
                f"data: val_fraction {fraction} and test_fraction {section.test_fraction} leave nothing to train on"
            )
        if section.test_fraction > 0:
            splits["train"], splits["test"] = _held_out(splits["train"], classes, section, section.test_fraction)
            fraction /= 1 - section.test_fraction  # both are shares of the whole
    if not splits.get("train"):
        raise UserError(
            "\n".join([f"data: no training images; there are only: {listed(list(splits))}", *problems[:20]])
        )
    if section.fold is not None:
        pool = splits["train"] + splits.get("val", [])
        labels, groups = _strata_of(pool, len(classes))
        parts = fold(labels, classes, section.fold, section.folds, section.split_seed, groups)
        splits["train"], splits["val"] = _taken(pool, parts)
    elif "val" not in splits:
        if not fraction:
            raise UserError("data: no validation images; add a val split, or set data.val_fraction, for example to 0.2")
        splits["train"], splits["val"] = _held_out(splits["train"], classes, section, fraction)
    splits = {name: splits[name] for name in SPLITS if name in splits}
    if section.labelled is not None:
        splits["train"] = _few(splits["train"], section.labelled, section.split_seed)
    return Dataset(classes, splits), problems + _crossing(splits)


def _few(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    """So many samples of each class, or cases in all, drawn by the seed, in their order; told where there are fewer."""
    kinds: dict[int, list[str]] = {}
    for sample in samples:
        cases = kinds.setdefault(-1 if sample.label is None or np.ndim(sample.label) else int(sample.label), [])
        if not cases or cases[-1] != sample.case:
            cases.append(sample.case)
    fewest = min(map(len, kinds.values()), default=0)
    if fewest < count:
        log.warning(
            "data.labelled is %d, but there are %d to train on%s", count, fewest, " of a class" * (len(kinds) > 1)
        )
    draw = np.random.default_rng(seed)
    kept = {cases[i] for cases in kinds.values() for i in draw.permutation(len(cases))[:count]}
    return [sample for sample in samples if sample.case in kept]


def given_splits(samples: list[Sample], section: Data) -> tuple[dict[str, list[Sample]], list[str]]:
    """The splits that list files or the source name, or one called "all"; and what lists and samples lack."""
    lists = {name: path for name in SPLITS if (path := getattr(section.lists, name))}
    if lists:
        return _listed_splits(samples, lists)
    splits: dict[str, list[Sample]] = {}
    for sample in samples:
        splits.setdefault(sample.split or "all", []).append(sample)
    if "all" in splits and len(splits) > 1:
        outside = listed([sample.name for sample in splits["all"]], most=5)
        raise UserError(f"data.root: some images are in {listed(sorted(set(splits) - {'all'}))}, but not {outside}")
    return {name: splits[name] for name in (*SPLITS, "all") if name in splits}, []


def _listed_splits(samples: list[Sample], lists: dict[str, Path]) -> tuple[dict[str, list[Sample]], list[str]]:
    known: dict[str, list[Sample]] = {}
    for sample in samples:
        for key in {sample.name, sample.case, sample.case.rsplit("/", 1)[-1]}:
            known.setdefault(normalize("NFC", key), []).append(sample)
    splits: dict[str, list[Sample]] = {}
    homes: dict[str, list[str]] = {}
    problems = []
    for name, path in lists.items():
        if not path.is_file():
            raise UserError(f"data.lists.{name}: {path}: no such file")
        try:
            text = normalize("NFC", path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise UserError(f"data.lists.{name}: {path}: not a text file; expected a name in each line") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines and not known.keys() & set(lines):
            raise UserError(
                f"data.lists.{name}: {path} names no image of the data: {listed(lines, most=5)}; expected names such "
                f"as {listed([sample.name for sample in samples], most=3)}"
            )
        problems += [f"{path}: no image called {line}" for line in lines if line not in known]
        splits[name] = [sample for line in lines for sample in known.get(line, [])]
        for line in lines:
            homes.setdefault(line, []).append(name)
    problems += [f"data.lists: {line} is listed in {listed(where)}" for line, where in homes.items() if len(where) > 1]
    return splits, problems


def _crossing(splits: dict[str, list[Sample]]) -> list[str]:
    """Groups, and cases of several samples, that are in more than one split; a line for all."""
    homes: dict[str, set[str]] = {}
    for name, samples in splits.items():
        for sample in samples:
            if sample.group != sample.name:  # without groups, a name in two folders is two images
                homes.setdefault(sample.group, set()).add(name)
    crossing = [f"{group} ({', '.join(sorted(home))})" for group, home in homes.items() if len(home) > 1]
    return [f"data: {len(crossing)} groups are in more than one split: {listed(crossing)}"] if crossing else []


def _strata_of(samples: list[Sample], classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(N,) labels or (N, classes), zeros for masks, and the groups of samples that are not drawn one by one."""
    groups = np.array([sample.group for sample in samples])
    if samples[0].label is None:
        labels = np.zeros((len(samples), classes))
        for row, sample in zip(labels, samples, strict=True):
            if sample.present is not None:
                row[sample.present] = 1
        return labels if labels.any() else np.zeros(len(samples), np.int64), groups
    labels = np.stack([sample.label for sample in samples])
    return labels, groups if any(sample.group != sample.name for sample in samples) else None


def _held_out(
    samples: list[Sample], classes: list[str], section: Data, fraction: float
) -> tuple[list[Sample], list[Sample]]:
    labels, groups = _strata_of(samples, len(classes))
    return _taken(samples, draw(labels, classes, fraction, section.split_seed, groups))


def _taken(samples: list[Sample], parts: tuple[np.ndarray, np.ndarray]) -> tuple[list[Sample], list[Sample]]:
    stay, out = ([samples[i] for i in np.sort(part)] for part in parts)
    return stay, out


def draw(
    labels: np.ndarray, classes: list[str], fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a fraction of the images out, with the class shares of the whole.

    Images with several labels are stratified by the rarest label of each. Whole groups are held out: of 100 seeded
    draws the one whose class shares are nearest is taken, since groups rarely allow the exact shares.

    Args:
        labels: (N,) class indices or (N, classes) of 0 and 1.
        groups: (N,) group of each image.

    Returns:
        sorted indices of the images that stay and of those held out.

    Raises:
        UserError: too few images or groups.
    """
    if groups is None:
        strata = _strata(labels, least=2)
        _refuse_small(strata, classes, 2, f"drawing {fraction:g} of the images by class")
        held = max(round(fraction * len(strata)), len(np.unique(strata)))
        if len(strata) - held < len(np.unique(strata)):
            raise UserError(f"{len(strata)} images are too few to hold {fraction:g} of every class out")
        from sklearn.model_selection import train_test_split  # seconds, which a recipe is read without

        stay, out = train_test_split(np.arange(len(strata)), test_size=held, random_state=seed, stratify=strata)
        return np.sort(stay), np.sort(out)
    if len(np.unique(groups)) < 2:
        raise UserError(f"{len(np.unique(groups))} group; at least 2 are needed to draw a split")
    from sklearn.model_selection import GroupShuffleSplit

    member = _one_hot(labels)
    splitter = GroupShuffleSplit(GROUP_DRAWS, test_size=fraction, random_state=seed)
    return min(splitter.split(member, groups=groups), key=lambda parts: _uneven(member, parts[1], fraction))


def fold(
    labels: np.ndarray, classes: list[str], index: int, folds: int, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices outside and inside fold `index`; the folds are a partition. Arguments and errors as in `draw`."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    strata = _strata(labels, least=folds)
    if groups is None:
        _refuse_small(strata, classes, folds, f"data.folds is {folds}")
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    else:
        if len(np.unique(groups)) < folds:
            raise UserError(f"data.folds is {folds}, but there are only {len(np.unique(groups))} groups")
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # a class in few groups is no error
        return list(splitter.split(strata, strata, groups))[index]


def _strata(labels: np.ndarray, least: int) -> np.ndarray:
    """(N,) what to stratify by; of several labels the rarest one, strata below `least` joined to the largest."""
    if labels.ndim == 1:
        return labels
    frequency = labels.sum(0)
    rarest = np.where(labels > 0, frequency, np.inf).argmin(1)
    strata = np.where(labels.any(1), rarest, labels.shape[1])
    values, counts = np.unique(strata, return_counts=True)
    strata[np.isin(strata, values[counts < least])] = values[counts.argmax()]
    return strata


def _refuse_small(strata: np.ndarray, classes: list[str], least: int, purpose: str) -> None:
    values, counts = np.unique(strata, return_counts=True)
    few = [f"{classes[v]} ({n})" for v, n in zip(values, counts, strict=True) if n < least]
    if few:
        raise UserError(f"{purpose} needs at least {least} images in every class; too few in: {listed(few)}")


def _one_hot(labels: np.ndarray) -> np.ndarray:
    return np.eye(labels.max() + 1)[labels] if labels.ndim == 1 else labels


def _uneven(member: np.ndarray, held: np.ndarray, fraction: float) -> float:
    """How far the held-out share of each class and of all images is from the wanted one."""
    shares = member[held].sum(0) / np.maximum(member.sum(0), 1)
    return float(np.abs(shares - fraction).sum() + abs(len(held) / len(member) - fraction) * member.shape[1])
