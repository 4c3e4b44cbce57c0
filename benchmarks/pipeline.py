"""Images a second of one core, from JPEG files to training and evaluation batches, beside timm's transforms.

`python benchmarks/pipeline.py FOLDER` takes the first 100 .jpg files below a folder; CPU time of the process, one
thread, ours and timm's in turn, medians of the rounds. Ours are bytes in training, whose batch is normalised as it is
on the device. timm's is its own transform of an opened image, once to uint8 with the batch normalised as its
prefetching loader does it, once to float32 as without.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from visionattn.data.images import ImageFile
from visionattn.tasks.classification.recipe import DATA
from visionattn.tasks.classification.transforms import Images, Normalize, eval_transform, train_transform

ROUNDS = 9
BATCH = 25


def ours(files: list[Path], training: bool) -> Callable[[], Any]:
    data = DATA["folder"](format="folder", root=Path(), channels=3, mean=list(MEAN), std=list(STD))
    samples = [ImageFile(str(file), str(file), str(file), 3, path=file, label=0) for file in files]
    images = Images(samples, train_transform(data), seed=0) if training else Images(samples, eval_transform(data))
    normalize = Normalize(MEAN, STD)

    def run() -> None:
        for first in range(0, len(files), BATCH):
            batch = torch.utils.data.default_collate([images[i] for i in range(first, min(first + BATCH, len(files)))])
            if training:
                normalize(batch["image"])

    return run


def timms(files: list[Path], training: bool, prefetching: bool) -> Callable[[], Any]:
    more = {"color_jitter": None, "hflip": 0.5, "scale": (0.5, 1.0), "auto_augment": None} if training else {}
    transform: Any = create_transform(
        224, is_training=training, interpolation="bicubic", crop_pct=0.875, use_prefetcher=prefetching, **more
    )
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def run() -> None:
        for first in range(0, len(files), BATCH):
            seen = [
                torch.as_tensor(transform(Image.open(file).convert("RGB"))) for file in files[first : first + BATCH]
            ]
            batch = torch.stack(seen)
            if prefetching:
                batch.float().sub_(mean).div_(std)

    return run


MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args().folder.rglob("*.jpg"))[:100]
    torch.set_num_threads(1)
    for training in (True, False):
        runs = {
            "ours": ours(files, training),
            "timm, uint8": timms(files, training, True),
            "timm, float32": timms(files, training, False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS + 1):
            for name, run in runs.items():
                began = time.process_time()
                run()
                seconds[name].append(time.process_time() - began)
        for name, values in seconds.items():
            rate = len(files) / statistics.median(values[1:])
            ratios = [o / v for o, v in zip(values[1:], seconds["ours"][1:], strict=True)]
            print(
                f"{'train' if training else 'eval'} {name}: {rate:.0f} images/s, ours {statistics.median(ratios):.2f}"
            )
