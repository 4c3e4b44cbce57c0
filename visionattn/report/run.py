"""The report of a run: one HTML page, inside one file, made from whatever the run directory holds so far.

Its fonts and colours are in report.html. Epochs are numbered from 1 here, from 0 in the run's files.
"""

import csv
import json
import math
import os
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import yaml
from sklearn.metrics import roc_curve

from visionattn.report.charts import Chart
from visionattn.report.page import (
    METRICS,
    PERCENT,
    Evaluation,
    embedded,
    finite,
    framed,
    headline_of,
    interval_of,
    label_of,
    matrix,
    number,
    plural,
    read_rows,
    reliability,
    table_of,
)
from visionattn.tasks.segmentation.report import segmentation_evaluation

__all__ = ["write_report"]

MATRIX_CLASSES = 50  # of more, the most confused pairs are shown
PAIRS = 30
ORDER = ("test", "val", "test-last", "val-last")  # of the sections
ROC_LABELS = 20
ROC_POINTS = 200
BINS = 15
SUPERSCRIPT = str.maketrans("-123456789", "⁻¹²³⁴⁵⁶⁷⁸⁹")


class Run(NamedTuple):
    """What a run directory holds; parts that are not there yet are empty."""

    name: str
    recipe_text: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, float | None]]
    evaluations: list[Evaluation]  # in ORDER, then the others


class Section(NamedTuple):
    """A part of the page; one with a note is folded away behind its title and the note."""

    key: str
    title: str
    content: str
    note: str = ""


def write_report(run: Path) -> Path:
    """Make `run`/report.html, at any time during or after training; the same files give the same page.

    Returns:
        its path.
    """
    content = _read(run)
    sections = _sections(content)
    links = "".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in sections)
    template = Template(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        name=escape(content.name),
        sentence=_sentence(content),
        facts=_facts(content),
        warnings=_warnings(content.environment.get("data", {})),
        links=links,
        sections="\n".join(map(_section, sections)),
    )
    path = run / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _read(run: Path) -> Run:
    recipe_text = _text(run / "recipe.yaml")
    folders = sorted(p.parent for p in run.glob("evaluation/*/metrics.json") if p.parent.suffix != ".partial")
    folders.sort(key=lambda folder: ORDER.index(folder.name) if folder.name in ORDER else len(ORDER))
    return Run(
        name=run.resolve().name,
        recipe_text=recipe_text,
        recipe=yaml.safe_load(recipe_text) or {},
        environment=json.loads(_text(run / "environment.json") or "{}"),
        epochs=[{key: finite(cell) for key, cell in row.items()} for row in read_rows(run / "metrics.csv")],
        evaluations=[Evaluation(folder, json.loads(_text(folder / "metrics.json"))) for folder in folders],
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"


def _sentence(run: Run) -> str:
    model, data = run.recipe.get("model", {}), run.recipe.get("data", {})
    start = " (from pretrained weights)" if model.get("pretrained") or model.get("checkpoint") else ""
    source = escape(data.get("name") or Path(data.get("root", "its data")).name)
    trained = f"trained on {source} for {plural(len(run.epochs), 'epoch')}"
    title = " with ".join(escape(model[key]) for key in ("name", "decoder") if model.get(key)) or "The network"
    name = f"<strong>{title}</strong>{start}"
    if not run.evaluations:
        return f"{name} is being {trained} so far; it has not been evaluated yet."
    folder, result = run.evaluations[0]
    value = f"<strong>{headline_of(result)} {label_of(result['headline'])}</strong>"
    value += f" (95{PERCENT} interval {interval_of(result)})" if result["interval"] else ""
    noun, kind = result.get("noun", "image"), {"test": "test ", "val": "validation "}.get(folder.name)
    images = plural(result["samples"], f"{kind or ''}{noun}") + ("" if kind else f" of {escape(folder.name)}")
    return f"{name}, {trained}, reaches {value} on {images}."


def _facts(run: Run) -> str:
    facts, environment = [], run.environment
    for e in run.evaluations[:1]:
        facts.append(
            (f"{label_of(e.result['headline'])}, {e.title.lower()}", headline_of(e.result), interval_of(e.result))
        )
    if run.epochs:
        planned, (best, metric) = run.recipe.get("train", {}).get("epochs", len(run.epochs)), _best(run)
        done = f"{len(run.epochs)}" + (f" of {planned}" if planned != len(run.epochs) else "")
        facts.append(("epochs", done, f"best: {best}, by validation {metric}" if best else ""))
    seconds = environment.get("seconds") or sum(row.get("seconds") or 0 for row in run.epochs)
    if seconds:
        facts.append(("time", _duration(seconds), environment.get("device", "")))
    if counts := environment.get("data", {}).get("images"):
        splits = " · ".join(f"{count:,}\u00a0{name}" for name, count in counts.items())
        facts.append(("images", f"{sum(counts.values()):,}", splits))
    for stamp in [key for key in ("finished", "started") if environment.get(key)][:1]:
        moment = datetime.fromisoformat(environment[stamp])
        facts.append((stamp, f"{moment.day} {moment:%b %Y}", f"{moment:%H:%M}"))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}<small>{escape(more)}</small></dd></div>" for k, v, more in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _best(run: Run) -> tuple[int | None, str]:
    """The epoch of the evaluated weights, or the best so far, and the metric that picks it."""
    results = [e.result for e in run.evaluations if e.folder.name in ("test", "val")]
    several = any(result.get("multi_label") for result in results)
    usual = "dice" if run.recipe.get("task") == "segmentation" else "auroc" if several else "accuracy"
    metric = run.recipe.get("train", {}).get("monitor") or usual
    rated = [(row[f"val/{metric}"], row["epoch"]) for row in run.epochs if row.get(f"val/{metric}") is not None]
    first_best = max(rated, key=lambda pair: -pair[0] if metric == "loss" else pair[0], default=(None, None))[1]
    epoch = results[0]["epoch"] if results else first_best
    return None if epoch is None else int(epoch) + 1, label_of(metric).removeprefix("log ")


