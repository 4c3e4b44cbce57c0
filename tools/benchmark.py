"""Times attention kernels and whole models against their peers, and measures their peak memory.

    visionattn benchmark kernels --sizes 224 512 1024 --threads 2
    visionattn benchmark models swin_tiny_patch4_window7_224 biformer_tiny --train
    visionattn benchmark models --pattern 'va_davit_*' va_convit_tiny --compile
    visionattn benchmark models nat_mini --train --count

Time: candidates take turns in one process, so that other load meets all of them; median and quartiles over the rounds.
With one thread on a CPU (--threads 1) it is time of the process, which other load does not take part in.
Roofline: the share of the speed that the device allows, for the pattern's multiply-adds (three times as many with the
backward pass) and for reading and writing each map once.
Memory: on CUDA the peak of the allocator during one call; on a CPU the growth of the resident set during the first call
in a fresh process (Linux only). Both are above what the inputs take, and include outputs and gradients.
With --count nothing is timed: what the same calls would do on a CUDA device is counted, which needs none (`_count.py`).
With --tune the tiles of Triton kernels are chosen by time on a GPU, and kept for the user (`_tune.py`).
"""

import argparse
import csv
import fnmatch
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import pkgutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionattn.environment import describe
from visionattn.errors import UserError
from visionattn.listing import gmacs
from visionattn.tools._count import Count, Waits, count, fake_cuda, to_fake_cuda
from visionattn.tools._roofline import DEVICES, measure

__all__ = ["add_arguments", "main", "run"]

PASSES = ("forward", "forward+backward")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}  # that a call is counted in; models by autocast
PREFIX = "va_"  # of our models that have a twin in timm, by the name without it


@dataclass(frozen=True)
class Case:
    """A square map of a stage, and what the candidates of its pattern get after q, k, v."""

    name: str
    side: int
    heads: int
    dim: int
    arguments: tuple


@dataclass(frozen=True)
class Pattern:
    """What a file `_cases_<pattern>.py` of this room holds.

    cases: of an image size.
    macs: of the forward pass of one image of a case.
    candidates: called with q, k, v and the case's arguments; the first is the peer.
    inference: further ones, which have no backward pass everywhere; only those that `--compare` names are run.
    """

    cases: Callable[[int], list[Case]]
    macs: Callable[[Case], float]
    candidates: dict[str, Callable[..., Tensor]]
    inference: dict[str, Callable[..., Tensor]]


def _patterns() -> dict[str, Pattern]:
    found = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith("_cases_"):
            module = importlib.import_module(f"{__package__}.{info.name}")
            made, macs = functools.partial(_made, module.cases), functools.partial(_macs, module.macs)
            further = getattr(module, "INFERENCE_CANDIDATES", {})
            found[info.name.removeprefix("_cases_")] = Pattern(made, macs, module.CANDIDATES, further)
    return found


def _made(cases: Callable[[int], list[tuple]], size: int) -> list[Case]:
    return [Case(*case) for case in cases(size)]


def _macs(macs: Callable[..., float], case: Case) -> float:
    return macs(case.side, case.heads, case.dim, *case.arguments)


PATTERNS = _patterns()


@dataclass
class Row:
    """One line of the result: speedup and memory ratio are those to the first candidate of the case and pass."""

    subject: str
    case: str
    candidate: str
    step: str
    batch: int
    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    peak_mib: float
    gmacs: float | None = None
    ms_per_gmac: float | None = None
    speedup: float = 1.0
    memory_ratio: float = 1.0
    roofline: float | None = None  # share of what the device allows


@dataclass
class CountRow:
    """One line of what was counted on fake CUDA tensors; `least_ms` by the roofline of each device."""

    subject: str
    case: str
    candidate: str
    step: str
    precision: str
    batch: int
    launches: int
    gigabytes: float
    peak_gigabytes: float  # held at one time, beside the parameters and images
    half_gflop: float  # of products in 16 bits
    single_gflop: float  # of others
    least_ms: dict[str, float]


