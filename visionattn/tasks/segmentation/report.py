"""The part of the report about a segmenter on one split: classes, calibration, worst and best cases."""

from html import escape

import numpy as np

from visionattn.report.evaluation import Evaluation, read_rows
from visionattn.report.pieces import (
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
from visionattn.tasks.segmentation.metrics import MEASURES, METRICS

__all__ = ["sections"]

MATRIX_CLASSES = 50  # of more, the most confused pairs are shown
LEGEND_CLASSES = 30


def sections(evaluation: Evaluation) -> str:
    """The content of an evaluation's section, HTML."""
    classes, counts = evaluation.classes, np.array(evaluation.more["confusion"])
    if len(classes) <= MATRIX_CLASSES:
        confusion = f"<h3>Confusion of pixels</h3>{matrix(classes, counts, percent=True)}"
    else:
        confusion = f"<h3>Most confused classes</h3>{most_confused(classes, counts, 'Pixels')}"
    bins, error = np.array(evaluation.more["calibration"]), evaluation.overall.get("calibration_error")
    blocks = f"<div>{_per_class(evaluation)}</div><div>{confusion}</div>"
    blocks += reliability(bins, error, "confidence", "accuracy", "labelled pixels")
    blocks += _trust(evaluation)
    note = f'<p class="note">{escape(about_weights(evaluation))}. {_rules(evaluation)}</p>'
    return f'{note}<div class="blocks">{blocks}</div>{_pictures(evaluation)}'


def _trust(evaluation: Evaluation) -> str:
    """What was fitted on held-out images, and what became of its promise here."""
    fitted, promised = evaluation.more.get("fitted"), evaluation.more.get("promised")
    if not fitted:
        return ""
    rows = fitted_rows({name: value for name, value in fitted.items() if name != "thresholds"})
    for name, threshold in zip(evaluation.classes, fitted["thresholds"] or [], strict=False):
        share = evaluation.more.get("missed", {}).get(name)
        kept = "cannot be promised" if threshold is None else f"from probability {threshold:.3g}"
        kept += "" if share is None else f": {number(True, share)} of it missed, at most {number(True, promised)} asked"
        rows.append([f"may be {name}", kept])
    return f"<div><h3>Trust</h3>{fitted_note(fitted)}{table_of('trust', ['What', 'Value'], rows)}</div>"


def _rules(evaluation: Evaluation) -> str:
    """How the numbers are to be read."""
    rules, noun = evaluation.more["rules"], evaluation.noun
    one = f"{'an' if noun == 'image' else 'a'} {noun}"
    text = "Only labelled pixels count. "
    if rules["empty"] == "transunet":
        text += f"Empty classes as in TransUNet's code: {one} whose truth has no pixel of a class that is predicted "
        text += "counts as Dice 1 and HD95 0, one without prediction as 0 and 0; HD95 is of the distances in both "
        text += "directions together."
    else:
        text += f"Where neither truth nor prediction of {one} has a class, the {noun} does not count for it; where "
        text += "only one of them has it, Dice, IoU and surface Dice are 0 and HD95 is the diagonal."
    if rules["surface"]:
        distances = "pixels" if rules["empty"] == "transunet" else rules["unit"]
        text += f" HD95 in {distances}; surface Dice with a tolerance of {rules['tolerance']:g} {rules['unit']}."
    else:
        text += " Surface distances are not measured."
    if rules["left_out"]:
        text += f" Counted classes are all but {', '.join(map(escape, rules['left_out']))}; mIoU and mF1 are of all."
    return text


def _per_class(evaluation: Evaluation) -> str:
    rows = evaluation.per_class
    columns = [*(name for name in MEASURES if any(row[name] is not None for row in rows)), "pooled_iou"]
    heads = ["Class", f"{evaluation.noun.capitalize()}s", "Pixels", *(METRICS[name].label for name in columns)]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = ""
    for row in rows:
        name = escape(row["class"])
        body += f'<tr><th scope="row" data-v="{name}">{name}</th>'
        body += "".join(f'<td data-v="{row[key]}">{row[key]:,}</td>' for key in ("cases", "pixels"))
        for metric in columns:
            rated = row[metric] is not None and metric != "hd95"
            bar = f' class="bar" style="--v:{row[metric]:.3f}"' if rated else ""
            value = "" if row[metric] is None else f' data-v="{row[metric]}"'
            body += f"<td{bar}{value}>{number(METRICS[metric].percent, row[metric])}</td>"
        body += "</tr>"
    note = "Pooled IoU is of all pixels together, the others are means over those that have the class."
    return f'<h3>Class by class</h3><p class="note">{note}</p>{framed("classes", head, body)}'


def _pictures(evaluation: Evaluation) -> str:
    html = ""
    rows = read_rows(evaluation.folder / "pictures.csv")
    slices = evaluation.more.get("slices")
    layout = "truth above prediction" if slices else "image, truth, prediction"
    css = "cases wide" if slices else "cases"
    for kind, title in (("worst", "Lowest Dice"), ("best", "Highest Dice")):
        figures = ""
        for row in [row for row in rows if row["kind"] == kind]:
            picture, case = evaluation.folder / row["file"], escape(row["case"])
            image = f'<img src="{embedded(picture)}" alt="{case}: {layout}">' if picture.is_file() else ""
            dice = f"<dl><div><dt>Dice</dt> <dd>{number(False, float(row['dice']))}</dd></div></dl>"
            figures += f'<figure>{image}<figcaption>{dice}<div class="file">{case}</div></figcaption></figure>'
        html += f'<h3>{title}</h3><p class="note">{layout}</p><div class="{css}">{figures}</div>' if figures else ""
    return html and html.replace(f'<div class="{css}">', f'{_legend(evaluation)}<div class="{css}">', 1)


def _legend(evaluation: Evaluation) -> str:
    """Which colour stands for which class in the pictures."""
    shown = [(name, color) for name, color in zip(evaluation.classes, evaluation.more["colors"], strict=True) if color]
    if len(shown) > LEGEND_CLASSES:
        return ""
    items = "".join(f'<li><span style="background:{color}"></span>{escape(name)}</li>' for name, color in shown)
    return f'<ul class="swatches">{items}</ul>'