def _warnings(data: dict[str, Any]) -> str:
    """What the check of the data had to say."""
    messages = [*data.get("warnings", []), *(f"left out: {skipped}" for skipped in data.get("skipped", []))]
    items = "".join(f"<li>{escape(message)}</li>" for message in messages)
    title = "<strong>From the check of the data</strong>"
    return f'<aside class="warning">{title}<ul>{items}</ul></aside>' if items else ""


def _sections(run: Run) -> list[Section]:
    found = [Section("results", "Results", _results(run.evaluations))] if run.evaluations else []
    found += [Section("training", "Training", _training(run))] if run.epochs else []
    for i, e in enumerate(run.evaluations):
        note = f"{headline_of(e.result)} {label_of(e.result['headline'])}" if i else ""
        split, comma, weights = e.title.partition(",")  # Test, last epoch
        title = f"{split} {e.result.get('noun', 'image')}s{comma}{weights}"
        found.append(Section(f"evaluation-{i}", title, _evaluation(e), note))
    if run.recipe_text:
        found.append(Section("recipe", "Recipe", f"<pre>{escape(run.recipe_text)}</pre>", "recipe.yaml"))
    if run.environment:
        facts = [[key.replace("_", " "), _plain(value)] for key, value in run.environment.items()]
        table = table_of("environment", ["What", "Value"], facts)
        found.append(Section("environment", "Environment", table, "environment.json"))
    return found


def _section(section: Section) -> str:
    title = f"<h2>{escape(section.title)}</h2>"
    if not section.note:
        return f'<section id="{section.key}">{title}{section.content}</section>'
    summary = f'<summary>{title}<span class="note">{escape(section.note)}</span></summary>'
    return f'<details id="{section.key}">{summary}{section.content}</details>'


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {', '.join(_plain(item).splitlines())}" for key, item in value.items())
    return "\n".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _results(evaluations: list[Evaluation]) -> str:
    places = {"val": 0, "test": 1, "val-last": 2, "test-last": 3}
    columns = sorted(evaluations, key=lambda e: places.get(e.folder.name, len(places)))
    noun = columns[0].result.get("noun", "image")
    sizes = [f"{escape(e.title)}<br>{plural(e.result['samples'], noun)}" for e in columns]
    heads = "".join(f'<th scope="col">{text}</th>' for text in ["Metric", *sizes, "Meaning"])
    first = columns[0].result
    found = {name for e in columns for name, value in e.result["overall"].items() if value is not None}
    rows = ""
    for name in [*(m for m in METRICS if m in found), *sorted(found - METRICS.keys())]:
        headline = name == first["headline"]
        cells = ""
        for e in columns:
            low_high = f"<small>{interval_of(e.result, name)}</small>"
            cells += f"<td>{number(name, e.result['overall'].get(name))}{low_high}</td>"
        meaning = METRICS[name][1] if name in METRICS else ""
        if name == "accuracy" and first.get("multi_label"):
            meaning = "image-label pairs decided correctly at the threshold 0.5"
        css = ' class="head"' if headline else ""
        rows += f'<tr{css}><th scope="row">{escape(label_of(name))}</th>{cells}<td class="meaning">{meaning}</td></tr>'
    noun = f"{noun}s" if first.get("task") != "segmentation" else "groups that are never split apart"
    note = f"Below a number: its 95{PERCENT} interval, by bootstrap over the {noun}."
    return framed("results", heads, rows) + (f'<p class="note">{note}</p>' if first["interval"] else "")


