"""Proof before use: "auto" takes a Triton kernel only where this machine has seen it right, and faster.

The first time that a kind of call is met, a few small problems of odd sizes run forward and, if it trains, backward,
against the reference in float64: memory that nobody writes holds NaN, and a second run must give the same bits. Then
the kernel is timed against the plain body on the call itself. The verdict is kept in one file for each user.

A kind of call is its pattern, dtype, padded head dims, options and direction, on its class of sizes. A verdict also
belongs to a device, driver, torch, triton and the source of the kernels: with others, calls are tried anew. Compiled
code reads verdicts only. The environment variable VISIONATTN_KERNELS overrides: "off" never takes Triton, "trust" takes
it untried, "check" is the default.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from visionattn.kernels import _blocks
from visionattn.kernels._check import allows_tf32

__all__ = [
    "Kind",
    "Verdict",
    "draw",
    "draw_maps",
    "facts_of",
    "is_proved",
    "kind_of",
    "mode",
    "path",
    "prove",
    "try_kernel",
    "verdicts",
]

FASTER = 1.1  # times the plain body, at which a kernel is taken
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
ROUNDS = 5  # of timing
MODES = ("check", "off", "trust")
UNFINISHED = "the process ended while the kernel was tried"
Key = str

_known: dict[Key, "Verdict"] = {}  # of this process, and what it has read


@dataclass(frozen=True)
class Verdict:
    """Of a kind of call: status "ok", "slower", "wrong" or "error"; factor: times as fast as the plain body."""

    status: str
    factor: float | None = None
    why: str = ""

    @property
    def is_taken(self) -> bool:
        return self.status == "ok"

    def __str__(self) -> str:
        times = "" if self.factor is None else f", {self.factor:.2f} times as fast as the plain body"
        return f"{self.status}{times}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True)
class Kind:
    """A kind of call. sizes: the class of its sizes, powers of two, which compiled code does not ask for."""

    device: torch.device
    pattern: str
    dtype: torch.dtype
    dims: tuple[int, ...]
    options: tuple
    training: bool
    sizes: tuple[int, ...] = ()


def mode() -> str:
    """What VISIONATTN_KERNELS says; raises ValueError for what it cannot."""
    value = os.environ.get("VISIONATTN_KERNELS", "check")
    if value not in MODES:
        raise ValueError(f"VISIONATTN_KERNELS={value!r}: expected one of {', '.join(MODES)}")
    return value


def path() -> Path:
    """The file of verdicts."""
    return _blocks.cache() / "kernels.json"


def kind_of(pattern: str, arguments: tuple) -> Kind:
    """Of a call with a pattern's canonical arguments."""
    q = arguments[0]
    sizes = _rounded(len(q) * q.shape[-2]), _rounded(q.shape[1:-2].numel())
    return Kind(*facts_of(pattern, arguments), sizes=sizes)


