"""The part of the report about a classifier on one split: confusion, classes, calibration, mistakes."""

from html import escape
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from visionattn.files import read_table
from visionattn.report.charts import Chart
from visionattn.report.evaluation import Evaluation, read_rows
from visionattn.report.pieces import (
    PERCENT,
    about_weights,
    embedded,
    fitted_note,
    fitted_rows,
    framed,
    matrix,
    most_confused,
    number,
    reliability,
    table_of,
)
from visionattn.tasks.classification.metrics import METRICS, binned

__all__ = ["sections"]

MATRIX_CLASSES = 50  # of more, the most confused pairs are shown
ROC_LABELS = 20
ROC_POINTS = 200
COLUMNS = ("precision", "recall", "f1", "auroc", "average_precision")
TITLES = {"precision": "Precision", "recall": "Recall", "f1": "F1", "auroc": "AUROC", "average_precision": "AP"}


def sections(evaluation: Evaluation) -> str:
    """The content of an evaluation's section, HTML."""
    several = evaluation.more["multi_label"]
    confusion = _counts(evaluation) if several else _confusion(evaluation)
    blocks = (
        f"<div>{confusion}</div><div>{_per_class(evaluation)}</div>{_probabilities(evaluation)}{_trust(evaluation)}"
    )
    note = f'<p class="note">{escape(about_weights(evaluation))}{_measured(evaluation)}</p>'
    return f'{note}<div class="blocks">{blocks}</div>{_mistakes(evaluation)}'


def _measured(evaluation: Evaluation) -> str:
    """Which means leave classes out, since their images cannot measure them."""
    counts = {name: (n, of) for name, (n, of) in evaluation.more.get("measured", {}).items() if n < of}
    texts = [f"{escape(METRICS[name].label)} over {n} of {of}" for name, (n, of) in counts.items()]
    return f". Means over the classes that these images can measure: {', '.join(texts)}" if texts else ""


def _counts(evaluation: Evaluation) -> str:
    counts = np.array(evaluation.more["confusion"])
    rows = [
        [name, *(f"{n:,}" for n in (tp, fn, fp, tn))]
        for name, ((tn, fp), (fn, tp)) in zip(evaluation.classes, counts, strict=True)
    ]
    return "<h3>Confusion</h3>" + table_of("counts", ["Label", "TP", "FN", "FP", "TN"], rows)


def _confusion(evaluation: Evaluation) -> str:
    classes, counts = evaluation.classes, np.array(evaluation.more["confusion"])
    if len(classes) <= MATRIX_CLASSES:
        return f"<h3>Confusion matrix</h3>{matrix(classes, counts)}"
    return f"<h3>Most confused pairs</h3>{most_confused(classes, counts, 'Images')}"


