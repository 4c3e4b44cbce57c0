"""Weights in files: read without executing anything, and taken over by a network."""

import logging
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import UserError, listed

__all__ = ["classifier_names", "load_checkpoint", "start_from"]

log = logging.getLogger(__name__)
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "module",
)  # what checkpoints keep their weights under
PREFIXES = ("network.", "module.", "_orig_mod.", "model.", "backbone.")  # of ours, DDP, compiled, Lightning, others


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain data only: no file can execute code here.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # plain data that timm's train.py keeps beside
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors each raise their own
        raise UserError(f"{path}: not a checkpoint of tensors and plain data ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """Why a file was refused, without torch's advice to switch the protection off."""
    if refused := re.search(r"Unsupported (?:global|class|operand).*?(?:GLOBAL |class )?([\w.]+\.[\w.]+)", str(error)):
        return f"it holds an object of {refused[1]}"
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub("\x1b\\[[0-9;]*m", "", lines[0])


def classifier_names(network: nn.Module) -> list[str]:
    """Names of the parameters of the classifier, or of all classifiers where there are several."""
    of_timm: Any = network  # which does not declare what it adds
    names = of_timm.pretrained_cfg["classifier"]
    names = [names] if isinstance(names, str) else list(names or ())
    return [key for key in network.state_dict() if any(key.startswith(f"{name}.") for name in names)]


def start_from(network: nn.Module, path: Path, name: str) -> None:
    """Load a checkpoint into the network called `name`; the head may differ in its class count, nothing else may.

    Raises:
        UserError: not a checkpoint, or one of another network.
    """
    state = _weights(load_checkpoint(path), network.state_dict())
    own, classifier = network.state_dict(), classifier_names(network)
    differ = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    if differ and differ <= set(classifier):
        old, new = (len(weights[sorted(differ)[0]]) for weights in (state, own))
        log.info("%s: head of %d classes left out, the new one has %d", path, old, new)
        state = {key: value for key, value in state.items() if key not in classifier}
        differ = set()
    missing, unknown = own.keys() - state.keys() - set(classifier), state.keys() - own.keys()
    if differ or missing or unknown:
        raise UserError(f"{path}: not a checkpoint of {name}: {_differences(own, state, missing, unknown, differ)}")
    network.load_state_dict(state, strict=False)


def _weights(content: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the wrappers and prefixes of whoever saved it."""
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping) and wrapper not in own:
            content = content[wrapper]
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        bare = {key.removeprefix(prefix): value for key, value in state.items()}
        if all(key.startswith(prefix) for key in state) and len(bare.keys() & own.keys()) > len(
            state.keys() & own.keys()
        ):
            state = bare
    return state


def _differences(own: Mapping, state: Mapping, missing: set, unknown: set, differ: set) -> str:
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in sorted(differ)]
    titles = {"missing": sorted(missing), "unknown": sorted(unknown), "other shape": shapes}
    return "; ".join(f"{title}: {listed(names, most=3)}" for title, names in titles.items() if names)
