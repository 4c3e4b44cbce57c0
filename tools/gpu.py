"""All that a GPU is needed for, in one run of minutes: `python -m visionattn.tools.gpu --out DIR`.

In this order, so that what matters most is there if the time is short: tests that need a GPU, proofs of the kernels
(`visionattn doctor --kernels`), models against timm's twins and Swin-T in inference and training, kernels against their
peers, and the tiles of Triton kernels, tuned last, since they decide the rest from then on. Each step is a process of
its own, ended when the time is over; what it says is kept in DIR, beside a summary.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from visionattn.errors import UserError

__all__ = ["main"]

MINUTES = 9.5
TWINS = ["va_davit_tiny", "va_xcit_tiny_12_p16_224", "va_convit_tiny", "va_volo_d1_224"]
FAMILIES = ["swin_tiny_patch4_window7_224", "biformer_tiny", "crossformer_tiny", "nat_mini"]


def steps(device: str, out: Path, quick: bool) -> dict[str, list[str]]:
    """Name -> arguments of Python. quick: the same commands on the least that they take."""
    rounds, batch = ("2", "1") if quick else ("10", "64")
    measured = ["--device", device, "--rounds", rounds, "--batch", batch, "--out", str(out)]
    benchmark = ["-m", "visionattn", "benchmark"]
    twins, families, sizes = (["va_convit_tiny"], ["test_vit"], ["64"]) if quick else (TWINS, FAMILIES, ["224"])
    small = ["160"] if quick else sizes  # test_vit takes no other
    patterns = ["--pattern", "channel"] if quick else []
    tests = ["tests/kernels/test_triton.py", "-k", "reasons"] if quick else ["tests/kernels", "-m", "gpu"]
    tiles = {"tiles": [*benchmark, "kernels", "--tune"]} if device == "cuda" else {}
    return {
        "tests": ["-m", "pytest", "-n0", "-q", *tests],
        "proofs": ["-m", "visionattn", "doctor", "--kernels"],
        "twins": [*benchmark, "models", "--pattern", *twins, "--sizes", *sizes, "--train", *measured],
        "families": [*benchmark, "models", *families, "--sizes", *small, "--train", *measured],
        "kernels": [*benchmark, "kernels", *patterns, "--sizes", *sizes, *measured],
        "compiled": [*benchmark, "models", "--pattern", *twins[:1], "--sizes", *sizes, "--compile", *measured],
        **tiles,
    }


def run(device: str, out: Path, quick: bool, minutes: float = MINUTES) -> bool:
    """Run all steps; returns whether all ended well. UserError where there is no such device, or `out` exists."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; --quick --device cpu rehearses")
    if out.exists():
        raise UserError(f"{out} exists: results are never overwritten; give another --out")
    out.mkdir(parents=True)
    end, summary = time.monotonic() + 60 * minutes, []
    for name, arguments in steps(device, out, quick).items():
        start = time.monotonic()
        with (out / f"{name}.txt").open("w") as log:
            try:
                process = subprocess.run(
                    [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, timeout=max(1, end - start)
                )
                status = "ok" if process.returncode == 0 else f"failed, status {process.returncode}"
            except subprocess.TimeoutExpired:
                status = "cut, the time was over"
        summary.append(f"{name}: {status}, {time.monotonic() - start:.0f} s")
        print(summary[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(summary) + "\n")
    return all(": ok, " in line for line in summary)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m visionattn.tools.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="to make, for all that is found")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: the same steps, on the least they take")
    arguments = parser.parse_args(argv)
    try:
        return 0 if run(arguments.device, arguments.out, arguments.quick) else 1
    except UserError as error:
        print(f"visionattn: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