def _per_class(evaluation: Evaluation) -> str:
    several, rows = evaluation.more["multi_label"], evaluation.per_class
    key, noun = ("auroc", "Label") if several else ("f1", "Class")
    rated = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    weak = [row["class"] for row in rated[: min(5, len(rows) // 4)]]
    head = "".join(f'<th scope="col">{text}</th>' for text in (noun, "Images", *TITLES.values()))
    body = ""
    for row in rows:
        name, low = escape(row["class"]), row["class"] in weak
        tag = '<span class="hidden"> (among the lowest)</span>' if low else ""
        body += f'<tr{" class=weak" if low else ""}><th scope="row" data-v="{name}">{name}{tag}</th>'
        body += f'<td data-v="{row["support"]}">{row["support"]:,}</td>'
        for metric in COLUMNS:
            bar = "" if row[metric] is None else f' class="bar" data-v="{row[metric]}" style="--v:{row[metric]:.3f}"'
            body += f"<td{bar}>{number(False, row[metric])}</td>"
        body += "</tr>"
    note = f'<p class="note">Marked: lowest {TITLES[key]}.</p>' if weak else ""
    return f"<h3>{noun} by {noun.lower()}</h3>{note}{framed('classes', head, body)}"


def _columns(path: Path, names: list[str]) -> list[tuple[str, ...]]:
    """Some columns of a table that may be far too large to keep."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = read_table(file)
        head = next(rows)
        places = [head.index(name) for name in names]
        return list(zip(*([row[i] for i in places] for row in rows), strict=True))


def _probabilities(evaluation: Evaluation) -> str:
    """ROC curves where there are two classes or several labels, and the reliability diagram."""
    path, several, classes = evaluation.folder / "predictions.csv", evaluation.more["multi_label"], evaluation.classes
    if not path.is_file():
        return ""
    scored = classes if several else classes[1:] if len(classes) == 2 else []
    kept = evaluation.folder / "probabilities.npy"
    columns = [] if kept.is_file() else [f"p:{name}" for name in scored]
    label, correct, confidence, *scores = _columns(path, ["label", "correct", "confidence", *columns])
    truth = np.array([[f";{name};" in f";{text};" for text in label] for name in scored])
    belief = np.array(scores, float) if columns or not scored else np.load(kept, mmap_mode="r").T
    confusion = evaluation.more["confusion"] if several else [evaluation.more["confusion"]]
    auroc = {row["class"]: row["auroc"] for row in evaluation.per_class if row["auroc"] is not None}
    worst = sorted((k for k, name in enumerate(scored) if name in auroc), key=lambda k: auroc[scored[k]])[:ROC_LABELS]
    curves = "".join(
        _roc(scored[k], auroc[scored[k]], truth[k], belief[k], confusion[k], several) for k in sorted(worst)
    )
    if not several:
        bins = binned(np.array(correct, float), np.array(confidence, float))
        return curves + reliability(bins, evaluation.overall["calibration_error"], "confidence", "accuracy", "images")
    lowest = f", the {ROC_LABELS} lowest of {len(auroc)}" if len(auroc) > ROC_LABELS else ""
    note = '<p class="note">With the area under the curve; the dot is the threshold 0.5.</p>'
    rocs = f'<div><h3>ROC curves{lowest}</h3>{note}<div class="small">{curves}</div></div>' if curves else ""
    bins = binned(truth.ravel(), belief.ravel())
    error = evaluation.overall["calibration_error"]
    return rocs + reliability(bins, error, "probability", "frequency", "image-label pairs")


def _trust(evaluation: Evaluation) -> str:
    """What is wrong among the surest images, and what the sets of classes keep of their promise."""
    blocks, more = "", evaluation.more
    if curve := more.get("risk_coverage"):
        coverage, risk = curve
        top = max(max(risk), 1e-9)
        chart = Chart()
        chart.axes("share of the images that are decided, the surest first")
        chart.line(np.stack([coverage, np.array(risk) / top], axis=1), "s0")
        area = evaluation.overall["aurc"]
        title = f"Risk over coverage: AURC {number(False, area)}"
        said = f"mistakes among these; the top is {number(True, top)}"
        blocks += chart.figure(title, f"{title}; {said}", [("s0", said)])
    if fitted := more.get("fitted"):
        rows = fitted_rows(fitted)
        if sets := more.get("sets"):
            covered = f"{number(True, sets['covered'])} (asked {number(True, sets['asked'])})"
            rows += [["sets that have the class", covered]]
            rows += [[f"sets of {size}", f"{count:,}"] for size, count in enumerate(sets["sizes"]) if count]
        blocks += f"<div><h3>Trust</h3>{fitted_note(fitted)}{table_of('trust', ['What', 'Value'], rows)}</div>"
        if before := more.get("before"):
            bins, error = np.array(before["bins"]), before["calibration_error"]
            noun = "image-label pairs" if more["multi_label"] else "images"
            blocks += reliability(bins, error, "confidence before the temperature", "accuracy", noun)
    return blocks


def _roc(name: str, area: float, truth: np.ndarray, score: np.ndarray, confusion: list, small: bool) -> str:
    curve = np.stack(roc_curve(truth, score)[:2], axis=1)
    kept = np.linspace(0, len(curve) - 1, min(ROC_POINTS, len(curve))).round().astype(int)
    chart = Chart(width=120, height=120, pad=4) if small else Chart()
    if not small:
        chart.axes("false positive rate")
    chart.rule((0, 0), (1, 1), "mark")
    chart.line(curve[kept], "s0")
    (tn, fp), (fn, tp) = confusion
    chart.dot(fp / (fp + tn), tp / (tp + fn), "s0")
    legend = [("s0", "true positive rate; the dot is the threshold 0.5"), ("mark", "chance")]
    title = f"ROC curve of {name}: AUROC {area:.3f}"
    return chart.figure(f"{name}: {area:.3f}" if small else title, title, () if small else legend)


def _mistakes(evaluation: Evaluation) -> str:
    several = evaluation.more["multi_label"]
    figures = ""
    for row in read_rows(evaluation.folder / "mistakes.csv"):
        picture, percent = evaluation.folder / row["file"], f"{100 * float(row['confidence']):.1f}{PERCENT}"
        truth, guess = (row[key].replace(";", ", ") if several else row[key] for key in ("label", "predicted"))
        facts = {"truth": truth or "none", "predicted": guess or "none", "off by" if several else "confidence": percent}
        items = "".join(f"<div><dt>{key}</dt> <dd>{escape(text)}</dd></div>" for key, text in facts.items())
        alt = escape(f"{row['name']}: truth {truth}, predicted {guess}")
        image = f'<img src="{embedded(picture)}" alt="{alt}">' if picture.is_file() else ""
        caption = f'<dl>{items}</dl><div class="file">{escape(row["name"])}</div>'
        figures += f'<figure><div class="picture">{image}</div><figcaption>{caption}</figcaption></figure>'
    return f'<h3>Most confident mistakes</h3><div class="mistakes">{figures}</div>' if figures else ""
