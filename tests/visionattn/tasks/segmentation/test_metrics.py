"""Segmentation metrics against values made by hand, and the stated rule for empty masks."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import f1_score, jaccard_score

from visionattn.data.sample import IGNORE
from visionattn.tasks.segmentation.metrics import (
    BINS,
    CaseCounts,
    calibration,
    calibration_error,
    count_pixels,
    measure_case,
    pooled,
    summarize,
)

TRUTH = np.zeros((8, 8), np.int64)
TRUTH[2:6, 2:6] = 1
SHIFTED = np.roll(TRUTH, 1, axis=1).astype(np.uint8)  # 12 of 16 pixels in common


def test_overlap_measures_are_those_of_the_definitions():
    counts, values = measure_case(SHIFTED, TRUTH, (1.0, 1.0), 2)
    assert counts.tolist() == [[44, 48, 48], [12, 16, 16]]
    assert values["dice"][1] == pytest.approx(24 / 32)
    assert values["iou"][1] == pytest.approx(12 / 20)
    assert values["precision"][1] == values["recall"][1] == pytest.approx(12 / 16)
    assert np.isnan(values["hd95"]).all()


def test_unlabelled_pixels_count_nowhere():
    truth = TRUTH.copy()
    truth[:, 4:] = IGNORE
    other = SHIFTED.copy()
    other[:, 4:] = 1 - other[:, 4:]
    for prediction in (SHIFTED, other):
        counts, values = measure_case(prediction, truth, (1.0, 1.0), 2, tolerance=1.0)
        assert counts[1].tolist() == [4, 4, 8]
        assert values["dice"][1] == pytest.approx(8 / 12)
    assert count_pixels(torch.tensor(SHIFTED), torch.full((8, 8), IGNORE), 2).sum() == 0


def test_surface_distances_are_in_the_unit_of_the_spacing():
    pytest.importorskip("monai")
    _, pixels = measure_case(SHIFTED, TRUTH, (1.0, 1.0), 2, tolerance=0.5)
    _, mm = measure_case(SHIFTED, TRUTH, (1.0, 0.25), 2, tolerance=0.5)
    assert pixels["hd95"][1] == pytest.approx(1.0)
    assert mm["hd95"][1] == pytest.approx(0.25)
    assert pixels["nsd"][1] < 1
    assert mm["nsd"][1] == 1


def test_volumes_are_measured_whole():
    pytest.importorskip("monai")
    truth = np.zeros((6, 8, 8), np.int64)
    truth[1:5, 2:6, 2:6] = 1
    _, values = measure_case(np.roll(truth, 1, axis=0).astype(np.uint8), truth, (5.0, 1.0, 1.0), 2, tolerance=1.0)
    assert values["dice"][1] == pytest.approx(0.75)
    assert values["hd95"][1] == pytest.approx(5.0)


EMPTY = np.zeros((8, 8), np.uint8)
RULES = {  # rule, prediction, truth: Dice, HD95, NSD of the class
    "both empty": ("standard", EMPTY, EMPTY.astype(int), (np.nan, np.nan, np.nan)),
    "missed": ("standard", EMPTY, TRUTH, (0, np.hypot(8, 8), 0)),
    "made up": ("standard", SHIFTED, EMPTY.astype(int), (0, np.hypot(8, 8), 0)),
    "transunet, both empty": ("transunet", EMPTY, EMPTY.astype(int), (0, 0, 0)),
    "transunet, missed": ("transunet", EMPTY, TRUTH, (0, 0, 0)),
    "transunet, made up": ("transunet", SHIFTED, EMPTY.astype(int), (1, 0, 1)),
}


@pytest.mark.parametrize("name", RULES)
def test_empty_masks_follow_the_stated_rule(name):
    pytest.importorskip("monai")
    rule, prediction, truth, expected = RULES[name]
    _, values = measure_case(prediction, truth, (1.0, 1.0), 2, rule, tolerance=1.0)
    assert [values[key][1] for key in ("dice", "hd95", "nsd")] == pytest.approx(expected, nan_ok=True)


def medpy_hd95(prediction: np.ndarray, truth: np.ndarray) -> float:
    """By MedPy's definition, pixel by pixel: border pixels miss a neighbour along an axis; no size of pixels."""

    def border(mask: np.ndarray) -> np.ndarray:
        around = np.pad(mask, 1)
        steps = [np.roll(around, step, axis) for axis in range(mask.ndim) for step in (-1, 1)]
        inner = np.logical_and.reduce(steps)[(slice(1, -1),) * mask.ndim]
        return np.argwhere(mask & ~inner)

    between = np.linalg.norm(border(prediction)[:, None] - border(truth)[None], axis=-1)
    return np.percentile(np.concatenate([between.min(0), between.min(1)]), 95)


