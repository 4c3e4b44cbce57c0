"""The part of the report about a detector on one split: classes, curves, confusion, counts, where it is wrong."""

from html import escape

import numpy as np

from visionattn.data.drawing import box_colors
from visionattn.report.charts import Chart
from visionattn.report.evaluation import Evaluation, read_rows
from visionattn.report.pieces import PERCENT, about_weights, embedded, framed, matrix, most_confused, number, table_of
from visionattn.tasks.detection.metrics import FROC_RATES

__all__ = ["sections"]

MATRIX_CLASSES = 50  # of more, the most confused pairs are shown
CURVES = 20  # precision-recall curves, those of the lowest AP50
LINES = 6  # curves of one chart, as there are colours
LEGEND_CLASSES = 30
SHARES = ("map", "map_50", "precision", "recall", "f1")
KINDS = {
    "class": "an object of another class",
    "place": "an object of its class, too far off",
    "class and place": "an object of another class, too far off",
    "duplicate": "an object that a surer detection has",
    "nothing there": "nothing",
    "missed": "an object that no detection has",
}


def sections(evaluation: Evaluation) -> str:
    """The content of an evaluation's section, HTML."""
    charts = f"{_f1(evaluation)}{_froc(evaluation)}{_counts(evaluation)}{_sizes(evaluation)}"
    blocks = f"<div>{_per_class(evaluation)}</div><div>{_confusion(evaluation)}</div><div>{_kinds(evaluation)}</div>"
    note = f'<p class="note">{escape(about_weights(evaluation))}. {_rules(evaluation)}</p>'
    return (
        f'{note}<div class="blocks">{blocks}<div>{_missed_at(evaluation)}{_seams(evaluation)}</div></div>'
        f'<div class="charts">{charts}</div>'
        f'<div class="blocks">{_precision(evaluation)}</div>{_pictures(evaluation)}'
    )


def _rules(evaluation: Evaluation) -> str:
    """How the numbers are to be read."""
    more = evaluation.more
    fits = "its centre is inside it" if more["match"] == "centre" else f"their IoU is at least {more['match']:g}"
    text = f"A detection is right that finds a free object of its class where {fits}. "
    if more["chosen_here"]:
        text += "The scores of the classes are those with the best F1 on these images themselves. "
    else:
        text += "The scores of the classes were chosen on validation images, or given. "
    if (scales := more.get("scales", [1.0])) != [1.0]:
        text += f"Images are looked at in the scales {', '.join(f'{scale:g}' for scale in scales)}. "
    text += f"At most {more['max_objects']:,} detections of an image count; AP is comparable with others' at 100. "
    text += f"{more['empty']:,} images have no object; they count in FROC and in counts."
    return text + (f" {more['ignored']:,} objects and regions are ignored." if more["ignored"] else "")


def _per_class(evaluation: Evaluation) -> str:
    heads = ["Class", "Objects", "AP", "AP50", "Precision", "Recall", "F1", "Count bias", "Score"]
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = ""
    for row in evaluation.per_class:
        name = escape(row["class"])
        body += f'<tr><th scope="row" data-v="{name}">{name}</th>'
        body += f'<td data-v="{row["objects"]}">{row["objects"]:,}</td>'
        for metric in SHARES:
            value = row[metric]
            bar = "" if value is None else f' class="bar" data-v="{value}" style="--v:{value:.3f}"'
            body += f"<td{bar}>{number(False, value)}</td>"
        bias = "–" if row["count_bias"] is None else f"{100 * row['count_bias']:+.0f}{PERCENT}"
        body += f"<td>{bias}</td><td>{row['score']:.2f}</td></tr>"
    note = "Precision, recall, F1 and count bias (found minus true objects, of true ones) at the score of the class."
    return f'<h3>Class by class</h3><p class="note">{note}</p>{framed("classes", head, body)}'


