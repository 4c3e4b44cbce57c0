"""Weights in files, read without executing anything, and resampled where networks see another size of images."""

import logging
import math
import re
import sys
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import Tensor, nn

from visionattn.errors import UserError

__all__ = ["classifier_names", "load_checkpoint", "resampled", "unwrapped"]

log = logging.getLogger(__name__)
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "module",
)  # what checkpoints keep their weights under


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain data only: no file can execute code here.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if zipfile.is_zipfile(path):
            _refuse_damaged(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # plain data that timm's train.py keeps beside
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zip, pickle and safetensors each raise their own
        raise UserError(f"{path}: not a checkpoint of tensors and plain data ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _refuse_damaged(path: Path) -> None:
    """Raises UserError where a check sum is wrong, which torch does not look at."""
    with zipfile.ZipFile(path) as archive:
        if (wrong := archive.testzip()) is not None:
            raise UserError(f"{path}: damaged, the check sum of {wrong} in it is wrong: take another copy")


def _reason(error: Exception) -> str:
    """Why a file was refused, without torch's advice to switch the protection off."""
    if refused := re.search(r"Unsupported (?:global|class|operand).*?(?:GLOBAL |class )?([\w.]+\.[\w.]+)", str(error)):
        return f"it holds an object of {refused[1]}"
    if isinstance(error, PermissionError | SafetensorError):
        return str(error)
    return "it is no file of torch.save, or a damaged one"


def classifier_names(network: nn.Module) -> list[str]:
    """Names of the parameters of the classifier, or of all classifiers where there are several."""
    of_timm: Any = network  # which does not declare what it adds
    names = of_timm.pretrained_cfg["classifier"]
    names = [names] if isinstance(names, str) else list(names or ())
    return [key for key in network.state_dict() if any(key.startswith(f"{name}.") for name in names)]


def unwrapped(content: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the wrappers of whoever saved it; `own` is the network's."""
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping) and wrapper not in own:
            content = content[wrapper]
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def resampled(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights as the models inside the network take over weights of another image size, where they do."""
    models: list[str] = []  # the outermost ones, each with the filter of timm that stands beside its class
    for prefix, module in network.named_modules():
        fitted = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        if fitted is None or any(f"{prefix}.".startswith(outer) for outer in models):
            continue
        models.append(f"{prefix}." if prefix else "")
        of_model = {key.removeprefix(models[-1]): v for key, v in state.items() if key.startswith(models[-1])}
        others = {key: value for key, value in state.items() if not key.startswith(models[-1])}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about how timm interpolates
                state = others | {models[-1] + key: value for key, value in fitted(of_model, module).items()}
        except Exception as error:  # each filter raises its own for weights of another network
            log.debug("%s: %s", prefix, error)
    own = network.state_dict()
    of_positions = [key for key in own.keys() & state.keys() if "pos_embed" in key]  # which not every filter resamples
    return state | {key: _resized(state[key], own[key].shape) for key in of_positions}


def _resized(table: Tensor, shape: Sequence[int]) -> Tensor:
    """A table of positions (1, C, H, W), (1, H, W, C), or (1, tokens, C) of square maps, for another height and width.

    Any other table is returned as it is.
    """
    if table.ndim != len(shape):
        return table
    differ = [axis for axis, (old, new) in enumerate(zip(table.shape, shape, strict=True)) if old != new]
    if table.ndim == 4 and differ == [2, 3]:
        return resample_abs_pos_embed_nhwc(table.permute(0, 2, 3, 1), list(shape[2:])).permute(0, 3, 1, 2)
    if table.ndim == 4 and differ == [1, 2]:
        return resample_abs_pos_embed_nhwc(table, list(shape[1:3]))
    if table.ndim == 3 and differ == [1]:
        for prefix in range(3):  # class tokens
            old, new = (math.isqrt(tokens - prefix) for tokens in (table.shape[1], shape[1]))
            if (old**2 + prefix, new**2 + prefix) == (table.shape[1], shape[1]):
                return resample_abs_pos_embed(table, [new, new], [old, old], prefix)
    return table
