"""`visionattn export`: a trained network as a file that runs without us, checked on validation images before it counts.

Normalisation, temperature and probabilities are in the graph; everything else that has to be known is beside it and in
its metadata.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn import __version__
from visionattn.data import formats
from visionattn.data.sample import Dataset, Sample
from visionattn.data.splits import split
from visionattn.errors import UserError, nearest
from visionattn.files import new_folder
from visionattn.models.ensemble import Ensemble
from visionattn.recipe import Recipe, part_of
from visionattn.runs.checkpoints import Trained
from visionattn.tasks.graph import Graph
from visionattn.tools._apart import apart
from visionattn.tools._exporters import EXPORTERS, Exporter, Ran, run_onnx, stamp
from visionattn.tools._precision import PRECISIONS, compared
from visionattn.tools._script import script_of

__all__ = ["LARGEST_ERROR", "Exported", "export", "part_of_task", "three_sizes", "written"]

LARGEST_ERROR = 1e-3  # relative, of any output
LONGEST = 600.0  # seconds that a graph for all sizes is searched for: of some families none was found in 150
BATCHES = (1, 3)
LEAST = 32  # pixels of a side
TRACED = (283, 337)  # pixels at least, for all sizes: no round number of tokens, and several windows of every attention
COMPARED = 256  # images at most, by which smaller files are compared
Size = tuple[int, int]


@dataclass(frozen=True)
class Exported:
    """What `export` has written.

    Attributes:
        path: the folder.
        checks: by file what was measured of it, as check.json.
    """

    path: Path
    checks: dict[str, dict[str, Any]]

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in self.checks]


def export(
    trained: Trained,
    to: str,
    out: Path,
    size: int | str | Sequence[int | str] = (),
    precision: str | Sequence[str] = (),
    data: Path | None = None,
) -> Exported:
    """Write a network into a new folder, with what is known of it and what was measured; see `Run.export`.

    Raises:
        UserError: it cannot be written so, or what was written differs from the network; then nothing is left.
    """
    if to not in EXPORTERS:
        raise UserError(f"--to {to}: unknown format{nearest(to, EXPORTERS)}; there are {', '.join(EXPORTERS)}")
    smaller = [precision] if isinstance(precision, str) else list(precision)
    _refuse_precision(smaller, to)
    spec, graph, about = trained.recipe, graph_of(trained), known_of(trained)
    sizes = sizes_of(size) or [part_of_task(spec).size_of(spec)]
    samples = checked_on(trained, data)
    checks: dict[str, dict[str, Any]] = {}
    with new_folder(out) as folder:
        for one in sizes:
            stem = "model" if len(sizes) == 1 else "model-{}x{}".format(*one) if one else "model-any"
            checks |= _files_of(graph, one, spec, about, samples, to, smaller, folder / stem)
        if to == "onnx":
            text = script_of(f"visionattn.tasks.{spec.task}.deployed", PREDICT)
            (folder / "predict.py").write_text(text, encoding="utf-8")
        _write_json(folder / "check.json", checks)
    return Exported(out, checks)


def _files_of(
    graph: Graph,
    size: Size | None,
    spec: Recipe,
    about: dict[str, Any],
    samples: Sequence[Sample],
    to: str,
    smaller: Sequence[str],
    stem: Path,
) -> dict[str, dict[str, Any]]:
    """Write the files of one size, None for all, and what is known of them; returns what was measured of each."""
    part, exporter = part_of_task(spec), EXPORTERS[to]
    path, side = stem.with_name(f"{stem.name}{exporter.suffix}"), size or part.size_of(spec)
    known = about | part.contract(spec, side) | {"size": size and list(size), "trained_at": list(spec.data.side)}
    few = samples[: max(BATCHES)]
    images = [inputs(evaluated(few, spec, one), spec, one) for one in ([size] if size else three_sizes(side))]
    checks = {path.name: written(exporter, graph, images, path, known)}
    _write_json(stem.with_name(f"{stem.name}.json"), known)
    some = samples[:: max(1, len(samples) // COMPARED)][:COMPARED]
    for name in smaller:
        small = stem.with_name(f"{stem.name}-{name}.onnx")
        PRECISIONS[name](path, small)
        stamp(small, known | {"precision": name})
        items = (evaluated([sample], spec, side)[0] for sample in some)
        pairs = [(inputs([item], spec, side), item) for item in items]
        checks[small.name] = compared(run_onnx(small), run_onnx(path), pairs, graph, part, spec)
    return checks


PREDICT = """What the model beside this file says of images, as `visionattn predict` does: python predict.py --help