def _confusion(evaluation: Evaluation) -> str:
    truth, found = [*evaluation.classes, "nothing there"], [*evaluation.classes, "missed"]
    counts = np.array(evaluation.more["confusion"])
    if len(truth) > MATRIX_CLASSES:
        return f"<h3>Most confused classes</h3>{most_confused(truth, counts, 'Objects')}"
    return f"<h3>Confusion</h3>{matrix(truth, counts, columns=found, unit='objects')}"


def _kinds(evaluation: Evaluation) -> str:
    rows = [[KINDS[kind], f"{count:,}"] for kind, count in evaluation.more["kinds"].items()]
    return f"<h3>What is wrong</h3>{table_of('counts', ['Wrong detections are of', 'Number'], rows)}"


def _missed_at(evaluation: Evaluation) -> str:
    """A coarse map of the image."""
    missed, objects = np.array(evaluation.more["missed_at"])
    body = ""
    for some, all_of in zip(missed, objects, strict=True):
        body += "<tr>"
        for n, of in zip(some, all_of, strict=True):
            share = n / max(of, 1)
            css = f' class="wrong" style="--v:{share:.3f}"' if n else ""
            body += f'<td{css} title="{n} of {of}">{f"{100 * share:.0f}" if of else ""}</td>'
        body += "</tr>"
    note = "Per cent of the objects whose centre is in this part of the image; missed ones at its border are a warning."
    return f'<h3>Where objects are missed</h3><p class="note">{note}</p>{framed("matrix", "", body)}'


def _seams(evaluation: Evaluation) -> str:
    """Whether the tiles of large images show in what is found."""
    sides = evaluation.more.get("seams")
    if not sides:
        return ""
    rows = [
        [
            where,
            f"{side['objects']:,}",
            f"{side['missed'] / side['objects']:.1%}" if side["objects"] else "–",
            f"{side['duplicates'] / side['found']:.1%}" if side["found"] else "–",
        ]
        for where, side in zip(("crossed by a border of tiles", "others"), sides, strict=True)
    ]
    table = table_of("counts", ["Objects", "Number", "Missed", "Duplicates of detections"], rows)
    note = "Much more in the first row than in the second: enlarge <code>data.overlap</code>."
    return f'<h3>At the borders of tiles</h3><p class="note">{note}</p>{table}'


def _precision(evaluation: Evaluation) -> str:
    """Precision over recall of each class, the point at its score marked."""
    rated = [(row["map_50"], k) for k, row in enumerate(evaluation.per_class) if row["map_50"] is not None]
    figures = ""
    for _, k in sorted(sorted(rated)[:CURVES], key=lambda pair: pair[1]):
        row, curve = evaluation.per_class[k], evaluation.more["curves"][k]
        chart = Chart(width=120, height=120, pad=4)
        chart.line(zip(curve["recall"], curve["precision"], strict=True), "s0")
        if row["precision"] is not None:
            chart.dot(row["recall"], row["precision"], "s0")
        title = f"Precision over recall of {row['class']}: AP50 {row['map_50']:.3f}"
        figures += chart.figure(f"{row['class']}: {row['map_50']:.3f}", title)
    lowest = f", the {CURVES} lowest of {len(rated)}" if len(rated) > CURVES else ""
    note = '<p class="note">Both from 0 to 1, with AP50; the dot is at the score of the class.</p>'
    return (
        f'<div><h3>Precision over recall{lowest}</h3>{note}<div class="small">{figures}</div></div>' if figures else ""
    )


def _f1(evaluation: Evaluation) -> str:
    chart, legend = Chart(height=236), []
    chart.axes("score")
    curves = [(k, curve) for k, curve in enumerate(evaluation.more["curves"]) if curve["score"]]
    curves.sort(key=lambda pair: -evaluation.per_class[pair[0]]["objects"])
    for n, (k, curve) in enumerate(curves[:LINES]):
        chart.line(zip(curve["score"], curve["f1"], strict=True), f"s{n}")
        legend.append((f"s{n}", evaluation.classes[k]))
    most = ", of the most frequent classes" if len(curves) > LINES else ""
    return chart.figure(f"F1 by score{most}", "F1 of each class by its score", legend) if curves else ""


