"""Detection metrics: average precision as COCO has it, and what one matching of detections and objects says.

Average precision (AP) is torchmetrics' by faster-coco-eval, equal to pycocotools, with a limit of detections that
follows the densest image; a class that no image has is left out of means.

The matching: detections of a class, the surest first, each take the free object of the class that fits best
(`evaluate.match`: an IoU, or the centre inside the object). A detection that takes none and lies by half of itself in
an ignored object or region does not count. From it: precision, recall and F1 at a score, which are the same whatever
the detections below it are; the count error; and FROC, the mean sensitivity at 1/8, 1/4 ... 8 false positives per
image, of all images, those without objects too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torchmetrics.detection import MeanAveragePrecision

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.report.evaluation import LOSS, Metric

__all__ = [
    "FROC_RATES",
    "KINDS",
    "METRICS",
    "Matching",
    "Pair",
    "Precisions",
    "average_precision",
    "best_scores",
    "coco",
    "froc",
    "limit_of",
    "mask_fits",
    "match",
    "overall",
    "overlaps",
    "pair_up",
]

FROC_RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives per image
IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0, 1, 101)
MOST_PAIRS, GROUPS = 10**7, 500  # of an image that is measured at once, and of one that is measured in parts
STRIP = 256  # boxes that are compared with what is near them at once
IGNORED = 0.5  # of a detection inside what is ignored
NEAR = 0.1  # IoU below which a detection has nothing to do with an object (Bolya et al. 2020, TIDE)
KINDS = ("class", "place", "class and place", "duplicate", "nothing there")  # of false positives, as in TIDE
METRICS = {
    "map": Metric("AP", "average precision, mean over IoU 0.5 to 0.95 and over classes (COCO)"),
    "map_50": Metric("AP50", "average precision at IoU 0.5, mean over classes"),
    "map_75": Metric("AP75", "average precision at IoU 0.75, mean over classes"),
    "mar": Metric("AR", "recall, mean over IoU 0.5 to 0.95 and over classes"),
    "f1": Metric("F1", "of all classes together, at their scores"),
    "precision": Metric("precision", "of all classes together, at their scores"),
    "recall": Metric("recall", "of all classes together, at their scores"),
    "mask_map": Metric("mask AP", "average precision of masks, mean over IoU 0.5 to 0.95 and over classes"),
    "mask_map_50": Metric("mask AP50", "average precision of masks at IoU 0.5, mean over classes"),
    "froc": Metric("FROC", "mean sensitivity at 1/8 to 8 false positives per image"),
    "count_error": Metric("count error", "mean absolute difference of found and true objects per image"),
    "count_bias": Metric("count bias", "found minus true objects, of true ones"),
    "map_small": Metric("AP small", "of objects below 32 x 32 native pixels (COCO)"),
    "map_medium": Metric("AP medium", "of objects of 32 x 32 to 96 x 96 native pixels (COCO)"),
    "map_large": Metric("AP large", "of objects above 96 x 96 native pixels (COCO)"),
} | LOSS


def coco(
    predictions: Sequence[Boxes], truths: Sequence[Boxes], classes: int, limit: int
) -> tuple[dict[str, float | None], list[dict[str, float | None]]]:
    """COCO's metrics over all classes, and `map` and `map_50` of each; None where there is nothing to measure.

    Args:
        predictions: of each image, with scores; at most `limit` of each count.
        truths: of each image; what is ignored without a class is ignored for every class.
    """
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    rows: list[dict[str, float | None]] = [{"map": None, "map_50": None} for _ in range(classes)]
    if not any((~truth.ignore).any() for truth in truths):
        return dict.fromkeys((*names, "mar")), rows
    limit = max(limit, 11)  # torchmetrics takes three different ones
    metric = MeanAveragePrecision(
        iou_thresholds=list(IOUS),
        rec_thresholds=RECALLS.tolist(),
        max_detection_thresholds=[1, 10, limit],
        class_metrics=True,
        extended_summary=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # what it is given is of all processes
    )
    metric.warn_on_many_detections = False
    images = (_apart(p, _for_each_class(t, classes), limit) for p, t in zip(predictions, truths, strict=True))
    for prediction, known in chain.from_iterable(images):
        arrays = {"boxes": prediction.xyxy, "scores": prediction.scores, "labels": prediction.labels}
        labels = {"boxes": known.xyxy, "labels": known.labels, "iscrowd": known.ignore.astype(np.int64)}
        found, wanted = ({key: torch.from_numpy(x) for key, x in fields.items()} for fields in (arrays, labels))
        metric.update([found], [wanted])
    results = metric.compute()
    precision = results["precision"][..., -1].numpy()  # IoUs, recalls, classes that occur, sizes
    parts = {"map": precision[..., 0], "map_50": precision[0, ..., 0], "map_75": precision[5, ..., 0]}
    parts |= {f"map_{size}": precision[..., n] for n, size in enumerate(("small", "medium", "large"), 1)}
    values = {name: _measured(part) for name, part in parts.items()}
    for n, k in enumerate(results["classes"].reshape(-1).tolist()):
        rows[k] = {"map": _measured(precision[:, :, n, 0]), "map_50": _measured(precision[0, :, n, 0])}
    return values | {"mar": _measured(results["recall"][..., 0, -1].numpy())}, rows


def limit_of(truths: Sequence[Boxes], limit: int) -> int:
    """How many detections of an image count: what a network finds at once, and at least twice the most objects."""
    return max(limit, 2 * max((len(truth) for truth in truths), default=0))


def _for_each_class(truth: Boxes, classes: int) -> Boxes:
    """What is ignored and of no class, once for every class."""
    anything = truth.labels < 0
    if not anything.any():
        return truth
    regions = np.repeat(truth.xyxy[anything], classes, axis=0)
    labels = np.tile(np.arange(classes), anything.sum())
    return Boxes(
        np.concatenate([truth.xyxy[~anything], regions]),
        np.concatenate([truth.labels[~anything], labels]),
        np.concatenate([truth.ignore[~anything], np.ones(len(labels), bool)]),
    )


def _apart(prediction: Boxes, truth: Boxes, limit: int) -> Iterator[tuple[Boxes, Boxes]]:
    """An image; one of very many objects as several, where COCO compares each detection with each object.

    What may be matched stays together: detections and objects of a class with an IoU from the least, and with every
    detection what is ignored around it. At most `limit` detections of a class count, those of the whole image.
    """
    if len(prediction) * len(truth) <= MOST_PAIRS:
        yield prediction, truth
        return
    assert prediction.scores is not None
    surest = np.lexsort((-prediction.scores, prediction.labels))
    starts = np.searchsorted(prediction.labels[surest], prediction.labels[surest])
    prediction = prediction[surest[np.arange(len(surest)) - starts < limit]]
    d, o, shared = overlaps(prediction.xyxy, truth.xyxy)
    ignored, same = truth.ignore[o], prediction.labels[d] == truth.labels[o]
    least = IOUS[0] * (prediction.areas[d] + truth.areas[o] - shared)
    linked = (d[~ignored & same & (shared >= least)], o[~ignored & same & (shared >= least)] + len(prediction))
    size = len(prediction) + len(truth)
    graph = sparse.coo_array((np.ones(len(linked[0])), linked), (size, size))
    group = sparse.csgraph.connected_components(graph, directed=False)[1] // GROUPS
    around = sparse.coo_array((np.ones(ignored.sum()), (d[ignored], o[ignored])), (len(prediction), len(truth))).tocsr()
    order = np.argsort(group, kind="stable")
    for own in _of_each(group[order]):
        members = order[own]
        found, objects = members[members < len(prediction)], members[members >= len(prediction)] - len(prediction)
        objects = objects[~truth.ignore[objects]]
        yield prediction[found], truth[np.union1d(objects, around[found].indices)]


def _measured(values: np.ndarray) -> float | None:
    """The mean of what there is; -1 stands for nothing."""
    return float(values[values > -1].mean()) if (values > -1).any() else None


@dataclass(frozen=True, eq=False)
class Matching:
    """Detections and objects of an image, by class.

    Attributes:
        scores, labels: (D,) of the detections, the surest first.
        right: (D,) bool: it has an object.
        counts: (D,) bool: it is right or wrong; False where it is in what is ignored.
        owner: (D,) the object that it takes, -1 for none.
        order: (D,) position of each among the predictions.
        objects: (classes,) number of objects that count.
    """

    scores: np.ndarray
    labels: np.ndarray
    right: np.ndarray
    counts: np.ndarray
    owner: np.ndarray
    order: np.ndarray
    objects: np.ndarray


def match(
    prediction: Boxes,
    truth: Boxes,
    classes: int,
    rule: float | Literal["centre"],
    ignored: float = IGNORED,
    masks: bool = False,
) -> Matching:
    """The detections of an image, each with the object that it has found; see the module.

    Args:
        ignored: share of a detection inside what is ignored, from which it does not count.
        masks: the IoU is that of masks.
    """
    assert prediction.scores is not None
    order = np.argsort(-prediction.scores, kind="stable")
    scores, prediction = prediction.scores[order], prediction[order]
    known = np.flatnonzero(~truth.ignore)
    d, o, fit = mask_fits(prediction, truth[known]) if masks else _fits(prediction.xyxy, truth.xyxy[known], rule)
    o, least = known[o], 0 if rule == "centre" else rule
    good = (prediction.labels[d] == truth.labels[o]) & (fit >= least)
    d, o, fit = d[good], o[good], fit[good]
    owner = np.full(len(prediction), -1)
    free = np.ones(len(truth), bool)
    for own in _of_each(d):
        best = own[np.argmax(np.where(free[o[own]], fit[own], -1.0))]
        if free[o[best]]:
            owner[d[best]], free[o[best]] = o[best], False
    counts = (owner >= 0) | ~_in_ignored(prediction, truth, ignored)
    objects = np.bincount(truth.labels[~truth.ignore], minlength=classes)
    return Matching(scores, prediction.labels, owner >= 0, counts, owner, order, objects)


def overlaps(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of boxes (N, 4) and (M, 4) share some ground, in order, and how much: three times (P,).

    Boxes are compared by strips, so that a scene of many objects takes neither the time nor the memory of N x M.
    """
    one, other = (x.astype(np.float64) for x in (one, other))
    by_top, rows = (np.argsort(x[:, 1], kind="stable") for x in (other, one))
    tops, tallest = other[by_top, 1], (other[:, 3] - other[:, 1]).max(initial=0)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for part in np.split(rows, range(STRIP, len(rows), STRIP)) if len(rows) else ():
        reach = one[part, 1].min() - tallest, one[part, 3].max()
        near = by_top[slice(*np.searchsorted(tops, reach))]
        low = np.maximum(one[part, None, :2], other[None, near, :2])
        high = np.minimum(one[part, None, 2:], other[None, near, 2:])
        shared = (high - low).clip(0).prod(2)
        i, j = np.nonzero(shared)
        found.append((part[i], near[j], shared[i, j]))
    i, j, shared = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], shared[order]


