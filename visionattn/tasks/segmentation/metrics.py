"""Segmentation metrics, from pixel counts and surfaces of each case (image, volume or scene).

Of each case and class: Dice = 2 TP / (P + T), IoU = TP / (P + T - TP), precision = TP / P, recall = TP / T, over
labelled pixels only; HD95, the 95th percentile of the distances between the surfaces in both directions (the larger
one), and NSD, the share of both surfaces that is within a tolerance of the other (normalised surface distance). The two
are MONAI's, in mm where the pixel size is known, else in pixels; without MONAI they are left out.

Where a class is empty, `empty="standard"`:

- in truth and prediction: nothing is measured; the case does not count for the class.
- in the prediction only, or in the truth only: Dice, IoU and NSD are 0, HD95 is the diagonal of the case, the largest
  distance there can be. Precision is undefined without prediction, recall without truth.

`empty="transunet"`, for comparison with papers that follow TransUNet's code: truth empty and prediction not gives
Dice 1 and HD95 0; prediction empty gives 0 and 0, whatever the truth; every case counts. HD95 is then as that code
takes it from MedPy: the 95th percentile of the distances in both directions together, in pixels whatever their size.

Means: `dice`, `iou`, `precision`, `recall`, `hd95`, `nsd` over the cases of a class, then over the counted classes,
which are all but those of `evaluate.leave_out`. `miou`, `mf1` and `pixel_accuracy` are of the pixels of all cases
together, as is usual for scenes; the first two are means over all classes that occur, as elsewhere, and
`miou_counted` and `mf1_counted` over the counted ones: with a background and one class the IoU and F1 of that class.
"""

import importlib.util
import warnings
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric as EpochMetric

from visionattn.data.sample import IGNORE
from visionattn.report.evaluation import LOSS, Metric

__all__ = [
    "BINS",
    "MEASURES",
    "METRICS",
    "CaseCounts",
    "calibration",
    "calibration_error",
    "count_pixels",
    "measure_case",
    "pooled",
    "summarize",
    "surfaces_available",
]

MEASURES = ("dice", "iou", "precision", "recall", "hd95", "nsd")
METRICS = {
    "dice": Metric("Dice", "mean over the cases of a class, then over the counted classes"),
    "iou": Metric("IoU", "as Dice"),
    "precision": Metric("precision", "as Dice, over the cases where the class is predicted"),
    "recall": Metric("recall", "as Dice, over the cases that have the class"),
    "hd95": Metric("HD95", "95th percentile of the distances between the surfaces; as Dice"),
    "nsd": Metric("surface Dice", "share of the surfaces within the tolerance of each other (NSD); as Dice"),
    "pooled_iou": Metric("pooled IoU", "of all pixels together"),
    "miou": Metric("mIoU", "of all pixels together, mean over all classes"),
    "miou_counted": Metric("mIoU of counted classes", "as mIoU, without the classes that are left out"),
    "mf1": Metric("mF1", "of all pixels together, mean over all classes"),
    "mf1_counted": Metric("mF1 of counted classes", "as mF1, without the classes that are left out"),
    "pixel_accuracy": Metric("pixel accuracy", "labelled pixels classified correctly", True),
    "calibration_error": Metric("calibration error", "mean distance of confidence from accuracy, in 15 bins", True),
} | LOSS
BINS = 15


