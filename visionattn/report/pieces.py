"""Pieces of the report's page that every task uses: numbers as texts, tables, matrices, pictures."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.errors import plural
from visionattn.report.charts import Chart
from visionattn.report.evaluation import Evaluation, read_history, read_rows

__all__ = [
    "PERCENT",
    "about_weights",
    "embedded",
    "explained",
    "finite",
    "fitted_note",
    "fitted_rows",
    "framed",
    "matrix",
    "most_confused",
    "number",
    "reliability",
    "table_of",
]

PAIRS = 30
LOSSLESS_BYTES = 16_000  # larger pictures are embedded as JPEG
PERCENT = "\u202f%"


def finite(value: str | float | None) -> float | None:
    return float(value) if value not in (None, "") and math.isfinite(float(value)) else None


def number(percent: bool, value: float | None) -> str:
    """A metric's value for people; a dash where there is none."""
    if value is None or finite(value) is None:
        return "–"
    return f"{100 * value:.1f}{PERCENT}" if percent else f"{value:.3f}"


def about_weights(evaluation: Evaluation) -> str:
    """How many samples were measured, with which weights."""
    about = evaluation.about
    text = f"{plural(evaluation.samples, evaluation.noun)}, weights of epoch {about['epoch']} ({about['checkpoint']})"
    epochs = read_history(evaluation.folder.parents[1])
    if about["checkpoint"].endswith("best.ckpt") and epochs and int(epochs[-1]["epoch"]) == about["epoch"]:
        text += ", which is the last epoch too"
    text += f", predictions averaged over {', '.join(about['tta'])}" if about.get("tta") else ""
    return text + (f", images of {about['data']}" if about.get("data") else "")


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


def matrix(
    classes: list[str],
    counts: np.ndarray,
    percent: bool = False,
    columns: list[str] | None = None,
    unit: str = "images",
) -> str:
    """A confusion matrix with a row per true class, as counts or as per cent of the row's pixels.

    Args:
        columns: what is predicted; unset: the classes.
    """
    numbered, few = len(classes) > 24, len(classes) < 5
    turned = not numbered and max(map(len, classes)) > (14 if few else 4)
    names = [escape(name) for name in classes]
    head = '<th class="axis">predicted →<br>truth ↓</th>'
    for k, name in enumerate(map(escape, columns or classes), 1):
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
    unit = "per cent of the row's pixels" if percent else unit
    note = f"Numbers are {unit}; the colour is their share of the row, blue where right and orange where wrong."
    size = "dense" if numbered else "roomy" if few else ""
    return f'<p class="note">{note}</p>{framed(f"matrix {size}".strip(), head, body)}'


def most_confused(classes: list[str], counts: np.ndarray, noun: str) -> str:
    """The pairs of classes that are most often taken for each other."""
    wrong = counts * (1 - np.eye(len(classes), dtype=int))
    share = wrong / counts.sum(1, keepdims=True).clip(1)
    order = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:PAIRS], wrong.shape)
    rows = [
        [classes[t], classes[p], f"{wrong[t, p]:,}", f"{100 * share[t, p]:.0f}{PERCENT}"]
        for t, p in zip(*order, strict=True)
        if wrong[t, p]
    ]
    return table_of("pairs", ["Truth", "Predicted", noun, "Share of truth"], rows)


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
    title = f"Calibration: mean gap {number(True, error)}"
    return chart.figure(title, f"{title}; {seen} by predicted {believed}", legend)


def fitted_rows(fitted: Mapping[str, Any]) -> list[list[str]]:
    """A row for each number that was fitted on held-out images."""
    known = {name.replace("_", " "): value for name, value in fitted.items() if value is not None}
    return [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in known.items()]


def fitted_note(fitted: Mapping[str, Any]) -> str:
    """What is to be kept in mind of numbers that were fitted on the images that the best epoch was chosen by."""
    text = "Fitted on the images that the best epoch was chosen by: on others it may promise too much."
    return f'<p class="note">{text}</p>' if fitted["source"] == "val" else ""


def explained(evaluation: Evaluation) -> str:
    """What its worst and best images depend on; "" where that was not asked for."""
    html = ""
    rows = read_rows(evaluation.folder / "explained.csv")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        figures = ""
        for row in [row for row in rows if row["kind"] == kind]:
            picture, name = evaluation.folder / row["file"], escape(row["image"])
            said = f"{name}: what {escape(row['target'])} depends on"
            image = f'<img src="{embedded(picture)}" alt="{said}">' if picture.is_file() else ""
            figures += f'<figure>{image}<figcaption><div class="file">{name}</div></figcaption></figure>'
        html += f'<h4>{escape(kind.capitalize())}</h4><div class="cases">{figures}</div>'
    note = (
        f"By {rows[0]['method']}; it shows what is used, not why. visionattn explain --check tests it." if rows else ""
    )
    return html and f'<h3>What predictions depend on</h3><p class="note">{note}</p>{html}'


def embedded(picture: Path) -> str:
    """A data address; photographs become JPEG, which is far smaller."""
    content, kind = picture.read_bytes(), "png"
    if len(content) > LOSSLESS_BYTES:
        stream = io.BytesIO()
        Image.open(picture).convert("RGB").save(stream, "JPEG", quality=88)
        content, kind = stream.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