def _fits(
    found: np.ndarray, objects: np.ndarray, rule: float | Literal["centre"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which detections (D, 4) are of which objects (N, 4), and how well."""
    d, o, shared = overlaps(found, objects)
    own, true = found.astype(np.float64)[d], objects.astype(np.float64)[o]
    if rule != "centre":
        union = (own[:, 2:] - own[:, :2]).prod(1) + (true[:, 2:] - true[:, :2]).prod(1) - shared
        return d, o, shared / union
    centre = (own[:, :2] + own[:, 2:]) / 2
    inside = ((centre >= true[:, :2]) & (centre < true[:, 2:])).all(1)
    away = np.linalg.norm(centre - (true[:, :2] + true[:, 2:]) / 2, axis=1)
    return d[inside], o[inside], 1 / (1 + away[inside])


def mask_fits(one: Boxes, other: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which objects of two lists share pixels of their masks, in order, and the IoU of these: three times (P,)."""
    assert one.masks is not None or not len(one)  # of what is asked for
    assert other.masks is not None or not len(other)
    places = [[pixels_of(box) for box in boxes.xyxy] for boxes in (one, other)]
    outer = [np.array([[c.start, r.start, c.stop, r.stop] for r, c in own]).reshape(-1, 4) for own in places]
    sizes = [np.array([mask.sum() for mask in boxes.masks or ()], np.float64) for boxes in (one, other)]
    n, m, _ = overlaps(*outer)
    shared = np.zeros(len(n))
    for at, pair in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
        a, b = (own[k] for own, k in zip(places, pair, strict=True))
        both = [masks[k] for masks, k in zip((one.masks, other.masks), pair, strict=True) if masks is not None]
        common = [slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)]
        parts = [
            mask[tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(common, place, strict=True))]
            for mask, place in zip(both, (a, b), strict=True)
        ]
        shared[at] = (parts[0] & parts[1]).sum()
    kept = shared > 0
    n, m, shared = n[kept], m[kept], shared[kept]
    return n, m, shared / (sizes[0][n] + sizes[1][m] - shared)