def count_pixels(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, 3) int64: TP, predicted and true pixels of each class among the labelled ones.

    Args:
        prediction, truth: class numbers of the same shape; `truth` IGNORE where unlabelled.
    """
    labelled = truth != IGNORE
    prediction, truth = prediction[labelled].long(), truth[labelled].long()
    right = truth[prediction == truth]
    return torch.stack([x.bincount(minlength=classes) for x in (right, prediction, truth)], dim=1)


class CaseCounts(EpochMetric):
    """Pixel counts of every case, whatever parts and processes they come from; computes the means (see the module).

    Args:
        cases: number of cases.
        classes: number of classes.
        kept: classes that count in means.
        empty: the rule for empty classes.
    """

    higher_is_better, full_state_update, is_differentiable = True, False, False
    counts: Tensor

    def __init__(self, cases: int, classes: int, kept: list[int], empty: str = "standard") -> None:
        super().__init__()
        self.classes, self.kept, self.empty = classes, kept, empty
        self.add_state("counts", torch.zeros(cases, classes, 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor, case: int) -> None:
        self.counts[case] += count_pixels(prediction, truth, self.classes)

    def compute(self) -> dict[str, Tensor]:
        counts = self.counts.cpu().numpy()
        values = measures_of(counts, self.empty)
        measures = {name: _mean_over_classes(_mean(values[name]), self.kept) for name in ("dice", "iou")}
        measures |= pooled(counts.sum(0)[None], self.kept)
        return {name: torch.tensor(float(np.squeeze(value)), dtype=torch.float32) for name, value in measures.items()}


def measures_of(counts: np.ndarray, empty: str = "standard") -> dict[str, np.ndarray]:
    """Dice, IoU, precision and recall (cases, classes) of counts (cases, classes, 3); NaN where nothing is measured."""
    right, predicted, true = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        measures = {
            "dice": 2 * right / (predicted + true),
            "iou": right / (predicted + true - right),
            "precision": right / predicted,
            "recall": right / true,
        }
    if empty == "transunet":
        for name in ("dice", "iou"):
            measures[name] = np.where(predicted == 0, 0.0, np.where(true == 0, 1.0, measures[name]))
    return measures


def measure_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, ...],
    classes: int,
    empty: str = "standard",
    tolerance: float | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Counts (classes, 3) and every measure (classes,) of one case.

    Args:
        prediction, truth: (H, W), or (slices, H, W), class numbers; `truth` IGNORE where unlabelled.
        spacing: size of a pixel along each axis.
        tolerance: of the NSD, in the unit of `spacing`; None leaves the surface distances out (NaN).
    """
    counts = count_pixels(torch.from_numpy(prediction), torch.from_numpy(truth), classes).numpy()
    values = {name: value[0] for name, value in measures_of(counts[None], empty).items()}
    values |= {name: np.full(classes, np.nan) for name in ("hd95", "nsd")}
    if tolerance is None or not surfaces_available():
        return counts, values
    diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
    labelled = truth != IGNORE
    for k, (_, predicted, true) in enumerate(counts):
        if predicted and true:
            of_class = (prediction == k) & labelled, (truth == k) & labelled
            values["nsd"][k] = _by_monai("compute_surface_dice", *of_class, spacing, class_thresholds=[tolerance])
            if empty == "transunet":
                values["hd95"][k] = _pooled_hd95(*of_class)
            else:
                values["hd95"][k] = _by_monai("compute_hausdorff_distance", *of_class, spacing, percentile=95)
        elif empty == "transunet":
            values["hd95"][k], values["nsd"][k] = 0.0, float(predicted > 0)
        elif predicted or true:
            values["hd95"][k], values["nsd"][k] = diagonal, 0.0
    return counts, values


def surfaces_available() -> bool:
    return importlib.util.find_spec("monai") is not None


def _by_monai(
    measure: str, prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], **options: Any
) -> float:
    """A surface measure of two non-empty masks."""
    import monai.metrics

    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 deprecates its own calls
        spaced = tuple(map(float, spacing))
        return getattr(monai.metrics, measure)(*masks, include_background=True, spacing=spaced, **options).item()


def _pooled_hd95(prediction: np.ndarray, truth: np.ndarray) -> float:
    """MedPy's HD95 of two non-empty masks: pixels, of which a mask's surface are those with an edge to the outside."""
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    surfaces = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (prediction, truth)]
    distances = [ndimage.distance_transform_edt(~other)[one] for one, other in (surfaces, surfaces[::-1])]
    return float(np.percentile(np.concatenate(distances), 95))


