"""Formats of exported networks: how a graph is written with what is known of it, and how the file is run again.

Files hold no path of the machine that wrote them.
"""

import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visionattn.errors import UserError
from visionattn.models.extras import imported
from visionattn.tasks.graph import Graph

__all__ = ["EXPORTERS", "Exporter", "Ran", "run_onnx", "stamp"]

KEY = "visionattn"  # of what is known of a file, inside it
OPSET = 18
Ran = Callable[[Tensor], list[np.ndarray]]  # images -> the outputs, in the order of `Graph.OUTPUTS`


class Exporter(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        write: of a graph, images (B, C, H, W), the path, what is known of it, and whether its sides are free.
        load: a file -> what runs it; None of what holds weights only.
    """

    suffix: str
    write: Callable[[Graph, Tensor, Path, dict[str, Any], bool], None]
    load: Callable[[Path], Ran] | None


def _shapes(free: bool) -> dict[str, dict[int, Any]]:
    axes = (0, 2, 3) if free else (0,)
    return {"images": dict.fromkeys(axes, torch.export.Dim.DYNAMIC)}


def _write_onnx(graph: Graph, images: Tensor, path: Path, about: dict[str, Any], free: bool) -> None:
    onnx = imported("onnx", "export", "export --to onnx")
    imported("onnxscript", "export", "export --to onnx")
    imported("onnxruntime", "export", "export --to onnx")
    with _quiet():
        program = torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            dynamic_shapes=_shapes(free),
            input_names=["images"],
            output_names=list(graph.OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    onnx.helper.set_model_props(model, {KEY: json.dumps(about)})
    onnx.save(model, path)


def _strip(model: Any) -> None:
    """Take away where the exporter found each node in the sources of whoever exported."""
    functions = [part for function in model.functions for part in (function, *function.node)]
    parts = [model.graph, *_nodes(model.graph), *functions]
    parts += [*model.graph.initializer, *model.graph.value_info, *model.graph.input, *model.graph.output]
    for part in parts:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    model.ClearField("doc_string")


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def stamp(path: Path, about: dict[str, Any]) -> None:
    """Replace what an ONNX file says of itself."""
    onnx = imported("onnx", "export", "export --to onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {KEY: json.dumps(about)})
    onnx.save(model, path)


def run_onnx(path: Path) -> Ran:
    """What runs an ONNX file, on the CPU."""
    onnxruntime = imported("onnxruntime", "export", "export --to onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def _write_torchscript(graph: Graph, images: Tensor, path: Path, about: dict[str, Any], free: bool) -> None:
    if free:
        raise UserError("--size any: a trace is right at the size that it was made for only; give a size, or --to onnx")
    with _quiet():
        traced = torch.jit.trace(graph, images, check_trace=False)
        traced.save(path, _extra_files={KEY: json.dumps(about)})
    _without_sources(path)


def _without_sources(path: Path) -> None:
    """Leave out of an archive of TorchScript the tables of who called what, which hold local paths."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            if not name.endswith(".debug_pkl"):
                archive.writestr(name, content)


def _run_torchscript(path: Path) -> Ran:
    with _quiet():
        return _running(torch.jit.load(path))


def _write_pt2(graph: Graph, images: Tensor, path: Path, about: dict[str, Any], free: bool) -> None:
    with _quiet():
        program = torch.export.export(graph, (images,), dynamic_shapes=_shapes(free))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)
        torch.export.save(program, path, extra_files={KEY: json.dumps(about)})


def _run_pt2(path: Path) -> Ran:
    with _quiet():
        return _running(torch.export.load(path).module())


def _running(module: Any) -> Ran:
    def run(images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(images)]

    return run


def _write_safetensors(graph: Graph, images: Tensor, path: Path, about: dict[str, Any], free: bool) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in graph.network.state_dict().items()}, path, {KEY: json.dumps(about)})


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters remark on their own code is kept back."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


EXPORTERS = {
    "onnx": Exporter(".onnx", _write_onnx, run_onnx),
    "pt2": Exporter(".pt2", _write_pt2, _run_pt2),
    "torchscript": Exporter(".pt", _write_torchscript, _run_torchscript),
    "safetensors": Exporter(".safetensors", _write_safetensors, None),
}
