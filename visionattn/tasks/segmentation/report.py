"""The part of the report about a segmenter on one split: classes, calibration, worst and best cases."""

from html import escape
from typing import Any

import numpy as np

from visionattn.report.page import (
    Evaluation,
    embedded,
    framed,
    label_of,
    matrix,
    number,
    plural,
    read_rows,
    reliability,
)

__all__ = ["segmentation_evaluation"]

MATRIX_CLASSES = 50  # of more, no confusion matrix is shown
LEGEND_CLASSES = 30
MEASURES = ("dice", "iou", "precision", "recall", "hd95", "nsd")


def segmentation_evaluation(evaluation: Evaluation) -> str:
    """The content of the section."""
    result = evaluation.result
    about = f"{plural(result['samples'], result['noun'])}, "
    about += f"weights of epoch {result['epoch'] + 1} ({result['checkpoint']})"
    epochs = read_rows(evaluation.folder.parents[1] / "metrics.csv")
    if result["checkpoint"].endswith("best.ckpt") and epochs and int(epochs[-1]["epoch"]) == result["epoch"]:
        about += ", which is the last epoch too"
    about += f", predictions averaged over {', '.join(result['tta'])}" if result.get("tta") else ""
    about += f", images of {result['data']}" if result.get("data") else ""
    blocks = f"<div>{_per_class(result)}</div>"
    if len(result["classes"]) <= MATRIX_CLASSES:
        pixels = matrix(result["classes"], np.array(result["confusion"]), percent=True)
        blocks += f"<div><h3>Confusion of pixels</h3>{pixels}</div>"
    error = result["overall"].get("calibration_error")
    blocks += reliability(np.array(result["calibration"]), error, "confidence", "accuracy", "labelled pixels")
    note = f'<p class="note">{escape(about)}. {_rules(result)}</p>'
    return f'{note}<div class="blocks">{blocks}</div>{_pictures(evaluation)}'


def _rules(result: dict[str, Any]) -> str:
    """How the numbers are to be read."""
    rules, noun = result["rules"], result["noun"]
    one = f"{'an' if noun == 'image' else 'a'} {noun}"
    text = "Only labelled pixels count. "
    if rules["empty"] == "transunet":
        text += f"Empty classes as in TransUNet's code: {one} whose truth has no pixel of a class that is predicted "
        text += "counts as Dice 1 and HD95 0, one without prediction as 0 and 0."
    else:
        text += f"Where neither truth nor prediction of {one} has a class, the {noun} does not count for it; where "
        text += "only one of them has it, Dice, IoU and surface Dice are 0 and HD95 is the diagonal."
    if rules["surface"]:
        text += f" HD95 in {rules['unit']}; surface Dice with a tolerance of {rules['tolerance']:g} {rules['unit']}."
    else:
        text += " Surface distances are not measured."
    if rules["left_out"]:
        text += f" Means leave out {', '.join(map(escape, rules['left_out']))}."
    return text


def _per_class(result: dict[str, Any]) -> str:
    rows = result["per_class"]
    columns = [*(name for name in MEASURES if any(row[name] is not None for row in rows)), "pooled_iou"]
    heads = ["Class", f"{result['noun'].capitalize()}s", "Pixels", *(label_of(name) for name in columns)]
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
            body += f"<td{bar}{value}>{number(metric, row[metric])}</td>"
        body += "</tr>"
    note = "Pooled IoU is of all pixels together, the others are means over those that have the class."
    return f'<h3>Class by class</h3><p class="note">{note}</p>{framed("classes", head, body)}'


def _pictures(evaluation: Evaluation) -> str:
    html = ""
    rows = read_rows(evaluation.folder / "pictures.csv")
    volumes = evaluation.result["noun"] == "volume"
    layout = "truth above prediction" if volumes else "image, truth, prediction"
    css = "cases wide" if volumes else "cases"
    for kind, title in (("worst", "Lowest Dice"), ("best", "Highest Dice")):
        figures = ""
        for row in [row for row in rows if row["kind"] == kind]:
            picture, case = evaluation.folder / row["file"], escape(row["case"])
            image = f'<img src="{embedded(picture)}" alt="{case}: {layout}">' if picture.is_file() else ""
            dice = f"<dl><div><dt>Dice</dt> <dd>{number('dice', float(row['dice']))}</dd></div></dl>"
            figures += f'<figure>{image}<figcaption>{dice}<div class="file">{case}</div></figcaption></figure>'
        html += f'<h3>{title}</h3><p class="note">{layout}</p><div class="{css}">{figures}</div>' if figures else ""
    return html and html.replace(f'<div class="{css}">', f'{_legend(evaluation.result)}<div class="{css}">', 1)


def _legend(result: dict[str, Any]) -> str:
    """Which colour stands for which class in the pictures."""
    shown = [(name, color) for name, color in zip(result["classes"], result["colors"], strict=True) if color]
    if len(shown) > LEGEND_CLASSES:
        return ""
    items = "".join(f'<li><span style="background:{color}"></span>{escape(name)}</li>' for name, color in shown)
    return f'<ul class="swatches">{items}</ul>'
