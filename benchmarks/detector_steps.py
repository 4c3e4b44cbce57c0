"""Time and memory of a training step of FCOS, by encoder, over torchvision's resnet50 under the same detector.

    python benchmarks/detector_steps.py [ENCODER ...]

Each encoder runs in a process of its own, one thread, batches of 2 images of 320 x 320 pixels with 10 objects each;
seconds are process CPU time, the median of 5 steps after one; GMAC are of the encoder for one image.
"""

import resource
import statistics
import subprocess
import sys
import time

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionattn.models.detectors import Objects, make_detector

SIZE, BATCH, STEPS = 320, 2, 5


def measure(encoder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(encoder, features_only=True)(torch.empty(1, 3, SIZE, SIZE))
    network = make_detector(encoder, "fcos", 3, 3).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    corners = torch.rand(BATCH, 10, 2) * (SIZE - 80)
    targets = [
        Objects(torch.cat([c, c + 20 + 60 * torch.rand(10, 2)], 1), torch.arange(10) % 3, torch.zeros(10).bool())
        for c in corners
    ]
    images = [torch.randn(3, SIZE, SIZE) for _ in range(BATCH)]
    seconds = []
    for _ in range(STEPS + 1):
        start = time.process_time()
        optimizer.zero_grad()
        sum(network(images, targets).values()).backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    gmac = counter.get_total_flops() / 2e9
    print(encoder, gmac, statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main(encoders: list[str]) -> None:
    rows = {}
    for encoder in ["resnet50", *encoders]:
        command = [sys.executable, __file__, "--one", encoder]
        name, *numbers = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        rows[name] = [float(number) for number in numbers]
    base = rows["resnet50"]
    print(
        f"{'encoder':<20} {'GMAC':>6} {'s':>6} {'GiB':>6} {'s over resnet50':>16} {'per GMAC':>9} {'memory over':>12}"
    )
    for name, (gmac, seconds, memory) in rows.items():
        ratio = seconds / base[1]
        print(
            f"{name:<20} {gmac:6.1f} {seconds:6.2f} {memory:6.2f} {ratio:16.2f} {ratio * base[0] / gmac:9.2f} "
            f"{memory / base[2]:12.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
    else:
        main(sys.argv[1:] or ["biformer_tiny", "nat_mini"])
