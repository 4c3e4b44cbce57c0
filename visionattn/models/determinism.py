"""`train.deterministic` on CUDA: which operators PyTorch has no deterministic form of, and whether a network uses one.

They are those that `torch.use_deterministic_algorithms` lists as raising an error there. `F.interpolate` (bilinear)
is not among them: on CUDA it takes another way while the mode is on.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from visionattn.errors import UserError, listed

__all__ = ["Used", "refuse_nondeterministic"]

OPERATORS = {  # by name in ATen, what people know them as
    "_adaptive_avg_pool2d_backward": "adaptive average pooling",
    "_adaptive_avg_pool3d_backward": "adaptive average pooling",
    "adaptive_max_pool2d_backward": "adaptive max pooling",
    "avg_pool3d_backward": "average pooling in 3-D",
    "fractional_max_pool2d_backward": "fractional max pooling",
    "max_unpool2d": "max unpooling",
    "upsample_linear1d_backward": "linear resizing",
    "upsample_bicubic2d_backward": "bicubic resizing",
    "_upsample_bicubic2d_aa_backward": "bicubic resizing",
    "_upsample_bilinear2d_aa_backward": "bilinear resizing with antialiasing",
    "reflection_pad1d_backward": "reflection padding",
    "reflection_pad2d_backward": "reflection padding",
    "grid_sampler_2d_backward": "grid sampling",
    "grid_sampler_3d_backward": "grid sampling",
    "nll_loss2d_forward": "the loss of maps",
    "histc": "histograms",
    "median.dim": "medians",
    "kthvalue": "k-th values",
}


class Used(TorchDispatchMode):
    """Inside, `found` gets what is used that has no deterministic form on CUDA, on whichever device this runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        if name in OPERATORS:
            self.found.add(OPERATORS[name])
        weights = (kwargs or {}).get("weights", args[1] if len(args) > 1 else None)
        if name == "bincount" and weights is not None:
            self.found.add("weighted counts")
        return function(*args, **kwargs or {})


def refuse_nondeterministic(network: nn.Module, name: str, image: tuple[int, int, int], batch: int) -> None:
    """Raises UserError where training the network on images (C, H, W) uses one of `OPERATORS`.

    Its gradients and the statistics of its batch norms are changed.
    """
    with Used() as operators:
        result = network.train()(torch.rand(batch, *image))
        torch.stack([part.float().mean() for part in _tensors(result)]).sum().backward()
    if operators.found:
        raise UserError(
            f"train.deterministic: the gradient of {listed(sorted(operators.found))} in model {name} on images of "
            f"{' x '.join(map(str, image))} has no deterministic form on a GPU; give the model the size of the images, "
            "such as img_size among model.args, take another one, or leave train.deterministic out"
        )


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
