"""Measuring a trained model on labelled images: `visionattn evaluate`; and loading one.

A folder is made for each evaluated split, with metrics.json and tables; see `visionattn.results` and
`visionattn.segresults`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from visionattn import quiet, recipe
from visionattn.errors import UserError
from visionattn.recipe import Recipe
from visionattn.report.page import plural
from visionattn.report.run import write_report
from visionattn.tasks.base import Task, load_checkpoint, module_of

__all__ = ["Trained", "evaluate", "format_table", "load_trained", "predictor"]


class Trained(NamedTuple):
    """A trained network and what it was trained by."""

    task: Task
    recipe: Recipe
    checkpoint: Path
    epoch: int


def load_trained(path: Path) -> Trained:
    """The network of a run directory (its best checkpoint) or of a checkpoint file.

    Raises:
        UserError: neither a run nor a checkpoint of ours.
    """
    quiet.silence()
    file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: no checkpoints/best.ckpt in it; expected a run directory or a checkpoint file")
    checkpoint = load_checkpoint(file)
    if "visionattn" not in checkpoint:
        raise UserError(
            f"{file}: not a checkpoint of visionattn fit (use model.checkpoint in a recipe to start from weights)"
        )
    about = checkpoint["visionattn"]
    spec = recipe.loads(about["recipe"], name=str(file))
    task = module_of(spec).restore(spec, about)
    task.load_state_dict(checkpoint["state_dict"])
    return Trained(task, spec, file, checkpoint["epoch"])


def predictor(spec: Recipe, **options: Any) -> pl.Trainer:
    """A Lightning trainer that only predicts, on the best device there is."""
    return pl.Trainer(
        precision=spec.train.precision, logger=False, enable_checkpointing=False, enable_model_summary=False, **options
    )


def evaluate(model: Path, data: Path | None, split: str | None, out: Path | None) -> Path:
    """Evaluate a run or checkpoint on its own held-out images or on other labelled ones, and print the metrics.

    Args:
        model: run directory or checkpoint.
        data: other labelled images with the same classes: a folder of class folders (or of splits), .npz or .csv;
            for segmentation a folder laid out as the one of the recipe.
        split: the split to take; None: test where there is one, else val, else all.
        out: folder to make for the results; None: a new one in the run's evaluation/.

    Returns:
        the folder.
    """
    trained = load_trained(model)
    kind = module_of(trained.recipe)
    module = kind.labelled(trained.task, trained.recipe, data)
    splits = module.images.splits
    split = split or next(name for name in ("test", "val", "all", *splits) if name in splits)
    if split not in splits:
        raise UserError(f"--split {split}: the images have {', '.join(splits)}")
    out = out or _fresh((model if model.is_dir() else Path()) / "evaluation" / (data.stem if data else split))
    if out.exists():
        raise UserError(f"{out} exists; results are never overwritten: give another --out")
    about = {"checkpoint": str(trained.checkpoint), "epoch": trained.epoch, "data": str(data) if data else None}
    trainer = predictor(trained.recipe)
    result = kind.evaluate_split(trainer, trained.task, module, split, trained.recipe, out, about)
    print(f"\n{format_table([result])}\n\nresults: {out}")
    if model.is_dir():
        print(f"report: {write_report(model)}")
    return out


def _fresh(folder: Path) -> Path:
    taken = 1
    while folder.exists():
        taken += 1
        folder = folder.with_name(f"{folder.name.rsplit('-', 1)[0] if taken > 2 else folder.name}-{taken}")
    return folder


def format_table(results: list[dict[str, Any]]) -> str:
    """The overall metrics with their intervals, a column for each evaluated split."""
    values = [item for result in results for item in result["overall"].items()]
    names = list(dict.fromkeys(name for name, value in values if value is not None))
    heads = [f"{r['split']} ({plural(r['samples'], r.get('noun', 'image'))})" for r in results]
    lines = ["".join(f"{text:>28}" for text in ["", *heads])]
    for name in names:
        cells = []
        for result in results:
            value, intervals = result["overall"].get(name), dict(result.get("intervals", {}))
            if interval := result["interval"]:
                intervals[interval["metric"]] = (interval["low"], interval["high"])
            text = "-" if value is None else f"{value:.4f}"
            cells.append(text + (" [{:.3f}, {:.3f}]".format(*intervals[name]) if name in intervals else ""))
        lines.append("".join(f"{text:>28}" for text in [name.replace("_", " "), *cells]))
    return "\n".join(lines)
