"""What is measured of a detector on held-out images.

Tables: images.csv (a row per image: right, wrong and missed), objects.csv (a row per detection that reaches its score
and per missed object), detections.csv (everything that is found, however unsure, for other tools), pictures.csv and
pictures/*.png: the worst, median and best images, the surest wrong detections and missed objects.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data import formats
from visionattn.data.boxes import Boxes
from visionattn.data.drawing import box_colors, draw_boxes
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, Window
from visionattn.progress import progress
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.detection.metrics import (
    FROC_RATES,
    KINDS,
    Pair,
    Precisions,
    best_scores,
    coco,
    froc,
    kept_at,
    limit_of,
    match,
    of_image,
    overall,
    pair_up,
)
from visionattn.tasks.detection.recipe import Recipe
from visionattn.tasks.detection.task import whole
from visionattn.tasks.detection.transforms import clipped, tiles_of

__all__ = ["measure"]

SIDES = ("left", "top", "right", "bottom")
SHOWN = 4  # worst, median and best images, each
CROPS = 12  # of wrong detections, and as many of missed objects
SIDE, CROP_SIDE = 260, 128  # pixels of pictures
MARGIN = 0.5  # around a crop, in sides of its box
POINTS = 200  # of a curve
BINS = 8  # of places in the image, each way


def measure(predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe, split: str) -> Evaluation:
    """Everything that is reported about the predictions of a split, in any order."""
    measured = _Measured(predictions, samples, spec)
    limit = limit_of(measured.truths, measured.limit)
    values, per_class = coco(measured.found, measured.truths, len(measured.classes), limit)
    values |= overall(measured.matchings, measured.scores)
    if spec.data.instances == "masks":
        of_masks = Precisions(measured.found, measured.masked, len(measured.classes), masks=True)
        values |= {f"mask_{name}": value for name, value in of_masks(np.ones(len(samples))).items()}
    monitor = spec.train.monitor
    pictures, rows = measured.pictures()
    return Evaluation(
        task=spec.task,
        split=split,
        noun=formats.module_of(spec.data).KIND.noun,
        samples=len(samples),
        classes=measured.classes,
        headline="map" if monitor in (None, "loss") else monitor,
        overall=values,
        intervals=measured.intervals(spec.evaluate.bootstrap),
        per_class=measured.per_class(per_class),
        more=measured.more()
        | {"bootstrap": {"resamples": spec.evaluate.bootstrap, "groups": len(measured.groups)}}
        | {"scales": spec.evaluate.scales},
        tables={
            "images.csv": measured.images(),
            "objects.csv": measured.objects(),
            "detections.csv": measured.detections(),
            "pictures.csv": rows,
        },
        pictures=pictures,
    )


class _Measured:
    """The predictions of a split with the truth, matched; `masked` is the truth with its masks where these count."""

    def __init__(self, predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe) -> None:
        evaluate, self.samples, self.classes = spec.evaluate, samples, spec.data.classes
        self.tiles = [tiles_of(sample.size, spec.data) for sample in samples]
        by_index: dict[int, list[Prediction]] = {}
        for prediction in predictions:
            by_index.setdefault(prediction.index, []).append(prediction)
        self.found = [whole(by_index[i], sample, spec) for i, sample in enumerate(samples)]
        targets = [sample.target() for sample in samples]
        self.truths = [clipped(*pair) for pair in zip(targets, (sample.size for sample in samples), strict=True)]
        self.masked = []
        if spec.data.instances == "masks":
            whole_ones = ((slice(0, sample.size[0]), slice(0, sample.size[1])) for sample in samples)
            self.masked = [target.within(window) for target, window in zip(targets, whole_ones, strict=True)]
        assert isinstance(evaluate.max_objects, int)  # once the recipe is resolved
        self.limit, self.rule = evaluate.max_objects, evaluate.match
        pairs = progress(zip(self.found, self.truths, strict=True), "matching", len(samples))
        self.matchings = [match(*pair, len(self.classes), self.rule) for pair in pairs]
        chosen = evaluate.score == "auto"
        self.chosen_here = chosen
        self.scores: list[float] = best_scores(self.matchings, len(self.classes)) if chosen else _each(spec)
        self.groups = sorted({sample.group for sample in samples})
        least = 0.5 if self.rule == "centre" else self.rule
        self.rows = [
            list(pair_up(f, t, m, kept_at(m, self.scores), least))
            for f, t, m in zip(self.found, self.truths, self.matchings, strict=True)
        ]

    def intervals(self, resamples: int) -> dict[str, list[float]]:
        """95 % intervals by bootstrap over groups; none where there is a single one."""
        if not resamples or len(self.groups) < 2:
            return {}
        member = np.searchsorted(self.groups, [sample.group for sample in self.samples])
        share = np.full(len(self.groups), 1 / len(self.groups))
        drawn = np.random.default_rng(0).multinomial(len(self.groups), share, resamples)[:, member].astype(np.float64)
        precisions = Precisions(self.found, self.truths, len(self.classes))
        values: dict[str, list[float]] = {}
        for weights in progress(drawn, "bootstrap", resamples):
            for name, value in (overall(self.matchings, self.scores, weights) | precisions(weights)).items():
                values.setdefault(name, []).extend([] if value is None else [value])
        return {name: np.quantile(sample, [0.025, 0.975]).tolist() for name, sample in values.items() if sample}

    def per_class(self, precisions: Sequence[dict[str, float | None]]) -> list[dict[str, Any]]:
        rows = []
        for k, name in enumerate(self.classes):
            counts = np.array([of_image(m, self.scores, k) for m in self.matchings])
            right, wrong, missed = counts.sum(0).tolist()
            objects = right + missed
            row = {"class": name, "objects": objects, "images": int((counts[:, [0, 2]].sum(1) > 0).sum())}
            row |= precisions[k] | {"precision": right / (right + wrong) if right + wrong else None}
            row |= {"recall": right / objects if objects else None}
            row |= {"f1": 2 * right / (2 * right + wrong + missed) if objects + wrong else None}
            rows.append(row | {"count_bias": (wrong - missed) / objects if objects else None, "score": self.scores[k]})
        return rows

    def images(self) -> Iterator[dict[str, Any]]:
        """A row per image."""
        for sample, matching in zip(self.samples, self.matchings, strict=True):
            right, wrong, missed = of_image(matching, self.scores)
            f1 = f"{2 * right / (2 * right + wrong + missed):.6f}" if right + wrong + missed else ""
            row = {"image": sample.name, "group": sample.group, "objects": right + missed, "found": right + wrong}
            yield row | {"right": right, "wrong": wrong, "missed": missed, "f1": f1}

    def objects(self) -> Iterator[dict[str, Any]]:
        """A row per detection that reaches its score, with the object that it is about, and per missed object."""
        for sample, found, truth, rows in zip(self.samples, self.found, self.truths, self.rows, strict=True):
            for d, o, iou, kind, _ in rows:
                cells = {"image": sample.name, "kind": kind}
                cells |= {"class": "" if d is None else self.classes[found.labels[d]]}
                cells |= {"score": "" if d is None else f"{_score(found, d):.6f}"}
                cells |= {"true_class": "" if o is None else self.classes[truth.labels[o]]}
                cells |= {"iou": "" if d is None or o is None else f"{iou:.4f}"}
                for key, boxes, n in (("", found, d), ("true_", truth, o)):
                    sides = [""] * 4 if n is None else [f"{value:.2f}" for value in boxes.xyxy[n]]
                    cells |= {f"{key}{side}": value for side, value in zip(SIDES, sides, strict=True)}
                yield cells

    def detections(self) -> Iterator[dict[str, Any]]:
        """A row for everything that is found."""
        for sample, found in zip(self.samples, self.found, strict=True):
            for d, (box, label) in enumerate(zip(found.xyxy, found.labels, strict=True)):
                row = {"image": sample.name, "class": self.classes[label], "score": f"{_score(found, d):.6f}"}
                yield row | {side: f"{value:.2f}" for side, value in zip(SIDES, box, strict=True)}

    def more(self) -> dict[str, Any]:
        """What only a detector's report has."""
        wrong, right = froc(self.matchings)
        kinds = [row.kind for rows in self.rows for row in rows]
        return {
            "scores": self.scores,
            "chosen_here": self.chosen_here,
            "match": self.rule,
            "max_objects": limit_of(self.truths, self.limit),
            "empty": sum(not m.objects.sum() for m in self.matchings),
            "ignored": int(sum(t.ignore.sum() for t in self.truths)),
            "confusion": self._confusion().tolist(),
            "kinds": {kind: kinds.count(kind) for kind in (*KINDS, "missed")},
            "froc": _thinned(wrong, right, limit=FROC_RATES[-1]),
            "curves": [self._curve(k) for k in range(len(self.classes))],
            "recall_by_size": self._recall_by_size(),
            "missed_at": self._missed_at().tolist(),
            "seams": self._seams(),
        }

    def _confusion(self) -> np.ndarray:
        """(classes + 1, classes + 1), truth in rows; last nothing there, and missed."""
        size = len(self.classes)
        counts = np.zeros((size + 1, size + 1), np.int64)
        for found, truth, rows in zip(self.found, self.truths, self.rows, strict=True):
            for row in rows:
                true = truth.labels[row.object] if row.takes else size
                counts[true, size if row.found is None else found.labels[row.found]] += 1
        return counts

    def _curve(self, label: int) -> dict[str, list[float]]:
        """Recall, precision and F1 of a class as its score falls."""
        parts = [(m.scores, m.right, m.counts & (m.labels == label)) for m in self.matchings]
        scores, right = (np.concatenate([part[i][part[2]] for part in parts]) for i in (0, 1))
        order = np.argsort(-scores, kind="stable")
        scores, right = scores[order], right[order].cumsum()
        objects, seen = sum(int(m.objects[label]) for m in self.matchings), np.arange(1, len(scores) + 1)
        if not objects or not len(scores):
            return {"score": [], "recall": [], "precision": [], "f1": []}
        places = np.unique(np.linspace(0, len(scores) - 1, min(POINTS, len(scores))).round().astype(int))
        curves = {
            "score": scores,
            "recall": right / objects,
            "precision": right / seen,
            "f1": 2 * right / (seen + objects),
        }
        return {name: curve[places].round(5).tolist() for name, curve in curves.items()}

    def _recall_by_size(self) -> list[dict[str, float]]:
        """Of tertiles of the objects' sizes, the root of their area."""
        sizes = np.concatenate([np.sqrt(t.areas[~t.ignore]) for t in self.truths])
        hits = []
        for truth, matching in zip(self.truths, self.matchings, strict=True):
            hit = np.zeros(len(truth), bool)
            hit[matching.owner[kept_at(matching, self.scores) & matching.right]] = True
            hits.append(hit[~truth.ignore])
        hit = np.concatenate(hits)
        edges = np.quantile(sizes, [0, 1 / 3, 2 / 3, 1]) if len(sizes) else np.zeros(4)
        which = np.searchsorted(edges[1:3], sizes, side="left")
        thirds = [(edges[n], edges[n + 1], hit[which == n]) for n in range(3)]
        return [
            {"from": float(low), "to": float(high), "objects": len(part), "recall": float(part.mean())}
            for low, high, part in thirds
            if len(part)
        ]

    def _missed_at(self) -> np.ndarray:
        """(2, BINS, BINS) missed objects, and all, by where their centres are in the image."""
        counts = np.zeros((2, BINS, BINS), np.int64)
        for sample, truth, rows in zip(self.samples, self.truths, self.rows, strict=True):
            centres = (truth.xyxy[:, [1, 0]] + truth.xyxy[:, [3, 2]]) / 2 / np.array(sample.size)
            cells = (centres * BINS).astype(int).clip(0, BINS - 1)
            missed = [row.object for row in rows if row.kind == "missed"]
            for plane, chosen in ((0, cells[missed]), (1, cells[~truth.ignore])):
                np.add.at(counts[plane], tuple(chosen.T), 1)
        return counts

    def _seams(self) -> list[dict[str, int]]:
        """Of what the border of a tile crosses, then of the rest: objects, missed ones, detections and duplicates.

        Empty where no image is cut into tiles.
        """
        sides = [{"objects": 0, "missed": 0, "found": 0, "duplicates": 0} for _ in range(2)]
        for tiles, size, found, truth, rows in zip(
            self.tiles, (sample.size for sample in self.samples), self.found, self.truths, self.rows, strict=True
        ):
            true, own = (np.where(_crossed(boxes.xyxy, tiles, size), 0, 1) for boxes in (truth, found))
            for side in true[~truth.ignore]:
                sides[side]["objects"] += 1
            for row in rows:
                if row.found is not None:
                    sides[own[row.found]]["found"] += 1
                    sides[own[row.found]]["duplicates"] += row.kind == "duplicate"
                elif row.object is not None:
                    sides[true[row.object]]["missed"] += 1
        return sides if any(len(tiles) > 1 for tiles in self.tiles) else []

    def pictures(self) -> tuple[dict[str, Image.Image], list[dict[str, Any]]]:
        """Images of the lowest, median and highest F1, and crops; with a row about each."""
        pictures: dict[str, Image.Image] = {}
        rows: list[dict[str, Any]] = []
        counts = [(*of_image(m, self.scores), i) for i, m in enumerate(self.matchings)]
        rated = sorted((2 * r / (2 * r + w + n), -w - n, i) for r, w, n, i in counts if r + w + n)
        middle = max(0, len(rated) // 2 - SHOWN // 2)
        chosen = {"worst": rated[:SHOWN], "median": rated[middle : middle + SHOWN], "best": rated[::-1][:SHOWN]}
        seen: set[int] = set()
        for kind in ("worst", "best", "median"):
            for f1, _, i in chosen[kind]:
                if i not in seen:
                    seen.add(i)
                    file = f"pictures/{kind}-{len(rows):02d}.png"
                    pictures[file] = self._pair(i)
                    rows.append({"file": file, "kind": kind, "image": self.samples[i].name, "about": f"F1 {f1:.3f}"})
        for kind, found in (("wrong", self._surest_wrong()), ("missed", self._largest_missed())):
            for n, (i, row) in enumerate(found):
                file = f"pictures/{kind}-{n:02d}.png"
                pictures[file], about = self._crop(i, row)
                rows.append({"file": file, "kind": kind, "image": self.samples[i].name, "about": about})
        return pictures, rows

    def _pair(self, i: int) -> Image.Image:
        """Truth beside what is found."""
        image, step = _reduced(self.samples[i])
        scale, colors = SIDE / max(image.shape[1:]), box_colors(len(self.classes))
        kept = np.array([row.found for row in self.rows[i] if row.found is not None], np.int64)
        found = self.found[i][kept]
        panels = [draw_boxes(image, _scaled(boxes, 1 / step), colors, scale) for boxes in (self.truths[i], found)]
        sheet = Image.new("RGB", (2 * panels[0].width + 4, panels[0].height), "white")
        for n, panel in enumerate(panels):
            sheet.paste(panel, (n * (panel.width + 4), 0))
        return sheet

    def _surest_wrong(self) -> list[tuple[int, Pair]]:
        rows = [(_score(self.found[i], row.found), i, row) for i, row in self._all() if row.kind in KINDS]
        return [(i, row) for _, i, row in sorted(rows, key=lambda item: -item[0])[:CROPS]]

    def _largest_missed(self) -> list[tuple[int, Pair]]:
        rows = [(self.truths[i].areas[row.object], i, row) for i, row in self._all() if row.kind == "missed"]
        return [(i, row) for _, i, row in sorted(rows, key=lambda item: -item[0])[:CROPS]]

    def _all(self) -> Iterator[tuple[int, Pair]]:
        return ((i, row) for i, rows in enumerate(self.rows) for row in rows)

    def _crop(self, i: int, row: Pair) -> tuple[Image.Image, str]:
        """What is around a wrong detection or a missed object, and what is to be said of it."""
        missed = row.found is None
        boxes, n = (self.truths[i], row.object) if missed else (self.found[i], row.found)
        assert n is not None  # of either
        box, sample = boxes.xyxy[n], self.samples[i]
        margin = MARGIN * max(box[2:] - box[:2]) + 2
        rows, columns = (
            slice(int(max(0, box[axis] - margin)), int(min(side, box[axis + 2] + margin) + 1))
            for axis, side in zip((1, 0), sample.size, strict=True)
        )
        window = rows, columns
        image = sample.image(window)
        corner = np.array([window[1].start, window[0].start] * 2, np.float32)
        shown = Boxes((box - corner)[None], boxes.labels[[n]], np.zeros(1, bool))
        picture = draw_boxes(image, shown, box_colors(len(self.classes)), CROP_SIDE / max(image.shape[1:]))
        name = self.classes[boxes.labels[n]]
        return picture, name if missed else f"{name} {_score(boxes, n):.2f}: {row.kind}"


def _score(boxes: Boxes, n: int | None) -> float:
    assert boxes.scores is not None  # of what is predicted
    return float(boxes.scores[n])


def _each(spec: Recipe) -> list[float]:
    scores = spec.evaluate.score
    return list(scores) if isinstance(scores, list) else [float(scores)] * len(spec.data.classes)


def _thinned(x: np.ndarray, y: np.ndarray, limit: float) -> list[list[float]]:
    """Some points of a curve up to x = limit."""
    inside = np.flatnonzero(x <= limit)
    places = inside[np.unique(np.linspace(0, len(inside) - 1, min(POINTS, len(inside))).round().astype(int))]
    return [x[places].round(5).tolist(), y[places].round(5).tolist()]


def _crossed(xyxy: np.ndarray, tiles: Sequence[Window], size: tuple[int, int]) -> np.ndarray:
    """(N,) whether a border of tiles that is none of the image (H, W) goes through a box (N, 4)."""
    crossed = np.zeros(len(xyxy), bool)
    for axis, length in enumerate(size):
        lines = {end for tile in tiles for end in (tile[axis].start, tile[axis].stop)} - {0, length}
        low, high = xyxy[:, [1 - axis]], xyxy[:, [3 - axis]]
        crossed |= ((low < sorted(lines)) & (high > sorted(lines))).any(1)
    return crossed


def _reduced(sample: Sample) -> tuple[np.ndarray, int]:
    """Every n-th pixel of a sample, and n."""
    step = max(1, max(sample.size) // (2 * SIDE))
    return sample.image()[:, ::step, ::step], step


def _scaled(boxes: Boxes, factor: float) -> Boxes:
    return Boxes(boxes.xyxy * np.float32(factor), boxes.labels, boxes.ignore, boxes.scores)