def kernel_call(pattern: str, case: Case, candidate: str, step: str, batch: int, device: str) -> Callable[[], Any]:
    """A function without arguments that runs the kernel once, on slices of one packed projection."""
    torch.manual_seed(0)
    training = step == PASSES[1]
    shape = (batch, case.side, case.side, 3, case.heads, case.dim)
    qkv = [x.requires_grad_(training) for x in torch.randn(shape, device=device).unbind(3)]
    function = (PATTERNS[pattern].candidates | PATTERNS[pattern].inference)[candidate]
    arguments = [x.to(device) if isinstance(x, Tensor) else x for x in case.arguments]
    gradient = torch.randn(shape[:3] + shape[4:], device=device) if training else None

    def call() -> Any:
        with nullcontext() if training else torch.no_grad():
            output = function(*qkv, *arguments)
        return torch.autograd.grad(output, qkv, gradient) if training else output

    return call


def try_kernels(device: str = "cuda", batch: int = 16) -> None:
    """Call every pattern on the stages of models at 224 px, in all precisions and directions, so that its kernel is
    tried."""
    for pattern, entry in PATTERNS.items():
        for case, step in itertools.product(entry.cases(224), PASSES):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    kernel_call(pattern, case, "visionattn", step, batch, device)()


def model_call(
    name: str, step: str, batch: int, size: tuple[int, int], device: str, compiled: bool = False
) -> Callable[[], Any]:
    """A function without arguments that runs the model once: inference, or a training step without the optimizer."""
    model = _model(name, size).to(device)
    model.train(step == PASSES[1])
    if compiled:
        model.compile()
    images = torch.randn(batch, 3, *size, device=device)

    def call() -> Any:
        if not model.training:
            with torch.inference_mode():
                return model(images)
        model.zero_grad(set_to_none=True)
        return model(images).square().mean().backward()

    return call


