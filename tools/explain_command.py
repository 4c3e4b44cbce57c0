"""`visionattn explain`: a folder of pictures, one page, a table and maps for other programs."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from visionattn.data import formats as data_formats
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed, nearest
from visionattn.files import new_folder, refuse_existing, write_rows, write_text
from visionattn.progress import progress
from visionattn.recipe import part_of
from visionattn.runs.checkpoints import Trained, load_trained
from visionattn.tasks.targets import Asked, box_of
from visionattn.tools.attribution import Question, head_importance
from visionattn.tools.explained_files import FORMATS, page, row_of, save
from visionattn.tools.explanations import Explanation, Wanted, explained

__all__ = ["explain_files", "wanted_of"]

log = logging.getLogger(__name__)
PAGE = "html"


def explain_files(
    model: Path,
    paths: Sequence[Path],
    out: Path,
    wanted: Wanted,
    check: bool = False,
    heads: bool = False,
    formats: Sequence[str] = (),
) -> list[str]:
    """Explain what a trained model says of images, into a folder that appears whole.

    Args:
        model: run directory or checkpoint.
        paths: files and folders of the format that the model was trained on.
        out: folder to make: NAME-METHOD.png, explanations.csv, index.html, and of scenes and volumes NAME-METHOD.tif
            or .nii.gz.
        heads: the importance of the heads instead, heads.csv.
        formats: png, html, npy, geotiff, nifti; none: pictures, the page, and what the model's masks are written in.

    Returns:
        a line for each method with what the checks say of it, or for all.

    Raises:
        UserError: what cannot be explained so; the folder is then not made.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise UserError(f"no such file or folder: {listed(missing)}")
    refuse_existing(out)
    trained = load_trained(model)
    section = trained.recipe.data
    for name in formats:
        if name not in FORMATS and name != PAGE:
            raise UserError(f"format {name}: expected {listed([*FORMATS, PAGE])}{nearest(name, [*FORMATS, PAGE])}")
    own = data_formats.module_of(section).KIND.writer
    chosen = list(formats) or ["png", PAGE, *([own] if own in FORMATS and own != "png" else [])]
    samples, problems = data_formats.unlabelled(paths, section, len(section.mean or ()))
    for problem in problems:
        log.warning(problem)
    if not samples:
        raise UserError("no image to explain among what was given")
    samples = _labelled(samples, trained) if wanted.target == "label" else samples
    with new_folder(out) as folder:
        if heads:
            write_rows(folder / "heads.csv", _of_heads(trained, samples, wanted))
            return [f"importance of the heads: {out / 'heads.csv'}"]
        made = []
        count = len(samples) * len(wanted.methods)
        one_by_one = progress(explained(trained, samples, wanted, check), "explaining", count)
        for _, found in groupby(one_by_one, key=lambda one: one.sample and one.sample.case):
            of_case = list(found)
            for method in wanted.methods:
                _write([one for one in of_case if one.method == method], folder, chosen)
            made += of_case
        write_rows(folder / "explanations.csv", [row_of(one) for one in made])
        if PAGE in chosen:
            write_text(folder / "index.html", page(made, f"What {trained.recipe.model.name} looks at"))
    return _summary(made, wanted.methods)


def wanted_of(method: str, target: str, region: str | None, layer: str | None, query: str | None, head: str) -> Wanted:
    """What a command line asks for.

    Raises:
        UserError: an unknown method, a query or a head that is none.
    """
    pixel = box_of(query)
    if query is not None and (pixel is None or query.count(",") != 1):
        raise UserError(f"--query is {query}: expected X,Y, a pixel of the file")
    if head != "mean" and not head.isdecimal():
        raise UserError(f"--head is {head}: expected mean or a number from 0")
    place = (pixel[1], pixel[0]) if pixel else None
    return Wanted(method.split(","), target, region, layer, place, None if head == "mean" else int(head))


def _write(explanations: Sequence[Explanation], folder: Path, formats: Sequence[str]) -> None:
    """What one method says of a case: a picture of each of its images, and one file of all of a volume."""
    for name in formats:
        if name == PAGE:
            continue
        ending, needed, _ = FORMATS[name]
        if needed == "volume":
            name = explanations[0].name.removesuffix("-000")
            save(explanations, folder / f"{name}-{explanations[0].method}{ending}")
            continue
        for one in explanations:
            save([one], folder / f"{one.name}-{one.method}{ending}")


def _labelled(samples: Sequence[Sample], trained: Trained) -> list[Sample]:
    """The same images as the data set of the recipe has them.

    Raises:
        UserError: one is not in it.
    """
    found: dict[Path, deque[Sample]] = {}  # in the order of the slices of a volume, the images of a tar file
    for sample in data_formats.find(trained.recipe.data).samples:
        for path in sample.files[:1]:
            found.setdefault(path.resolve(), deque()).append(sample)
    queues = [found.get(sample.files[0].resolve()) if sample.files else None for sample in samples]
    known = [queue.popleft() if queue else None for queue in queues]
    unknown = [sample.name for sample, match in zip(samples, known, strict=True) if match is None]
    if unknown:
        raise UserError(f"target is label, but the recipe's data do not have {listed(unknown)}: name a class")
    channels = len(trained.recipe.data.mean or ())
    return [replace(sample, channels=channels) for sample in known if sample is not None]


def _of_heads(trained: Trained, samples: Sequence[Sample], wanted: Wanted) -> list[dict[str, Any]]:
    """The mean importance over the images, head by head."""
    total: dict[tuple[str, int], float] = {}
    parts = [
        part
        for sample in samples
        for part in part_of(trained.recipe.task, "explain").seen(
            trained.task.eval(), sample, trained.recipe, Asked(wanted.target, wanted.region)
        )
    ]
    for part in progress(parts, "heads", len(parts)):
        for layer, head, importance in head_importance(Question(trained.task.network, part.image, part.logit)):
            total[layer, head] = total.get((layer, head), 0.0) + importance / len(parts)
    return [{"layer": layer, "head": head, "importance": f"{x:.6g}"} for (layer, head), x in total.items()]


def _summary(made: Sequence[Explanation], methods: Sequence[str]) -> list[str]:
    lines = []
    for method in methods:
        verdicts = [one.checks["verdict"] for one in made if one.method == method and one.checks]
        counts = sorted({verdict: verdicts.count(verdict) for verdict in verdicts}.items(), key=lambda pair: -pair[1])
        lines += [f"{method}: " + ", ".join(f"{verdict} ({count})" for verdict, count in counts)] if counts else []
    return lines
