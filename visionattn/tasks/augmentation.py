"""Random changes of images with any number of bands, and of what is labelled in them, that several tasks use."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["BandDropout", "GainAndOffset", "QuarterTurns"]


class QuarterTurns(v2.Transform):
    """One, two or three quarter turns; an even number where height and width differ. Of boxes too."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"turns": int(torch.randint(1, 4, (1,)).item()) if height == width else 2}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return _turned(inpt, params["turns"])
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)


def _turned(boxes: tv_tensors.BoundingBoxes, turns: int) -> tv_tensors.BoundingBoxes:
    left, top, right, bottom = boxes.as_subclass(Tensor).unbind(1)
    height, width = boxes.canvas_size
    for _ in range(turns):  # anticlockwise: what was at the right is at the top
        left, top, right, bottom = top, width - right, bottom, width - left
        height, width = width, height
    turned = torch.stack([left, top, right, bottom], 1)
    return tv_tensors.BoundingBoxes(turned, format="XYXY", canvas_size=(height, width))


class GainAndOffset(v2.Transform):
    """Changes of contrast and brightness for any number of bands: x (1 + a) + b, |a| and |b| up to the strength."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        gain, offset = torch.empty(2).uniform_(-self.strength, self.strength).tolist()
        return {"gain": 1 + gain, "offset": offset}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(inpt * params["gain"] + params["offset"], like=inpt)


class BandDropout(v2.Transform):
    """Each band is set to its mean with this probability; one band always stays."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        bands = flat_inputs[0].shape[-3]
        kept = torch.rand(bands) >= self.probability
        kept[torch.randint(bands, (1,))] = True
        return {"kept": kept}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(inpt * params["kept"][:, None, None], like=inpt)