def _model(name: str, size: tuple[int, int]) -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    try:
        return timm.create_model(name, img_size=size)
    except (TypeError, ValueError):  # a family that takes any size, and no such argument
        return timm.create_model(name)


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call, one of each in every round, after one round that is not counted.

    Of one thread of a CPU those that the process took, so that other load does not count.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(rounds + 1):
        for name, call in calls.items():
            _wait(device)
            start = clock()
            call()
            _wait(device)
            times[name].append(1e3 * (clock() - start))
    return {name: values[1:] for name, values in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str, make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MiB that one call of `make(*arguments)` takes at its peak above what was there before it."""
    if device == "cuda":
        call = make(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_resident, torch.get_num_threads(), make, *arguments).result()


def _peak_resident(threads: int, make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    torch.set_num_threads(threads)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    call = make(*arguments)
    matrix = torch.randn(256, 256, requires_grad=True)
    (matrix @ matrix).sum().backward()  # threads and workspaces of the libraries are not the candidate's

    def mebibytes(key: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) / 1024

    before = mebibytes("VmRSS")
    reset.write_text("5")  # the peak is now the present
    call()
    return mebibytes("VmHWM") - before


def _rows(
    subject: str,
    case: str,
    step: str,
    args: argparse.Namespace,
    makers: dict[str, tuple],
    macs: dict[str, float] | None = None,
    least_seconds: float | None = None,
) -> list[Row]:
    """Time and memory of the candidates of one case; `makers` holds what `peak_memory` takes."""
    macs = macs or {}
    times = take_turns({name: make(*rest) for name, (make, *rest) in makers.items()}, args.rounds, args.device)
    rows: list[Row] = []
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
        row = Row(subject, case, name, step, args.batch, quartiles[1], quartiles[0], quartiles[2], 0.0)
        row.peak_mib = peak_memory(args.device, *makers[name])
        if name in macs:
            row.gmacs, row.ms_per_gmac = macs[name], row.median_ms / args.batch / macs[name]
        if least_seconds is not None:
            row.roofline = 1e3 * least_seconds / row.median_ms
        first = rows[0] if rows else row
        row.speedup, row.memory_ratio = first.median_ms / row.median_ms, row.peak_mib / max(first.peak_mib, 1e-9)
        rows.append(row)
        print(
            f"{subject:<12} {case:<18} {step:<17} {name:<32} {row.median_ms:9.2f} ms "
            f"[{row.quartile1_ms:.2f}, {row.quartile3_ms:.2f}]  {row.speedup:5.2f}x  {row.peak_mib:8.1f} MiB"
            + (f"  {row.gmacs:.2f} GMAC" if row.gmacs else "")
            + (f"  {row.roofline:.0%} of roofline" if row.roofline else ""),
            flush=True,
        )
    return rows


def run_kernels(args: argparse.Namespace) -> list[Row]:
    rows = []
    cases = [(name, case) for name in args.pattern for size in args.sizes for case in PATTERNS[name].cases(size)]
    for name, case in cases:
        for step in PASSES:
            candidates = list(PATTERNS[name].candidates)
            if step == "forward":
                candidates += [further for further in PATTERNS[name].inference if further in args.compare]
            makers = {c: (kernel_call, name, case, c, step, args.batch, args.device) for c in candidates}
            rows += _rows(name, case.name, step, args, makers, least_seconds=_least_seconds(name, case, step, args))
    return rows


def count_kernels(args: argparse.Namespace) -> list[CountRow]:
    rows = []
    for pattern in args.pattern:
        for case in (case for size in args.sizes for case in PATTERNS[pattern].cases(size)):
            for step, precision in itertools.product(PASSES, PRECISIONS):
                for candidate in PATTERNS[pattern].candidates:
                    counted = count_kernel(pattern, case, candidate, step, args.batch, PRECISIONS[precision])
                    rows.append(_counted(pattern, case.name, candidate, step, precision, args.batch, counted))
    return rows


def count_kernel(
    pattern: str, case: Case, candidate: str, step: str, batch: int, dtype: torch.dtype | None = None
) -> Count:
    """Of what `kernel_call` runs, on a projection in `dtype`, with autocast to it for what else there is."""
    function, shape = PATTERNS[pattern].candidates[candidate], (batch, case.side, case.side, 3, case.heads, case.dim)
    kept = [f for f in vars(inspect.getmodule(function)).values() if hasattr(f, "cache_clear")]
    with fake_cuda():
        qkv = torch.empty(shape, device="cuda", dtype=dtype, requires_grad=step == PASSES[1])
        arguments = [x.cuda() if isinstance(x, Tensor) else x for x in case.arguments]
        for f in kept:
            f.cache_clear()
        try:
            return count(lambda: function(*qkv.unbind(3), *arguments), [qkv] if qkv.requires_grad else [], dtype)
        finally:
            for f in kept:
                f.cache_clear()


def count_models(args: argparse.Namespace) -> list[CountRow]:
    rows = []
    for names, size in itertools.product(_rivals(args), args.sizes):
        for step, precision in itertools.product(PASSES if args.train else PASSES[:1], PRECISIONS):
            for name in names:
                counted = count_model(name, step, args.batch, size, PRECISIONS[precision])
                case = "{} x {} px".format(*size)
                rows.append(_counted("models", case, name, step, precision, args.batch, counted))
    return rows


def count_model(name: str, step: str, batch: int, size: tuple[int, int], dtype: torch.dtype | None) -> Count:
    """Of inference, or of a training step without the optimizer; dtype: that of autocast, None for float32."""
    model = _model(name, size).train(step == PASSES[1])
    with fake_cuda():
        to_fake_cuda(model)
        images = torch.empty(batch, 3, *size, device="cuda")
        return count(lambda: model(images), list(model.parameters()) if model.training else [], dtype)


def _counted(
    subject: str, case: str, candidate: str, step: str, precision: str, batch: int, counted: Count
) -> CountRow:
    half = sum(flops for dtype, flops in counted.flops.items() if dtype.itemsize == 2)
    least = {name: 1e3 * counted.seconds(device) for name, device in DEVICES.items()}
    gflops = half / 1e9, (counted.flops.total() - half) / 1e9
    row = CountRow(
        subject,
        case,
        candidate,
        step,
        precision,
        batch,
        counted.launches,
        counted.bytes / 1e9,
        counted.peak / 1e9,
        *gflops,
        least,
    )
    times = ", ".join(f"{name} {ms:.2f}" for name, ms in least.items())
    print(
        f"{subject:<16} {case:<18} {step:<17} {precision:<9} {candidate:<32} {row.launches:6} launches "
        f"{row.gigabytes:8.2f} GB, peak {row.peak_gigabytes:.2f}, "
        f"{gflops[0]:8.1f} + {gflops[1]:.1f} GFLOP in 16 and 32 bits; least ms: {times}",
        flush=True,
    )
    return row


def save_counts(rows: Sequence[CountRow], stem: Path) -> None:
    """Write the table (.csv) and what it was counted with (.json); refuses to replace either of them."""
    plain = [asdict(row) for row in rows]
    for row in plain:
        row |= {f"{name} least ms": ms for name, ms in row.pop("least_ms").items()}
    _write(plain, stem, [".csv", ".json"])


def _least_seconds(pattern: str, case: Case, step: str, args: argparse.Namespace) -> float:
    """Of q, k, v, the output and, in backward, their gradients: 4 maps, or 11 in all."""
    passes, maps = (1, 4) if step == "forward" else (3, 11)
    moved = maps * 4 * args.batch * case.side**2 * case.heads * case.dim
    return measure(args.device).seconds(2 * passes * args.batch * PATTERNS[pattern].macs(case), moved)


def run_models(args: argparse.Namespace) -> list[Row]:
    steps = [(step, step, False) for step in (PASSES if args.train else PASSES[:1])]
    steps += [(f"{step}, compiled", step, True) for step, *_ in steps] if args.compile else []
    rivals = _rivals(args)
    costs = {size: {name: _cost(name, size) for name in itertools.chain(*rivals)} for size in args.sizes}
    rows = []
    for names in rivals:
        for height, width in args.sizes:
            case = f"{height} x {width} px"
            macs = {name: costs[height, width][name] for name in names}
            for label, step, compiled in steps:
                rest = (step, args.batch, (height, width), args.device, compiled)
                makers = {name: (model_call, name, *rest) for name in names}
                rows += _rows("models", f"{names[-1]}, {case}" if args.pattern else case, label, args, makers, macs)
    if args.pattern:
        for step in dict.fromkeys(row.step for row in rows):
            speedups = [row.speedup for row in rows if row.step == step and row.candidate.startswith(PREFIX)]
            print(f"{step}: geometric mean {statistics.geometric_mean(speedups):.2f}x, least {min(speedups):.2f}x")
    return rows


def _cost(name: str, size: tuple[int, int]) -> float:
    """GMACs; asked for before anything is measured, since some of timm's models take some sizes only."""
    try:
        return gmacs(_model(name, size).eval(), (3, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        why = f": {error}" if str(error) else ""
        pixels = "{} x {} pixels".format(*size)
        raise UserError(f"{name} does not take images of {pixels}{why}; give other --sizes") from error


def _rivals(args: argparse.Namespace) -> list[list[str]]:
    """Lists of models to compare, the peer of each first."""
    import timm

    unknown = [name for name in args.names if not timm.is_model(name)]
    if unknown:
        raise UserError(f"no model called {', '.join(unknown)}: `visionattn list` shows ours, timm.list_models() all")
    if not args.pattern:
        if not args.names:
            raise UserError("benchmark models: give names of models, or --pattern 'va_*'")
        return [args.names]
    twins = [
        name for name in timm.list_models() if name.startswith(PREFIX) and timm.is_model(name.removeprefix(PREFIX))
    ]
    chosen = {pattern: fnmatch.filter(twins, pattern) for pattern in args.pattern}
    for pattern, names in chosen.items():
        if not names:
            raise UserError(f"--pattern {pattern}: none of our models with a twin in timm, {PREFIX}*, is called so")
    return [[name.removeprefix(PREFIX), name] for name in dict.fromkeys(itertools.chain(*chosen.values()))]


def save(rows: Sequence[Row], stem: Path) -> None:
    """Write the table (.csv), the chart (.png) and where it was measured (.json); refuses to replace any of them."""
    _write([asdict(row) for row in rows], stem, [".csv", ".png", ".json"], lambda: _chart(rows))


def _write(rows: list[dict[str, Any]], stem: Path, suffixes: list[str], chart: Callable[[], Any] | None = None) -> None:
    files = {suffix: stem.with_suffix(suffix) for suffix in suffixes}
    for file in files.values():
        if file.exists():
            raise UserError(f"{file} exists: results are never overwritten; give another folder with --out")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with files[".csv"].open("x", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if chart is not None:
        with files[".png"].open("xb") as stream:
            chart().savefig(stream, format="png", dpi=120)
    with files[".json"].open("x") as stream:
        json.dump(describe(), stream, indent=2)
    print(f"written: {', '.join(map(str, files.values()))}")


def _chart(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    last = rows[-1].step
    panels = {step: (step, "median_ms", "ms") for step in dict.fromkeys(row.step for row in rows)}
    panels["memory"] = (last, "peak_mib", f"peak of {last}, MiB")
    count = len({_label(row) for row in rows})
    figure = Figure(figsize=(5 + 4 * len(panels), 1.5 + 0.3 * count), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.candidate for row in rows))}
    for axis, (step, value, unit) in zip(axes, panels.values(), strict=True):
        chosen = [row for row in rows if row.step == step]
        labels, values = [_label(row) for row in chosen], [getattr(row, value) for row in chosen]
        bars = axis.barh(labels, values, color=[colours[row.candidate] for row in chosen])
        axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.margins(x=0.2, y=0.02)
        axis.set_title(unit if value == "peak_mib" else f"{step}, {unit}")
    axes[0].invert_yaxis()
    return figure


def _label(row: Row) -> str:
    return f"{row.subject} {row.case}, {row.candidate}"


def _size(text: str) -> tuple[int, int]:
    """`224` or `384x640` -> height and width"""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `visionattn benchmark`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="kernels|models")
    kernels = kinds.add_parser("kernels", help="attention patterns against textbook forms")
    kernels.add_argument("--pattern", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    kernels.add_argument("--sizes", nargs="+", type=int, default=[224, 512], metavar="PX", help="image sizes")
    further = sorted({name for pattern in PATTERNS.values() for name in pattern.inference})
    kernels.add_argument("--compare", nargs="+", choices=further, default=[], help="further peers, forward only")
    kernels.add_argument("--tune", action="store_true", help="find the fastest tiles of Triton kernels on this GPU")
    models = kinds.add_parser("models", help="whole models, by their names in timm; the first is the peer")
    models.add_argument("names", nargs="*", default=[], metavar="NAME")
    models.add_argument(
        "--pattern", nargs="+", metavar="GLOB", help=f"each of our models called so, {PREFIX}*, against timm's twin"
    )
    models.add_argument("--sizes", nargs="+", type=_size, default=[(224, 224)], metavar="PX", help="224 or 384x640")
    models.add_argument("--train", action="store_true", help="measure a training step too")
    models.add_argument("--compile", action="store_true", help="measure each model compiled too")
    for command in (kernels, models):
        command.add_argument("--count", action="store_true", help="count launches and bytes on CUDA; needs no GPU")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--batch", type=int, default=8)
        command.add_argument("--threads", type=int, help="of PyTorch on the CPU")
        command.add_argument("--rounds", type=int, default=15, help="measurements of each candidate, at least 2")
        command.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="for the results")


def run(args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, print it and write it to `--out`; UserError for the impossible."""
    if args.count:
        _run_counts(args)
        return
    if args.kind == "kernels" and args.tune:
        from visionattn.tools._tune import tune  # which imports this module

        tune(args.pattern)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    for option, least in (("batch", 1), ("rounds", 2), ("threads", 1)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: expected at least {least}")
    if args.threads:
        torch.set_num_threads(args.threads)
    stem = args.out / f"{args.kind}-{args.device}-{datetime.now():%Y%m%d-%H%M%S}"
    rows = run_kernels(args) if args.kind == "kernels" else run_models(args)
    save(rows, stem)


def _run_counts(args: argparse.Namespace) -> None:
    stem = args.out / f"{args.kind}-counted-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        rows = count_kernels(args) if args.kind == "kernels" else count_models(args)
    except Waits as error:
        raise UserError(f"--count: a call cannot be counted without its values, as {error}") from error
    save_counts(rows, stem)


def main(argv: Sequence[str] | None = None) -> None:
    """`visionattn benchmark ARGUMENTS`."""
    parser = argparse.ArgumentParser(
        prog="visionattn benchmark",
        description=__doc__.partition("\n")[0],
        epilog="examples:\n  visionattn benchmark kernels\n  visionattn benchmark models davit_tiny va_davit_tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
