"""What is measured of a classifier on held-out images.

Tables: predictions.csv, a row per image with the probability of each class, or of many classes of the likeliest, all
then being in probabilities.npy; mistakes.csv and mistakes/*.png, the most confident mistakes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample, unit_range
from visionattn.inference.uncertainty import risk_coverage, tempered
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.classification import metrics
from visionattn.tasks.classification.labels import WIDEST, Labelling, labelling_of, probability_cells, targets_of
from visionattn.tasks.classification.recipe import Recipe

__all__ = ["measure"]

MISTAKES = 12
RISKS = 200  # points of the curve
THUMBNAIL = 160  # pixels of the longer side


def measure(predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe, split: str) -> Evaluation:
    """Everything that is reported about the predictions of a split, in any order, one for each sample."""
    labelling = labelling_of(spec.data.classes, spec.data.multi_label)
    rows = sorted(predictions, key=lambda prediction: prediction.index)
    probabilities, targets = torch.from_numpy(np.stack([np.asarray(row.value) for row in rows])), targets_of(samples)
    scores = metrics.of_classes(probabilities, targets)
    means = metrics.overall(probabilities, targets, scores)
    overall = {name: None if score.isnan() else score.item() for name, score in means.items()}
    overall["loss"] = labelling.log_loss(probabilities, targets).item()
    if not spec.data.multi_label:
        overall["aurc"] = risk_coverage(*_sure_and_wrong(probabilities, targets))[-1]
    measured = {name: int(which.sum()) for name, which in metrics.measurable(targets, len(labelling.classes)).items()}
    groups = [sample.group for sample in samples]
    interval = metrics.interval(probabilities, targets, groups, spec.evaluate.bootstrap)
    mistakes, pictures = _mistakes(labelling, samples, probabilities.numpy(), targets.numpy())
    return Evaluation(
        task=spec.task,
        split=split,
        noun="image",
        samples=len(samples),
        classes=labelling.classes,
        headline=labelling.headline,
        overall=overall,
        intervals={labelling.headline: interval} if interval else {},
        per_class=metrics.per_class(scores, targets, labelling),
        more={
            "multi_label": spec.data.multi_label,
            "confusion": _confusion(labelling, probabilities.numpy(), targets.numpy()).tolist(),
            "measured": {name: [n, len(labelling.classes)] for name, n in measured.items()},
            "bootstrap": {"resamples": spec.evaluate.bootstrap, "groups": len(set(groups))},
        }
        | _trust(labelling, probabilities, targets, spec),
        tables={"predictions.csv": _table(labelling, samples, probabilities.numpy()), "mistakes.csv": mistakes},
        arrays={"probabilities.npy": probabilities.numpy()} if len(labelling.classes) > WIDEST else {},
        pictures=pictures,
    )


def _sure_and_wrong(probabilities: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the confidence of each decision, and whether it is wrong."""
    confidence, guess = probabilities.max(1)
    return confidence.numpy(), (guess != targets).numpy()


def _trust(labelling: Labelling, probabilities: Tensor, targets: Tensor, spec: Recipe) -> dict[str, Any]:
    """What the report says of how far these probabilities can be trusted: sets, refusal, and what they were before."""
    fitted, several = spec.evaluate.fitted, spec.data.multi_label
    trust: dict[str, Any] = {}
    if not several:
        coverage, risk, _ = risk_coverage(*_sure_and_wrong(probabilities, targets))
        kept = np.unique(np.linspace(0, len(risk) - 1, min(RISKS, len(risk))).round().astype(int))
        trust["risk_coverage"] = [coverage[kept].tolist(), risk[kept].tolist()]
    if fitted is None:
        return trust
    trust["fitted"] = fitted.model_dump()
    if fitted.temperature != 1:
        before = tempered(probabilities, 1 / fitted.temperature, several)
        error = metrics.overall(before, targets, metrics.of_classes(before, targets, ranked=False))["calibration_error"]
        if several:
            belief, right = before.flatten().numpy(), targets.flatten().numpy()
        else:
            belief, wrong = _sure_and_wrong(before, targets)
            right = ~wrong
        trust["before"] = {
            "calibration_error": error.item(),
            "loss": labelling.log_loss(before, targets).item(),
            "bins": metrics.binned(right, belief).tolist(),
        }
    if fitted.least is not None:
        sets = (probabilities >= fitted.least).numpy()
        trust["sets"] = {
            "asked": 1 - (spec.evaluate.conformal or 0),
            "covered": float(sets[np.arange(len(sets)), targets].mean()),
            "sizes": np.bincount(sets.sum(1), minlength=len(labelling.classes) + 1).tolist(),
        }
    return trust


def _confusion(labelling: Labelling, probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(K, K) counts, a row per true class; of several labels (K, 2, 2), [[tn, fp], [fn, tp]] of each."""
    guess, width = labelling.decided(probabilities), probabilities.shape[1]
    if targets.ndim == 1:
        return np.bincount(targets * width + guess, minlength=width**2).reshape(width, width)
    truth, guess = targets > 0, guess > 0
    pairs = [[(a & b).sum(0) for b in (~guess, guess)] for a in (~truth, truth)]
    return np.moveaxis(np.array(pairs), -1, 0)


def _table(labelling: Labelling, samples: Sequence[Sample], probabilities: np.ndarray) -> Iterator[dict[str, Any]]:
    for sample, row in zip(samples, probabilities, strict=True):
        truth, guess = labelling.name(sample.label), labelling.name(labelling.decided(row))
        confidence = "" if np.ndim(sample.label) else f"{row.max():.6f}"
        cells = {"name": sample.name, "label": truth, "predicted": guess, "correct": int(truth == guess)}
        yield cells | {"confidence": confidence} | probability_cells(labelling.classes, row)


def _mistakes(
    labelling: Labelling, samples: Sequence[Sample], probabilities: np.ndarray, targets: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, Image.Image]]:
    """The images whose prediction is furthest from the truth, with what was believed instead."""
    sure, believed = labelling.surprise(probabilities, targets)
    worst = [i for i in np.argsort(-sure, kind="stable")[:MISTAKES] if sure[i] > 0]
    rows, pictures = [], {}
    for rank, i in enumerate(worst):
        file = f"mistakes/{rank:02d}.png"
        pictures[file] = _thumbnail(samples[i])
        truth, guess = labelling.name(targets[i]), labelling.name(labelling.decided(probabilities[i]))
        row = {"file": file, "name": samples[i].name, "label": truth, "predicted": guess}
        rows.append(row | {"confidence": f"{sure[i]:.6f}", "p_label": f"{believed[i]:.6f}"})
    return rows, pictures


def _thumbnail(sample: Sample) -> Image.Image:
    """A small picture for people: three or one channels, at most THUMBNAIL pixels, stretched if deeper than 8 bits."""
    image = sample.image()
    pixels = unit_range(image[:1] if len(image) == 2 else image[:3])
    pixels = pixels if image.dtype == np.uint8 else pixels / max(float(pixels.max()), 1e-6)
    array = (pixels * 255).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    scale = THUMBNAIL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
