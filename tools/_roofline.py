"""The roofline of a device: no program is faster than its multiplications and its memory allow.

That of the machine at hand is measured when it is needed, so that a share of it means the machine as it is; those of
devices that are not here come from their makers.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["DEVICES", "Device", "Roofline", "measure"]


@dataclass(frozen=True)
class Roofline:
    """Speeds of a device in float32."""

    flops: float  # operations per second of one large matrix product
    bandwidth: float  # bytes per second, read and written, of one large copy

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for this many operations and bytes."""
        return max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Device:
    """Speeds that a maker states, in operations and bytes per second; dense, products summed in float32."""

    half: float  # of products of 16 bits
    single: float  # of products of float32, as torch computes them by default: without TF32
    bandwidth: float
    launch: float = 5e-6  # seconds of the host for one launch from eager PyTorch

    def seconds(self, flops: float, dtype: torch.dtype, moved: float) -> float:
        """The least time of one launch."""
        return max(flops / (self.half if dtype.itemsize == 2 else self.single), moved / self.bandwidth)


DEVICES = {
    # nvidia.com/en-us/data-center/h200: 1979 TFLOPS with sparsity, so 989 without; 67; 4.8 TB/s
    "H200": Device(989e12, 67e12, 4.8e12),
    # nvidia.com/en-us/data-center/a100 (80 GB SXM): 312 TFLOPS, 19.5, 2039 GB/s
    "A100": Device(312e12, 19.5e12, 2.039e12),
    # Ada architecture whitepaper, appendix A: 165.2 TFLOPS with float32 sums, 82.6, 1008 GB/s
    "RTX 4090": Device(165.2e12, 82.6e12, 1.008e12),
    # nvidia.com/en-us/data-center/tesla-t4: 65 TFLOPS (float16; it has no bfloat16), 8.1, 320 GB/s
    "T4": Device(65e12, 8.1e12, 0.32e12),
}


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
