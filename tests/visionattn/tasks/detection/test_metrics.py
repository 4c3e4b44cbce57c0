"""Detection metrics against pycocotools, and against counting one by one."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.tasks.detection.metrics import (
    FROC_RATES,
    KINDS,
    Precisions,
    best_scores,
    coco,
    froc,
    kept_at,
    limit_of,
    mask_fits,
    match,
    of_image,
    overall,
    overlaps,
    pair_up,
)

CLASSES = 3


def boxes_of(rng, count: int, size: int = 100, scored: bool = False, ignored: float = 0.0) -> Boxes:
    corners = rng.integers(0, size - 30, (count, 2))
    xyxy = np.concatenate([corners, corners + rng.integers(4, 30, (count, 2))], 1).astype(np.float32)
    scores = rng.random(count).astype(np.float32) if scored else None
    return Boxes(xyxy, rng.integers(0, CLASSES, count), rng.random(count) < ignored, scores)


def made(rng, images: int = 12, ignored: float = 0.2) -> tuple[list[Boxes], list[Boxes]]:
    """Truth with empty images and crowds, and detections of which most are near an object."""
    truths = [boxes_of(rng, int(n), ignored=ignored) for n in rng.integers(0, 12, images)]
    found = []
    for truth in truths:
        moved = truth.xyxy + rng.normal(0, 2, truth.xyxy.shape).astype(np.float32)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        labels = np.where(rng.random(len(truth)) < 0.9, truth.labels, rng.integers(0, CLASSES, len(truth)))
        near = Boxes(moved, labels, np.zeros(len(truth), bool), rng.random(len(truth)).astype(np.float32))
        found.append(Boxes.joined([near, boxes_of(rng, int(rng.integers(0, 6)), scored=True)]))
    return found, truths


def by_pycocotools(found: list[Boxes], truths: list[Boxes], limit: int) -> dict[str, float]:
    def annotations(images, scored):
        for i, boxes in enumerate(images):
            for k, (box, label) in enumerate(zip(boxes.xyxy.astype(float), boxes.labels, strict=True)):
                left, top, right, bottom = box.tolist()
                side = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                kind = {"score": float(boxes.scores[k])} if scored else {"iscrowd": int(boxes.ignore[k])}
                yield {"image_id": i, "category_id": int(label)} | side | kind

    truth, detections = COCO(), COCO()
    for content, images, scored in ((truth, truths, False), (detections, found, True)):
        content.dataset = {
            "images": [{"id": i} for i in range(len(images))],
            "categories": [{"id": k} for k in range(CLASSES)],
            "annotations": [a | {"id": n + 1} for n, a in enumerate(annotations(images, scored))],
        }
        content.createIndex()
    evaluator = COCOeval(truth, detections, "bbox")
    evaluator.params.maxDets = [1, 10, limit]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    recall = evaluator.eval["recall"][:, :, 0, -1]
    mean = lambda x: x[x > -1].mean()  # noqa: E731
    return {"map": mean(precision), "map_50": mean(precision[0]), "map_75": mean(precision[5]), "mar": mean(recall)}


@pytest.mark.parametrize("seed", range(5))
def test_precision_is_that_of_pycocotools_and_resamples_begin_there(seed):
    found, truths = made(np.random.default_rng(seed))
    values, rows = coco(found, truths, CLASSES, 100)
    for name, value in by_pycocotools(found, truths, 100).items():
        assert values[name] == pytest.approx(value, abs=1e-9), name
    known = [row["map"] for row in rows if row["map"] is not None]
    assert np.mean(known) == pytest.approx(values["map"], abs=1e-9)
    again = Precisions(found, truths, CLASSES)(np.ones(len(truths)))
    exact = by_pycocotools(found, truths, 100)
    assert again == {name: pytest.approx(exact[name], abs=1e-9) for name in ("map", "map_50")}


def test_resampled_images_count_as_often_as_they_are_drawn():
    found, truths = made(np.random.default_rng(7), images=6)
    drawn = [0, 0, 2, 3, 3, 3]
    weights = np.bincount(drawn, minlength=6).astype(float)
    values, _ = coco([found[i] for i in drawn], [truths[i] for i in drawn], CLASSES, 100)
    assert Precisions(found, truths, CLASSES)(weights)["map"] == pytest.approx(values["map"], abs=1e-9)
    matchings = [match(*pair, CLASSES, 0.5) for pair in zip(found, truths, strict=True)]
    assert overall(matchings, [0.5] * 3, weights) == pytest.approx(overall([matchings[i] for i in drawn], [0.5] * 3))


def test_regions_without_a_class_are_ignored_for_all():
    truth = Boxes(np.array([[0, 0, 50, 50], [60, 60, 80, 80]], np.float32), np.array([-1, 1]), np.array([True, False]))
    inside = Boxes(
        np.array([[5, 5, 20, 20], [60, 60, 80, 80]], np.float32),
        np.array([0, 1]),
        np.zeros(2, bool),
        np.ones(2, np.float32),
    )
    values, rows = coco([inside], [truth], CLASSES, 100)
    assert values["map"] == 1
    assert [row["map"] for row in rows] == [None, 1, None]
    assert of_image(match(inside, truth, CLASSES, 0.5), [0.5] * 3) == (1, 0, 0)


def test_what_nothing_measures_is_none():
    none = Boxes(scores=np.zeros(0, np.float32))
    some = boxes_of(np.random.default_rng(0), 5)
    values, rows = coco([none], [none], CLASSES, 100)
    assert set(values.values()) == {None}
    assert rows == [{"map": None, "map_50": None}] * CLASSES
    matching = match(none, none, CLASSES, 0.5)
    assert overall([matching], [0.5] * 3) == {
        "f1": None, "precision": None, "recall": None, "froc": None, "count_error": 0.0, "count_bias": None,
    }  # fmt: skip
    values, _ = coco([none], [some], CLASSES, 100)
    assert values["map"] == 0
    assert overall([match(none, some, CLASSES, 0.5)], [0.5] * 3)["recall"] == 0
    assert Precisions([none], [none], CLASSES)(np.ones(1)) == {"map": None, "map_50": None}
    assert best_scores([matching], CLASSES) == [0.5] * CLASSES


def test_more_objects_than_coco_allows_are_all_counted():
    rng = np.random.default_rng(0)
    truth = boxes_of(rng, 1500, size=4000)
    found = Boxes(truth.xyxy, truth.labels, truth.ignore, np.ones(1500, np.float32))
    values, _ = coco([found], [truth], CLASSES, 3000)
    assert values["map"] == pytest.approx(1)
    assert of_image(match(found, truth, CLASSES, 0.5), [0.5] * 3) == (1500, 0, 0)


@pytest.mark.parametrize("rule", [0.5, 0.1, "centre"])
@pytest.mark.parametrize("seed", range(3))
def test_the_matching_is_that_of_hand(rule, seed):
    found, truths = made(np.random.default_rng(seed), images=6)
    for prediction, truth in zip(found, truths, strict=True):
        free, right = set(np.flatnonzero(~truth.ignore).tolist()), {}
        iou = box_iou(torch.from_numpy(prediction.xyxy), torch.from_numpy(truth.xyxy)).numpy()
        for d in np.argsort(-prediction.scores, kind="stable").tolist():
            centre = (prediction.xyxy[d, :2] + prediction.xyxy[d, 2:]) / 2
            fits = []
            for o in free:
                left, top, right_side, bottom = truth.xyxy[o]
                away = np.hypot(*(centre - [(left + right_side) / 2, (top + bottom) / 2]))
                inside = left <= centre[0] < right_side and top <= centre[1] < bottom
                fit = (-away if inside else None) if rule == "centre" else iou[d, o] if iou[d, o] >= rule else None
                if fit is not None and truth.labels[o] == prediction.labels[d]:
                    fits.append((fit, -o))
            if fits:
                right[d] = -max(fits)[1]
                free.remove(right[d])
        matching = match(prediction, truth, CLASSES, rule)
        owner = {int(d): int(o) for d, o in zip(matching.order, matching.owner, strict=True) if o >= 0}
        assert owner == right


def test_the_score_is_the_one_with_the_best_f1():
    found, truths = made(np.random.default_rng(3), images=30, ignored=0.0)
    matchings = [match(*pair, CLASSES, 0.5) for pair in zip(found, truths, strict=True)]
    chosen = best_scores(matchings, CLASSES)

    def f1(k: int, score: float) -> float:
        right, wrong, missed = np.sum([of_image(m, [score] * CLASSES, k) for m in matchings], axis=0)
        return 2 * right / (2 * right + wrong + missed)

    for k in range(CLASSES):
        scores = np.concatenate([m.scores[m.labels == k] for m in matchings])
        assert f1(k, chosen[k]) == max(f1(k, score) for score in scores)


def test_froc_counts_false_positives_over_all_images():
    found, truths = made(np.random.default_rng(4), images=10, ignored=0.0)
    matchings = [match(*pair, CLASSES, 0.5) for pair in zip(found, truths, strict=True)]
    rate, sensitivity = froc(matchings)
    for score in (0.2, 0.5, 0.9):
        right, wrong, missed = np.sum([of_image(m, [score] * CLASSES) for m in matchings], axis=0)
        place = np.searchsorted(rate, wrong / 10, side="right") - 1
        assert rate[place] == pytest.approx(wrong / 10)
        assert right / (right + missed) in sensitivity[np.isclose(rate, wrong / 10)]
    healthy = match(Boxes(scores=np.zeros(0, np.float32)), Boxes(), CLASSES, 0.5)
    more, _ = froc([*matchings, *[healthy] * 10])
    assert more == pytest.approx(rate / 2)
    expected = np.mean([sensitivity[rate <= r].max() for r in FROC_RATES])
    assert overall(matchings, [0.5] * 3)["froc"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_each_detection_and_object_is_in_one_row(seed):
    found, truths = made(np.random.default_rng(seed))
    for prediction, truth in zip(found, truths, strict=True):
        matching = match(prediction, truth, CLASSES, 0.5)
        kept = kept_at(matching, [0.3] * CLASSES)
        rows = list(pair_up(prediction, truth, matching, kept, 0.5))
        named = [row.found for row in rows if row.found is not None]
        assert sorted(named) == sorted(matching.order[kept & matching.counts].tolist())
        taken = [row.object for row in rows if row.takes]
        assert sorted(taken) == np.flatnonzero(~truth.ignore).tolist()
        assert {row.kind for row in rows} <= {"right", "missed", *KINDS}
        right = sum(row.kind == "right" for row in rows)
        assert right == of_image(matching, [0.3] * CLASSES)[0]


def test_what_is_wrong_is_told_apart():
    truth = Boxes(
        np.array([[0, 0, 20, 20], [40, 0, 60, 20], [80, 0, 100, 20]], np.float32),
        np.array([0, 0, 1]),
        np.zeros(3, bool),
    )
    kinds = {
        "right": ([0, 0, 20, 20], 0),
        "duplicate": ([1, 0, 21, 20], 0),
        "class": ([40, 0, 60, 20], 1),
        "place": ([88, 5, 108, 25], 1),
        "class and place": ([12, 10, 32, 30], 2),
        "nothing there": ([200, 0, 220, 20], 0),
    }
    prediction = Boxes(
        np.array([box for box, _ in kinds.values()], np.float32),
        np.array([label for _, label in kinds.values()]),
        np.zeros(6, bool),
        np.linspace(0.9, 0.4, 6).astype(np.float32),
    )
    matching = match(prediction, truth, CLASSES, 0.5)
    rows = list(pair_up(prediction, truth, matching, np.ones(6, bool), 0.5))
    assert [row.kind for row in sorted(rows[:6], key=lambda row: row.found)] == list(kinds)
    assert [(row.kind, row.object) for row in rows[6:]] == [("missed", 2)]


@pytest.mark.parametrize("seed", range(3))
def test_the_iou_of_masks_is_that_of_their_pixels(seed):
    rng, sets, canvases = np.random.default_rng(seed), [], []
    for count in (9, 7):
        corners, sides = rng.uniform(0, 30, (count, 2)), rng.uniform(1, 15, (count, 2))
        xyxy = np.concatenate([corners, corners + sides], 1).astype(np.float32)
        canvas, masks = np.zeros((count, 48, 48), bool), []
        for k, box in enumerate(xyxy):
            here = pixels_of(box)
            masks.append(rng.random(canvas[k][here].shape) < 0.6)
            canvas[k][here] = masks[-1]
        sets.append(Boxes(xyxy, np.zeros(count, np.int64), np.zeros(count, bool), masks=masks))
        canvases.append(canvas.reshape(count, -1).astype(float))
    shared = canvases[0] @ canvases[1].T
    union = canvases[0].sum(1)[:, None] + canvases[1].sum(1) - shared
    one, other, iou = mask_fits(*sets)
    found = np.zeros_like(shared)
    found[one, other] = iou
    np.testing.assert_allclose(found, shared / np.maximum(union, 1))


@pytest.mark.parametrize("strip", [1, 7, 256])
@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (40, 60)])
def test_what_shares_ground_is_found_among_many(monkeypatch, counts, strip):
    monkeypatch.setattr("visionattn.tasks.detection.metrics.STRIP", strip)
    rng = np.random.default_rng(0)
    one, other = (boxes_of(rng, count).xyxy for count in counts)
    if len(other):
        other[0] = 0, 0, 100, 100  # taller than all others
    shared = [
        [max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1])) for b in other]
        for a in one
    ]
    expected = np.array(shared).reshape(counts)
    i, j, area = overlaps(one, other)
    assert list(zip(i, j, strict=True)) == list(zip(*np.nonzero(expected), strict=True))
    np.testing.assert_array_equal(area, expected[i, j])


@pytest.mark.parametrize("limit", [3, 200])
@pytest.mark.parametrize("seed", range(4))
def test_a_scene_of_many_objects_is_measured_in_parts_as_if_at_once(monkeypatch, seed, limit):
    rng = np.random.default_rng(seed)
    found, truths = made(rng, images=1, ignored=0.3)
    found = [Boxes.joined([found[0], boxes_of(rng, 60, scored=True)])]
    truths = [Boxes.joined([truths[0], boxes_of(rng, 50, ignored=0.2)])]
    truths[0].xyxy[-1], truths[0].ignore[-1] = (10, 10, 90, 90), True
    expected = by_pycocotools(found, truths, max(limit, 11))
    monkeypatch.setattr("visionattn.tasks.detection.metrics.MOST_PAIRS", 0)
    monkeypatch.setattr("visionattn.tasks.detection.metrics.GROUPS", 2)
    values, _ = coco(found, truths, CLASSES, limit)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_a_scene_of_8000_objects_is_measured():
    """All its boxes against all others would be gigabytes."""
    rng = np.random.default_rng(0)
    truth = boxes_of(rng, 8_000, size=10_000)
    found = Boxes.joined([truth, *[boxes_of(rng, 20_000, size=10_000)]])
    found.scores = np.where(np.arange(28_000) < 8_000, 0.9, 0.1).astype(np.float32)
    values, _ = coco([found], [truth], CLASSES, limit_of([truth], 100))
    matching = match(found, truth, CLASSES, 0.5)
    assert values["map"] > 0.999
    assert of_image(matching, [0.5] * 3) == (8_000, 0, 0)
    kinds = [pair.kind for pair in pair_up(found, truth, matching, kept_at(matching, [0.5] * 3), 0.5)]
    assert kinds == ["right"] * 8_000


def test_masks_decide_where_boxes_are_equal():
    """Two objects with one box and the two halves of it as masks: each has its own detection."""
    box, half = np.array([[2, 2, 10, 10]] * 2, np.float32), np.arange(8)[None] < 4
    masks = [np.repeat(half, 8, 0), np.repeat(~half, 8, 0)]
    labels, none = np.zeros(2, np.int64), np.zeros(2, bool)
    truth = Boxes(box, labels, none, masks=masks)
    found = Boxes(box, labels, none, np.array([0.9, 0.8], np.float32), masks=masks[::-1])
    assert match(found, truth, 1, 0.5, masks=True).owner.tolist() == [1, 0]
    assert Precisions([found], [truth], 1, masks=True)(np.ones(1)) == {"map": 1.0, "map_50": 1.0}
