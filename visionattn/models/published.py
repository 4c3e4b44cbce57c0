"""Segmenters and detectors under names of timm's registry, so that `timm.create_model` makes published ones.

What makes them is imported when one is asked for.
"""

from typing import Any

from timm.models import register_model
from timm.models._builder import load_pretrained
from torch import nn

__all__ = ["va_detector", "va_segmenter"]


@register_model
def va_segmenter(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any encoder under any decoder, by the arguments of `visionattn.models.segmenters.make_segmenter`."""
    from visionattn.models.segmenters import make_segmenter

    return _loaded(make_segmenter, pretrained, kwargs)


@register_model
def va_detector(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any encoder under any detector, by the arguments of `visionattn.models.detectors.make_detector`."""
    from visionattn.models.detectors import make_detector

    return _loaded(make_detector, pretrained, kwargs)


def _loaded(make: Any, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """The network, with the weights that stand beside its configuration where they are asked for."""
    cfg, cache = kwargs.pop("pretrained_cfg", None), kwargs.pop("cache_dir", None)
    for other in ("pretrained_cfg_overlay", "pretrained_model_args"):
        kwargs.pop(other, None)
    network = make(**kwargs)
    if pretrained:
        whole = {"first_conv": None, "classifier": None}  # nothing is adapted: it is what was published
        load_pretrained(network, dict(cfg or {}) | whole, cache_dir=cache)
    if cfg:
        network.pretrained_cfg = network.default_cfg = dict(cfg)
    return network
