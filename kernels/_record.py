"""Keeps the attention weights that the kernels of a model compute, for explanation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Attention", "active", "keep", "record_attention"]


class Attention(NamedTuple):
    """Attention weights of one call of one layer; rows sum to 1.

    weights: (B, heads, queries, keys), queries in row-major order of their map. After backward, `weights.grad` is their
        gradient.
    indices: None where every query attends to every key, in row-major order of their map; else (B, queries, keys), the
        flat positions of the keys that the weights belong to.
    """

    weights: Tensor
    indices: Tensor | None


class _Recorder:
    def __init__(self) -> None:
        self.running: list[str] = []  # names of the modules being called, outermost first
        self.record: dict[str, list[Attention]] = {}


_recorder: _Recorder | None = None


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[Attention]]]:
    """While active, the kernels called inside `model` run their reference form and keep their attention weights.

        with record_attention(model) as record:
            model(images)[0, label].backward()
        record["stages.2.0.attn"][0].weights.grad

    Yields a dictionary that fills as the model runs: the name (in `model.named_modules()`) of the innermost module that
    was running -> one `Attention` for each call. Works on a compiled model too, which then runs uncompiled. A model
    with `grad_checkpointing` runs without it; where other code checkpoints, call backward inside the block (what
    backward computes again is not recorded a second time).
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("record_attention is active already: leave its block before entering another")
    recorder = _Recorder()
    with ExitStack() as undo:
        for name, module in model.named_modules():
            undo.callback(module.register_forward_pre_hook(_entering(recorder, name)).remove)
            undo.callback(module.register_forward_hook(_leaving(recorder), always_call=True).remove)
            if getattr(module, "grad_checkpointing", False):
                module.grad_checkpointing = False
                undo.callback(setattr, module, "grad_checkpointing", True)
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        _recorder = recorder
        try:
            yield recorder.record
        finally:
            _recorder = None


def active() -> bool:
    """Whether a kernel called now has its weights recorded."""
    return _recorder is not None and bool(_recorder.running)


def keep(weights: Tensor, indices: Tensor | None) -> None:
    """Record the weights of the kernel being called, unless backward is only repeating a checkpointed forward."""
    if _recorder is None or torch._C._current_graph_task_id() != -1:
        return
    if weights.requires_grad:
        weights.retain_grad()
    _recorder.record.setdefault(_recorder.running[-1], []).append(Attention(weights, indices))


def _entering(recorder: _Recorder, name: str):
    return lambda module, arguments: recorder.running.append(name)


def _leaving(recorder: _Recorder):
    def leave(module, arguments, output) -> None:
        recorder.running.pop()

    return leave
