"""Crops for training and parts for evaluation: image and mask stay together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from visionattn import recipe
from visionattn.data import formats
from visionattn.data.sample import IGNORE, Dataset
from visionattn.data.splits import split
from visionattn.data.survey import read_through
from visionattn.recipe import Recipe
from visionattn.tasks.segmentation.recipe import Augment
from visionattn.tasks.segmentation.task import evaluation_set, resolve, training_set
from visionattn.tasks.segmentation.transforms import augmentation


def prepared(root: Path, **keys) -> tuple[Recipe, Dataset]:
    """A resolved recipe for image files with masks, and its images."""
    text = f"task: segmentation\nmodel: {{name: m}}\ndata: {{format: image_mask, root: {root}, classes: [no, yes]}}\n"
    spec = recipe.loads(
        text, "test", ["evaluate.surface=false", *(f"data.{key}={value}" for key, value in keys.items())]
    )
    samples, classes, problems = formats.find(spec.data)
    dataset, more = split(samples, classes, spec.data)
    assert problems == more == []
    return resolve(spec, read_through(dataset))


def write(root: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    for folder, content in (("images", image), ("masks", mask)):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)


@pytest.mark.parametrize("resize", ["squash", "shorter", "none"])
def test_crops_keep_image_and_mask_together(resize, tmp_path):
    mask = np.zeros((40, 48), np.uint8)
    mask[20:] = 1  # the value of a pixel tells its row, so its class
    for k, name in enumerate(["train/0", "train/1", "train/2", "train/3", "val/0"]):
        write(tmp_path, name, np.arange(40, dtype=np.uint8)[:, None] + np.full((1, 48), k, np.uint8), mask)
    keys = {"mean": "[0.0]", "std": "[1.0]", "image_size": 32, "batch_size": 2, "resize": resize}
    augment = "{scale: [0.6, 1.6], hflip: 0.5, vflip: 0.5, rot90: 0.5}"
    spec, dataset = prepared(tmp_path, augment=augment, crops_per_image=8, **keys)
    crops = training_set(dataset, spec)
    assert len(crops) == 32
    for n in range(len(crops)):
        crop = crops[3, n]
        image, truth = crop["image"][0] * 255 - crop["index"], crop["mask"]
        assert image.shape == truth.shape == (32, 32)
        sure = (truth != IGNORE) & ((image - 19.5).abs() > 3)
        assert ((image > 19.5) == (truth == 1))[sure].float().mean() > 0.95
        assert torch.equal(crops[3, n]["image"], crop["image"])
    assert not torch.equal(crops[4, 0]["image"], crops[3, 0]["image"])


def test_crops_find_rare_classes(tmp_path):
    mask = np.zeros((200, 200), np.uint8)
    mask[180:183, 10:13] = 1
    for name in ("train/a", "val/a"):
        write(tmp_path, name, mask + 3, mask)
    shares = {}
    for rare in (0.0, 1.0):
        keys = {"resize": "none", "image_size": 32, "batch_size": 1, "crops_per_image": 60, "rare_crops": rare}
        spec, dataset = prepared(tmp_path, **keys)
        crops = training_set(dataset, spec)
        shares[rare] = np.mean([(crops[0, i]["mask"] == 1).any() for i in range(60)])
    assert shares[0.0] < 0.2
    assert 0.3 < shares[1.0] < 0.8  # both classes are as likely to be looked for


def test_scenes_are_evaluated_in_parts_that_cover_them_once(tmp_path, monkeypatch):
    monkeypatch.setattr("visionattn.tasks.segmentation.transforms.PART", 40)
    for name in ("train/a", "train/b", "val/a"):
        write(tmp_path, name, np.zeros((100, 90), np.uint8), np.zeros((100, 90), np.uint8))
    spec, dataset = prepared(tmp_path, resize="none", image_size=32, batch_size=2)
    parts = evaluation_set(dataset.splits["val"], spec.data)
    seen = np.zeros((100, 90), int)
    for i in range(len(parts)):
        part = parts[i]
        top, bottom, left, right = part["window"]
        seen[top:bottom, left:right] += 1
        assert part["mask"].shape == (bottom - top, right - left)
        inner = part["inner"]
        assert (inner[1] - inner[0], inner[3] - inner[2]) == part["mask"].shape
        assert part["image"].shape[1:] == part["extent"]
    assert (seen == 1).all()


def test_augmentation_leaves_masks_whole_numbers_and_a_band():
    augment = Augment(hflip=1.0, rotate=45.0, jitter=0.5, band_dropout=0.9)
    change = augmentation(augment)
    torch.manual_seed(0)
    for _ in range(20):
        image, mask = change(
            tv_tensors.Image(torch.rand(5, 32, 32) + 1), tv_tensors.Mask(torch.ones(32, 32, dtype=torch.uint8))
        )
        assert set(mask.unique().tolist()) <= {1, IGNORE}
        assert image.abs().flatten(1).amax(1).max() > 0
        assert image.shape == (5, 32, 32)