def facts_of(pattern: str, arguments: tuple) -> tuple[torch.device, str, torch.dtype, tuple[int, ...], tuple, bool]:
    """What a `Kind` of calls of any sizes is made of."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    maps = [x for x in tensors if x.ndim >= 4 and x.is_floating_point()]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    dims = tuple(_rounded(x.shape[-1], 16) for x in maps)
    options = tuple("given" if isinstance(x, Tensor) else x for x in arguments if not isinstance(x, float))
    if tensors[0].dtype == torch.float32 and allows_tf32():
        options += ("tf32",)
    return tensors[0].device, pattern, tensors[0].dtype, dims, options, training


def _rounded(size: int, least: int = 1) -> int:
    """Up to a power of two."""
    return max(least, 1 << (size - 1).bit_length()) if size else 0


def is_proved(kind: Kind) -> bool | None:
    """Whether the verdicts of this kind of call, of any sizes, say that the kernel is right and faster; None if there
    are none. Nothing is tried."""
    key = _key(kind)
    if not any(known.startswith(key) for known in _known):
        _known.update(_read())
    found = [verdict for known, verdict in _known.items() if known.startswith(key)]
    return all(verdict.is_taken for verdict in found) if found else None


def prove(kind: Kind, try_it: Callable[[], Verdict]) -> Verdict:
    """The verdict of a kind of call: known, read, or else what `try_it` returns, which is then kept.

    One process tries at a time, and those that waited read. What ends a process in the middle, is an error ever after.
    """
    key = _key(kind)
    if key not in _known:
        try:
            path().parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path()}.lock"):
                _known.update(_read())
                if key not in _known:
                    _write(key, Verdict("error", why=UNFINISHED))
                    try:
                        _known[key] = try_it()
                    except torch.OutOfMemoryError:
                        _write(key, None)
                        return Verdict("error", why="there was no memory to try it")
                    except BaseException:
                        _write(key, None)
                        raise
                    _write(key, _known[key])
        except OSError as error:
            warnings.warn(f"{path()}: {error}; verdicts on kernels are not kept", stacklevel=2)
            _known[key] = try_it()
    return _known[key]


def verdicts() -> dict[Key, Verdict]:
    """All of the file, of this machine's present versions, by what they are on."""
    prefixes = tuple({_machine(torch.device("cuda", i)) for i in range(torch.cuda.device_count())})
    return {key.split("; ")[-1]: verdict for key, verdict in _read().items() if key.startswith(prefixes)}


@functools.lru_cache(maxsize=1024)
def _key(kind: Kind) -> Key:
    dtype, direction = str(kind.dtype).removeprefix("torch."), "training" if kind.training else "inference"
    facts = " ".join(map(str, (kind.pattern, direction, dtype, *kind.dims, *kind.options)))
    return f"{_machine(kind.device)}{facts} @ {' x '.join(map(str, kind.sizes))}"


@functools.cache
def _machine(where: torch.device) -> str:
    """The device, its driver, the versions and the source that a verdict belongs to."""
    source = hashlib.sha256()
    tables = [file for file in (_blocks.OURS, _blocks.user_file()) if file.exists()]
    for file in [*sorted(Path(__file__).parent.glob("_*_triton.py")), *tables]:
        source.update(file.read_bytes())
    device, driver = where.type, ""
    if where.type == "cuda":
        major, minor = torch.cuda.get_device_capability(where)
        device, driver = f"{torch.cuda.get_device_name(where)} sm_{major}{minor}", _driver()
    versions = [f"{name} {_version(name)}" for name in ("torch", "triton")]
    return "; ".join([device, f"driver {driver}", *versions, f"kernels {source.hexdigest()[:16]}"]) + "; "


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Module")[1].split()[0]
    except (OSError, IndexError):
        return str(torch.version.cuda or torch.version.hip)


