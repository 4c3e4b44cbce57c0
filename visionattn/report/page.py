"""Pieces of the report's page that every task uses: numbers as texts, tables, matrices, pictures."""

import base64
import csv
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from visionattn.report.charts import Chart

__all__ = [
    *("METRICS", "PERCENT", "Evaluation", "embedded", "finite", "framed", "headline_of", "interval_of", "label_of"),
    *("matrix", "number", "plural", "read_rows", "reliability", "table_of"),
]

LOSSLESS_BYTES = 16_000  # larger pictures are embedded as JPEG
PERCENT = "\u202f%"

METRICS = {  # name: (label, meaning, shown in per cent)
    "accuracy": ("accuracy", "images classified correctly", True),
    "top5": ("top-5 accuracy", "images whose class is among the five most probable", True),
    "balanced_accuracy": ("balanced accuracy", "mean recall of the classes", True),
    "f1": ("F1", "mean over the classes", False),
    "auroc": ("AUROC", "mean over the classes, each against the rest", False),
    "average_precision": ("average precision", "mean over the classes, each against the rest", False),
    "dice": ("Dice", "mean over the cases of a class, then over classes", False),
    "iou": ("IoU", "as Dice", False),
    "precision": ("precision", "as Dice, over the cases where the class is predicted", False),
    "recall": ("recall", "as Dice, over the cases that have the class", False),
    "hd95": ("HD95", "95th percentile of the distances between the surfaces; as Dice", False),
    "nsd": ("surface Dice", "share of the surfaces within the tolerance of each other (NSD); as Dice", False),
    "pooled_iou": ("pooled IoU", "of all pixels together", False),
    "miou": ("mIoU", "of all pixels together, mean over the classes", False),
    "mf1": ("mF1", "of all pixels together, mean over the classes", False),
    "pixel_accuracy": ("pixel accuracy", "labelled pixels classified correctly", True),
    "calibration_error": ("calibration error", "mean distance of confidence from accuracy, in 15 bins", True),
    "loss": ("log loss", "of the predicted probabilities, without class weights", False),
}
TITLES = {
    "val": "Validation",
    "test": "Test",
    "val-last": "Validation, last epoch",
    "test-last": "Test, last epoch",
    "all": "All",
}


class Evaluation(NamedTuple):
    """An evaluation folder and the content of its metrics.json."""

    folder: Path
    result: dict[str, Any]

    @property
    def title(self) -> str:
        return TITLES.get(self.folder.name, self.folder.name)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finite(value: str | float | None) -> float | None:
    return float(value) if value not in (None, "") and math.isfinite(float(value)) else None


def number(metric: str, value: float | None) -> str:
    if finite(value) is None:
        return "–"
    return f"{100 * value:.1f}{PERCENT}" if metric in METRICS and METRICS[metric][2] else f"{value:.3f}"


def headline_of(result: dict[str, Any]) -> str:
    return number(result["headline"], result["overall"].get(result["headline"]))


def interval_of(result: dict[str, Any], metric: str | None = None) -> str:
    """The interval of a metric, or of the headline; '' where there is none."""
    metric, known = metric or result["headline"], result.get("intervals", {})
    if (interval := result["interval"]) and interval["metric"] == metric:
        known = {metric: (interval["low"], interval["high"])}
    if metric not in known:
        return ""
    low, high = (number(metric, value) for value in known[metric])
    return f"{low.removesuffix(PERCENT)}\u2009–\u2009{high}"


def label_of(metric: str) -> str:
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table_of(css: str, heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, the first column being headings."""
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    return framed(css, "".join(f'<th scope="col">{escape(text)}</th>' for text in heads), body)


def framed(css: str, head: str, body: str) -> str:
    """A table inside a region that scrolls, by keys too."""
    table = f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    tall = " tall" if body.count("<tr") > 25 and "matrix" not in css else ""
    return f'<div class="scroll{tall}" role="region" aria-label="{css}" tabindex="0">{table}</div>'


def matrix(classes: list[str], counts: np.ndarray, percent: bool = False) -> str:
    """A confusion matrix with a row per true class, as counts of images or as per cent of the row's pixels."""
    numbered, few = len(classes) > 24, len(classes) < 5
    turned = not numbered and max(map(len, classes)) > (14 if few else 4)
    names = [escape(name) for name in classes]
    head = '<th class="axis">predicted →<br>truth ↓</th>'
    for k, name in enumerate(names, 1):
        text = f'<span aria-label="{name}">{k}</span>' if numbered else f"<span>{name}</span>"
        head += f'<th scope="col" title="{name}"{" class=turned" if turned else ""}>{text}</th>'
    body = ""
    for k, (name, row) in enumerate(zip(names, counts, strict=True)):
        number = f'<span class="axis">{k + 1}</span> ' if numbered else ""
        body += f'<tr><th scope="row" title="{name}">{number}{name}</th>'
        for other, (count, share) in enumerate(zip(row, row / max(row.sum(), 1), strict=True)):
            css = f' class="{"right" if k == other else "wrong"}" style="--v:{share:.3f}"' if count else ""
            text = f"{100 * share:.0f}" if percent else count
            body += f"<td{css}>{text if count else ''}</td>"
        body += "</tr>"
    unit = "per cent of the row's pixels" if percent else "images"
    note = f"Numbers are {unit}; the colour is their share of the row, blue where right and orange where wrong."
    size = "dense" if numbered else "roomy" if few else ""
    return f'<p class="note">{note}</p>{framed(f"matrix {size}".strip(), head, body)}'


def reliability(bins: np.ndarray, error: float | None, believed: str, seen: str, noun: str) -> str:
    """Calibration as a chart, of (3, bins): number, summed probability, and how many came true."""
    chart = Chart()
    chart.axes(f"predicted {believed}")
    chart.rule((0, 0), (1, 1), "mark")
    for b in np.flatnonzero(bins[0]):
        count, belief, right = bins[:, b]
        x, y = belief / count, right / count
        chart.bar((b / bins.shape[1], (b + 1) / bins.shape[1]), count / bins[0].sum(), "share")
        chart.rule((x, x), (x, y), "gap")
        chart.dot(x, y, "s0")
    legend = [("s0", seen), ("mark", "perfect"), ("gap", "gap"), ("share", f"share of the {noun}")]
    title = f"Calibration: mean gap {number('calibration_error', error)}"
    return chart.figure(title, f"{title}; {seen} by predicted {believed}", legend)


def embedded(picture: Path) -> str:
    """A data address; photographs become JPEG, which is far smaller."""
    content, kind = picture.read_bytes(), "png"
    if len(content) > LOSSLESS_BYTES:
        stream = io.BytesIO()
        Image.open(picture).convert("RGB").save(stream, "JPEG", quality=88)
        content, kind = stream.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
