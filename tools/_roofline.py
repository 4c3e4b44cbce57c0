"""The roofline of a device: no program is faster than its multiplications and its memory allow.

Both speeds are measured here, when they are needed, so that a share of the roofline means the machine as it is.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Roofline", "measure"]


@dataclass(frozen=True)
class Roofline:
    """Speeds of a device in float32."""

    flops: float  # operations per second of one large matrix product
    bandwidth: float  # bytes per second, read and written, of one large copy

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for this many operations and bytes."""
        return max(flops / self.flops, moved / self.bandwidth)


@functools.cache
def measure(device: str) -> Roofline:
    """The best of a few trials each: a product of 2048 x 2048 matrices, a copy of 256 MiB."""
    x, y = torch.randn(2, 2048, 2048, device=device)
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: x @ y, device)
    copy = _best(lambda: target.copy_(source), device)
    return Roofline(flops=2 * 2048**3 / product, bandwidth=2 * source.nbytes / copy)


def _best(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
