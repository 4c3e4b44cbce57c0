"""Low-rank adapters: a few trained weights beside the linear layers of a network that keeps its own.

Hu et al. 2021, arXiv 2106.09685, by the library peft. In training a layer gives W x + B A x. Wherever weights are kept
for use they are merged, W + B A, under the keys of the network without adapters: predicting, evaluating, exporting and
starting other runs need no peft.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from visionattn.errors import UserError, listed
from visionattn.models.extras import imported
from visionattn.models.networks import backbone_parameters, try_out

__all__ = ["adapt", "merged", "remove", "trained_parameters"]


def adapt(network: nn.Module, rank: int, name: str, image: tuple[int, int, int]) -> None:
    """Freeze the backbone of the network called `name` and put an adapter beside each of its linear layers.

    What is above the backbone stays as it is. A layer that images (C, H, W) do not go through, or whose weights are
    read without calling it, is left out: nothing would train its adapter.

    Args:
        rank: of the adapters, rows of A and columns of B, whose product has a factor of 1.

    Raises:
        UserError: peft is not installed, or there is no layer to adapt.
    """
    peft = imported("peft", "adapt", "model.adapter")
    backbone = {id(p) for p in backbone_parameters(network)}
    layers = {key: m for key, m in network.named_modules() if type(m) is nn.Linear and id(m.weight) in backbone}
    called = _called(network, layers, name, image)
    if not called:
        raise UserError(
            f"model.adapter: model {name} has no linear layer below its head, and adapters stand beside such layers "
            "(HaloNet and other networks of convolutions have none); use model.freeze instead"
        )
    trained = [p for p in network.parameters() if p.requires_grad and id(p) not in backbone]
    exactly = "|".join(re.escape(key) for key in called)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly), network)
    for parameter in trained:  # peft freezes all but the adapters
        parameter.requires_grad_(True)


def _called(network: nn.Module, layers: Mapping[str, nn.Module], name: str, image: tuple[int, int, int]) -> list[str]:
    """The layers that an image goes through."""
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, key=key: called.add(key)) for key, layer in layers.items()]
    try_out(network, name, image)
    for hook in hooks:
        hook.remove()
    return [key for key in layers if key in called]


def trained_parameters(network: nn.Module) -> str:
    """A table of what is trained, part by part, and which layers are left out; empty where everything is trained."""
    rows = {name: list(part.parameters()) for name, part in network.named_children()}
    rows |= {name: [p] for name, p in network.named_parameters(recurse=False)} | {"all": list(network.parameters())}
    if all(p.requires_grad for p in rows["all"]):
        return ""
    lines = [f"{'parameters':<20} {'trained':>12} {'of':>12}"]
    for name, parameters in rows.items():
        trained, count = (sum(p.numel() for p in parameters if p.requires_grad >= least) for least in (True, False))
        lines += [f"{name:<20} {trained:>12,} {count:>12,} {trained / count:>7.1%}"] if count else []
    modules = dict(network.named_modules())
    adapted = [key for key, module in modules.items() if hasattr(module, "lora_A")]
    frozen = [key for key, m in modules.items() if type(m) is nn.Linear and not m.weight.requires_grad]
    left_out = [key for key in frozen if not key.startswith(tuple(f"{layer}." for layer in adapted))]
    if adapted and left_out:
        lines.append(f"frozen without an adapter, as nothing calls them: {listed(left_out, most=3)}")
    return "\n".join(lines)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its adapters merged, under the keys of the network without them."""
    plain = {}
    for key, value in state.items():
        layer, _, name = key.rpartition(".base_layer.")
        down, up = (state.get(f"{layer}.lora_{matrix}.default.weight") for matrix in "AB")
        if down is None or up is None:
            plain[key] = value
        else:
            plain[f"{layer}.{name}"] = value + up @ down if name == "weight" else value
    return {key: value for key, value in plain.items() if ".lora_" not in key}


def remove(network: nn.Module) -> None:
    """Take the adapters off, unmerged; a network without any stays as it is."""
    for key, module in list(network.named_modules()):
        if hasattr(module, "lora_A"):
            network.set_submodule(key, module.base_layer)
