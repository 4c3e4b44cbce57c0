"""Finds the fastest tiles, warps and stages of the Triton kernels on a GPU: `visionattn benchmark kernels --tune`.

Each of a pattern's kernels is timed with each of `CHOICES`, on the first of its cases in the benchmark with each head
dim, in bfloat16; what is faster by `GAIN` than the table's becomes a row of the user's own table. Only kernels that the
call launches can differ; a choice that does not compile, or fit the device, is passed over.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn import files
from visionattn.errors import UserError
from visionattn.kernels import _blocks, set_backend
from visionattn.kernels._blocks import Blocks, Entry
from visionattn.tools.benchmark import PASSES, PATTERNS, Case

__all__ = ["tune"]

TUNED = ("window", "neighborhood", "routing", "halo")
BATCH, ROUNDS = 32, 10
GAIN = 1.03
# Queries and keys at a time, warps, stages.
CHOICES = (
    Blocks(64, 32, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 2), Blocks(128, 32, 4, 2),
    Blocks(128, 64, 8, 2), Blocks(32, 64, 4, 1), Blocks(32, 32, 4, 2), Blocks(64, 64, 4, 1), Blocks(64, 64, 8, 1),
)  # fmt: skip
Time = Callable[[Callable[[], Any]], float]  # of a function, in milliseconds


def tune(
    patterns: Sequence[str], device: str = "cuda", time: Time | None = None, capability: int | None = None
) -> None:
    """Time the kernels of these patterns, print what is faster, and write it to the user's table.

    time and capability stand in for a GPU's. Raises UserError where there is no GPU, or no pattern to tune.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--tune times kernels on a GPU, and PyTorch finds no CUDA device here")
    patterns = [pattern for pattern in patterns if pattern in TUNED]
    if not patterns:
        raise UserError(f"--tune: give a --pattern of {', '.join(TUNED)}; the others have no such table")
    if capability is None:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    found: dict[Entry, Blocks] = {}
    for pattern, case in _cases(patterns):
        found |= _tune_case(pattern, case, device, time or _milliseconds, capability)
    if not found:
        print(f"nothing is faster than the table by {GAIN - 1:.0%}: nothing is written")
        return
    file = _blocks.user_file()
    kept = _blocks.read(file) if file.exists() else {}
    files.make_folder(file.parent)
    rows = [entry._asdict() | blocks._asdict() for entry, blocks in sorted((kept | found).items())]
    with files.new_file(file, replace=True) as part:
        files.write_rows(part, rows)
    print(f"{len(found)} rows written to {file}, of {len(rows)}: kernels take them from the next start of Python on")


def _cases(patterns: Sequence[str]) -> Iterator[tuple[str, Case]]:
    """The first of each head dim."""
    for pattern in patterns:
        yield from (
            (pattern, case) for case in {case.dim: case for case in PATTERNS[pattern].cases(224)[::-1]}.values()
        )


def _tune_case(pattern: str, case: Case, device: str, time: Time, capability: int) -> dict[Entry, Blocks]:
    best: dict[Entry, Blocks] = {}
    for kernel in _blocks.KERNELS:
        call = _call(pattern, case, device, PASSES[kernel != "forward"])
        entry = Entry(capability, pattern, kernel, 16, max(32, case.dim))
        choices = list(dict.fromkeys([_blocks.blocks(entry), *CHOICES]))
        times = {}
        for blocks in choices:
            with _blocks.preferring(best | {entry: blocks}), set_backend("triton"):
                times[blocks] = _time(call, time)
        fastest = min(choices, key=times.__getitem__)
        if times[choices[0]] > GAIN * times[fastest]:
            best[entry] = fastest
            gained = f"{choices[0]} {times[choices[0]]:.3f} ms, {fastest} {times[fastest]:.3f}"
            print(f"{case.name}, {pattern} {kernel}: {gained}")
    return best


def _call(pattern: str, case: Case, device: str, step: str) -> Callable[[], Any]:
    """Of a batch in bfloat16; with a backward pass, of what else takes gradients too."""
    training = step == PASSES[1]
    shape = (BATCH, case.side, case.side, 3, case.heads, case.dim)
    qkv = torch.randn(shape, device=device).bfloat16().requires_grad_(training).unbind(3)
    rest = [x.to(device).bfloat16().requires_grad_(training) if isinstance(x, Tensor) else x for x in case.arguments]
    inputs = [*qkv, *(x for x in rest if isinstance(x, Tensor))]

    def call() -> Any:
        with torch.set_grad_enabled(training):
            output = PATTERNS[pattern].candidates["visionattn"](*qkv, *rest)
        return torch.autograd.grad(output, inputs, output) if training else output

    return call


def _time(call: Callable[[], Any], time: Time) -> float:
    try:
        return time(call)
    except Exception as error:  # of the compiler, or of the driver
        print(f"passed over: {type(error).__name__}: {error}".splitlines()[0][:200])
        return float("inf")


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median of some runs on the device, after two that compile and warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])