def _of_each(rows: np.ndarray) -> list[np.ndarray]:
    """Positions of each value in a sorted array."""
    return np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows)) + 1) if len(rows) else []


def _in_ignored(prediction: Boxes, truth: Boxes, share: float) -> np.ndarray:
    regions = truth[truth.ignore]
    d, r, shared = overlaps(prediction.xyxy, regions.xyxy)
    fits = (regions.labels[r] < 0) | (regions.labels[r] == prediction.labels[d])
    inside = np.zeros(len(prediction), bool)
    inside[d[fits & (shared >= share * prediction.areas[d])]] = True
    return inside


class Pair(NamedTuple):
    """A detection with the object that it is about, or one of the two alone.

    Attributes:
        found: position among the predictions; None for a missed object.
        object: None where nothing is near.
        kind: "right", one of KINDS, or "missed".
        takes: the object is this detection's alone, or missed.
    """

    found: int | None
    object: int | None
    iou: float
    kind: str
    takes: bool


def pair_up(prediction: Boxes, truth: Boxes, matching: Matching, kept: np.ndarray, least: float) -> Iterator[Pair]:
    """Each detection that is kept and counts, and each object that none of them has found.

    A detection of a wrong class takes its object, if that is free, so that each object is taken once.

    Args:
        kept: (D,) of the matching's detections.
        least: IoU from which a detection is of an object.
    """
    prediction = prediction[matching.order]
    known = np.flatnonzero(~truth.ignore)
    d, o, iou = _fits(prediction.xyxy, truth.xyxy[known], 0.0)
    o = known[o]
    of = {int(d[own[0]]): own for own in _of_each(d)}
    nothing = np.zeros(0, np.int64)
    right = kept & matching.right
    taken = np.zeros(len(truth), bool)
    taken[matching.owner[right]] = True
    for n in np.flatnonzero(right).tolist():
        owner, own = int(matching.owner[n]), of.get(n, nothing)
        yield Pair(int(matching.order[n]), owner, float(iou[own][o[own] == owner].sum()), "right", True)
    for n in np.flatnonzero(kept & matching.counts & ~matching.right).tolist():
        own = of.get(n, nothing)
        objects = o[own]
        kind, near = _kind(int(prediction.labels[n]), iou[own], truth.labels[objects], taken[objects], least)
        if near is not None and kind == "class":
            taken[objects[near]] = True
        about, fit = (None, 0.0) if near is None else (int(objects[near]), float(iou[own[near]]))
        yield Pair(int(matching.order[n]), about, fit, kind, kind == "class")
    for n in np.flatnonzero(~taken & ~truth.ignore).tolist():
        yield Pair(None, n, 0.0, "missed", True)


