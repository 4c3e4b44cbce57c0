"""Whether sets of classes hold the true one as often as was asked, on images that are like those they were fitted on.

`python benchmarks/coverage.py pneumoniamnist.npz -o DIR`: the images for training and validation are drawn apart into
1500 for a cross-validation of five folds and 3732 that no network sees. Each fold alone, and their mean, is calibrated
by `Run.calibrate` and asked for the sets of the rest.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import visionattn

FOLDS, KNOWN = 5, 1500
QUIET = {"trainer": {"enable_progress_bar": False}, "train.ema": None, "evaluate.tta": []}


def written(data: Path, out: Path) -> list[tuple[Path, str]]:
    """Files below known/CLASS for the folds, and below new; path and class of the latter."""
    held = np.load(data)
    images, labels = (
        np.concatenate([held[f"{part}_{kind}"] for part in ("train", "val")]) for kind in ("images", "labels")
    )
    new = []
    for n, i in enumerate(np.random.default_rng(0).permutation(len(images))):
        name = "pneumonia" if labels[i, 0] else "normal"
        path = out / ("known" if n < KNOWN else "new") / name / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
        new += [] if n < KNOWN else [(path, name)]
    return new


def told(runs: list[Path], new: list[tuple[Path, str]], miss: float) -> dict[str, Any]:
    """Coverage, mean size and share of empty sets, accuracy and calibration of the mean of runs."""
    model = visionattn.load(*runs)
    fitted = model.calibrate(conformal=miss)
    found = visionattn.load(*runs).predict([path for path, _ in new])
    sets = [one.set or [] for one in found]
    names = [name for _, name in new]
    return {
        "runs": len(runs),
        "fitted on": fitted.images,
        "asked": 1 - miss,
        "coverage": round(np.mean([name in kept for name, kept in zip(names, sets, strict=True)]).item(), 4),
        "mean size": round(np.mean([len(kept) for kept in sets]).item(), 3),
        "empty": round(np.mean([not kept for kept in sets]).item(), 4),
        "accuracy": round(np.mean([one.label == name for one, name in zip(found, names, strict=True)]).item(), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    torch.set_num_threads(1)
    new = written(arguments.data, arguments.out)
    runs = []
    for fold in range(FOLDS):
        change = {
            "data": {"format": "folder", "root": str(arguments.out / "known"), "image_size": 32, "resize": "squash",
                     "batch_size": 64, "fold": fold, "folds": FOLDS},
            "train.epochs": 10,
            "evaluate.calibration": "temperature",
        }  # fmt: skip
        run = visionattn.fit("classification/medmnist", change | QUIET, run=arguments.out / f"fold-{fold}")
        runs.append(run.path)
    for miss in (0.2, 0.1, 0.05, 0.02):
        print(told(runs[:1], new, miss), told(runs, new, miss), sep="\n", flush=True)
