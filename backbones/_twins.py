"""Published checkpoints: those that families which timm has too take from it, and what is in one."""

import re
from dataclasses import replace
from typing import Any

from timm.models import get_arch_pretrained_cfgs
from timm.models._pretrained import PretrainedCfg
from torch import Tensor

from visionattn.backbones.backbone import Backbone

__all__ = ["check_checkpoint", "twin_cfgs", "unwrap"]


def twin_cfgs(architecture: str, **changes: Any) -> dict[str, PretrainedCfg]:
    """timm's configurations of all weights of an architecture, by our names: timm's, with `va_` before it.

    Addresses and licences stay; changes: values of `PretrainedCfg` to set.
    """
    cfgs = get_arch_pretrained_cfgs(architecture)
    return {f"va_{name}": replace(cfg, architecture=None, tag=None, **changes) for name, cfg in cfgs.items()}


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training script's checkpoint; a bare one is returned as it is."""
    for wrapper in ("state_dict_ema", "state_dict", "model"):
        checkpoint = checkpoint.get(wrapper, checkpoint)
    return checkpoint


def check_checkpoint(state_dict: dict[str, Tensor], model: Backbone, block: str = r".*?blocks\.\d+\.") -> None:
    """Raises ValueError for a state dict of a network of other widths or depths.

    What timm adapts on loading may differ: channels of the first convolution, and classes. block: pattern of the names
    of blocks.
    """
    remedy = "create the model that it belongs to, or pass that model's arguments"
    expected, cfg = model.state_dict(), model.pretrained_cfg
    theirs, ours = ({match[0] for key in keys if (match := re.match(block, key))} for keys in (state_dict, expected))
    if theirs != ours:
        raise ValueError(f"the checkpoint has {len(theirs)} blocks, and the model {len(ours)}: {remedy}")
    heads = cfg["classifier"]
    adapted = tuple(f"{name}." for name in (cfg["first_conv"], *([heads] if isinstance(heads, str) else heads)))
    for key, value in expected.items():
        if not key.startswith(adapted) and key in state_dict and state_dict[key].shape != value.shape:
            raise ValueError(
                f"{key} of the checkpoint is of {tuple(state_dict[key].shape)}, expected {tuple(value.shape)}: {remedy}"
            )