def _kind(label: int, iou: np.ndarray, labels: np.ndarray, taken: np.ndarray, least: float) -> tuple[str, int | None]:
    """What is wrong with a detection, and which of the objects near it, with this IoU, it is about."""
    if not len(iou) or iou.max() < NEAR:
        return "nothing there", None
    of_class, others = (np.where(labels == label, iou, 0.0), np.where(labels != label, iou, 0.0))
    free = np.where(taken, 0.0, others)
    if free.max() >= least:
        return "class", int(free.argmax())
    for near in (of_class, others):
        if near.max() >= least:
            return "duplicate", int(near.argmax())
    if of_class.max() >= NEAR:
        return "place", int(of_class.argmax())
    return "class and place", int(others.argmax())


class _Pooled:
    """The matchings of images as flat arrays, the surest detection first, each image counted `weights` times."""

    def __init__(self, matchings: Sequence[Matching], weights: np.ndarray | None = None) -> None:
        weights = np.ones(len(matchings)) if weights is None else weights
        self.scores = np.concatenate([m.scores[m.counts] for m in matchings])
        self.labels = np.concatenate([m.labels[m.counts] for m in matchings])
        self.right = np.concatenate([m.right[m.counts] for m in matchings])
        self.weights = np.repeat(weights, [int(m.counts.sum()) for m in matchings])
        order = np.argsort(-self.scores, kind="stable")
        self.scores, self.labels, self.right, self.weights = (
            x[order] for x in (self.scores, self.labels, self.right, self.weights)
        )
        self.objects = np.sum([w * m.objects for w, m in zip(weights, matchings, strict=True)], axis=0)
        self.images = weights.sum()


def best_scores(matchings: Sequence[Matching], classes: int) -> list[float]:
    """Of each class the score at which F1 is best; of a class without a right detection that of all classes."""
    pooled = _Pooled(matchings)
    overall = _best(pooled.scores, pooled.right, pooled.objects.sum())
    scores = []
    for k in range(classes):
        own = pooled.labels == k
        best = _best(pooled.scores[own], pooled.right[own], pooled.objects[k])
        scores.append(overall if best is None else best)
    return [0.5 if score is None else score for score in scores]