@pytest.mark.parametrize("shape", [(24, 30), (5, 14, 12)])
def test_the_rule_of_transunet_has_the_hd95_of_its_code(shape):
    pytest.importorskip("monai")
    rng = np.random.default_rng(0)
    masks = [ndimage.gaussian_filter(rng.normal(size=shape), 2) > 0.05 for _ in range(2)]
    masks[0][0] = True  # a part far away, at the edge of the picture
    prediction, truth = masks[0].astype(np.uint8), masks[1].astype(np.int64)
    spacing = (0.5, 2.0, 0.7)[: len(shape)]
    _, values = measure_case(prediction, truth, spacing, 2, "transunet", tolerance=1.0)
    assert values["hd95"][1] == pytest.approx(medpy_hd95(*masks))
    _, standard = measure_case(prediction, truth, (1.0,) * len(shape), 2, tolerance=1.0)
    assert values["hd95"][1] < standard["hd95"][1], "the larger of two percentiles"


def test_means_are_over_the_cases_of_a_class_and_then_over_the_classes_that_count():
    counts, values = zip(
        *(measure_case(p, t, (1.0, 1.0), 3) for p, t in ((SHIFTED, TRUTH), (EMPTY, EMPTY.astype(int)))), strict=True
    )
    values = {key: np.stack([value[key] for value in values]) for key in values[0]}
    found = summarize(np.stack(counts), values, ["a", "b"], ["ground", "disc", "none"], [1, 2], 50)
    assert found["overall"]["dice"] == pytest.approx(0.75)  # the empty case and the absent class do not count
    assert found["overall"]["miou_counted"] == pytest.approx(0.6)
    assert found["overall"]["miou"] == pytest.approx((108 / 116 + 0.6) / 2)
    assert found["overall"]["pixel_accuracy"] == pytest.approx((44 + 12 + 64) / 128)
    assert found["overall"]["hd95"] is None
    assert found["per_class"][2]["dice"] is None
    assert found["per_class"][1]["cases"] == 1
    assert found["intervals"]["dice"] == pytest.approx([0.75, 0.75])


def test_means_over_all_classes_and_over_the_counted_ones_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, prediction = (rng.choice(4, (20, 20), p=[0.6, 0.2, 0.2, 0.0]) for _ in range(2))
    metric = CaseCounts(cases=1, classes=4, kept=[1, 2, 3])
    metric.update(torch.tensor(prediction), torch.tensor(truth), 0)
    found = metric.compute()
    for ours, score in (("miou", jaccard_score), ("mf1", f1_score)):
        for name, labels in ((ours, [0, 1, 2]), (f"{ours}_counted", [1, 2])):  # class 3 occurs nowhere
            expected = score(truth.ravel(), prediction.ravel(), labels=labels, average="macro")
            assert found[name] == pytest.approx(expected)


def test_the_bootstrap_keeps_groups_together():
    counts = np.array([[[10, 10, 10]]] * 5 + [[[0, 10, 10]]] * 5)
    values = {key: np.array([[1.0]] * 5 + [[0.0]] * 5) for key in ("dice", "iou")}
    apart = summarize(counts, values, [str(i) for i in range(10)], ["a"], [0], 500)["intervals"]["dice"]
    together = summarize(counts, values, ["p"] * 5 + ["q"] * 5, ["a"], [0], 500)["intervals"]["dice"]
    assert together == [0, 1]
    assert summarize(counts, values, ["p"] * 10, ["a"], [0], 500)["intervals"] == {}
    assert 0 < apart[0] < 0.5 < apart[1] < 1


def test_counts_of_epochs_agree_with_the_evaluation():
    metric = CaseCounts(cases=2, classes=2, kept=[1])
    metric.update(torch.tensor(SHIFTED[:4]), torch.tensor(TRUTH[:4]), 0)  # a case in two parts
    metric.update(torch.tensor(SHIFTED[4:]), torch.tensor(TRUTH[4:]), 0)
    metric.update(torch.tensor(EMPTY), torch.tensor(TRUTH), 1)
    found = metric.compute()
    assert found["dice"] == pytest.approx((0.75 + 0) / 2)
    both = np.array([[[44 + 48, 48 + 64, 48 + 48], [12, 16, 32]]])
    assert found["miou_counted"] == pytest.approx(pooled(both, [1])["miou_counted"][0])


def test_calibration_bins_confidence_of_labelled_pixels():
    probabilities = torch.tensor([[[0.9, 0.9, 0.2, 0.6]], [[0.1, 0.1, 0.8, 0.4]]])
    bins = calibration(probabilities, torch.tensor([[0, 1, 1, IGNORE]])).numpy()
    assert bins.shape == (3, BINS)
    assert bins.sum(1) == pytest.approx([3, 2.6, 2])
    assert calibration_error(bins) == pytest.approx((abs(1.8 - 1) + abs(0.8 - 1)) / 3)
