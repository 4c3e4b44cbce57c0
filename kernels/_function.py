"""Functions with a backward of their own, which cost nothing more where nobody asks for gradients."""

from typing import Any

import torch
from torch import Tensor

from visionattn.kernels._check import transforms

__all__ = ["Function"]


class Function(torch.autograd.Function):
    """`run` in place of `apply`, which takes 50 to 100 us a call, as long as attention on a map of 8 x 8."""

    @classmethod
    def run(cls, *arguments: Any) -> Any:
        """`forward` alone where no argument has a gradient, else `apply`."""
        if (
            torch.compiler.is_compiling()
            or transforms()
            or torch.autograd.forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments))
        ):
            return cls.apply(*arguments)
        return cls.forward(*arguments)
