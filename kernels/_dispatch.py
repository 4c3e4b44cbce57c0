"""Chooses the implementation of an attention pattern.

To add a pattern, write `kernels/<pattern>.py`, shaped like `routing.py`, with
- `_reference(*arguments) -> (output, weights, indices)`: the definition, any dtype. `weights` is the very tensor that
  multiplies v, (B, heads, Nq, Nk); for a sparse pattern `indices` (B, Nq, Nk) holds the flat key positions, -1 outside
  of the map, else None. Where rows are not the places of the map in order, a fourth result (Nq,) says what they add to;
- `_plain(*arguments) -> output`: the fast path of GPUs and of all that a compiler traces, see `_plain.py`;
- `_on_cpu(*arguments) -> output`: the fast path of a CPU; may be the same;
- the public function, last, named in `__all__` and imported in `__init__.py`: it checks the user's arguments, makes
  them canonical (defaults filled in, ints to pairs) and ends with
  `return dispatch("<pattern>", backend, Forms(_reference, _on_cpu, _plain), *arguments)`.
Triton code goes to `kernels/_<pattern>_triton.py`, imported when a CUDA tensor first needs it, with
- `attention(*arguments) -> output`, behind a torch.library operator;
- `unsupported(*arguments) -> str | None`: None, or the reason why this call cannot run, as a clause ("head_dim is 200,
  at most 128 is supported");
- `unsuited(*arguments) -> str | None`: None, or the reason why the plain body is the better one and nothing is tried;
- `problems(*arguments)`: yields the arguments of a few small calls of the same kind, on which it is proved, see
  `_proof.py`.
Its tests are an entry in `tests/kernels/test_contract.py`, and the definition as loops in `test_<pattern>.py`.
Under autocast all implementations receive their floating tensors in the autocast dtype and run with autocast off.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionattn.kernels import _proof, _record
from visionattn.kernels._check import autocasting, transforms
from visionattn.kernels._plain import can_keep, capturing

__all__ = ["Forms", "bodies", "describe_backends", "dispatch", "set_backend", "takes_plain"]

BACKENDS = ("auto", "reference", "torch", "triton")

TRITON_DEVICES = {"cuda"}


class Forms(NamedTuple):
    """The PyTorch forms of a pattern; the backend "torch" is `on_cpu` or `plain`."""

    reference: Callable[..., tuple]
    on_cpu: Callable[..., Any]
    plain: Callable[..., Any]
    kind: str = "space"  # of what attends to what, see `_record.Attention`
    # rows at least, and the arguments of a call -> (first row, arguments) of parts of the queries
    strip: Callable[..., Any] | None = None


_default = "auto"  # what backend="auto" means now
_compiled: set[tuple[str, _proof.Kind]] = set()  # kinds of calls that took Triton in this process, by "auto" or by name
_ran: dict[tuple[str, str, str], None] = {}  # pattern, body and why it was not a faster one, of all calls so far


@contextmanager
def set_backend(name: str) -> Iterator[None]:
    """While active, calls with `backend="auto"` use this backend, in all threads; one named in a call wins.

    Raises ValueError for a name other than auto, reference, torch, triton.
    """
    global _default
    _check_name(name)
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


def dispatch(pattern: str, backend: str, forms: Forms, *arguments: Any) -> Any:
    """Run the pattern on `arguments` (the first a tensor) with the backend asked for, or the best one for "auto"."""
    _check_name(backend)
    if autocasting(arguments[0]):
        device = arguments[0].device.type
        arguments = _autocast(device, arguments)
        with torch.autocast(device, enabled=False):
            return dispatch(pattern, backend, forms, *arguments)
    if _record.active():
        return _record.recorded(forms.reference, pattern, forms.kind, forms.strip, *arguments)
    body, why = _choose(pattern, _default if backend == "auto" else backend, forms, arguments)
    _note(pattern, body, why)
    if body == "reference":
        return forms.reference(*arguments)[0]
    if body == "triton":
        return _sibling(pattern).attention(*arguments)
    return (forms.plain if body == "plain" else forms.on_cpu)(*arguments)


def takes_plain(x: Tensor) -> bool:
    """Whether the PyTorch form of x is the plain body."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def describe_backends() -> list[str]:
    """One line for each pattern and kind of device: the body that "auto" takes there, and why not a faster one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    lines = []
    for info in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        if info.name.startswith("_"):
            continue
        for device in devices:
            reason = _no_triton(info.name, device)
            body = "on_cpu" if device == "cpu" else "plain"
            line = f"{body} ({reason})" if reason else "triton where it is proved right and faster, else plain"
            lines.append(f"{info.name:<28} {device:<5} {line}")
    return lines


def bodies() -> list[str]:
    """One line for each pattern and body that has run in this process, and why it was not a faster one."""
    return sorted(f"{pattern}: {body}{f' ({why})' if why else ''}" for pattern, body, why in _ran)


@torch.compiler.assume_constant_result
def _note(pattern: str, body: str, why: str) -> None:
    _ran[pattern, body, why] = None


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")


def _choose(pattern: str, backend: str, forms: Forms, arguments: tuple) -> tuple[str, str]:
    """The body to run, reference, on_cpu, plain or triton, and for "auto" why it is not a faster one."""
    device = arguments[0].device.type
    if backend == "auto" and (device == "meta" or torch.jit.is_tracing() or transforms()):
        return "reference", ""  # the one that reads no values, that TorchScript can save, and torch.func transform
    if backend in ("torch", "triton") and transforms() not in ([], ["Grad"]):
        raise ValueError(
            f"backend={backend!r} cannot run this {pattern} call under torch.func's {' of '.join(transforms())}: use "
            "backend='auto' or 'reference'"
        )
    if backend == "reference":
        return backend, ""
    ours = "plain" if takes_plain(arguments[0]) else "on_cpu"
    if backend == "torch" or (backend == "auto" and device not in TRITON_DEVICES):
        return ours, ""
    if backend == "auto" and type(arguments[0]) not in (Tensor, nn.Parameter):
        return ours, "the tensors are fake, or of a class of their own"
    reason = _no_triton(pattern, device) or _sibling(pattern).unsupported(*arguments)
    if reason is None:
        reason = _unproved(pattern, forms, arguments) if backend == "auto" else _uncompiled(pattern, arguments)
    if reason is None:
        return "triton", ""
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run this {pattern} call: {reason}; use backend='auto' or 'torch'")
    return ours, reason


def _unproved(pattern: str, forms: Forms, arguments: tuple) -> str | None:
    """Why "auto" does not take a Triton kernel that could run: None where this machine has seen it right and faster."""
    mode, sibling = _mode(), _sibling(pattern)
    if mode == "off":
        return "VISIONATTN_KERNELS=off"
    reason = sibling.unsuited(*arguments) if mode == "check" else None
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return None if mode == "trust" else _unproved_when_compiled(*_proof.facts_of(pattern, arguments))
    kind = _proof.kind_of(pattern, arguments)
    if not can_keep(arguments[0]):  # fake, or being captured, when no kernel can be compiled
        return None if ("auto", kind) in _compiled else "it has not run before the capture"
    if mode == "check":
        verdict = _proof.prove(
            kind,
            lambda: _proof.try_kernel(
                sibling.attention, forms.plain, forms.reference, sibling.problems(*arguments), arguments, kind.training
            ),
        )
        if not verdict.is_taken:
            return str(verdict)
    _compiled.add(("auto", kind))
    return None


def _uncompiled(pattern: str, arguments: tuple) -> str | None:
    """Why a kernel asked for by name cannot run while a CUDA graph is captured, where Triton must not compile."""
    if torch.compiler.is_compiling():
        return None
    if can_keep(arguments[0]):
        _compiled.add(("triton", _proof.kind_of(pattern, arguments)))
    elif capturing(arguments[0]):
        kind = _proof.kind_of(pattern, arguments)
        if not {("auto", kind), ("triton", kind)} & _compiled:
            return "a CUDA graph is being captured, which lets no kernel be compiled: make such a call before it"
    return None


@torch.compiler.assume_constant_result
def _mode() -> str:
    return _proof.mode()


@torch.compiler.assume_constant_result
def _unproved_when_compiled(*facts: Any) -> str | None:
    proved = _proof.is_proved(_proof.Kind(*facts))
    if proved is None:
        return "not tried on this machine: visionattn doctor --kernels tries kernels for compiled code"
    return None if proved else "not faster, or not right, on this machine"


@torch.compiler.assume_constant_result
def _no_triton(pattern: str, device: str) -> str | None:
    """Why no call of the pattern can run on Triton on this kind of device; None if calls can."""
    if device not in TRITON_DEVICES:
        return f"Triton kernels need CUDA tensors, and these are on {device}"
    if importlib.util.find_spec(f"{__package__}._{pattern}_triton") is None:
        return "this pattern has no Triton kernel yet"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


@torch.compiler.assume_constant_result
def _sibling(pattern: str) -> Any:
    return importlib.import_module(f"{__package__}._{pattern}_triton")


def _autocast(device: str, arguments: tuple) -> tuple:
    """The arguments with floating tensors, but for float64, in autocast's dtype."""
    dtype = torch.get_autocast_dtype(device)

    def cast(argument: Any) -> Any:
        floating = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(dtype) if floating else argument

    return tuple(cast(argument) for argument in arguments)