It needs numpy, onnxruntime and Pillow. Written by visionattn from its own functions; Apache-2.0."""


def sizes_of(given: int | str | Sequence[int | str]) -> list[Size | None]:
    """Heights and widths from 224, "224", "224,320", or several of these; None for "any".

    Raises:
        UserError: anything else.
    """
    sizes: list[Size | None] = []
    for one in [given] if isinstance(given, int | str) else given:
        if one == "any":
            sizes.append(None)
            continue
        sides = [int(side) for side in str(one).split(",") if side.strip().isdecimal()]
        if len(sides) not in (1, 2) or len(sides) != str(one).count(",") + 1 or min(sides) < LEAST:
            raise UserError(f"--size {one}: expected any, or height,width of at least {LEAST} pixels, such as 224,320")
        sizes.append((sides[0], sides[-1]))
    return sizes


def _refuse_precision(names: Sequence[str], to: str) -> None:
    for name in names:
        if name not in PRECISIONS:
            raise UserError(
                f"--precision {name}: unknown{nearest(name, PRECISIONS)}; there are {', '.join(PRECISIONS)}"
            )
        if to != "onnx":
            raise UserError(f"--precision {name} is for --to onnx, but this is --to {to}")


def part_of_task(spec: Recipe) -> ModuleType:
    """The task's file of what its networks are exported as."""
    try:
        return part_of(spec.task, "export")
    except ModuleNotFoundError:
        raise UserError(
            f"a network of {spec.task} answers nothing yet, and is not exported: train one from it, by model.checkpoint"
        ) from None


def graph_of(trained: Trained) -> Graph:
    """What is exported of a network, in float32 on the CPU."""
    spec, fitted = trained.recipe, _fitted(trained)
    if isinstance(trained.task.network, Ensemble):
        raise UserError("several runs are averaged, but a file holds one network: export each of them")
    return part_of_task(spec).graph(trained.task.float().cpu(), spec, fitted.temperature if fitted else 1.0).eval()


def _fitted(trained: Trained) -> Any:
    """What calibration has found, None where there was none."""
    return getattr(trained.recipe.evaluate, "fitted", None)


def checked_on(trained: Trained, data: Path | None) -> list[Sample]:
    """The samples that files are checked on: those of validation, or others.

    Raises:
        UserError: there are none.
    """
    section = trained.recipe.data
    if data is not None:
        samples, problems = formats.unlabelled([data], section, len(section.mean or ()))
        if not samples:
            raise UserError("\n".join([f"{data}: no image to check on", *problems[:5]]))
        return samples
    try:
        found = formats.find(section)
        dataset: Dataset = split(found.samples, found.classes, section)[0].with_channels(len(section.mean or ()))
    except (UserError, OSError) as error:
        raise UserError(
            f"files are checked on validation images, but those of the recipe cannot be read ({error}): give images by "
            "--data"
        ) from None
    if not dataset.splits.get("val"):
        raise UserError("files are checked on validation images, but there are none: give images by --data")
    return dataset.splits["val"]


