"""Drawing splits: stratified by class, whole groups together, the same for the same seed."""

import warnings

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold, StratifiedKFold, train_test_split

from visionattn.data.images import listed
from visionattn.errors import UserError

__all__ = ["draw", "fold"]

GROUP_DRAWS = 100


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
        stay, out = train_test_split(np.arange(len(strata)), test_size=held, random_state=seed, stratify=strata)
        return np.sort(stay), np.sort(out)
    if len(np.unique(groups)) < 2:
        raise UserError(f"{len(np.unique(groups))} group; at least 2 are needed to draw a split")
    member = _one_hot(labels)
    splitter = GroupShuffleSplit(GROUP_DRAWS, test_size=fraction, random_state=seed)
    return min(splitter.split(member, groups=groups), key=lambda parts: _uneven(member, parts[1], fraction))


def fold(
    labels: np.ndarray, classes: list[str], index: int, folds: int, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices outside and inside fold `index`; the folds are a partition. Arguments and errors as in `draw`."""
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
