"""`visionattn publish`: a run as a folder for the Hugging Face hub, with a card that says what it is and is not.

Nothing is sent. With visionattn imported, `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the network.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from timm.models._pretrained import filter_pretrained_cfg

from visionattn import __version__
from visionattn.data import formats
from visionattn.errors import UserError, listed
from visionattn.files import new_folder
from visionattn.recipe import Recipe
from visionattn.report.evaluation import Evaluation
from visionattn.runs.checkpoints import Trained, load_trained
from visionattn.runs.directory import RunDirectory
from visionattn.tools.export import part_of_task

__all__ = ["publish", "strictest"]

FREE = (
    "cc0-1.0",
    "unlicense",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "apache-2.0",
    "cc-by-4.0",
)  # less free to the right
ALIKE = ("lgpl", "gpl", "agpl", "cc-by-sa", "openrail")  # what is made of it has conditions too


def publish(run: Path, out: Path, licence: str | None = None, data_licence: str | None = None) -> Path:
    """Write a hub folder of a run directory; returns it.

    Args:
        run: run directory.
        out: the folder to make.
        licence: SPDX identifier, as the hub has it; unset: the strictest of code, start weights and data.
        data_licence: of the training data.

    Raises:
        UserError: no run directory; no licence follows, or none that others may freely use.
    """
    directory = RunDirectory.existing(run)
    trained = load_trained(run)
    sources = {"code": "apache-2.0", **_start(trained), "data": data_licence}
    licence = licence or strictest(sources)
    with new_folder(out) as folder:
        network = trained.task.network.float()
        save_file(
            {k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
        )
        _write(folder / "config.json", json.dumps(_config(trained, licence), indent=1))
        _write(
            folder / "recipe.yaml", yaml.safe_dump(_without_paths(trained.recipe), sort_keys=False, allow_unicode=True)
        )
        measured = {one.folder.name: _measured(one) for one in directory.evaluations}
        _write(folder / "metrics.json", json.dumps(measured, indent=1))
        _write(folder / "README.md", _card(trained, directory, licence, sources, out.name))
        _refuse_paths(folder, [Path.home(), Path.cwd(), run.resolve(), *_paths(trained.recipe.model_dump())])
    return out


def strictest(sources: Mapping[str, str | None]) -> str:
    """The licence that holds for what is made of all these.

    Raises:
        UserError: one of them has none, or forbids commercial use.
    """
    ranks = {name: _rank(licence) for name, licence in sources.items()}
    worst = max(ranks, key=lambda name: ranks[name])
    licence = sources[worst]
    if licence is None or ranks[worst] > len(FREE):
        known = f"is {licence}" if licence else "is not known"
        raise UserError(
            f"the licence of the {worst} {known}: say under which licence the weights may be published by --licence"
            f"{', or that of the data by --data-licence' if worst == 'data' and not licence else ''}"
        )
    return licence


def _rank(licence: str | None) -> int:
    """Small for free ones; above len(FREE) for those that need a decision."""
    text = (licence or "").lower()
    if text in FREE:
        return FREE.index(text)
    parts = text.split("-")
    bound = "nc" not in parts and any(text.startswith(kind) for kind in ALIKE)
    return len(FREE) if bound else len(FREE) + 1 + (not text)


def _start(trained: Trained) -> dict[str, str | None]:
    """The licence of the weights that training started from, if any."""
    model = trained.recipe.model
    if model.checkpoint is not None:
        return {"weights that training started from": None}
    if not model.pretrained:
        return {}
    cfg: Any = getattr(trained.task.network, "pretrained_cfg", {})
    return {"weights that training started from": cfg.get("license")}


def _config(trained: Trained, licence: str) -> dict[str, Any]:
    """config.json, as timm reads it: how to make the network, and how its images are to be prepared."""
    spec, network = trained.recipe, trained.task.network
    architecture, arguments = part_of_task(spec).made_by(spec)
    known: Any = getattr(network, "pretrained_cfg", {})
    cfg = filter_pretrained_cfg(dict(known), remove_source=True, remove_null=True)
    data, squash = spec.data, getattr(spec.data, "resize", "squash") == "squash"
    for gone in ("architecture", "tag", "label_offset", "test_input_size", "pool_size", "custom_load", "test_crop_pct"):
        cfg.pop(gone, None)
    cfg |= {
        "input_size": [len(data.mean or ()), *data.side],
        "mean": data.mean,
        "std": data.std,
        "interpolation": getattr(data, "interpolation", "bilinear"),
        "crop_pct": 1.0 if squash else getattr(data, "crop_pct", 1.0),
        "crop_mode": "squash" if squash else "center",
        "license": licence,
    }
    names = part_of_task(spec).contract(spec, data.side)["classes"]
    features = getattr(network, "num_features", None)
    return {
        "architecture": architecture,
        "num_classes": len(names),
        "label_names": names,
        **({"num_features": features} if features else {}),
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }


def _paths(value: Any) -> list[Path]:
    if isinstance(value, Path):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [path for one in inner for path in _paths(one)]


def _without_paths(spec: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data, in place of paths what they stand for."""

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, Path):
            return f"YOUR_{key.upper()}"
        if isinstance(value, Mapping):
            return {name: plain(inner, name) for name, inner in value.items()}
        return [plain(inner, key) for inner in value] if isinstance(value, list | tuple) else value

    return {key: plain(value, key) for key, value in spec.model_dump().items() if key not in ("log", "trainer")}


