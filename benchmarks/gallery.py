"""What trained networks look at on real images, by the methods of `visionattn explain`, and which can be trusted.

`python benchmarks/gallery.py pneumonia|isic --data DATA -o DIR`: trains a narrow BiFormer (minutes of one core),
explains twelve test images with `--check`, and prints how often each method passes and by how much it is better than
edges and chance; DIR/explained/index.html is there to look at. DATA: pneumoniamnist.npz, or the folder of ISIC 2018.
"""

import argparse
import csv
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import visionattn
from visionattn.cli import main

METHODS = ["layercam", "gradcam", "ig", "gradient", "occlusion", "rollout", "relevance"]
MODEL = {"name": "biformer_tiny", "args": {"depth": [1, 1, 2, 1], "embed_dim": [32, 64, 128, 256], "n_win": 4}}
QUIET = {"trainer": {"enable_progress_bar": False}, "train.ema": None}
EACH = 6  # images of either class of pneumonia; of ISIC twice as many


def pneumonia(data: Path, out: Path) -> tuple[visionattn.Run, list[Path]]:
    change = {"model": MODEL, "data.root": str(data), "data.image_size": 64, "data.batch_size": 32}
    change |= {"optim.clip_grad": 1.0, "train.epochs": 5, "evaluate.tta": []}
    run = visionattn.fit("classification/medmnist", change | QUIET, run=out / "run")
    held = np.load(data)
    images = []
    for label in (0, 1):
        for i in np.flatnonzero(held["test_labels"][:, 0] == label)[:EACH]:
            images.append(out / f"{label}-{i:03d}.png")
            Image.fromarray(held["test_images"][i]).save(images[-1])
    return run, images


def isic(data: Path, out: Path) -> tuple[visionattn.Run, list[Path]]:
    model = MODEL | {"decoder": "fpn", "decoder_args": {"pyramid_channels": 64, "segmentation_channels": 64}}
    recipe = {
        "task": "segmentation",
        "model": model,
        "data": {
            "format": "image_mask", "root": str(data), "image_size": 96, "batch_size": 16, "labelled": 400,
            "classes": ["background", "lesion"], "values": [0, 255], "augment": {"vflip": 0.5, "rot90": 0.5},
        },
        "optim": {"lr": 1e-3, "warmup_epochs": 1},
        "train": {"epochs": 12},
        "evaluate": {"surface": False},
    }  # fmt: skip
    run = visionattn.fit(recipe, QUIET, run=out / "run")
    return run, sorted((data / "images" / "test").glob("*.jpg"))[: 2 * EACH]


STUDIES = {"pneumonia": pneumonia, "isic": isic}


def table(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A row for each method: verdicts counted, medians of what the checks measure."""
    found = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        verdicts = Counter(row["verdict"] for row in own)
        row: dict[str, Any] = {"method": method, "images": len(own), "passes": verdicts.pop("passes", 0)}
        row["otherwise"] = ", ".join(f"{words} ({count})" for words, count in verdicts.most_common())
        for base in ("edges", "random"):
            better = [float(x[f"deletion_than_{base}"]) + float(x[f"insertion_than_{base}"]) for x in own]
            row[f"better than {base}"] = round(statistics.median(better), 3)
        for name in ("stability", "shuffled_head", "shuffled_all"):
            row[name] = round(statistics.median(float(x[name]) for x in own), 2)
        found.append(row)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    torch.set_num_threads(1)
    run, images = STUDIES[arguments.study](arguments.data, arguments.out)
    explained = arguments.out / "explained"
    asked = ["--method", ",".join(METHODS), "--check", "-o", str(explained)]
    assert main(["explain", str(run.path), *map(str, images), *asked]) == 0
    with (explained / "explanations.csv").open() as file:
        rows = table(list(csv.DictReader(file)))
    with (arguments.out / f"gallery-{arguments.study}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(run.metrics["test"], *rows, sep="\n")