def _froc(evaluation: Evaluation) -> str:
    rate, sensitivity = evaluation.more["froc"]
    chart = Chart((0, FROC_RATES[-1]), height=236)
    chart.axes("false positives per image")
    chart.line(zip(rate, sensitivity, strict=True), "s0")
    value = number(False, evaluation.overall["froc"])
    title = f"FROC: sensitivity, mean at 1/8 to 8: {value}"
    return chart.figure(title, f"{title}, of all images")


def _counts(evaluation: Evaluation) -> str:
    rows = read_rows(evaluation.folder / "images.csv")
    pairs = np.array([[int(row["objects"]), int(row["found"])] for row in rows]).reshape(-1, 2)
    top = float(max(pairs.max(initial=0), 1)) * 1.05
    chart = Chart((0, top), (0, top), height=236)
    chart.axes("true objects in an image", integer=True)
    chart.rule((0, 0), (top, top), "mark")
    for true, found in np.unique(pairs, axis=0):
        chart.dot(true, found, "s0")
    error = number(False, evaluation.overall["count_error"])
    title = f"Found objects: {error} off on average"
    return chart.figure(
        title, f"{title}, by true objects of an image", [("s0", "found"), ("mark", "as many as there are")]
    )


def _sizes(evaluation: Evaluation) -> str:
    thirds = evaluation.more["recall_by_size"]
    if not thirds:
        return ""
    chart = Chart((thirds[0]["from"] - 1, thirds[-1]["to"] + 1), height=236)
    chart.axes("size in pixels (root of the area)")
    for third in thirds:
        chart.bar((third["from"], max(third["to"], third["from"] + 0.5)), third["recall"], "share")
    about = ", ".join(f"{t['from']:.0f} to {t['to']:.0f}: {number(False, t['recall'])}" for t in thirds)
    return chart.figure("Recall by size, in thirds of the objects", f"Recall by size: {about}")


def _pictures(evaluation: Evaluation) -> str:
    rows = read_rows(evaluation.folder / "pictures.csv")
    html = _legend(evaluation) if rows else ""
    titles = {"worst": "Lowest F1", "median": "Median F1", "best": "Highest F1"}
    for kind, title in titles.items():
        figures = "".join(_figure(evaluation, row) for row in rows if row["kind"] == kind)
        note = '<p class="note">Truth, and what is found.</p>'
        html += f'<h3>{title}</h3>{note}<div class="cases">{figures}</div>' if figures else ""
    for kind, title in {"wrong": "Surest wrong detections", "missed": "Largest missed objects"}.items():
        figures = "".join(_figure(evaluation, row) for row in rows if row["kind"] == kind)
        html += f'<h3>{title}</h3><div class="mistakes">{figures}</div>' if figures else ""
    return html


def _figure(evaluation: Evaluation, row: dict[str, str]) -> str:
    picture, name, about = evaluation.folder / row["file"], escape(row["image"]), escape(row["about"])
    image = f'<img src="{embedded(picture)}" alt="{name}: {about}">' if picture.is_file() else ""
    caption = f'<dl><div><dd>{about}</dd></div></dl><div class="file">{name}</div>'
    return f'<figure><div class="picture">{image}</div><figcaption>{caption}</figcaption></figure>'


def _legend(evaluation: Evaluation) -> str:
    """Which colour stands for which class in the pictures."""
    if len(evaluation.classes) > LEGEND_CLASSES:
        return ""
    pairs = zip(evaluation.classes, map(bytes, box_colors(len(evaluation.classes))), strict=True)
    items = "".join(f'<li><span style="background:#{color.hex()}"></span>{escape(name)}</li>' for name, color in pairs)
    return f'<h3>Pictures</h3><ul class="swatches">{items}</ul>'