def _training(run: Run) -> str:
    """Curves over epochs: losses, validation metrics, learning rate."""
    shown = [name for name in METRICS if name not in ("loss", "calibration_error")]
    panels = [
        _curves(run, "Loss", {"val/loss": "validation", "train/loss": "training"}),
        _curves(run, "Validation metrics", {f"val/{name}": label_of(name) for name in shown}),
        _curves(run, "Learning rate", {"lr": "learning rate"}),
    ]
    return f'<div class="charts">{"".join(panels)}</div>'


def _curves(run: Run, title: str, columns: dict[str, str]) -> str:
    lines = {}
    for column, label in columns.items():
        if points := [(row["epoch"] + 1, row[column]) for row in run.epochs if row.get(column) is not None]:
            lines[label] = np.array(points)
    if not lines:
        return ""
    x, y = np.concatenate(list(lines.values())).T
    power = math.floor(math.log10(y.max())) if 0 < y.max() < 0.01 else 0
    low, high = y.min() / 10**power, y.max() / 10**power
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    span = (max(low - pad, 0) if low >= 0 else low - pad, min(high + pad, 1) if 0.5 < high <= 1 else high + pad)
    alone = 0.5 if x.min() == x.max() else 0
    chart = Chart((x.min() - alone, x.max() + alone), span, height=236)
    chart.axes("epoch", integer=True)
    best, _ = _best(run)
    if best and not alone:
        chart.mark(best, f"best: {best}")
    legend = []
    for i, (label, points) in enumerate(lines.items()):
        colour = f"s{i}"
        legend.append((f"{colour} dashed" if i % 2 else colour, label))
        chart.line(points / (1, 10**power), legend[-1][0])
        for epoch, value in points[(points[:, 0] == best) | (len(points) == 1)]:
            chart.dot(epoch, value / 10**power, colour)
    title += f" (×10{str(power).translate(SUPERSCRIPT)})" if power else ""
    last = ", ".join(f"{label} {points[-1, 1]:.4g}" for label, points in lines.items())
    return chart.figure(title, f"{title} by epoch; after the last: {last}", legend if len(legend) > 1 else ())


def _evaluation(evaluation: Evaluation) -> str:
    result = evaluation.result
    if result.get("task") == "segmentation":
        return segmentation_evaluation(evaluation)
    about = f"{plural(result['samples'], 'image')}, weights of epoch {result['epoch'] + 1} ({result['checkpoint']})"
    about += f", predictions averaged over {', '.join(result['tta'])}" if result.get("tta") else ""
    about += f", images of {result['data']}" if result.get("data") else ""
    blocks = f"<div>{_confusion(result)}</div><div>{_per_class(result)}</div>{_probabilities(evaluation)}"
    return f'<p class="note">{escape(about)}</p><div class="blocks">{blocks}</div>{_mistakes(evaluation)}'


def _confusion(result: dict[str, Any]) -> str:
    classes, counts = result["classes"], np.array(result["confusion"])
    if result["multi_label"]:
        rows = [
            [name, *(f"{n:,}" for n in (tp, fn, fp, tn))]
            for name, ((tn, fp), (fn, tp)) in zip(classes, counts, strict=True)
        ]
        return "<h3>Confusion</h3>" + table_of("counts", ["Label", "TP", "FN", "FP", "TN"], rows)
    if len(classes) <= MATRIX_CLASSES:
        return f"<h3>Confusion matrix</h3>{matrix(classes, counts)}"
    wrong = counts * (1 - np.eye(len(classes), dtype=int))
    share = wrong / counts.sum(1, keepdims=True).clip(1)
    pairs = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:PAIRS], wrong.shape), strict=True)
    rows = [
        [classes[t], classes[p], f"{wrong[t, p]:,}", f"{100 * share[t, p]:.0f}{PERCENT}"]
        for t, p in pairs
        if wrong[t, p]
    ]
    return "<h3>Most confused pairs</h3>" + table_of("pairs", ["Truth", "Predicted", "Images", "Share of truth"], rows)


