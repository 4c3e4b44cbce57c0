"""What exports of whole networks are worth: errors in ONNX Runtime, sizes that one file serves, time beside eager.

    python benchmarks/exports.py biformer_tiny va_davit_tiny --out benchmarks/exports-cpu.csv

prints a row of Markdown for each model, with random weights, as it is made, on one thread: times, or without --time
whether one file is right at three sizes. Each model has a process of its own and ten minutes.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

import visionattn  # noqa: F401 - registers the models
from visionattn.errors import UserError
from visionattn.tasks.graph import Graph
from visionattn.tools import export
from visionattn.tools._exporters import EXPORTERS, Ran, run_onnx
from visionattn.tools._precision import PRECISIONS

ANY = ["one size: MB", "any size: error, or why not", "any size: MB"]
TIMED = ["eager, ms", "ONNX, ms", "int8, ms", "int8: equal classes"]
LONGEST = 600  # seconds that a model may take
SECONDS = 5.0
IMAGES = 64  # of noise, by which int8 is compared


class Classifier(Graph):
    """Images -> probabilities and logits of a classifier."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(self.normalised(images))
        return logits.softmax(1), logits


def columns(timed: bool) -> list[str]:
    """Of the table."""
    fixed = ["model", "size", "one size: error", "export, s"]
    return fixed + (TIMED if timed else ANY)


def row(name: str, timed: bool, **arguments: Any) -> list[str]:
    """A model's cells."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **arguments).eval()
    channels, *sides = model.default_cfg["input_size"]
    size = sides[0], sides[1]
    graph = Classifier(model, [0.5] * channels, [0.25] * channels).eval()
    with tempfile.TemporaryDirectory() as folder:
        began, path = time.perf_counter(), Path(folder, "one.onnx")
        one = _tried(graph, path, [size], channels)
        seconds = time.perf_counter() - began
        cells = [name, "{} x {}".format(*size), one, f"{seconds:.0f}"]
        if timed:
            return cells + _times(graph, path, torch.rand(1, channels, *size))
        free = Path(folder, "any.onnx")
        found = _tried(graph, free, export.three_sizes(size), channels)
        return [*cells, _megabytes(path), found, _megabytes(free)]


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f}" if path.exists() else ""


def _tried(graph: Graph, path: Path, sizes: Sequence[tuple[int, int]], channels: int) -> str:
    try:
        check = export.written(EXPORTERS["onnx"], graph, [torch.rand(3, channels, *size) for size in sizes], path, {})
    except UserError as error:
        return str(error).split("; nothing was kept")[0]
    return f"{check['largest_relative_error']:.0e}"


def _times(graph: Graph, path: Path, image: Tensor) -> list[str]:
    small = path.with_name("int8.onnx")
    PRECISIONS["int8"](path, small)
    run, run_small = run_onnx(path), run_onnx(small)

    def eager(images: Tensor) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.numpy() for output in graph(images)]

    images = torch.rand(IMAGES, *image.shape[1:])
    same = np.mean([run(x[None])[1].argmax() == run_small(x[None])[1].argmax() for x in images])
    return [*(f"{1000 * _seconds(one, image):.0f}" for one in (eager, run, run_small)), f"{same:.3f}"]


def _seconds(run: Ran | Callable[[Tensor], Any], image: Tensor) -> float:
    """The least of several calls."""
    run(image)
    began, best = time.perf_counter(), np.inf
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        run(image)
        best = min(best, time.perf_counter() - start)
    return float(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also written there, after what is there")
    arguments = parser.parse_args()
    if len(arguments.models) == 1:
        torch.set_num_threads(1)
        csv.writer(sys.stdout).writerow(row(arguments.models[0], arguments.time))
        return
    head = columns(arguments.time)
    print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|", flush=True)
    options = ["--time"] if arguments.time else []
    for name in arguments.models:
        command = [sys.executable, __file__, name, *options]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST).stdout
            cells = next(csv.reader(output.splitlines()[-1:]), [name, "", "crashed"])
        except subprocess.TimeoutExpired:
            cells = [name, "", f"no end in {LONGEST} s"]
        print("|", " | ".join(cells), "|", flush=True)
        if arguments.out:
            new = not arguments.out.exists()
            with arguments.out.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([head, cells] if new else [cells])


if __name__ == "__main__":
    main()
