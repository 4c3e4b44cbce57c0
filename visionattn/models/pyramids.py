"""Encoders that give maps at several strides: pyramids of ours or of timm's, and transformers of one stride.

A pyramid has maps at strides 4, 8, 16 and 32. Of a transformer of one stride `SimplePyramid` makes such maps.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from visionattn.backbones.encoder_decoder import EncoderDecoder
from visionattn.errors import UserError
from visionattn.models.networks import create

__all__ = ["STRIDES", "Pyramid", "SimplePyramid", "make_pyramid"]

STRIDES = (4, 8, 16, 32)


class SimplePyramid(nn.Module):
    """The last of some maps, (B, C, h, w) -> maps at several strides: the simple feature pyramid of ViTDet.

    Li et al. 2022, arXiv 2203.16527. Transposed convolutions upwards, each of which halves the channels, and max
    pooling downwards; its projections to 256 channels are left to the decoder.

    Args:
        dim: C.
        patch: stride of the map; one that is no power of two counts as the nearest.
        strides: of the results, powers of two.
    """

    def __init__(self, dim: int, patch: int, strides: Sequence[int] = STRIDES) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.levels = nn.ModuleList()
        self.channels = []
        for stride in strides:
            doublings = round(math.log2(patch / stride))
            layers, channels = [], dim
            for i in range(doublings):
                layers += [LayerNorm2d(channels), nn.GELU()] if i else []
                layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
                channels //= 2
            layers += [nn.MaxPool2d(2) for _ in range(-doublings)]
            self.levels.append(nn.Sequential(*layers))
            self.channels.append(channels)
        self.multiple = patch * 2 ** max(0, -doublings)  # of an image's sides, that every level may halve

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x = self.norm(maps[-1])
        return [level(x) for level in self.levels]


class Pyramid(NamedTuple):
    """An encoder with the neck that its maps go through, if any.

    Attributes:
        encoder: of timm, with `features_only`.
        neck: maps -> maps.
        channels: of the maps, fine to coarse.
        multiple: what an image's sides have to be multiples of.
    """

    encoder: Any
    neck: SimplePyramid | None
    channels: list[int]
    multiple: int


def make_pyramid(
    name: str,
    wanted: Sequence[int],
    in_chans: int = 3,
    pretrained: bool = False,
    args: dict[str, Any] | None = None,
    any_size: bool = False,
) -> Pyramid:
    """The encoder called `name` with maps at the wanted strides, of which 2 is left out where there is none.

    Args:
        any_size: `multiple` is 1 where the encoder's maps of any image have ceil(size / stride) rows and columns.

    Raises:
        UserError: an unknown encoder, an argument it does not take, or an encoder without such maps.
    """
    args = args or {}
    encoder = _make_encoder(name, wanted, in_chans, pretrained, args)
    strides, channels, neck = encoder.feature_info.reduction(), encoder.feature_info.channels(), None
    if len(strides) == 1 < len(wanted):
        neck = SimplePyramid(channels[0], strides[0], [stride for stride in wanted if stride > 2])
        channels = neck.channels
    multiple = neck.multiple if neck else strides[-1]
    if any_size and not neck and _refusal(encoder, in_chans, (75, 107)) is None:
        multiple = 1
    elif reason := _refusal(encoder, in_chans, _trial_size(args.get("img_size"), math.lcm(multiple, 16))):
        raise UserError(
            f"model {name} does not take images of any size ({reason}); give it the size of your images, such "
            "as img_size: [256, 256] among its arguments (model.args in a recipe), or take another encoder"
        )
    return Pyramid(encoder, neck, channels, multiple)


def _make_encoder(name: str, wanted: Sequence[int], in_chans: int, pretrained: bool, args: dict[str, Any]) -> Any:
    """An encoder whose `feature_info` has the wanted strides (2 only where there is one), or one stride."""
    with torch.device("meta"):
        probe = create(name, args)
    if isinstance(probe, EncoderDecoder):
        raise UserError(f"model {name} is a whole segmenter: leave the decoder out, or name an encoder alone")
    if not hasattr(probe, "forward_intermediates"):
        raise UserError(f"model {name} gives no maps (it has no forward_intermediates): take another encoder")
    strides = [info["reduction"] for info in probe.feature_info]
    last = {stride: i for i, stride in enumerate(strides)}
    if set(wanted) - {2} <= set(strides):
        indices = [last[stride] for stride in wanted if stride in last]
    elif len(strides) > 1 and strides[-1] == strides[-2] <= max(wanted):
        indices = [len(strides) - 1]
    else:
        raise UserError(f"model {name} has maps at strides {strides}: expected {list(STRIDES)}, or one stride to 32")
    ours = {"features_only": True, "feature_cls": "getter", "out_indices": indices}
    known = inspect.signature(type(probe).__init__).parameters
    if "dynamic_img_size" in known and not args.keys() & {"img_size", "dynamic_img_size"}:
        ours["dynamic_img_size"] = True
    return create(name, args, in_chans=in_chans, pretrained=pretrained, **ours)


def _trial_size(img_size: int | Sequence[int] | None, multiple: int) -> tuple[int, int]:
    if img_size is None:
        return 2 * multiple, 3 * multiple
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width


def _refusal(encoder: Any, in_chans: int, size: tuple[int, int]) -> str | None:
    """Why the encoder does not give maps of ceil(size / stride) for images of this size; None if it does."""
    training = encoder.training
    device = next(encoder.parameters()).device
    try:
        with torch.no_grad():
            maps = encoder.eval()(torch.zeros(1, in_chans, *size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{size[0]} x {size[1]}: {error}"
    finally:
        encoder.train(training)
    expected = [[math.ceil(side / stride) for side in size] for stride in encoder.feature_info.reduction()]
    actual = [list(x.shape[2:]) for x in maps]
    return None if actual == expected else f"{size[0]} x {size[1]}: maps of {actual}, expected {expected}"