def inputs(items: Sequence[dict[str, Any]], spec: Recipe, size: Size) -> Tensor:
    """(N, C, *size) as the graph takes them: whole images where they fit, else their upper left corner."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.data.mean, spec.data.std))
    images = [item["image"][:, : size[0], : size[1]] for item in items]
    images = [F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1])) for image in images]
    return torch.stack(images) * std + mean


def evaluated(samples: Sequence[Sample], spec: Recipe, size: Size) -> list[dict[str, Any]]:
    """Items of the evaluation set at another size of image."""
    data = spec.data.model_copy(update={"image_size": list(size)})
    dataset = part_of(spec.task, "task").evaluation_set(samples, data)
    return [dataset[i] for i in range(len(samples))]


def known_of(trained: Trained) -> dict[str, Any]:
    """What is known of the network whatever it is exported as."""
    spec = trained.recipe
    channels = len(spec.data.mean or ())
    unit = formats.module_of(spec.data).KIND.unit_range
    fitted = _fitted(trained)
    return {
        "format": 1,
        "task": spec.task,
        "model": spec.model.name,
        "channels": channels,
        "values": "0..1" if unit else "as stored",
        "mean": spec.data.mean,
        "std": spec.data.std,
        "temperature": fitted.temperature if fitted else 1.0,
        "uncertainty": fitted and fitted.model_dump(exclude={"source"}),
        "epoch": trained.epoch,
        "checkpoint_sha256": hashlib.sha256(trained.checkpoint.read_bytes()).hexdigest(),
        "licence": getattr(trained.task.network, "pretrained_cfg", {}).get("license"),
        "versions": {"visionattn": __version__, "torch": torch.__version__},
    }


def three_sizes(size: Size) -> list[Size]:
    """At which a file for all sizes is tried: as trained, odd, and much longer than wide."""
    height, width = size
    return [size, (max(LEAST, 5 * height // 6) | 1, 5 * width // 4 | 1), (2 * height, max(LEAST, 3 * width // 4))]


def _traced(size: Size, channels: int) -> Tensor:
    """Two images that a graph for all sizes is traced by: of small ones, a graph would take it that windows are one."""
    height, width = (max(least, 5 * side // 4 | 1) for side, least in zip(size, TRACED, strict=True))
    return torch.rand(2, channels, height, width)


def written(
    exporter: Exporter, graph: Graph, images: Sequence[Tensor], path: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write a file, run it at several batch sizes, and say what was found.

    Args:
        images: (N, C, H, W) of each size that the file is for.

    Raises:
        UserError: its results are not the network's.
    """
    free, of_size = len(images) > 1, images[0][:1].repeat(2, 1, 1, 1)
    if free:
        traced = _traced((of_size.shape[2], of_size.shape[3]), of_size.shape[1])
        try:
            apart(lambda: _write(exporter, graph, traced, path, about, free), LONGEST)
        except TimeoutError:
            raise UserError(
                f"the exporter has found no graph for all sizes in {LONGEST:g} seconds; nothing was kept{_else(free)}"
            ) from None
        except ChildProcessError as error:
            raise UserError(
                f"the exporter has crashed in its search for a graph for all sizes ({error}); nothing was kept"
                f"{_else(free)}"
            ) from None
    else:
        _write(exporter, graph, of_size, path, about, free)
    if exporter.load is None:
        return {"images": 0}
    run, worst = exporter.load(path), 0.0
    for of_size in images:
        for batch in BATCHES:
            worst = max(worst, error_of(run, graph, of_size[torch.arange(batch) % len(of_size)], _else(free)))
    sizes = [list(of_size.shape[2:]) for of_size in images]
    return {"largest_relative_error": worst, "batches": list(BATCHES), "sizes": sizes, "images": len(images[0])}


def _write(exporter: Exporter, graph: Graph, images: Tensor, path: Path, about: dict[str, Any], free: bool) -> None:
    try:
        exporter.write(graph, images, path, about, free)
    except UserError:
        raise
    except Exception as error:  # exporters raise nearly anything
        raise UserError(
            f"the network cannot be exported so: {_reason(error)}; nothing was kept{_else(free)}"
        ) from error


def _else(free: bool) -> str:
    return "; give the sizes that you need, such as --size 224 --size 448" if free else ""


def _reason(error: BaseException) -> str:
    """The line of an exporter's report that says most: it writes pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip("-* ") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "inferred" in line or "Not all values" in line or "guard" in line.lower()]
    return f"{type(error).__name__}: {(telling or lines or ['no reason given'])[0]}"[:300]


def error_of(run: Ran, graph: Graph, images: Tensor, instead: str = "") -> float:
    """The largest error of any output, relative to the largest value of that output.

    Raises:
        UserError: it is above `LARGEST_ERROR`, or the file does not run; `instead` says what to do.
    """
    batch, _, height, width = images.shape
    at = f"at {height} x {width} pixels, batch {batch}"
    with torch.no_grad():
        expected = [output.numpy() for output in graph(images)]
    try:
        found = run(images)
    except Exception as error:  # each runtime raises its own
        raise UserError(f"the exported file does not run {at}: {_reason(error)}; nothing was kept{instead}") from None
    worst = 0.0
    if all(one.shape == other.shape for one, other in zip(found, expected, strict=True)):
        found = graph.matched(found, expected)
    for name, one, other in zip(graph.OUTPUTS, found, expected, strict=True):
        wrong = float(np.abs(one - other).max() / np.abs(other).max()) if one.shape == other.shape else np.inf
        if not wrong <= LARGEST_ERROR:
            raise UserError(
                f"the exported file is wrong {at}: {name} differ from the network's by {wrong:.2g} of their largest "
                f"value, more than {LARGEST_ERROR:g}; nothing was kept{instead}"
            )
        worst = max(worst, wrong)
    return worst


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
