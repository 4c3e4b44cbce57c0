"""The report of a run: one HTML page, inside one file, made from whatever the run directory holds so far.

Its fonts and colours are in template.html; what is said about a split is the task's, `visionattn.tasks.TASK.report`.
"""

import importlib.resources
import json
import math
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import yaml

from visionattn.errors import plural
from visionattn.files import write_text
from visionattn.progress import duration
from visionattn.recipe import part_of
from visionattn.report.charts import Chart
from visionattn.report.evaluation import Evaluation, Metric, read_history
from visionattn.report.pieces import PERCENT, explained, finite, framed, number, table_of

__all__ = ["write_report"]

ORDER = ("test", "val", "test-last", "val-last")  # of the sections
TITLES = {
    "val": "Validation",
    "test": "Test",
    "val-last": "Validation, last epoch",
    "test-last": "Test, last epoch",
    "all": "All",
}
COLOURS = 6  # of curves; further ones are dashed where these are not
SUPERSCRIPT = str.maketrans("-123456789", "⁻¹²³⁴⁵⁶⁷⁸⁹")


class Run(NamedTuple):
    """What a run directory holds; parts that are not there yet are empty."""

    name: str
    recipe_text: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
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
    template = Template((importlib.resources.files(__package__) / "template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        name=escape(content.name),
        sentence=_sentence(content),
        facts=_facts(content),
        warnings=_warnings(content.environment.get("data", {})),
        links=links,
        sections="\n".join(map(_section, sections)),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def _read(run: Path) -> Run:
    recipe_text = _text(run / "recipe.yaml")
    folders = sorted(path.parent for path in run.glob("evaluation/[!.]*/metrics.json"))
    folders = [folder for folder in folders if folder.suffix != ".partial"]  # which a killed 0.1.0 left
    folders.sort(key=lambda folder: ORDER.index(folder.name) if folder.name in ORDER else len(ORDER))
    return Run(
        name=run.resolve().name,
        recipe_text=recipe_text,
        recipe=yaml.safe_load(recipe_text) or {},
        environment=json.loads(_text(run / "environment.json") or "{}"),
        epochs=[{key: finite(cell) for key, cell in row.items()} for row in read_history(run)],
        evaluations=[Evaluation.read(folder) for folder in folders],
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _metrics(task: str) -> dict[str, Metric]:
    return part_of(task, "metrics").METRICS


def _metric(evaluation: Evaluation, name: str) -> Metric:
    return _metrics(evaluation.task).get(name, Metric(name.replace("_", " "), ""))


def _value(evaluation: Evaluation, name: str) -> str:
    return number(_metric(evaluation, name).percent, evaluation.overall.get(name))


def _interval(evaluation: Evaluation, name: str) -> str:
    """The interval of a metric; '' where there is none."""
    if name not in evaluation.intervals:
        return ""
    low, high = (number(_metric(evaluation, name).percent, value) for value in evaluation.intervals[name])
    return f"{low.removesuffix(PERCENT)}\u2009–\u2009{high}"


def _headline(evaluation: Evaluation) -> str:
    return f"{_value(evaluation, evaluation.headline)} {_metric(evaluation, evaluation.headline).label}"


def _title(evaluation: Evaluation) -> str:
    return TITLES.get(evaluation.folder.name, evaluation.folder.name)


def _sentence(run: Run) -> str:
    model, data = run.recipe.get("model", {}), run.recipe.get("data", {})
    start = " (from pretrained weights)" if model.get("pretrained") or model.get("checkpoint") else ""
    source = escape(data.get("name") or Path(data.get("root", "its data")).name)
    trained = f"trained on {source} for {plural(len(run.epochs), 'epoch')}"
    parts = [escape(model[key]) for key in ("name", "decoder", "detector") if model.get(key)]
    name = f"<strong>{' with '.join(parts) or 'The network'}</strong>{start}"
    if not run.evaluations:
        return f"{name} is being {trained} so far; it has not been evaluated yet."
    first = run.evaluations[0]
    interval = _interval(first, first.headline)
    value = f"<strong>{_headline(first)}</strong>" + (f" (95{PERCENT} interval {interval})" if interval else "")
    kind = {"test": "test ", "val": "validation "}.get(first.folder.name)
    images = plural(first.samples, f"{kind or ''}{first.noun}") + ("" if kind else f" of {escape(first.folder.name)}")
    return f"{name}, {trained}, reaches {value} on {images}."


def _facts(run: Run) -> str:
    facts, environment = [], run.environment
    for e in run.evaluations[:1]:
        label = f"{_metric(e, e.headline).label}, {_title(e).lower()}"
        facts.append((label, _value(e, e.headline), _interval(e, e.headline)))
    if run.epochs:
        planned, (best, metric) = run.recipe.get("train", {}).get("epochs", len(run.epochs)), _best(run)
        done = f"{len(run.epochs)}" + (f" of {planned}" if planned != len(run.epochs) else "")
        facts.append(("epochs", done, f"best: {best}, by validation {metric}" if best else ""))
    seconds = environment.get("seconds") or sum(row.get("seconds") or 0 for row in run.epochs)
    if seconds:
        facts.append(("time", duration(seconds), environment.get("device", "")))
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
    evaluated = [e for e in run.evaluations if e.folder.name in ("test", "val")]
    monitor = run.recipe.get("train", {}).get("monitor") or (evaluated[0].headline if evaluated else None)
    metric = monitor or run.environment.get("monitor", "loss")
    rated = [(row[f"val/{metric}"], row["epoch"]) for row in run.epochs if row.get(f"val/{metric}") is not None]
    first_best = max(rated, key=lambda pair: -pair[0] if metric == "loss" else pair[0], default=(None, None))[1]
    epoch = evaluated[0].about["epoch"] if evaluated else first_best
    label = _metrics(run.recipe["task"])[metric].label if "task" in run.recipe else metric
    return None if epoch is None else int(epoch), label.removeprefix("log ")


def _warnings(data: dict[str, Any]) -> str:
    """What the check of the data had to say."""
    messages = [*data.get("warnings", []), *(f"left out: {skipped}" for skipped in data.get("skipped", []))]
    items = "".join(f"<li>{escape(message)}</li>" for message in messages)
    title = "<strong>From the check of the data</strong>"
    return f'<aside class="warning">{title}<ul>{items}</ul></aside>' if items else ""


def _sections(run: Run) -> list[Section]:
    parts = [Section("results", "Results", _results(run.evaluations))] if run.evaluations else []
    parts += [Section("training", "Training", _training(run))] if run.epochs else []
    for i, e in enumerate(run.evaluations):
        split, comma, weights = _title(e).partition(",")  # Test, last epoch
        title, content = f"{split} {e.noun}s{comma}{weights}", part_of(e.task, "report").sections(e) + explained(e)
        parts.append(Section(f"evaluation-{i}", title, content, _headline(e) if i else ""))
    if run.recipe_text:
        parts.append(Section("recipe", "Recipe", f"<pre>{escape(run.recipe_text)}</pre>", "recipe.yaml"))
    if run.environment:
        facts = [[key.replace("_", " "), _plain(value)] for key, value in run.environment.items()]
        table = table_of("environment", ["What", "Value"], facts)
        parts.append(Section("environment", "Environment", table, "environment.json"))
    return parts


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
    first = columns[0]
    sizes = [f"{escape(_title(e))}<br>{plural(e.samples, e.noun)}" for e in columns]
    heads = "".join(f'<th scope="col">{text}</th>' for text in ["Metric", *sizes, "Meaning"])
    measured = {name for e in columns for name, value in e.overall.items() if value is not None}
    rows = ""
    for name in [*(m for m in _metrics(first.task) if m in measured), *sorted(measured - _metrics(first.task).keys())]:
        metric, css = _metric(first, name), ' class="head"' if name == first.headline else ""
        cells = "".join(f"<td>{_value(e, name)}<small>{_interval(e, name)}</small></td>" for e in columns)
        meaning = first.more.get("meanings", {}).get(name, metric.meaning)
        rows += f'<tr{css}><th scope="row">{escape(metric.label)}</th>{cells}<td class="meaning">{meaning}</td></tr>'
    groups = first.more.get("bootstrap", {}).get("groups", first.samples)
    drawn = f"{first.noun}s" if groups == first.samples else "groups that are never split apart"
    note = f"Below a number: its 95{PERCENT} interval, by bootstrap over the {drawn}."
    return framed("results", heads, rows) + (f'<p class="note">{note}</p>' if first.intervals else "")


def _training(run: Run) -> str:
    """Curves over epochs: losses, validation metrics, learning rate."""
    metrics = _metrics(run.recipe["task"]) if "task" in run.recipe else {}
    shown = {
        f"val/{name}": metric.label for name, metric in metrics.items() if name not in ("loss", "calibration_error")
    }
    panels = [
        _curves(run, "Loss", {"val/loss": "validation", "train/loss": "training"}),
        _curves(run, "Validation metrics", shown),
        _curves(run, "Learning rate", {"lr": "learning rate"}),
    ]
    return f'<div class="charts">{"".join(panels)}</div>'


def _curves(run: Run, title: str, columns: dict[str, str]) -> str:
    lines: dict[str, np.ndarray] = {}
    for column, label in columns.items():
        if points := [(row["epoch"], row[column]) for row in run.epochs if row.get(column) is not None]:
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
    for i, (label, curve) in enumerate(lines.items()):
        colour = f"s{i % COLOURS}"
        legend.append((f"{colour} dashed" if (i + i // COLOURS) % 2 else colour, label))
        chart.line(curve / (1, 10**power), legend[-1][0])
        for epoch, value in curve[(curve[:, 0] == best) | (len(curve) == 1)]:
            chart.dot(epoch, value / 10**power, colour)
    title += f" (×10{str(power).translate(SUPERSCRIPT)})" if power else ""
    last = ", ".join(f"{label} {curve[-1, 1]:.4g}" for label, curve in lines.items())
    return chart.figure(title, f"{title} by epoch; after the last: {last}", legend if len(legend) > 1 else ())
