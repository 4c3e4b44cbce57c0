"""What pretraining without labels is worth when labels are few, beside training from scratch for as long.

`python benchmarks/pretraining.py digits|ucmerced|isic [--data DIR] [--seeds 5] [--objective mim] [-o DIR]` prints and
writes a table: for each seed the test result of a network that starts from the pretrained one, of one from scratch that
is trained as many epochs, and of one from scratch that is trained as long as both trainings together.
`... cost` prints CPU seconds an image, and memory, of each objective and of a classifier of the same network.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import visionattn
from visionattn import recipe
from visionattn.data.sample import Dataset
from visionattn.recipe import part_of
from visionattn.runs.fit import prepare
from visionattn.tools.benchmark import peak_memory

NETWORK = {"depth": [1, 1, 2, 1], "embed_dim": [32, 64, 128, 256], "n_win": 4}
EPOCHS = {"mim": 60, "vicreg": 30}  # of pretraining, which take about as long: vicreg has two views of an image
SELDOM = {"check_val_every_n_epoch": 5}  # a validation costs more than an epoch of few labels
QUIET = {"trainer.enable_progress_bar": False}


def digits(seed: int, objective: str, data: Path | None) -> tuple[Any, Any, dict, dict, str]:
    """Recipes of the pretraining and of the training, what is changed in each, and what is measured."""
    shared = {"data.split_seed": seed, "train.seed": seed}
    first = {**shared, "objective.name": objective, "probe": None}
    second = {**shared, "data.labelled": 10, "data.batch_size": 50, "train.epochs": 60, "optim.lr": 1e-3}
    return "pretraining/quickstart", "quickstart", first, second | {"optim.warmup_epochs": 5}, "accuracy"


def ucmerced(seed: int, objective: str, data: Path | None) -> tuple[Any, Any, dict, dict, str]:
    model = {"name": "biformer_tiny", "args": NETWORK}
    first = {
        "task": "pretraining",
        "model": model,
        "data": {
            "format": "unlabelled", "root": f"{data}/train", "image_size": 64, "batch_size": 64,
            "augment": {"vflip": 0.5, "rot90": 0.75},
        },
        "objective": {"name": objective},
        "optim": {"lr": 2e-3, "warmup_epochs": 2, "clip_grad": 3.0, "args": {"betas": [0.9, 0.95]}},
        "train": {"epochs": EPOCHS[objective]},
    }  # fmt: skip
    second = {
        "task": "classification",
        "model": model,
        "data": {
            "format": "folder", "root": str(data), "image_size": 64, "resize": "squash", "batch_size": 32,
            "labelled": 10, "split_seed": seed, "augment": {"vflip": 0.5, "crop_scale": [0.6, 1.0]},
        },
        "optim": {"lr": 1e-3, "warmup_epochs": 5},
        "train": {"epochs": 60, "seed": seed},
        "trainer": SELDOM,
    }  # fmt: skip
    return first, second, {}, {}, "accuracy"


def isic(seed: int, objective: str, data: Path | None) -> tuple[Any, Any, dict, dict, str]:
    model = {"name": "biformer_tiny", "args": NETWORK}
    first = {
        "task": "pretraining",
        "model": model,
        "data": {
            "format": "unlabelled", "root": f"{data}/images/train", "image_size": 96, "batch_size": 32,
            "augment": {"vflip": 0.5, "rot90": 0.75},
        },
        "objective": {"name": objective},
        "optim": {"lr": 1e-3, "warmup_epochs": 2, "clip_grad": 3.0, "args": {"betas": [0.9, 0.95]}},
        "train": {"epochs": EPOCHS[objective] // 8},
    }  # fmt: skip
    second = {
        "task": "segmentation",
        "model": model | {"decoder": "fpn", "decoder_args": {"pyramid_channels": 64, "segmentation_channels": 64}},
        "data": {
            "format": "image_mask", "root": str(data), "image_size": 96, "batch_size": 10, "labelled": 50,
            "split_seed": seed, "classes": ["skin", "lesion"], "values": [0, 255],
            "augment": {"vflip": 0.5, "rot90": 0.5},
        },
        "optim": {"lr": 1e-3, "warmup_epochs": 3},
        "train": {"epochs": 60, "seed": seed},
        "trainer": SELDOM,
        "evaluate": {"surface": False},
    }  # fmt: skip
    return first, second, {}, {}, "dice"


STUDIES = {"digits": digits, "ucmerced": ucmerced, "isic": isic}


def study(name: str, data: Path | None, seeds: int, objective: str, out: Path) -> None:
    """Train everything, and write the table."""
    rows: list[dict[str, Any]] = []
    before: Any = None
    for seed in range(seeds):
        first, second, one, two, metric = STUDIES[name](seed, objective, data)
        if (first, one) != before:  # where the split is the files' own, one pretraining serves all seeds
            before, began = (first, one), time.process_time()
            pretrained = visionattn.fit(first, one | QUIET, run=out / f"{name}-{objective}-{seed}")
            spent = time.process_time() - began
        row: dict[str, Any] = {"seed": seed, "pretraining s": round(spent)}
        starts = {"pretrained": {"model.checkpoint": str(pretrained.path)}, "scratch": {}}
        for kind, start in starts.items():
            began = time.process_time()
            run = visionattn.fit(second, two | QUIET | start, run=out / f"{name}-{objective}-{seed}-{kind}")
            row |= {kind: run.metrics["test"][metric], f"{kind} s": round(time.process_time() - began)}
        epochs = run.recipe.train.epochs
        longer = {"train.epochs": epochs + round(epochs * row["pretraining s"] / row["scratch s"])}
        run = visionattn.fit(second, two | QUIET | longer, run=out / f"{name}-{objective}-{seed}-longer")
        row |= {"scratch, as long": run.metrics["test"][metric], "its epochs": longer["train.epochs"]}
        rows.append(row)
        print(row, flush=True)
    with (out / f"{name}-{objective}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for kind in ("pretrained", "scratch", "scratch, as long"):
        values = [row[kind] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{kind}: {statistics.mean(values):.4f} +- {spread:.4f} ({metric}, {len(values)} seeds)")


COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("quickstart", {}),
    "mim": ("pretraining/quickstart", {"probe": None}),
    "vicreg": ("pretraining/quickstart", {"probe": None, "objective.name": "vicreg"}),
}


def cost(rounds: int = 6) -> None:
    """CPU seconds an image of a training step, without loading, and memory: of a classifier and of each objective."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    made = {name: _step(name) for name in COSTS}
    for _ in range(rounds):  # in turn, so that what else the machine does is the same for all
        for name, step in made.items():
            began = time.process_time()
            images = step()
            seconds.setdefault(name, []).append((time.process_time() - began) / images)
    usual = statistics.median(seconds["supervised"])
    for name, values in seconds.items():
        median, peak = statistics.median(values), peak_memory("cpu", _step, name)
        print(f"{name}: {1000 * median:.3f} ms of a CPU an image, {median / usual:.2f} of supervised, {peak:.0f} MiB")


def _step(name: str) -> Any:
    """A training step of a recipe on one batch, again and again; it gives how many images that is."""
    spec, dataset, task = prepare(recipe.load(*COSTS[name]))
    batch = _batch(spec, dataset)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
    task.train()
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    task.log_loss = lambda loss, *_: loss  # type: ignore[method-assign]

    def step() -> int:
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
        return len(batch["image"])

    return step


def _batch(spec: recipe.Recipe, dataset: Dataset) -> Any:
    items = part_of(spec.task, "task").training_set(dataset, spec)
    return torch.utils.data.default_collate([items[0, i] for i in range(spec.data.batch_size)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=[*STUDIES, "cost"])
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objective", choices=["mim", "vicreg"], default="mim")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    if arguments.study == "cost":
        cost()
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        study(arguments.study, arguments.data, arguments.seeds, arguments.objective, arguments.out)
