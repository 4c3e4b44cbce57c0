"""Images with masks: pairs, what masks say, and splits."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn import recipe
from visionattn.data import formats
from visionattn.data.formats.image_mask import read_mask
from visionattn.data.labels import Labels
from visionattn.data.sample import IGNORE, Dataset
from visionattn.data.splits import split
from visionattn.data.survey import read_through
from visionattn.errors import UserError
from visionattn.tasks.segmentation.recipe import DATA, Data


def section(root: Path, **keys) -> Data:
    """The data section of a recipe for image files with masks."""
    text = f"task: segmentation\nmodel: {{name: m}}\ndata: {{format: image_mask, root: {root}, classes: [no, yes]}}\n"
    return recipe.loads(text, "test", [f"data.{key}={value}" for key, value in keys.items()]).data


def find(data: Data) -> tuple[Dataset, list[str]]:
    """The splits of a section, of which only headers are read, and what is wrong with them."""
    samples, classes, problems = formats.find(data)
    dataset, more = split(samples, classes, data)
    return dataset, problems + more


def names_of(dataset: Dataset) -> dict[str, list[str]]:
    return {name: [sample.name for sample in part] for name, part in dataset.splits.items()}


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
    assert {sample.name for sample in found.samples} == {"a", "b", "sub/c"}
    for sample in found.samples:
        assert sample.mask_path.stem == f"{sample.path.stem}_seg"


def test_splits_are_what_folders_above_or_below_are_called(tmp_path):
    write(tmp_path / "Train" / "Urban", ["1", "2"])
    write(tmp_path / "Val" / "Urban", ["1"])
    found, problems = find(section(tmp_path))
    assert not problems
    assert names_of(found) == {
        "train": ["Train/Urban/1", "Train/Urban/2"],
        "val": ["Val/Urban/1"],
    }


def test_drawn_splits_and_folds_keep_groups_together_and_repeat(tmp_path):
    names = [f"p{p}_{i}" for p in range(10) for i in range(3)]
    write(tmp_path, names)
    keys = {"group": "'^p[0-9]+'", "val_fraction": 0.2, "test_fraction": 0.2}
    first, again = (find(section(tmp_path, **keys))[0] for _ in range(2))
    groups = {name: {sample.group for sample in part} for name, part in first.splits.items()}
    assert {name: len(group) for name, group in groups.items()} == {"train": 6, "val": 2, "test": 2}
    assert not groups["train"] & groups["val"] | groups["train"] & groups["test"] | groups["val"] & groups["test"]
    assert names_of(first) == names_of(again)
    held = [find(section(tmp_path, group=keys["group"], fold=k, folds=5))[0].splits["val"] for k in range(5)]
    assert sorted(sample.name for part in held for sample in part) == sorted(names)


def test_list_files_say_the_splits_and_must_not_overlap(tmp_path):
    write(tmp_path, ["a", "b", "c", "d"])
    for name, lines in (("train", "b\na\n"), ("val", "c\n")):
        (tmp_path / f"{name}.txt").write_text(lines)
    lists = {f"lists.{name}": tmp_path / f"{name}.txt" for name in ("train", "val")}
    found, problems = find(section(tmp_path, **lists))
    assert not problems
    assert names_of(found) == {"train": ["b", "a"], "val": ["c"]}
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
        ({"ignore_index": -1}, [[0, -1, 1]], [[0, IGNORE, 1]]),
        ({"values": "[-5, 7]", "ignore_index": -9999}, [[-5, -9999, 7]], [[0, IGNORE, 1]]),
        ({"values": "[0, 312782560]"}, [[0, 312782560]], [[0, 1]]),
        ({"values": "[0, 65536]"}, [[0, 65536]], [[0, 1]]),
        ({"values": "[0, 4294967295]", "ignore_index": 4294967294}, [[4294967295, 4294967294]], [[1, IGNORE]]),
        ({"values": "[9223372036854775807, -9223372036854775808]"}, [[2**63 - 1, -(2**63)]], [[0, 1]]),
        ({"values": "[[0, 70000], [-3, 8]]"}, [[8, 70000, 0, -3]], [[1, 0, 0, 1]]),
    ],
)
def test_values_of_masks_become_class_numbers(keys, mask, expected):
    numbers = Labels.of(section(Path("x"), **keys)).of_mask(np.array(mask), "m.png")
    assert numbers.tolist() == expected


@pytest.mark.parametrize(
    "dtype", ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", ">u2", ">i4", "f2", "f4", "f8"]
)
def test_the_type_of_a_mask_does_not_matter(dtype):
    keys = {"values": "[0, 1]", "ignore_index": -1}
    mask = np.array([[0, 1, 1, 0]]).astype(dtype)
    assert Labels.of(section(Path("x"), **keys)).of_mask(mask, "m.png").tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("wide", [256, 65536, 2**32, -(2**16), 2**31 + 1])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8"])
def test_a_value_that_a_mask_cannot_hold_is_in_no_mask(dtype, wide):
    """Numbers are compared as numbers, not after they have been cut to the bits of the mask."""
    labels = Labels.of(section(Path("x"), values=f"[3, {wide}]"))
    mask = np.array([[3, wide % 256 % 128]]).astype(dtype)
    if mask[0, 1] == 3:
        assert labels.of_mask(mask, "m.png").tolist() == [[0, 0]]
    else:
        with pytest.raises(UserError, match=rf"m\.png: the mask has {mask[0, 1]}, but classes are"):
            labels.of_mask(mask, "m.png")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("keys", [{}, {"ignore_index": 0}, {"values": "[0, 5]", "ignore_index": -1}])
def test_masks_of_no_numbers_are_refused_by_name(keys, value):
    labels = Labels.of(section(Path("x"), **keys))
    with pytest.raises(UserError, match=r"m\.tif: the mask has values that are no numbers \(NaN or infinite\)"):
        labels.of_mask(np.array([[0, value]], np.float32), "m.tif")
    with pytest.raises(UserError, match=r"m\.tif: the mask has values that are no whole numbers"):
        labels.of_mask(np.array([[0, 0.5]], np.float32), "m.tif")


def test_a_mask_file_with_nan_is_named_when_the_data_are_read(tmp_path):
    write(tmp_path, ["train/a", "val/a"], kind=".tif")
    mask = np.zeros((40, 48), np.float32)
    Image.fromarray(mask).save(tmp_path / "masks/train/a.tif")
    mask[3, 4] = np.nan
    Image.fromarray(mask).save(tmp_path / "masks/val/a.tif")
    readings = read_through(find(section(tmp_path))[0]).readings
    assert readings["train"][0].error is None
    assert str(tmp_path / "masks/val/a.tif") in readings["val"][0].error
    assert "NaN" in readings["val"][0].error


@pytest.mark.parametrize("value", [70000, -7, 2**31 - 1])
def test_wide_numbers_in_mask_files_are_read(tmp_path, value):
    mask = np.zeros((40, 48), np.int32)
    mask[:, 24:] = value
    write(tmp_path, ["train/a", "val/a"], mask, kind=".tif")
    found, problems = find(section(tmp_path, values=f"[0, {value}]"))
    assert not problems
    assert np.bincount(found.samples[0].target().ravel()).tolist() == [40 * 24, 40 * 24]
    advice = read_through(find(section(tmp_path))[0]).readings["train"][0].error
    assert f"data.values=[0, {value}]" in advice or f"data.ignore_index={value}" in advice


def write_scene(root: Path, name: str, mask: np.ndarray) -> None:
    import rasterio

    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    for folder, content in (("images", np.zeros(mask.shape, np.uint8)), ("masks", mask)):
        path = root / folder / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = {"height": mask.shape[0], "width": mask.shape[1], "count": 1}
        with rasterio.open(path, "w", driver="GTiff", dtype=content.dtype, **size, **place) as file:
            file.write(content, 1)


def write_volume(root: Path, name: str, mask: np.ndarray) -> None:
    import nibabel

    for folder, content in (("images", np.zeros(mask.shape, np.float32)), ("masks", mask)):
        path = root / folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(content[..., None], np.eye(4), dtype=content.dtype), path)


WRITERS = {"geotiff": write_scene, "nifti": write_volume}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("dtype", "value", "ignored"),
    [("i4", 312782560, -1), ("i2", -5, -9999), ("u4", 2**32 - 1, 70000), ("f4", 65536, -1), ("f8", 312782561, -7)],
)
def test_any_integer_of_a_mask_file_can_be_a_class_in_every_format(tmp_path, form, dtype, value, ignored):
    mask = np.zeros((40, 48), dtype)
    mask[:, 16:32], mask[:, 32:] = value, ignored
    WRITERS[form](tmp_path, "a", mask)
    data = DATA[form](format=form, root=tmp_path, classes=2, values=[0, value], ignore_index=ignored)
    (sample,), _, problems = formats.find(data)
    assert not problems
    found = sample.target()
    assert {k: int((found == k).sum()) for k in (0, 1, IGNORE)} == {0: 640, 1: 640, IGNORE: 640}


@pytest.mark.parametrize("form", WRITERS)
def test_masks_with_nan_are_refused_by_name_in_every_format(tmp_path, form):
    mask = np.zeros((40, 48), np.float32)
    mask[3, 4] = np.nan
    WRITERS[form](tmp_path, "broken", mask)
    samples, classes, problems = formats.find(DATA[form](format=form, root=tmp_path, classes=2))
    assert not problems
    (reading,) = read_through(Dataset(classes, {"train": samples})).readings["train"]
    assert "masks/broken" in reading.error
    assert "NaN" in reading.error


def test_unknown_values_are_named_with_the_likely_remedy():
    labels = Labels.of(section(Path("x")))
    with pytest.raises(UserError, match=r"m.png: the mask has 255.*data.values=\[0, 255\]"):
        labels.of_mask(np.array([[0, 255]], np.uint8), "m.png")
    with pytest.raises(UserError, match=r"m.png: the mask has 255.*data.ignore_index=255"):
        labels.of_mask(np.array([[0, 1, 255]], np.uint8), "m.png")
    with pytest.raises(UserError, match=r"m.png: the mask has -1.*data.ignore_index=-1"):
        labels.of_mask(np.array([[0, -1]], np.int16), "m.png")
    with pytest.raises(UserError, match=r"data\.colors"):
        labels.of_mask(np.array([[[0, 0, 0], [60, 16, 152]]], np.uint8), "m.png")


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


def test_grey_masks_that_were_saved_in_colour_are_numbers(tmp_path):
    grey = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (40, 48))
    colour = np.repeat(grey[..., None], 3, axis=2)
    write(tmp_path, ["train/a", "val/b"], colour)
    dataset, problems = find(section(tmp_path, values=[0, 255]))
    assert problems == []
    assert np.array_equal(dataset.samples[0].target(), grey // 255)
    labels = Labels.of(section(tmp_path, colors={"no": "#000000", "yes": "#FFFFFF"}))
    assert np.array_equal(labels.of_mask(colour, "a"), grey // 255)


def test_builtin_scenes_use_every_digit_once():
    data = recipe.load("segmentation/quickstart").data
    found, problems = find(data)
    assert not problems
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 875, "val": 125, "test": 250}
    sample = found.splits["test"][0]
    image, mask = sample.image(), sample.target()
    assert image.shape == (1, 64, 64)
    assert ((image[0] == 0) == (mask == 0)).all()
    assert set(np.unique(mask)) - {0, IGNORE} == set((sample.numbers + 1).tolist())


@pytest.mark.parametrize("form", sorted(DATA))
def test_every_format_takes_the_keys_of_every_data_set(form):
    keys = {"root": "x", "classes": 2} if form != "builtin" else {}
    data = DATA[form](format=form, **keys, lists={"train": "t.txt"}, skip_bad=True, val_fraction=0.3, test_fraction=0.1)
    assert (data.lists.train, data.skip_bad) == (Path("t.txt").absolute(), True)
    assert (data.val_fraction, data.test_fraction) == (0.3, 0.1)


@pytest.mark.parametrize("name", ["images/.hidden.png", "images/._a.png", "images/@eaDir/a.png", "@eaDir/images/a.png"])
@pytest.mark.parametrize("top", ["", "__MACOSX/"])
def test_what_systems_leave_is_neither_an_image_nor_a_mask(tmp_path, name, top):
    write(tmp_path, ["a", "b", "c", "d", "e"])
    for part in (name, name.replace("images", "masks", 1)):
        path = tmp_path / top / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "images/a.png").read_bytes())
    found, problems = find(section(tmp_path))
    assert not problems
    assert sorted(sample.name for sample in found.samples) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("place", ["up", "images/up", "masks/up", "images/deep/up"])
def test_a_link_to_a_folder_above_does_not_multiply_the_pairs(tmp_path, place):
    write(tmp_path / "in", ["a", "b", "c", "d", "e"])
    link = tmp_path / "in" / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "in", target_is_directory=True)
    found, problems = find(section(tmp_path / "in"))
    assert not problems
    assert sorted(sample.name for sample in found.samples) == ["a", "b", "c", "d", "e"]


def test_links_to_each_other_s_parents_end(tmp_path):
    for one, other in (("x", "y"), ("y", "x")):
        write(tmp_path / one, ["a", "b", "c"])
        for k in range(12):
            (tmp_path / one / f"images/to{k}").symlink_to(tmp_path / other, target_is_directory=True)
    found, problems = find(section(tmp_path))
    assert not problems
    assert sorted(sample.name for sample in found.samples) == ["x/a", "x/b", "x/c", "y/a", "y/b", "y/c"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_that_differ_in_unicode_normalisation_only_are_one_name(tmp_path, forms):
    names = ["Zürich_é", "naïve", "Ångström/über", "plain", "가나"]
    for folder, form in zip(("images", "masks"), forms, strict=True):
        for name in names:
            write(tmp_path / "all", [unicodedata.normalize(form, name)])
            source = tmp_path / "all" / folder / f"{unicodedata.normalize(form, name)}.png"
            target = tmp_path / "in" / folder / f"{unicodedata.normalize(form, name)}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
    found, problems = find(section(tmp_path / "in"))
    assert not problems
    assert {sample.name for sample in found.samples} == {unicodedata.normalize("NFC", name) for name in names}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_list_files_name_images_in_either_normalisation(tmp_path, form):
    write(tmp_path, [unicodedata.normalize("NFD", "Zürich"), "Genève", "Bern"])
    lists = {}
    for part, names in (("train", ["Zürich", "Bern"]), ("val", ["Genève"])):
        lists[f"lists.{part}"] = tmp_path / f"{part}.txt"
        (tmp_path / f"{part}.txt").write_text("\n".join(unicodedata.normalize(form, name) for name in names))
    found, problems = find(section(tmp_path, **lists))
    assert not problems
    assert names_of(found) == {"train": ["Zürich", "Bern"], "val": ["Genève"]}
