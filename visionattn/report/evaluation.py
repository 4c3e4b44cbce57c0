"""What is measured on the labelled samples of a split, and the folder that holds it.

The folder has metrics.json, tables and pictures; the report reads it back.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from visionattn.files import make_folder, new_folder, read_table, write_rows

__all__ = ["LOSS", "RENAMED", "Evaluation", "Metric", "format_table", "history", "read_history", "read_rows"]

FORMAT = 2  # of metrics.json
RENAMED = {"miou": "miou_counted", "mf1": "mf1_counted"}  # metrics of 0.1.0, which left classes out of them
FIELDS = ("task", "split", "noun", "samples", "classes", "headline", "overall", "intervals", "per_class")


class Metric(NamedTuple):
    """What a report says about a metric: its label, its meaning, and whether it is shown in per cent."""

    label: str
    meaning: str
    percent: bool = False


LOSS = {"loss": Metric("log loss", "of the predicted probabilities, without class weights")}  # of every task


@dataclass
class Evaluation:
    """How well a trained network does on a split.

    Attributes:
        task: the folder of `visionattn.tasks`.
        split: what it is called.
        noun: what a case is called: image, volume, scene.
        samples: number of cases.
        classes: their names.
        headline: the metric that stands for a run.
        overall: metrics; None where nothing can be measured.
        intervals: 95 % bootstrap intervals (low, high) of some of them.
        per_class: a row for each class.
        more: what only this task reports.
        about: checkpoint, epoch (counted from 1, as everywhere in a run), data, views.
        tables: by file name the rows of a table.
        arrays: by file name (.npy) what is too wide for a table.
        pictures: by file name.
        folder: where it was read from or written to.
    """

    task: str
    split: str
    noun: str
    samples: int
    classes: list[str]
    headline: str
    overall: dict[str, float | None]
    intervals: dict[str, list[float]]
    per_class: list[dict[str, Any]]
    more: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Iterable[Mapping[str, Any]]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    folder: Path = Path()

    def as_dict(self) -> dict[str, Any]:
        """The content of metrics.json."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return {"format": FORMAT} | fields | self.about | self.more

    def write(self, out: Path, replace: bool = False) -> None:
        """Make the folder `out`. Raises Unwritable where it exists and is not to be replaced."""
        make_folder(out.parent)
        with new_folder(out, replace) as folder:
            (folder / "metrics.json").write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")
            for name, rows in self.tables.items():
                write_rows(folder / name, rows)
            for name, array in self.arrays.items():
                np.save(folder / name, array)
            for name, picture in self.pictures.items():
                (folder / name).parent.mkdir(exist_ok=True)
                picture.save(folder / name)
        self.folder = out

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The evaluation of a folder, of this version or of an earlier one."""
        content = _migrated(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        about: dict[str, Any] = {
            name: content.pop(name) for name in ("checkpoint", "epoch", "data", "tta") if name in content
        }
        fields = {name: content.pop(name) for name in FIELDS}
        return cls(**fields, about=about, more=content, folder=folder)


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """The content of metrics.json as this version writes it."""
    if content.pop("format", 1) == 1:  # of visionattn 0.1.0
        interval = content.pop("interval", None)
        content.setdefault("task", "classification")
        content.setdefault("noun", "image")
        content.setdefault("intervals", {interval["metric"]: [interval["low"], interval["high"]]} if interval else {})
        content["bootstrap"] = {key: n for key, n in (interval or {}).items() if key in ("resamples", "groups")}
        content["slices"] = content["noun"] == "volume"
        content["epoch"] += 1  # counted from 0
        content["headline"] = RENAMED.get(content["headline"], content["headline"])
        for key in ("overall", "intervals"):
            content[key] = {RENAMED.get(name, name): value for name, value in content[key].items()}
    return content


def history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each epoch, of a run of any version, with epochs counted from 1 and metrics as they are called now."""
    if not rows or int(rows[0]["epoch"]) > 0:
        return rows
    renamed = {f"val/{name}": f"val/{now}" for name, now in RENAMED.items()}
    return [{renamed.get(k, k): v for k, v in row.items()} | {"epoch": int(row["epoch"]) + 1} for row in rows]


def read_history(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.csv as texts; see `history`."""
    return history(read_rows(run / "metrics.csv"))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, none where it is missing."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = read_table(file)
        header = next(rows, [])
        return [dict(zip(header, row, strict=True)) for row in rows]


def format_table(evaluations: list[Evaluation]) -> str:
    """The overall metrics with their intervals as text, a column for each evaluation."""
    values = [item for e in evaluations for item in e.overall.items()]
    names = list(dict.fromkeys(name for name, value in values if value is not None))
    heads = [f"{e.split} ({e.samples:,} {e.noun}{'' if e.samples == 1 else 's'})" for e in evaluations]
    lines = ["".join(f"{text:>28}" for text in ["", *heads])]
    for name in names:
        cells = []
        for e in evaluations:
            value = e.overall.get(name)
            text = "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
            cells.append(text + (" [{:.3f}, {:.3f}]".format(*e.intervals[name]) if name in e.intervals else ""))
        lines.append("".join(f"{text:>28}" for text in [name.replace("_", " "), *cells]))
    return "\n".join(lines)
