"""The part of the report about a network that learns without labels: probes, signs of collapse, pictures."""

from html import escape

from visionattn.report.evaluation import Evaluation
from visionattn.report.pieces import about_weights, embedded, number, table_of
from visionattn.tasks.pretraining.metrics import METRICS

__all__ = ["sections"]

COLUMNS = ("linear", "linear_all", "knn", "knn_all")


def sections(evaluation: Evaluation) -> str:
    """The content of an evaluation's section, HTML."""
    windows = evaluation.more["windows"]
    more = f", {windows:,} windows" if windows != evaluation.samples else ""
    note = f'<p class="note">{escape(about_weights(evaluation))}{more}.</p>'
    return note + _collapse(evaluation) + _probe(evaluation) + _pictures(evaluation)


def _collapse(evaluation: Evaluation) -> str:
    lines = evaluation.more["collapse"]
    if not lines:
        return '<p class="note">No sign of collapse.</p>'
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="warning"><strong>Signs of collapse</strong><ul>{items}</ul></aside>'


def _probe(evaluation: Evaluation) -> str:
    rows = evaluation.more.get("probe")
    if not rows:
        return '<p class="note">No probe: with labelled images in the recipe (probe) the features would be tried.</p>'
    bank, told = evaluation.more["probe_images"]
    heads = ["Features", *(METRICS[name].label for name in COLUMNS)]
    cells = [[name, *(number(True, values.get(key)) for key in COLUMNS)] for name, values in rows.items()]
    note = (
        f"What {bank:,} labelled images are worth on frozen features, told of {told:,} others. Features that learn "
        "from hidden pixels do badly here and well after fine-tuning: compare runs, and a classifier from scratch."
    )
    return f'<h3>Probe</h3><p class="note">{note}</p>{table_of("probe", heads, cells)}'


def _pictures(evaluation: Evaluation) -> str:
    texts = {
        "reconstructions": "Hidden pixels: the image, what was seen of it, and it with its hidden pixels as predicted",
        "neighbours": "Nearest features: an image, and those that look most alike to the network",
    }
    html = ""
    for name, text in texts.items():
        picture = evaluation.folder / f"{name}.png"
        if picture.is_file():
            title, _, note = text.partition(": ")
            image = f'<img src="{embedded(picture)}" alt="{escape(text)}">'
            html += f'<div><h3>{title}</h3><p class="note">{note}</p><figure>{image}</figure></div>'
    return f'<div class="blocks">{html}</div>'
