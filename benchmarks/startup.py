"""What a start costs before the first step: `visionattn fit` on 1,000, 10,000 and 50,000 images.

`python benchmarks/startup.py FOLDER`: makes PNG files of 32 x 32 of ten classes there, and measures in a process each,
with nothing kept from before, the seconds until a fit has its resolved recipe, samples and network: the first time, the
second, and once more after an image has changed. What the imports take is left out.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = 1_000, 10_000, 50_000
START = """
import sys, time
from visionattn import recipe
from visionattn.runs.fit import prepare
spec = recipe.load("classification/aerial_scenes", [f"data.root={sys.argv[1]}", "data.image_size=32"])
began, spent = time.perf_counter(), time.process_time()
prepare(spec)
print(f"{time.process_time() - spent:.2f} CPU s, {time.perf_counter() - began:.2f} s")
"""


def make(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / f"{i % 10}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for count in COUNTS:
        root = folder / str(count)
        make(root, count)
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / f"cache-{count}")}
        for when in ("first", "second", "an image changed"):
            if when == "an image changed":
                Image.new("RGB", (32, 32), "red").save(root / "0" / "00000.png")
            command = [sys.executable, "-c", START, str(root)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(f"{count} images, {when}: {done.stdout.strip()}", flush=True)
