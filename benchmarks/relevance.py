"""What a relevance map costs on one thread: CPU seconds and peak memory of a process, of whole networks on one image.

    python benchmarks/relevance.py biformer_tiny va_volo_d1_224 --size 1024 > benchmarks/relevance-cpu.csv

prints a row for each model, with random weights, as it is made. Each has a process of its own.
"""

import argparse
import csv
import resource
import subprocess
import sys
import time
from typing import Any

import timm
import torch

import visionattn  # noqa: F401 - registers the models
from visionattn.tools.attribution import METHODS, Question

COLUMNS = ["model", "map", "CPU s", "peak GB", "of which before"]
LONGEST = 1800  # seconds that a model may take


def row(name: str, size: int) -> list[str]:
    """A model's cells."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network: Any = timm.create_model(name).eval()
    before = _peak()
    began = time.process_time()
    answer = METHODS["relevance"](
        Question(network, torch.randn(network.in_chans, size, size), lambda x: network(x)[:, 0])
    )
    seconds = time.process_time() - began
    finest = " x ".join(map(str, answer.map.shape))
    return [name, finest, f"{seconds:.0f}", f"{_peak():.2f}", f"{before:.2f}"]


def _peak() -> float:
    """GB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.one:
        table.writerow(row(args.models[0], args.size))
        return
    table.writerow(COLUMNS)
    for name in args.models:
        sys.stdout.flush()
        command = [sys.executable, __file__, name, "--size", str(args.size), "--one"]
        try:
            subprocess.run(command, check=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            table.writerow([name, f"no end in {LONGEST} s", "", "", ""])
        except subprocess.CalledProcessError as error:
            table.writerow([name, f"ended by {error.returncode}", "", "", ""])


if __name__ == "__main__":
    main()
