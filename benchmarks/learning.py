"""Whether each family learns: its smallest form, narrowed and shortened, from scratch on small real data sets.

`python benchmarks/learning.py pneumonia --data pneumoniamnist.npz [-o DIR] [NAME ...]`: AUROC on validation images
after each epoch, and on test. `... landcover --data DIR [--seconds 300]`: under FPN, all networks for the same time of
one core. Prints a line a network, and writes a table beside the runs.
"""

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

import visionattn

PYRAMID = {"depths": [1, 1, 2, 1]}
NETWORKS = {
    "agent_deit_tiny": {"depth": 4, "embed_dim": 96},
    "agent_pvt_tiny": PYRAMID | {"embed_dims": [32, 64, 80, 128]},
    "agent_swin_tiny": {"depths": [1, 1, 2, 2], "embed_dim": 48},
    "agent_cswin_tiny": {"depth": [1, 1, 2, 1], "embed_dim": 32},
    "moh_transnext_small_75": PYRAMID
    | {
        "embed_dims": [24, 48, 96, 192],
        "num_heads": [2, 4, 4, 8],
        "shared_heads": [2, 4, 1, 2],
        "active_heads": [0, 0, 2, 4],
    },
    "transnext_micro": PYRAMID | {"embed_dims": [24, 48, 96, 192], "num_heads": [1, 2, 4, 8]},
    "patchconvnet_s60": {"depth": 6, "embed_dim": 96},
    "rmt_tiny": PYRAMID | {"embed_dims": [32, 64, 96, 128], "num_heads": [2, 4, 6, 8], "projection": 128},
    "flowformer": PYRAMID | {"embed_dims": [24, 48, 96, 192]},
    "lgvit_96": {"embed_dim": 48, "num_heads": [3, 3, 6, 12]},
    "crossformer_tiny": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
}
QUIET = {"trainer.enable_progress_bar": False}


def pneumonia(name: str, data: Path, run: Path, seconds: float) -> dict[str, Any]:
    """AUROC of five epochs, and on test, of images of 64 px."""
    change = {
        "model": {"name": name, "args": NETWORKS[name]},
        "data.root": str(data),
        "data.image_size": 64,
        "data.batch_size": 32,
        "optim.clip_grad": 1.0,
        "train.epochs": 5,
        "train.ema": None,
        "evaluate.tta": [],
    }
    done = visionattn.fit("classification/medmnist", change | QUIET, run=run)
    curve = [row["val/auroc"] for row in done.history if row.get("val/auroc") is not None]
    return {f"epoch {i + 1}": round(value, 4) for i, value in enumerate(curve)} | {
        "test": round(done.metrics["test"]["auroc"], 4)
    }


def landcover(name: str, data: Path, run: Path, seconds: float) -> dict[str, Any]:
    """Mean IoU under FPN after as many epochs as take `seconds` of the process, on validation and test images."""
    change = {
        "model": {"name": name, "decoder": "fpn", "args": NETWORKS[name]},
        "data.root": str(data),
        "data.image_size": 128,
        "train.ema": None,
        "trainer.check_val_every_n_epoch": 3,
    } | QUIET
    few = 3
    taken, _ = _fitted(change | {"train.epochs": few}, run.with_name(f"{run.name}-{few}"))
    epochs = max(few, round(few * seconds / taken))
    taken, done = _fitted(change | {"train.epochs": epochs}, run)
    scores = {split: round(done.metrics[split]["miou"], 4) for split in ("val", "test")}
    return {"epochs": epochs, "seconds": round(taken)} | scores


def _fitted(change: dict[str, Any], run: Path) -> tuple[float, visionattn.Run]:
    """Seconds of the process, and the run."""
    began = time.process_time()
    done = visionattn.fit("segmentation/aerial_landcover", change, run=run)
    return time.process_time() - began, done


STUDIES = {"pneumonia": pneumonia, "landcover": landcover}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[], help="of NETWORKS; all by default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.names or NETWORKS:
        run = arguments.out / f"{arguments.study}-{name}"
        began = time.process_time()
        row = {"model": name} | STUDIES[arguments.study](name, arguments.data, run, arguments.seconds)
        rows.append(row | {"cpu s": round(time.process_time() - began)})
        print(json.dumps(rows[-1]), flush=True)
    with (arguments.out / f"{arguments.study}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