def _per_class(result: dict[str, Any]) -> str:
    rows, key = result["per_class"], "auroc" if result["multi_label"] else "f1"
    rated = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    weak = [row["class"] for row in rated[: min(5, len(rows) // 4)]]
    columns = {"precision": "Precision", "recall": "Recall", "f1": "F1", "auroc": "AUROC", "average_precision": "AP"}
    noun = "Label" if result["multi_label"] else "Class"
    head = "".join(f'<th scope="col">{text}</th>' for text in (noun, "Images", *columns.values()))
    body = ""
    for row in rows:
        name, low = escape(row["class"]), row["class"] in weak
        tag = '<span class="hidden"> (among the lowest)</span>' if low else ""
        body += f'<tr{" class=weak" if low else ""}><th scope="row" data-v="{name}">{name}{tag}</th>'
        body += f'<td data-v="{row["support"]}">{row["support"]:,}</td>'
        for metric in columns:
            bar = "" if row[metric] is None else f' class="bar" data-v="{row[metric]}" style="--v:{row[metric]:.3f}"'
            body += f"<td{bar}>{number(metric, row[metric])}</td>"
        body += "</tr>"
    note = f'<p class="note">Marked: lowest {columns[key]}.</p>' if weak else ""
    return f"<h3>{noun} by {noun.lower()}</h3>{note}{framed('classes', head, body)}"


def _columns(path: Path, names: list[str]) -> list[tuple[str, ...]]:
    """Some columns of a table that may be far too large to keep."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        head = next(rows)
        places = [head.index(name) for name in names]
        return list(zip(*([row[i] for i in places] for row in rows), strict=True))


def _probabilities(evaluation: Evaluation) -> str:
    """ROC curves where there are two classes or several labels, and the reliability diagram."""
    path, result = evaluation.folder / "predictions.csv", evaluation.result
    if not path.is_file():
        return ""
    several, classes = result["multi_label"], result["classes"]
    scored = classes if several else classes[1:] if len(classes) == 2 else []
    columns = ["label", "correct", "confidence", *(f"p:{name}" for name in scored)]
    label, correct, confidence, *scores = _columns(path, columns)
    truth = np.array([[f";{name};" in f";{text};" for text in label] for name in scored])
    belief = np.array(scores, dtype=float)
    confusion = result["confusion"] if several else [result["confusion"]]
    auroc = {row["class"]: row["auroc"] for row in result["per_class"] if row["auroc"] is not None}
    worst = sorted((k for k, name in enumerate(scored) if name in auroc), key=lambda k: auroc[scored[k]])[:ROC_LABELS]
    curves = "".join(
        _roc(scored[k], auroc[scored[k]], truth[k], belief[k], confusion[k], several) for k in sorted(worst)
    )
    if not several:
        return curves + _reliability(np.array(correct, float), np.array(confidence, float), result)
    lowest = f", the {ROC_LABELS} lowest of {len(auroc)}" if len(auroc) > ROC_LABELS else ""
    note = '<p class="note">With the area under the curve; the dot is the threshold 0.5.</p>'
    rocs = f'<div><h3>ROC curves{lowest}</h3>{note}<div class="small">{curves}</div></div>' if curves else ""
    return rocs + _reliability(truth.ravel(), belief.ravel(), result)


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


def _reliability(right: np.ndarray, belief: np.ndarray, result: dict[str, Any]) -> str:
    several = result["multi_label"]
    place = np.minimum((belief * BINS).astype(int), BINS - 1)
    bins = np.stack([np.bincount(place, weights, BINS) for weights in (np.ones_like(belief), belief, right)])
    believed, seen = ("probability", "frequency") if several else ("confidence", "accuracy")
    noun = "image-label pairs" if several else "images"
    return reliability(bins, result["overall"].get("calibration_error"), believed, seen, noun)


def _mistakes(evaluation: Evaluation) -> str:
    several = evaluation.result["multi_label"]
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
