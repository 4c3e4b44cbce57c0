"""Images with masks: pairs, what masks say, splits, crops and parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from visionattn import recipe
from visionattn.data.formats.image_mask import read_mask
from visionattn.data.labels import Labels
from visionattn.data.masked import find, find_labelled, prepare
from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.recipe import SegmentationAugment
from visionattn.tasks.segmentation.task import _views
from visionattn.tasks.segmentation.transforms import TrainingCrops, WholeImages, augmentation

ROOT = Path(__file__).parents[2]


def section(root: Path, **keys):
    """The data section of a recipe for image files with masks."""
    text = f"task: segmentation\nmodel: {{name: m}}\ndata: {{format: image_mask, root: {root}, classes: [no, yes]}}\n"
    return recipe.loads(text, "test", [f"data.{key}={value}" for key, value in keys.items()]).data


def write(root: Path, names: list[str], mask: np.ndarray | None = None, kind: str = ".png") -> None:
    """Grey images whose values are their rows, and masks of two classes, split in the middle."""
    for k, name in enumerate(names):
        rows = np.arange(40, dtype=np.uint8)[:, None] + np.zeros((1, 48), np.uint8) + k
        values = np.zeros((40, 48), np.uint8) if mask is None else mask
        if mask is None:
            values[:, 24:] = 1
        for folder, content, ending in (("images", rows, ".png"), ("masks", values, kind)):
            path = root / folder / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)


def test_pairs_are_made_by_stem_whatever_the_order_and_the_ending(tmp_path):
    write(tmp_path, ["b", "a", "sub/c"], kind=".tif")
    (tmp_path / "masks" / "a.tif").rename(tmp_path / "masks" / "a_seg.tif")
    for name in ("b", "sub/c"):
        (tmp_path / "masks" / f"{name}.tif").rename(tmp_path / "masks" / f"{name}_seg.tif")
    found, problems = find(section(tmp_path, mask_suffix="_seg", val_fraction=0.4))
    assert not problems
    for split in found.splits.values():
        for item in split.items:
            assert item.mask_path.stem == f"{item.path.stem}_seg"
            assert item.name in ("a", "b", "sub/c")


def test_splits_are_what_folders_above_or_below_are_called(tmp_path):
    write(tmp_path / "Train" / "Urban", ["1", "2"])
    write(tmp_path / "Val" / "Urban", ["1"])
    found, problems = find(section(tmp_path))
    assert not problems
    assert {name: split.names for name, split in found.splits.items()} == {
        "train": ["Train/Urban/1", "Train/Urban/2"],
        "val": ["Val/Urban/1"],
    }


def test_drawn_splits_and_folds_keep_groups_together_and_repeat(tmp_path):
    names = [f"p{p}_{i}" for p in range(10) for i in range(3)]
    write(tmp_path, names)
    keys = {"group": "'^p[0-9]+'", "val_fraction": 0.2, "test_fraction": 0.2}
    first, again = (find(section(tmp_path, **keys))[0].splits for _ in range(2))
    groups = {name: {item.group for item in split.items} for name, split in first.items()}
    assert {name: len(group) for name, group in groups.items()} == {"train": 6, "val": 2, "test": 2}
    assert not groups["train"] & groups["val"] | groups["train"] & groups["test"] | groups["val"] & groups["test"]
    assert {n: s.names for n, s in first.items()} == {n: s.names for n, s in again.items()}
    held = [find(section(tmp_path, group=keys["group"], fold=k, folds=5))[0].splits["val"] for k in range(5)]
    assert sorted(name for split in held for name in split.names) == sorted(names)


def test_list_files_say_the_splits_and_must_not_overlap(tmp_path):
    write(tmp_path, ["a", "b", "c", "d"])
    for split, lines in (("train", "b\na\n"), ("val", "c\n")):
        (tmp_path / f"{split}.txt").write_text(lines)
    lists = {f"lists.{split}": tmp_path / f"{split}.txt" for split in ("train", "val")}
    found, problems = find(section(tmp_path, **lists))
    assert not problems
    assert {n: s.names for n, s in found.splits.items()} == {"train": ["b", "a"], "val": ["c"]}
    (tmp_path / "val.txt").write_text("c\na\nz\n")
    _, problems = find(section(tmp_path, **lists))
    assert any("a is listed in train, val" in text for text in problems)
    assert any("val.txt: no image called z" in text for text in problems)


@pytest.mark.parametrize(
    ("keys", "mask", "expected"),
    [
        ({}, [[0, 1]], [[0, 1]]),
        ({"values": "[0, 255]"}, [[0, 255]], [[0, 1]]),
        ({"values": "[[0, 3], 7]"}, [[0, 3, 7]], [[0, 0, 1]]),
        ({"ignore_index": 0}, [[0, 1, 2]], [[IGNORE, 0, 1]]),
        ({"values": "[0, 1]", "ignore_index": 65535}, [[0, 65535, 1]], [[0, IGNORE, 1]]),
    ],
)
def test_values_of_masks_become_class_numbers(keys, mask, expected):
    numbers = Labels.of(section(Path("x"), **keys)).of_mask(np.array(mask, np.uint16), "m.png")
    assert numbers.tolist() == expected


def test_unknown_values_are_named_with_the_likely_remedy():
    labels = Labels.of(section(Path("x")))
    with pytest.raises(UserError, match=r"m.png: the mask has 255.*data.values=\[0, 255\]"):
        labels.of_mask(np.array([[0, 255]], np.uint8), "m.png")
    with pytest.raises(UserError, match=r"m.png: the mask has 255.*data.ignore_index=255"):
        labels.of_mask(np.array([[0, 1, 255]], np.uint8), "m.png")
    with pytest.raises(UserError, match=r"m.png: the mask has -1"):
        labels.of_mask(np.array([[0, -1]], np.int16), "m.png")
    with pytest.raises(UserError, match=r"data\.colors"):
        labels.of_mask(np.zeros((2, 2, 3), np.uint8), "m.png")


def test_palette_masks_are_read_by_number_or_by_colour(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8))
    picture.putpalette([16, 32, 48, 255, 0, 0])
    picture.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", colors=False).tolist() == [[0, 1]]
    assert read_mask(tmp_path / "m.png", colors=True).tolist() == [[[16, 32, 48], [255, 0, 0]]]


def test_colours_of_masks_become_class_numbers():
    labels = Labels.of(section(Path("x"), colors="{no: '#102030', yes: '#ff0000', ignore: '#000000'}"))
    mask = np.array([[[16, 32, 48], [255, 0, 0], [0, 0, 0]]], np.uint8)
    assert labels.of_mask(mask, "m.png").tolist() == [[0, 1, IGNORE]]
    with pytest.raises(UserError, match="#010101"):
        labels.of_mask(mask + 1, "m.png")


@pytest.mark.parametrize("resize", ["squash", "shorter", "none"])
def test_crops_keep_image_and_mask_together(resize, tmp_path):
    mask = np.zeros((40, 48), np.uint8)
    mask[20:] = 1  # the value of a pixel tells its row, so its class
    write(tmp_path, [f"train/{i}" for i in range(4)] + ["val/0"], mask)
    keys = {"mean": "[0.0]", "std": "[1.0]", "image_size": 32, "batch_size": 2, "resize": resize}
    augment = "{scale: [0.6, 1.6], hflip: 0.5, vflip: 0.5, rot90: 0.5}"
    data = section(tmp_path, augment=augment, crops_per_image=8, **keys)
    found, data = prepare(find_labelled(data), data)
    crops = TrainingCrops(found.splits["train"], data, seed=0)
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
    for split in ("train", "val"):
        for folder, content in (("images", mask + 3), ("masks", mask)):
            path = tmp_path / folder / split / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(content).save(path)
    shares = {}
    for rare in (0.0, 1.0):
        keys = {"resize": "none", "image_size": 32, "batch_size": 1, "crops_per_image": 60, "rare_crops": rare}
        data = section(tmp_path, **keys)
        found, data = prepare(find_labelled(data), data)
        crops = TrainingCrops(found.splits["train"], data, seed=0)
        shares[rare] = np.mean([(crops[0, i]["mask"] == 1).any() for i in range(60)])
    assert shares[0.0] < 0.2
    assert 0.3 < shares[1.0] < 0.8  # both classes are as likely to be looked for


def test_scenes_are_evaluated_in_parts_that_cover_them_once(tmp_path, monkeypatch):
    monkeypatch.setattr("visionattn.crops.PART", 40)
    write(tmp_path, ["train/a", "train/b", "val/a"], np.zeros((100, 90), np.uint8))
    for path in (tmp_path / "images").rglob("*.png"):
        Image.fromarray(np.zeros((100, 90), np.uint8)).save(path)
    data = section(tmp_path, resize="none", image_size=32, batch_size=2)
    found, data = prepare(find_labelled(data), data)
    parts = WholeImages(found.splits["val"].items, data)
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
    augment = SegmentationAugment(hflip=1.0, rotate=45.0, jitter=0.5, band_dropout=0.9)
    change = augmentation(augment)
    torch.manual_seed(0)
    for _ in range(20):
        image, mask = change(
            tv_tensors.Image(torch.rand(5, 32, 32) + 1), tv_tensors.Mask(torch.ones(32, 32, dtype=torch.uint8))
        )
        assert set(mask.unique().tolist()) <= {1, IGNORE}
        assert image.abs().flatten(1).amax(1).max() > 0
        assert image.shape == (5, 32, 32)


@pytest.mark.parametrize("tta", [["hflip"], ["hflip", "vflip"], ["hflip", "vflip", "rot90"]])
def test_views_are_turned_back(tta):
    image = torch.rand(2, 3, 8, 12)
    views = _views(tta)
    assert len(views) == {1: 2, 2: 4, 3: 16}[len(tta)]
    for forth, back in views:
        assert torch.equal(back(forth(image)), image)


def test_builtin_scenes_use_every_digit_once():
    data = recipe.load("segmentation/quickstart").data
    found, problems = find(data)
    assert not problems
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 875, "val": 125, "test": 250}
    item = found.splits["test"].items[0]
    image, mask = item.image(), item.mask()
    assert image.shape == (1, 64, 64)
    assert ((image[0] == 0) == (mask == 0)).all()
    assert set(np.unique(mask)) - {0, IGNORE} == set((item.labels + 1).tolist())
