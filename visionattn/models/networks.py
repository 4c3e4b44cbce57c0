"""The network of a recipe's `model` section: made by timm, its weights started from, parts of it frozen."""

from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from torch import nn

import visionattn.backbones  # noqa: F401  registers the models
from visionattn.errors import UserError, nearest
from visionattn.models.handover import about, adapt_bands, start_from
from visionattn.recipe.sections import Model

__all__ = [
    "arguments_of",
    "backbone_parameters",
    "create",
    "freeze",
    "make_network",
    "refuse_unknown",
    "refuse_unknown_model",
    "started",
    "statistics_of",
    "try_out",
]


def refuse_unknown(key: str, name: str, known: Collection[str], where: str) -> None:
    """Raises UserError unless the name is known; `where` says how to list those that are."""
    if name not in known:
        kind = key.rpartition(".")[2].replace("name", key.partition(".")[0])
        raise UserError(f"{key} is {name!r}: unknown {kind}{nearest(name, known, most=3, cutoff=0.5)} ({where})")


def refuse_unknown_model(key: str, name: str) -> None:
    """Raises UserError unless timm knows a model of this name."""
    if "." in name or not timm.is_model(name):  # its list takes long
        refuse_unknown(key, name, timm.list_models(), "visionattn list, timm.list_models()")


def create(name: str, arguments: dict[str, Any], **ours: Any) -> Any:
    """`timm.create_model` with a user's arguments, beside which `ours` are not told in messages.

    Raises:
        UserError: unknown model or argument, no published weights.
    """
    refuse_unknown_model("model.name", name)
    try:
        return timm.create_model(name, **ours, **arguments)
    except Exception as error:  # each model raises its own for arguments that it cannot take
        reason = str(error) or type(error).__name__
        raise UserError(f"model {name} cannot be made with {arguments or 'its defaults'}: {reason}") from None


def arguments_of(spec: Model, image_size: tuple[int, int]) -> dict[str, Any]:
    """What a recipe says about a model, as keyword arguments of its constructor."""
    arguments = {name: value for name in ("drop_rate", "drop_path_rate") if (value := getattr(spec, name))}
    arguments |= spec.args
    known = timm.get_pretrained_cfg(spec.name) if timm.is_model(spec.name) else None
    if known is not None and known.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    return arguments


def make_network(spec: Model, num_classes: int, channels: int, image_size: tuple[int, int]) -> nn.Module:
    """A classifier: images (B, channels, H, W) -> logits (B, num_classes).

    Raises:
        UserError: unknown argument, no published weights, or a checkpoint that does not fit.
    """
    arguments = arguments_of(spec, image_size)
    network = create(spec.name, arguments, pretrained=spec.pretrained, num_classes=num_classes, in_chans=channels)
    return started(network, spec, arguments)


def started(network: Any, spec: Model, arguments: dict[str, Any]) -> Any:
    """The network with the weights of `model.checkpoint`, or with published ones over other bands, where it is to have
    them; its attribute `start` then says what it has taken."""
    if spec.checkpoint is not None:
        network.start = start_from(network, spec.checkpoint, spec.name, arguments, spec.bands)
    elif spec.bands is not None and not spec.pretrained:
        raise UserError(
            "model.bands says how the bands of trained weights are adapted, but there is neither model.checkpoint nor "
            "model.pretrained: true"
        )
    elif spec.bands is not None:
        network.start = adapt_bands(network, create(spec.name, arguments, pretrained=True), spec.name, spec.bands)
    return network


def statistics_of(spec: Model, channels: int, unit_range: bool) -> dict[str, list[float]]:
    """Mean and std that the weights were trained with which the network starts from, where they can be known and fit.

    Args:
        unit_range: of the images, see `visionattn.data.formats.Kind`.
    """
    if spec.checkpoint is not None and (source := about(spec.checkpoint)):
        fits = len(source.mean) == channels and source.unit_range in (None, unit_range) and spec.bands is None
        return {"mean": source.mean, "std": source.std} if fits else {}
    published = spec.pretrained and unit_range and spec.bands is None
    known = timm.get_pretrained_cfg(spec.name) if published else None
    if known is None or len(known.mean) != channels:
        return {}
    return {"mean": list(known.mean), "std": list(known.std)}


def try_out(
    network: nn.Module, name: str, image: tuple[int, int, int], batch: int = 1, training: bool = False
) -> torch.Tensor:
    """The result for a batch of blank images (C, H, W), in evaluation or training mode.

    A training batch changes the statistics of batch norms.

    Raises:
        UserError: the network fails on such images.
    """
    try:
        with torch.no_grad():
            result = network.train(training)(torch.zeros(batch, *image))
    except Exception as error:  # each model raises its own
        reason = str(error) or type(error).__name__
        shape = " x ".join(map(str, image))
        if "more than 1 value per channel" in reason:
            reason = (
                "a norm would be taken over a single value; enlarge data.image_size"
                f"{' or data.batch_size' if batch == 1 else ''}, or take another model or decoder ({reason})"
            )
        images = f"a training batch of {batch} images" if training else "images"
        raise UserError(
            f"model {name} cannot take {images} of {shape} (data.channels, data.image_size): {reason}"
        ) from None
    network.train()
    return result


def freeze(network: nn.Module, what: str | list[str] | None) -> None:
    """Keep parameters from being trained: all but the head ("backbone"), or those whose names match a pattern.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    if what is None:
        return
    if what == "backbone":
        frozen = backbone_parameters(network)
    else:
        names = dict(network.named_parameters())
        useless = [pattern for pattern in what if not any(fnmatch(name, pattern) for name in names)]
        if useless:
            some = ", ".join(list(names)[:: max(1, len(names) // 5)][:5])
            raise UserError(f"model.freeze: no parameter matches {', '.join(useless)}; names look like {some}")
        frozen = [p for name, p in names.items() if any(fnmatch(name, pattern) for pattern in what)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError("model.freeze leaves nothing to train")


def backbone_parameters(network: Any) -> list[nn.Parameter]:
    """Of an encoder under a decoder the encoder's, else all but the classifiers'."""
    if hasattr(network, "encoder"):
        return list(network.encoder.parameters())
    head = network.get_classifier()
    heads = head if isinstance(head, tuple | list | nn.ModuleList) else [head]
    of_heads = {id(p) for module in heads for p in module.parameters()}
    return [p for p in network.parameters() if id(p) not in of_heads]