def _measured(evaluation: Evaluation) -> dict[str, Any]:
    kept = ("samples", "noun", "headline", "overall", "intervals", "per_class")
    return {name: getattr(evaluation, name) for name in kept}


def _refuse_paths(folder: Path, secrets: Iterable[Path]) -> None:
    """Raises UserError where a file tells of the machine that it is from; a last look."""
    words = {str(path) for path in secrets if len(path.parts) > 2}
    for file in folder.iterdir():
        content = file.read_bytes()
        if found := [word for word in words if word.encode() in content]:
            raise UserError(f"{file.name} would tell the path {listed(found)}: rename the class or setting that has it")


def _card(trained: Trained, run: RunDirectory, licence: str, sources: Mapping[str, str | None], name: str) -> str:
    """README.md: front matter that the hub reads, then what people have to know."""
    spec = trained.recipe
    evaluations = {one.folder.name: one for one in run.evaluations}
    shown = evaluations.get("test") or evaluations.get("val")
    head = {
        "library_name": "timm",
        "license": licence,
        "tags": ["timm", "visionattn", part_of_task(spec).HUB_TASK],
        "pipeline_tag": part_of_task(spec).HUB_TASK,
        **({"model-index": [_index(spec, shown, name)]} if shown else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        "```python\nimport timm\nimport visionattn  # without it timm does not know the model\n\n"
        f'model = timm.create_model("hf-hub:USER/{name}", pretrained=True)\n```',
        f"{spec.model.name}, trained for {spec.task} with visionattn {__version__}.",
        _use(spec),
        _data(spec, run),
        _results(evaluations, shown),
        _licences(licence, sources),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _index(spec: Recipe, shown: Evaluation, name: str) -> dict[str, Any]:
    values = {key: value for key, value in shown.overall.items() if value is not None}
    metrics = [{"type": key, "value": round(float(value), 6)} for key, value in values.items()]
    dataset = {"name": f"own images, {shown.folder.name}", "type": "private", "split": shown.folder.name}
    return {
        "name": name,
        "results": [{"task": {"type": part_of_task(spec).HUB_TASK}, "dataset": dataset, "metrics": metrics}],
    }


def _use(spec: Recipe) -> str:
    classes = part_of_task(spec).contract(spec, spec.data.side)["classes"]
    return (
        "## Intended use\n\n"
        f"Images like those that it was trained on, to find: {listed(classes)}. It knows nothing else, whatever it is "
        "shown.\n\n"
        "Not for decisions about people without somebody who is answerable for them, and not for images from other "
        "devices, places or populations before it has been measured there."
    )


def _data(spec: Recipe, run: RunDirectory) -> str:
    counts = run.facts.get("data", {}).get("images", {})
    noun = formats.module_of(spec.data).KIND.noun
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in counts.items())
    side = " x ".join(map(str, spec.data.side))
    steps = {
        "resize": getattr(spec.data, "resize", None),
        "size": side,
        "channels": len(spec.data.mean or ()),
        "mean": spec.data.mean,
        "std": spec.data.std,
    }
    told = "\n".join(f"- {key}: {value}" for key, value in steps.items() if value is not None)
    return f"## Data\n\n| split | {noun}s |\n|---|---|\n{rows}\n\nPreprocessing:\n\n{told}"


def _results(evaluations: Mapping[str, Evaluation], shown: Evaluation | None) -> str:
    if shown is None:
        return "## Results\n\nNothing was measured on held-out images."
    rows = []
    for name, value in shown.overall.items():
        low, high = shown.intervals.get(name, (None, None))
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        rows.append(f"| {name.replace('_', ' ')} | {'' if value is None else f'{value:.4f}'} | {interval} |")
    chosen = "" if shown.folder.name == "test" else ", by which the best epoch was chosen"
    text = (
        f"## Results\n\nOn {shown.samples:,} {shown.noun}s of {shown.folder.name} that were not trained on{chosen}; "
        "95 % bootstrap intervals.\n\n"
        f"| metric | value | interval |\n|---|---|---|\n" + "\n".join(rows)
    )
    return text + _worst(shown.per_class)


def _worst(per_class: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """The classes that it knows least, by the first of their metrics that is one."""
    named = [name for name in ("f1", "dice", "iou", "ap", "map") if per_class and name in per_class[0]]
    known = [row for row in per_class if named and row[named[0]] is not None]
    if len(known) < 2:
        return ""
    rows = [f"{row['class']} {row[named[0]]:.3f}" for row in sorted(known, key=lambda row: row[named[0]])[:most]]
    return f"\n\nWorst classes by {named[0]}: {listed(rows)}."


def _licences(licence: str, sources: Mapping[str, str | None]) -> str:
    rows = "\n".join(f"| {name} | {given or 'not known'} |" for name, given in sources.items())
    return f"## Licence\n\n{licence}, chosen in view of:\n\n| of | licence |\n|---|---|\n{rows}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
