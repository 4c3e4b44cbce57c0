"""What is measured of a network that learns without labels, on held-out images.

Tables: images.csv, a row per window with its error. Pictures: reconstructions.png, neighbours.png.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from visionattn.data import formats
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.pretraining.metrics import collapsed, nearest, signs
from visionattn.tasks.pretraining.recipe import Recipe
from visionattn.tasks.pretraining.task import Seen
from visionattn.tasks.pretraining.transforms import Windows

__all__ = ["measure"]

QUERIES, NEIGHBOURS = 8, 6
PANEL, GAP = 112, 4  # pixels


def measure(predictions: Sequence[Prediction], samples: Sequence[Sample], spec: Recipe, split: str) -> Evaluation:
    """Everything that is reported about the windows of a split, in any order."""
    pairs = [(p.index, p.value) for p in predictions if isinstance(p.value, Seen)]
    pairs.sort(key=lambda pair: pair[1].item)
    seen = [value for _, value in pairs]
    features = torch.from_numpy(np.stack([np.asarray(value) for value in seen]))
    overall: dict[str, float | None] = {**signs(features)}
    if seen[0].error is not None:
        error, of_mean = (np.mean([getattr(value, name) for value in seen]) for name in ("error", "of_mean"))
        overall |= {"loss": float(error), "ratio": float(error / max(of_mean, 1e-6))}
    queries = np.linspace(0, len(seen) - 1, min(QUERIES, len(seen))).round().astype(int).tolist()
    near = nearest(features, queries, NEIGHBOURS)
    pictures = {"neighbours.png": _neighbours(queries, near, Windows(samples, spec.data), spec)}
    if shown := [value.picture for value in seen if value.picture is not None]:
        pictures["reconstructions.png"] = _sheet([_panels(picture, spec) for picture in shown])
    return Evaluation(
        task=spec.task,
        split=split,
        noun=formats.module_of(spec.data).KIND.noun,
        samples=len(samples),
        classes=[],
        headline="ratio" if "ratio" in overall else "spread",
        overall=overall,
        intervals={},
        per_class=[],
        more={"objective": spec.objective.model_dump(), "windows": len(seen), "collapse": collapsed(overall, 1.0)},
        tables={"images.csv": _table(pairs, samples)},
        pictures=pictures,
    )


def _table(pairs: Sequence[tuple[int, Seen]], samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    for index, value in pairs:
        errors = {} if value.error is None else {"error": f"{value.error:.6f}", "of_mean": f"{value.of_mean:.6f}"}
        yield {"name": samples[index].name, "window": value.item} | errors


def _neighbours(queries: Sequence[int], near: Sequence[Sequence[int]], windows: Windows, spec: Recipe) -> Image.Image:
    """A row for each query: itself, and the windows with the nearest features."""
    return _sheet(
        [
            _panels(np.stack([windows[i]["image"].numpy() for i in [q, *n]]), spec)
            for q, n in zip(queries, near, strict=True)
        ]
    )


def _panels(pictures: np.ndarray, spec: Recipe) -> list[Image.Image]:
    """Normalised images (N, C, H, W) for people: up to three channels, stretched alike by the first one's values."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.data.mean, spec.data.std))
    count = 3 if pictures.shape[1] >= 3 else 1
    values = (pictures.astype(np.float32) * std + mean)[:, :count]
    low, high = np.percentile(values[0], (1, 99), axis=(1, 2), keepdims=True)
    pixels = (np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)
    images = [Image.fromarray(x[0] if count == 1 else x.transpose(1, 2, 0)).convert("RGB") for x in pixels]
    scale = PANEL / max(images[0].size)
    size = (max(1, round(images[0].width * scale)), max(1, round(images[0].height * scale)))
    return [image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS) for image in images]


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Panels of one size in rows."""
    width, height = (length + GAP for length in rows[0][0].size)
    sheet = Image.new("RGB", (width * max(map(len, rows)) - GAP, height * len(rows) - GAP), "white")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            sheet.paste(panel, (c * width, r * height))
    return sheet