def pooled(counts: np.ndarray, kept: list[int]) -> dict[str, np.ndarray]:
    """mIoU and mF1, of all and of the counted classes, and pixel accuracy (N,) of summed counts (N, classes, 3)."""
    values, every = measures_of(counts), list(range(counts.shape[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy = counts[..., 0].sum(1) / counts[..., 2].sum(1)
    return {
        "miou": _mean_over_classes(values["iou"], every),
        "miou_counted": _mean_over_classes(values["iou"], kept),
        "mf1": _mean_over_classes(values["dice"], every),
        "mf1_counted": _mean_over_classes(values["dice"], kept),
        "pixel_accuracy": accuracy,
    }


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(N, classes) means of (cases, classes), NaN left out; N rows of weights of the cases, or one of equal ones."""
    weights = np.ones((1, len(values))) if weights is None else weights
    seen = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights @ np.where(seen, values, 0)) / (weights @ seen)


def _mean_over_classes(values: np.ndarray, kept: list[int]) -> np.ndarray:
    """(N,) of (N, classes), NaN left out."""
    values = values[:, kept]
    seen = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seen, values, 0).sum(1) / seen.sum(1)


def summarize(
    counts: np.ndarray,
    values: dict[str, np.ndarray],
    groups: list[str],
    classes: list[str],
    kept: list[int],
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything reported about the cases of a split, as plain data.

    Args:
        counts: (cases, classes, 3).
        values: each of MEASURES (cases, classes).
        groups: of each case: whole groups are drawn for the bootstrap.
        kept: classes that count in means.
        resamples: behind the 95 % intervals (percentile bootstrap over groups); 0 gives none, and so does a single
            group, which says nothing about others.

    Returns:
        `overall` (name -> value), `intervals` (name -> [low, high]) and `per_class` (a row for each class: cases,
        pixels, means; None where nothing is measured).
    """
    ones = np.ones((1, len(counts)))
    overall = {name: value[0] for name, value in _overall(counts, values, kept, ones).items()}
    intervals = {}
    if resamples and len(set(groups)) > 1:
        drawn = _overall(counts, values, kept, _draws(groups, resamples, seed))
        for name, sample in drawn.items():
            if np.isfinite(sample).any():
                intervals[name] = np.nanquantile(sample, [0.025, 0.975]).tolist()
    means = {name: _mean(value)[0] for name, value in values.items()}
    whole = measures_of(counts.sum(0)[None])
    rows = []
    for k, name in enumerate(classes):
        row = {"class": name, "cases": int((counts[:, k, 2] > 0).sum()), "pixels": int(counts[:, k, 2].sum())}
        row |= {measure: _plain(mean[k]) for measure, mean in means.items()}
        row |= {"pooled_iou": _plain(whole["iou"][0, k]), "pooled_f1": _plain(whole["dice"][0, k])}
        rows.append(row | {"counted": k in kept})
    return {
        "overall": {name: _plain(value) for name, value in overall.items()},
        "intervals": intervals,
        "per_class": rows,
    }


def _overall(
    counts: np.ndarray, values: dict[str, np.ndarray], kept: list[int], weights: np.ndarray
) -> dict[str, np.ndarray]:
    measures = {name: _mean_over_classes(_mean(value, weights), kept) for name, value in values.items()}
    return measures | pooled(np.einsum("nc,ckt->nkt", weights, counts), kept)


def _draws(groups: list[str], resamples: int, seed: int) -> np.ndarray:
    """(resamples, cases) how often each case is drawn, whole groups together."""
    names, member = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    return drawn[:, member].astype(np.float64)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def calibration(probabilities: Tensor, truth: Tensor) -> Tensor:
    """(3, BINS) of the labelled pixels, by confidence: their number, summed confidence, and how many are right.

    Args:
        probabilities: (classes, H, W).
        truth: (H, W), IGNORE where unlabelled.
    """
    labelled = truth != IGNORE
    confidence, guess = (x[labelled] for x in probabilities.max(0))
    place = (confidence * BINS).long().clamp_(0, BINS - 1)
    weights = torch.stack([torch.ones_like(confidence), confidence, guess == truth[labelled]]).double()
    return weights.new_zeros(3, BINS).index_add_(1, place, weights)  # bincount has no deterministic form on CUDA


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error of (3, BINS): the mean distance of confidence from accuracy over the pixels."""
    return float(np.abs(bins[1] - bins[2]).sum() / max(bins[0].sum(), 1))
