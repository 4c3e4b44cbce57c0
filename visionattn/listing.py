"""`visionattn list`: every model of ours with its size, cost, weights, licence and paper; and every decoder."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import visionattn.backbones  # noqa: F401  registers the models
from visionattn.kernels import set_backend

__all__ = ["Entry", "decoder_table", "format_table", "gmacs", "models", "our_models"]


class Entry(NamedTuple):
    """One model: parameters in millions, GMACs (multiply-adds of one image) at `input_size`."""

    name: str
    parameters: float
    gmacs: float
    input_size: tuple[int, int, int]
    pretrained: bool
    licence: str
    paper: str


def our_models() -> list[str]:
    """Names of the models that this package registers in timm."""
    return [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("visionattn.")]


def models(pattern: str = "*") -> Iterator[Entry]:
    """Our models whose name matches a shell pattern; made on the meta device, so nothing is allocated."""
    for name in our_models():
        if fnmatch(name, pattern):
            yield _entry(name)


def gmacs(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Multiply-accumulates of one image, in 1e9; attention in its unfused form, since fused operators are opaque."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), set_backend("reference"), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops() / 2e9


def _entry(name: str) -> Entry:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    cfg = model.pretrained_cfg
    return Entry(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        gmacs=gmacs(model, cfg["input_size"]),
        input_size=tuple(cfg["input_size"]),
        pretrained=timm.is_model_pretrained(name),
        licence=cfg.get("license") or "-",
        paper=cfg.get("paper_ids") or "-",
    )


def format_table(entries: list[Entry]) -> str:
    """Aligned text of the entries, with a heading."""
    rows = [("model", "M params", "GMACs", "input", "pretrained", "licence", "paper")]
    for e in entries:
        size = "x".join(map(str, e.input_size))
        weights = "yes" if e.pretrained else "no"
        rows.append((e.name, f"{e.parameters:.2f}", f"{e.gmacs:.2f}", size, weights, e.licence, e.paper))
    return _aligned(rows)


def decoder_table(pattern: str = "*") -> str:
    """Aligned text of the decoders whose name matches a shell pattern, with a heading."""
    from visionattn.models.segmenters import DECODERS  # which imports segmentation_models_pytorch

    return _aligned([("decoder", ""), *((n, d.description) for n, d in DECODERS.items() if fnmatch(n, pattern))])


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