def _best(scores: np.ndarray, right: np.ndarray, objects: float) -> float | None:
    """In the middle between the last detection that is kept and the first that is not."""
    if not right.any():
        return None
    found = np.arange(1, len(scores) + 1)
    f1 = 2 * right.cumsum() / (found + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # of equal scores all are kept, or none
    last = int(f1.argmax())
    below = scores[last + 1] if last + 1 < len(scores) else 0.0
    return float((scores[last] + below) / 2)


def kept_at(matching: Matching, scores: Sequence[float]) -> np.ndarray:
    """(D,) the detections that reach the score of their class."""
    return matching.scores >= np.asarray(scores)[matching.labels]


def froc(matchings: Sequence[Matching], weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """False positives per image and sensitivity, as the score falls; both (D + 1,), from 0."""
    pooled = _Pooled(matchings, weights)
    wrong = (pooled.weights * ~pooled.right).cumsum() / max(pooled.images, 1)
    right = (pooled.weights * pooled.right).cumsum() / max(pooled.objects.sum(), 1)
    return np.insert(wrong, 0, 0.0), np.insert(right, 0, 0.0)


def overall(
    matchings: Sequence[Matching], scores: Sequence[float], weights: np.ndarray | None = None
) -> dict[str, float | None]:
    """Precision, recall and F1 at the scores, FROC, and the count error; None where nothing is measured."""
    weights = np.ones(len(matchings)) if weights is None else weights
    counts = np.array([of_image(m, scores) for m in matchings])
    right, wrong, missed = weights @ counts
    errors = counts[:, 1] - counts[:, 2]
    curve = froc(matchings, weights)
    places = [np.searchsorted(curve[0], rate, side="right") - 1 for rate in FROC_RATES]
    return {
        "f1": _ratio(2 * right, 2 * right + wrong + missed),
        "precision": _ratio(right, right + wrong),
        "recall": _ratio(right, right + missed),
        "froc": float(curve[1][places].mean()) if right + missed else None,
        "count_error": _ratio(weights @ np.abs(errors), weights.sum()),
        "count_bias": _ratio(weights @ errors, right + missed),
    }


def of_image(matching: Matching, scores: Sequence[float], label: int | None = None) -> tuple[int, int, int]:
    """Right and wrong detections and missed objects at these scores, of one class or of all."""
    kept = kept_at(matching, scores) & matching.counts
    objects = matching.objects if label is None else matching.objects[label]
    kept &= True if label is None else matching.labels == label
    right = int((kept & matching.right).sum())
    return right, int(kept.sum()) - right, int(np.sum(objects)) - right


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def average_precision(right: np.ndarray, weights: np.ndarray, objects: float) -> float:
    """COCO's: the mean of the best precision at 101 recalls and beyond, of detections from the surest.

    Args:
        right: (D,) bool, of those that count.
        weights: (D,) how often each counts.
        objects: their number, above 0.
    """
    hits, seen = (weights * right).cumsum(), weights.cumsum()
    precision = np.maximum.accumulate((hits / np.maximum(seen, 1e-12))[::-1])[::-1]
    places = np.searchsorted(hits / objects, RECALLS, side="left")
    return float(np.where(places < len(hits), np.append(precision, 0.0)[places], 0.0).mean())


class Precisions:
    """Average precision of any resample of the images, from one matching at each IoU; equal to COCO's.

    Args:
        predictions, truths: of each image.
        masks: the IoU is that of masks.
    """

    def __init__(
        self, predictions: Sequence[Boxes], truths: Sequence[Boxes], classes: int, masks: bool = False
    ) -> None:
        pairs = list(zip(predictions, truths, strict=True))
        self.at = [[match(p, t, classes, iou, iou, masks) for p, t in pairs] for iou in IOUS]
        self.objects = np.array([m.objects for m in self.at[0]]).reshape(-1, classes)
        scores = np.concatenate([m.scores for m in self.at[0]])
        labels = np.concatenate([m.labels for m in self.at[0]])
        image = np.repeat(np.arange(len(pairs)), [len(m.scores) for m in self.at[0]])
        right, counts = (
            np.array([np.concatenate([getattr(m, x) for m in at]) for at in self.at]) for x in ("right", "counts")
        )
        order = np.argsort(-scores, kind="stable")
        self.of_class = []
        for k in range(classes):
            own = order[labels[order] == k]
            self.of_class.append((image[own], right[:, own], counts[:, own]))

    def __call__(self, weights: np.ndarray) -> dict[str, float | None]:
        """`map` and `map_50` where each image counts `weights` times (images,)."""
        rows = []
        for k, (image, right, counts) in enumerate(self.of_class):
            if objects := float(weights @ self.objects[:, k]):
                of_each = weights[image]
                rows.append([average_precision(r, of_each * c, objects) for r, c in zip(right, counts, strict=True)])
        if not rows:
            return {"map": None, "map_50": None}
        return {"map": float(np.mean(rows)), "map_50": float(np.mean([row[0] for row in rows]))}
