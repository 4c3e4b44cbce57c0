"""Smaller ONNX files: in half precision, or with weights of matrices in 8 bits, and what that costs.

int8 is dynamic: weights of MatMul and Gemm per output channel, activations as they come; convolutions stay, which in 8
bits are slower on a CPU and change more decisions. Activations scaled by calibration images (static) gain nothing over
that, see `benchmarks/README.md`. Of fp16 files a CPU gains nothing but size.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from visionattn.errors import UserError
from visionattn.models.extras import imported
from visionattn.recipe import Recipe
from visionattn.tasks.graph import Graph
from visionattn.tools._exporters import Ran

__all__ = ["PRECISIONS", "compared"]

WIDE = ("ScatterElements", "ScatterND")  # of which ONNX Runtime's CPU adds up no halves
LARGEST_LOSS = 0.01  # of the share of right decisions, or of equal ones where nothing tells which are right


def _fp16(source: Path, out: Path) -> None:
    onnx = imported("onnx", "export", "export --precision")
    converter = imported("onnxruntime.transformers.float16", "export", "export --precision fp16")
    wide = [*converter.DEFAULT_OP_BLOCK_LIST, *WIDE]
    onnx.save(converter.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=wide), out)


def _int8(source: Path, out: Path) -> None:
    quantization = imported("onnxruntime.quantization", "export", "export --precision int8")
    root = logging.getLogger()
    root.addFilter(_no_hint)
    try:
        quantization.quantize_dynamic(source, out, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    finally:
        root.removeFilter(_no_hint)


def _no_hint(record: logging.LogRecord) -> bool:
    """Leaves out what ONNX Runtime would have people do to the file, which is for convolutions."""
    return "pre-processing before quantization" not in record.getMessage()


PRECISIONS: dict[str, Callable[[Path, Path], None]] = {"fp16": _fp16, "int8": _int8}


def compared(
    run: Ran,
    whole: Ran,
    inputs: Sequence[tuple[Tensor, dict[str, Any]]],
    graph: Graph,
    part: ModuleType,
    spec: Recipe,
) -> dict[str, Any]:
    """What a smaller file does on images, beside the whole one.

    Args:
        run, whole: what runs each.
        inputs: images (1, C, H, W) with the items of the evaluation set that they are of.
        graph: what both compute.
        part: the task's `export`.

    Raises:
        UserError: too many decisions are others.
    """
    seconds: dict[Ran, list[float]] = {run: [], whole: []}
    rows = []
    for image, item in inputs:
        outputs = {}
        for one in (run, whole):
            began = time.perf_counter()
            outputs[one] = one(image)
            seconds[one].append(time.perf_counter() - began)
        small, large = (
            dict(zip(graph.OUTPUTS, values, strict=True))
            for values in (graph.matched(outputs[run], outputs[whole]), outputs[whole])
        )
        change = np.abs(small["probabilities"] - large["probabilities"]).max()
        rows.append(
            (part.agreement(small, large, spec), change, part.right(small, item, spec), part.right(large, item, spec))
        )
    equal, change, right, right_before = zip(*rows, strict=True)
    known = [pair for pair in zip(right, right_before, strict=True) if None not in pair]
    now, before = np.mean(known, axis=0).tolist() if known else (None, None)
    agreement = float(np.mean(equal))
    lost = 1 - agreement if now is None else before - now
    if lost > LARGEST_LOSS:
        what = "of equal decisions" if now is None else "of right decisions"
        raise UserError(
            f"{lost:.1%} {what} are lost on {len(rows)} images, more than {LARGEST_LOSS:.0%}; nothing was kept"
        )
    return {
        "images": len(rows),
        "agreement_with_fp32": agreement,
        "largest_change_of_a_probability": float(max(change)),
        "accuracy": now,
        "accuracy_of_fp32": before,
        "milliseconds_an_image": 1000 * float(np.median(seconds[run])),
        "milliseconds_an_image_of_fp32": 1000 * float(np.median(seconds[whole])),
    }
