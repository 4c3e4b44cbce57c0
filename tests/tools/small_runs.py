"""Small segmenters and detectors, trained for an epoch on made pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import visionattn

NARROW = {"depth": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "head_dim": 8, "n_win": 2, "topks": [1, 2, 4, -2]}
SMALL = {"pyramid_channels": 32, "segmentation_channels": 32}
COMMON = {
    "optim": {"lr": 3e-3},
    "train": {"epochs": 1},
    "evaluate": {"bootstrap": 0},
    "trainer": {"enable_progress_bar": False, "accelerator": "cpu"},
}


def write_blots(root: Path) -> Path:
    """Images with masks, and the boxes of the same squares in one file."""
    rng = np.random.default_rng(0)
    (root / "masks").mkdir(parents=True)
    (root / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "blot"}]}
    for i in range(10):
        height, width = rng.integers(60, 90, 2).tolist()
        mask, side = np.zeros((height, width), np.uint8), int(rng.integers(12, 30))
        top, left = int(rng.integers(height - side)), int(rng.integers(width - side))
        mask[top : top + side, left : left + side] = 1
        picture = np.clip(rng.normal(90, 12, mask.shape) + 90 * mask, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        box = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [left, top, side, side], "area": side**2}
        content["annotations"].append(box | {"iscrowd": 0})
    (root / "labels.json").write_text(json.dumps(content))
    return root


def segmenter(root: Path, run: Path, resize: str = "squash", tta: Sequence[str] = ()) -> visionattn.Run:
    data = {"format": "image_mask", "root": str(root), "classes": ["ground", "blot"], "image_size": [64, 64]}
    recipe = COMMON | {
        "task": "segmentation",
        "model": {"name": "biformer_tiny", "args": NARROW, "decoder": "fpn", "decoder_args": SMALL},
        "data": data | {"resize": resize, "batch_size": 4, "workers": 0},
        "evaluate": COMMON["evaluate"] | {"tta": list(tta)},
    }
    return visionattn.fit(recipe, run=run)


def detector(root: Path, run: Path, resize: str = "fit", name: str = "fcos") -> visionattn.Run:
    args = {"fpn_channels": 16, "convs": 1, "finest": 8, "coarsest": 16}
    recipe = COMMON | {
        "task": "detection",
        "model": {"name": "biformer_tiny", "args": NARROW, "detector": name, "detector_args": args},
        "data": {
            "format": "coco",
            "root": str(root),
            "image_size": 64,
            "resize": resize,
            "batch_size": 4,
            "workers": 0,
        },
    }
    return visionattn.fit(recipe, {"data.overlap": 0.5, "evaluate.score": 0.05, "train.epochs": 6}, run=run)