def _version(name: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "none"


def _read() -> dict[Key, Verdict]:
    """All verdicts of the file; with a warning none, if it is no such file."""
    try:
        return {key: Verdict(**verdict) for key, verdict in json.loads(path().read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path()} is no file of verdicts on kernels ({error}): they are tried anew", stacklevel=2)
        return {}


def _write(key: Key, verdict: Verdict | None) -> None:
    """Add a verdict to the file, or remove it; the file changes as a whole."""
    with warnings.catch_warnings(action="ignore"):
        entries = _read()
    entries.pop(key, None)
    if verdict is not None:
        entries[key] = verdict
    text = json.dumps({key: asdict(entry) for key, entry in sorted(entries.items())}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, suffix=".json", delete=False, encoding="utf-8") as stream:
        stream.write(text)
    os.replace(stream.name, path())


def draw(like: Tensor, *shape: int) -> Tensor:
    """Random numbers of the device and dtype of a tensor, the same for the same shape, by a generator of their own."""
    generator = torch.Generator(like.device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def draw_maps(q: Tensor, v: Tensor, size: tuple[int, ...], heads: int = 3) -> list[Tensor]:
    """q, k and v of two images of this size: slices of one packed projection, unless values have another width."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    maps = draw(q, 2, *size, 3, heads, dim).unbind(-3)
    return [*maps] if value_dim == dim else [*maps[:2], draw(v, 2, *size, heads, value_dim)]


def try_kernel(
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    reference: Callable[..., tuple],
    problems: Iterator[tuple],
    arguments: tuple,
    training: bool,
) -> Verdict:
    """Run a kernel on small problems, then time it against the plain body on `arguments`."""
    try:
        with torch.inference_mode(False), _own_stream(arguments[0]):
            for problem in problems:
                error = _error(kernel, reference, problem, training)
                if error:
                    return Verdict("wrong", why=error)
            factor = _speedup(kernel, plain, _leaves(arguments, training), training)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Verdict("error", why=f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return Verdict("ok" if factor >= FASTER else "slower", factor)


@contextmanager
def _own_stream(x: Tensor) -> Iterator[None]:
    """Beside the caller's work, after what it has started; the host waits for the end."""
    if not x.is_cuda:
        yield
        return
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _leaves(arguments: tuple, training: bool, dtype: torch.dtype | None = None) -> tuple:
    """The arguments as tensors of their own, floating ones with a gradient where it is asked for."""
    return tuple(
        x.detach().clone().to(dtype or x.dtype).requires_grad_(training)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in arguments
    )


def _run(function: Callable[..., Any], arguments: tuple, training: bool) -> list[Tensor]:
    """Outputs and, in training, the gradients of a sum of them, weighted from -1 to 2."""
    with torch.set_grad_enabled(training):
        outputs = function(*arguments)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if not training:
            return outputs
        weights = [torch.linspace(-1, 2, x.numel(), device=x.device).bfloat16().to(x.dtype).view_as(x) for x in outputs]
        total = sum((x.where(x.isfinite() | x.isnan(), 0) * w).sum() for x, w in zip(outputs, weights, strict=True))
        inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        return [x.detach() for x in outputs] + list(torch.autograd.grad(total, inputs))


def _error(kernel: Callable[..., Any], reference: Callable[..., tuple], problem: tuple, training: bool) -> str:
    """What is wrong with the kernel on this problem; "" if nothing is."""
    exact = _leaves(problem, training, torch.float64)
    expected = _run(lambda *arguments: reference(*arguments)[0], exact, training)
    leaves = _leaves(problem, training)
    with _poisoned_memory():
        first, second = (_run(kernel, leaves, training) for _ in range(2))
    tf32 = leaves[0].dtype == torch.float32 and allows_tf32()
    tolerance = TOLERANCES[torch.float16 if tf32 else leaves[0].dtype]  # tf32 has as many bits
    where = f"on {tuple(leaves[0].shape)} {str(leaves[0].dtype).removeprefix('torch.')}"
    for i, (x, again, right) in enumerate(zip(first, second, expected, strict=True)):
        if not torch.equal(_bits(x), _bits(again)):
            return f"result {i} changes from run to run {where}"
        x, finite = x.double(), right.isfinite()
        if not torch.equal(x[~finite], right[~finite]):
            return f"result {i} is not -inf where it should be {where}"
        difference, norm = (x - right)[finite], right[finite].norm() + 1e-2 * right.numel() ** 0.5
        if not difference.norm() <= tolerance * norm:  # NaN too
            return f"result {i} is off by {difference.norm() / norm:.1e} {where}, at most {tolerance:.1e} is right"
        largest = difference.abs().amax() if difference.numel() else x.new_zeros(())
        if not largest <= 20 * tolerance * (right[finite].abs().amax() if difference.numel() else 1):
            return f"result {i} is off by {largest:.1e} at one place {where}"
    return ""


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, as PyTorch fills it for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _speedup(kernel: Callable[..., Any], plain: Callable[..., Any], arguments: tuple, training: bool) -> float:
    """How many times as fast as the plain body, by medians of runs in turns."""
    times: list[list[float]] = [[], []]
    for i in range(ROUNDS + 1):
        for function, elapsed in zip((kernel, plain), times, strict=True):
            _wait(arguments[0])
            start = time.perf_counter()
            _run(function, arguments, training)
            _wait(arguments[0])
            if i:
                elapsed.append(time.perf_counter() - start)
    return statistics.median(times[1]) / max(statistics.median(times[0]), 1e-9)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
