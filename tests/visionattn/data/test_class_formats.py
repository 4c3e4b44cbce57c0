"""From a data section to splits: every format of images with labels, every refusal, and what is filled in."""

import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats
from visionattn.data.sample import Dataset
from visionattn.data.splits import given_splits, split
from visionattn.data.survey import read_through, usable
from visionattn.errors import UserError
from visionattn.runs import fit
from visionattn.tasks.classification.recipe import DATA, Data, Recipe

SMALL = {"image_size": 32, "batch_size": 4}


def write(path: Path, value: int = 0, size: tuple[int, int] = (40, 36), channels: int = 3) -> Path:
    """A noise image that no other value has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)
    return path


def folders(root: Path, **counts: int) -> Path:
    """A folder tree: folders(root, train__cat=3) writes three images to root/train/cat."""
    value = 0
    for name, count in counts.items():
        (root / name.replace("__", "/")).mkdir(parents=True)
        for i in range(count):
            write(root / name.replace("__", "/") / f"{i:03}.png", value := value + 1)
    return root


def table(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def folder_data(root: Path, **keys) -> Data:
    return DATA["folder"](format="folder", root=root, **SMALL | keys)


def npz_data(path: Path, arrays: dict[str, np.ndarray], **keys) -> Data:
    np.savez(path, **arrays)
    return DATA["npz"](format="npz", root=path, **SMALL | keys)


def arrays(
    count: int = 12, shape: tuple[int, ...] = (28, 28), labels: np.ndarray | None = None, dtype=np.uint8
) -> dict:
    rng = np.random.default_rng(0)
    labels = np.arange(count)[:, None] % 3 if labels is None else labels
    images = {f"{s}_images": rng.integers(0, 256, (count, *shape), dtype=np.uint8) for s in ("train", "val", "test")}
    return images | {f"{s}_labels": labels for s in ("train", "val", "test")}


def find(section: Data) -> Dataset:
    """The splits of a section, nothing opened that need not be."""
    samples, classes, problems = formats.find(section)
    dataset, more = split(samples, classes, section)
    assert problems == more == []
    return dataset


def prepare(section: Data) -> tuple[Dataset, Data]:
    """What `fit` would train on, and the section with what it fills in."""
    trainer = {"accelerator": "cpu"}
    spec = Recipe(task="classification", model={"name": "test_resnet"}, data=section, trainer=trainer)
    spec, dataset, _ = fit.prepare(spec)
    return dataset, spec.data


def find_elsewhere(section: Data, root: Path) -> Dataset:
    """Other labelled images for a model that was trained with a section, as `evaluate` reads them."""
    other = formats.elsewhere(section, root)
    samples, classes, problems = formats.find(other)
    splits, more = given_splits(samples, other)
    assert problems == more == []
    return usable(read_through(Dataset(classes, splits)), other.skip_bad)


def labels_of(dataset: Dataset, part: str) -> np.ndarray:
    return np.stack([sample.label for sample in dataset.splits[part]])


def names_of(dataset: Dataset, part: str) -> list[str]:
    return [sample.name for sample in dataset.splits[part]]


def counts(dataset: Dataset) -> dict[str, list[int]]:
    """Images of each class in each split."""
    classes = range(len(dataset.classes))
    found = {}
    for part in dataset.splits:
        labels = labels_of(dataset, part)
        found[part] = [int((labels == k).sum() if labels.ndim == 1 else labels[:, k].sum()) for k in classes]
    return found


def test_folder_with_all_splits(tmp_path):
    root = folders(tmp_path, train__b=3, train__a=2, val__a=1, val__b=1, test__b=2)
    found = find(folder_data(root))
    assert found.classes == ["a", "b"]
    assert counts(found) == {"train": [2, 3], "val": [1, 1], "test": [0, 2]}
    assert names_of(found, "train")[0] == "train/a/000.png"
    assert found.splits["train"][0].path == root / "train/a/000.png"
    assert labels_of(found, "train").tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("inside", ["train__", ""], ids=["train only", "one folder"])
def test_folder_splits_are_drawn_by_class(tmp_path, inside):
    root = folders(tmp_path, **{f"{inside}a": 20, f"{inside}b": 10})
    found = find(folder_data(root))
    assert counts(found) == {"train": [16, 8], "val": [4, 2]}
    again, other = find(folder_data(root)), find(folder_data(root, split_seed=1))
    assert names_of(again, "val") == names_of(found, "val") != names_of(other, "val")
    assert not set(names_of(found, "train")) & set(names_of(found, "val"))


def test_test_fraction_is_drawn_first(tmp_path):
    root = folders(tmp_path, a=20, b=20)
    found = find(folder_data(root, test_fraction=0.25))
    assert counts(found) == {"train": [11, 11], "val": [4, 4], "test": [5, 5]}
    other = find(folder_data(root, test_fraction=0.25, fold=1))
    assert names_of(other, "test") == names_of(found, "test")


@pytest.mark.parametrize(
    ("tree", "keys", "message"),
    [
        ({}, {}, "no images in"),
        ({"a": 5, "b": 0, "c": 0}, {}, "no images in .*b, .*c"),
        ({"train__a": 5, "train__b": 5, "val__a": 0, "val__b": 2}, {}, "no images in .*val/a"),
        ({"train__a": 5, "train__b": 5, "val__a": 1, "val__c": 2, "val__d": 1}, {}, "no training image of c, d"),
        ({"a": 9}, {}, r"only one class \(a\)"),
        ({"a": 5, "b": 1, "c": 1}, {}, r"too few in: b \(1\), c \(1\)"),
        ({"a": 2, "b": 2}, {}, "batch_size is 4, but there are only 2 training images"),
        ({"a": 8, "b": 8}, {"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"a": 8, "b": 8}, {"val_fraction": 0.0}, "no validation images"),
        ({"a": 8, "b": 4}, {"fold": 0}, r"folds is 5 needs at least 5 images in every class; too few in: b \(4\)"),
        ({"train__a": 5, "valid__a": 5}, {}, r"rename valid \(expected val\)"),
        ({"val__a": 5, "val__b": 5}, {}, "no training images; there are only: val"),
        ({"a": 9, "b": 9}, {"classes": ["a", "c"]}, r"not in data.classes \(a, c\) but in the data: b"),
        ({"a": 9, "b": 9}, {"classes": ["a", "b", "c", "d"]}, "no training image of c, d"),
        ({"a": 9, "b": 9}, {"classes": ["a", "b", "a"]}, "names twice: a"),
    ],
)
def test_folder_refusals(tmp_path, tree, keys, message):
    with pytest.raises(UserError, match=message):
        prepare(folder_data(folders(tmp_path, **tree), **keys))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone is missing, expected a folder"):
        find(folder_data(tmp_path / "gone"))


def test_long_lists_of_offenders_are_cut(tmp_path):
    tree = {f"c{i:02}": 0 for i in range(30)}
    with pytest.raises(UserError, match="c19, and 10 more"):
        find(folder_data(folders(tmp_path, **tree)))


def test_classes_fix_the_order(tmp_path):
    found = find(folder_data(folders(tmp_path, a=10, b=5), classes=["b", "a"]))
    assert found.classes == ["b", "a"]
    assert counts(found)["train"] == [4, 8]


def test_numbers_as_class_names_are_in_the_order_of_their_values(tmp_path):
    assert find(folder_data(folders(tmp_path, **{"10": 4, "9": 4, "2": 4}))).classes == ["2", "9", "10"]


@pytest.mark.parametrize(("shape", "channels"), [((28, 28), 1), ((28, 28, 1), 1), ((28, 28, 3), 3), ((8, 8, 6), 6)])
def test_npz_images(tmp_path, shape, channels):
    found, data = prepare(npz_data(tmp_path / "a.npz", arrays(shape=shape)))
    assert found.classes == ["0", "1", "2"]
    assert counts(found) == {split: [4, 4, 4] for split in ("train", "val", "test")}
    assert (data.channels, len(data.mean), len(data.std)) == (channels, channels, channels)
    assert names_of(found, "train")[7] == "train[7]"


def test_npz_with_several_labels(tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (12, 5))
    found = find(npz_data(tmp_path / "a.npz", arrays(labels=labels)))
    assert labels_of(found, "val").dtype == np.float32
    assert np.array_equal(labels_of(found, "val"), labels)


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        ({"val_labels": None}, {}, "missing val_labels; it has .*train_images"),
        (
            {"val_labels": None, "val_images": None},
            {},
            "no validation images; add a val split, or set data.val_fraction",
        ),
        ({"val_images": np.zeros((12, 9, 9), np.uint8)}, {}, "image shapes are"),
        ({"val_labels": np.zeros((7, 1), int)}, {}, r"val_labels has shape \(7, 1\) for 12 images"),
        ({"train_labels": np.full((12, 1), 0.5)}, {}, "float64 values"),
        ({"train_labels": np.full((12, 3), 2)}, {}, "values to 2, expected 0 and 1"),
        ({"train_labels": np.eye(12, dtype=int)}, {}, "label shapes differ"),
        ({"train_labels": np.full((12, 1), 2)}, {}, "no training image of 0, 1"),
        ({}, {"classes": ["a", "b"]}, "data.classes has 2 names, but .* 3 classes"),
        ({}, {"channels": 4}, "data.channels is 4, but the images of .* have 1"),
        (arrays(2, (28, 28, 28)), {}, r"28x28x28 are volumes, .*; data\.channels=28 takes the last axis"),
        (arrays(2, (3, 28, 20)), {}, r"channels come last, \(N, H, W, C\); move the axis of 3"),
    ],
)
def test_npz_refusals(tmp_path, change, keys, message):
    content = {key: value for key, value in (arrays() | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        prepare(npz_data(tmp_path / "a.npz", content, **keys))


def test_npz_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_text("hello")
    np.savez(tmp_path / "b.npz", train_images=np.array([{}], dtype=object))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UserError, match=f"{name}: not readable as .npz of plain arrays"):
            find(DATA["npz"](format="npz", root=tmp_path / name))
    with pytest.raises(UserError, match=r"gone\.npz: no such file"):
        find(DATA["npz"](format="npz", root=tmp_path / "gone.npz"))


def test_several_labels_cannot_be_drawn_alike(tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (12, 5))
    with pytest.raises(UserError, match="balanced_sampling is true, but images have several labels"):
        prepare(npz_data(tmp_path / "a.npz", arrays(labels=labels), balanced_sampling=True))


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Names of 40 image files in tmp_path."""
    return [write(tmp_path / f"{i}.png", i).name for i in range(40)]


def csv_data(path: Path, **keys) -> Data:
    return DATA["csv"](format="csv", root=path, **SMALL | keys)


def test_csv_draws_splits(tmp_path, images):
    path = table(tmp_path / "t.csv", "path,label", [f"{p}, {'ab'[i % 2]} " for i, p in enumerate(images)])
    found = find(csv_data(path, test_fraction=0.1))
    assert found.classes == ["a", "b"]
    assert counts(found) == {"train": [14, 14], "val": [4, 4], "test": [2, 2]}
    assert all(int(Path(sample.name).stem) % 2 == sample.label for sample in found.samples)


def test_csv_with_its_own_splits_and_folder(tmp_path, images):
    rows = [
        f"{p},{'ab'[i % 2]},{('train', 'train', 'val', 'test')[i % 4 if i < 36 else 0]}" for i, p in enumerate(images)
    ]
    (tmp_path / "tables").mkdir()
    path = table(tmp_path / "tables/t.csv", "file,class,part", rows)
    names = {"path_column": "file", "label_column": "class", "split_column": "part"}
    found = find(csv_data(path, images=tmp_path, **names))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 22, "val": 9, "test": 9}


def test_csv_with_several_labels(tmp_path, images):
    texts = ["x|y", "y", "", "z|x"]
    path = table(tmp_path / "t.csv", "path,label", [f"{p},{texts[i % 4]}" for i, p in enumerate(images)])
    found = find(csv_data(path, label_separator="|"))
    assert found.classes == ["x", "y", "z"]
    together = np.concatenate([labels_of(found, name) for name in found.splits])
    assert together.sum(0).tolist() == [20, 20, 10]
    assert len(found.splits["val"]) == 8
    assert labels_of(found, "val").sum(0).tolist() == [4, 4, 2]


@pytest.mark.parametrize("separator", [None, "|"])
@pytest.mark.parametrize(
    "keys", [{}, {"test_fraction": 0.2}, {"fold": 2, "folds": 4}], ids=["val", "val, test", "fold"]
)
def test_groups_stay_together(tmp_path, images, separator, keys):
    rows = [f"{p},{'ab'[i % 2]},patient{i // 4}" for i, p in enumerate(images)]
    path = table(tmp_path / "t.csv", "path,label,patient", rows)
    found = find(csv_data(path, group_column="patient", label_separator=separator, **keys))
    homes = [{sample.group for sample in split} for split in found.splits.values()]
    assert set.union(*homes) == {f"patient{i}" for i in range(10)}
    assert sum(map(len, homes)) == 10
    assert all(len(set(c)) == 1 for c in counts(found).values())  # every group has as many of a as of b


@pytest.mark.parametrize(
    ("header", "row", "keys", "message"),
    [
        ("path,lable", "{},a", {}, "label_column: .* no column 'label'; it has path, lable; did you mean lable?"),
        ("path,label", "{},", {}, "label is empty in line 2, 3"),
        ("path,label", "x{},a", {}, "40 of 40 files are missing: .*x0.png, .* and 20 more"),
        ("path,label", "0.png,a", {}, "listed more than once: 0.png, .*several labels of an image go into one row"),
        ("path,label,part", "{},a,valid", {"split_column": "part"}, "part has valid, expected train, val, test"),
        ("path,label,who", "{},a,me", {"group_column": "who"}, "1 group; at least 2"),
        ("path,label,who", "{},a,me", {"group_column": "who", "fold": 0}, "only 1 groups"),
    ],
)
def test_csv_refusals(tmp_path, images, header, row, keys, message):
    with pytest.raises(UserError, match=message):
        prepare(csv_data(table(tmp_path / "t.csv", header, [row.format(p) for p in images]), **keys))


def test_csv_groups_across_given_splits_are_refused(tmp_path, images):
    rows = [f"{p},{'ab'[i % 2]},{'train' if i < 30 else 'val'},g{i // 4}" for i, p in enumerate(images)]
    path = table(tmp_path / "t.csv", "path,label,part,who", rows)
    with pytest.raises(UserError, match=r"in more than one split: g7 \(train, val\)"):
        prepare(csv_data(path, split_column="part", group_column="who"))


@pytest.mark.parametrize("line", ["0.png,a,b", "0.png", '0.png,"a",b'])
@pytest.mark.parametrize("separator", [None, ","])
def test_csv_lines_that_do_not_fit_the_header_are_named(tmp_path, images, line, separator):
    rows = [f'{p},"a"' for p in images[1:]]
    path = table(tmp_path / "t.csv", "path,label", [*rows[:3], line, *rows[3:], line])
    with pytest.raises(UserError, match=r"more or fewer fields than the 2 of the header in line 5, 42; .* in quotes"):
        find(csv_data(path, label_separator=separator))


def test_csv_labels_with_commas_stand_in_quotes(tmp_path, images):
    path = table(tmp_path / "t.csv", "path,label", [f'{p},"{("a", "a,b")[i % 2]}"' for i, p in enumerate(images)])
    assert find(csv_data(path)).classes == ["a", "a,b"]
    found = find(csv_data(path, label_separator=","))
    assert np.concatenate([labels_of(found, name) for name in found.splits]).sum(0).tolist() == [40, 20]


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_csv_columns_are_separated_as_the_header_is(tmp_path, images, separator):
    rows = [f"{p}{separator}{'ab'[i % 2]}" for i, p in enumerate(images)]
    path = table(tmp_path / "t.csv", f"\ufeffpath{separator}label", rows)
    assert counts(find(csv_data(path))) == {"train": [16, 16], "val": [4, 4]}


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "null", "NA", "N/A", "<NA>", "NaT"])
@pytest.mark.parametrize("column", ["label", "labels", "who"])
def test_csv_cells_that_say_that_there_is_nothing_are_refused(tmp_path, images, text, column):
    keys = {"label": {}, "labels": {"label_separator": "|"}, "who": {"group_column": "who"}}[column]
    said = {"label": f"{text},g", "labels": f"a|{text},g", "who": f"a,{text}"}[column]
    rows = [f"{p},{'ab'[i % 2]},g{i // 4}" for i, p in enumerate(images[1:])]
    path = table(tmp_path / "t.csv", "path,label,who", [f"{images[0]},{said}", *rows])
    with pytest.raises(
        UserError, match=f"{column.rstrip('s')} says that there is none, .* in line 2; remove such rows"
    ):
        find(csv_data(path, **keys))
    if column != "who":  # a class may be called so
        assert text in formats.find(csv_data(path, classes=["a", "b", text], **keys)).classes


def test_csv_columns_of_one_name_are_refused(tmp_path, images):
    path = table(tmp_path / "t.csv", "path,label,label", [f"{p},a,b" for p in images])
    with pytest.raises(UserError, match=r"columns of one name: label"):
        find(csv_data(path))


def test_csv_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv: not readable as a table \(No such file"):
        find(csv_data(tmp_path / "gone.csv"))
    with pytest.raises(UserError, match="no rows below the header"):
        find(csv_data(table(tmp_path / "t.csv", "path,label", [])))


@pytest.mark.parametrize(("name", "size", "count"), [("mnist_5k", 28, 5000), ("digits", 8, 1797)])
def test_builtin(name, size, count):
    found = find(DATA["builtin"](format="builtin", name=name, test_fraction=0.1))
    assert found.classes == list("0123456789")
    assert sum(map(len, found.splits.values())) == count
    images = np.stack([sample.pixels for sample in found.splits["train"]])
    assert images.shape[1:] == (size, size)
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)


def test_folds_partition_train_and_val(tmp_path):
    root = folders(tmp_path, train__a=12, train__b=18, val__a=8, val__b=2, test__a=3)
    found = [find(folder_data(root, fold=k, folds=4)) for k in range(4)]
    held = [set(names_of(f, "val")) for f in found]
    whole = find(folder_data(root))
    assert set.union(*held) == {*names_of(whole, "train"), *names_of(whole, "val")}
    assert sum(map(len, held)) == 40
    for f, names in zip(found, held, strict=True):
        assert counts(f) == {"train": [15, 15], "val": [5, 5], "test": [3, 0]}
        assert not names & set(names_of(f, "train"))


def test_other_images_are_read_with_the_trained_classes(tmp_path):
    data = folder_data(folders(tmp_path / "own", a=9, b=9), classes=["a", "b"])
    assert counts(find_elsewhere(data, folders(tmp_path / "new", b=3))) == {"all": [0, 3]}
    with pytest.raises(UserError, match="in the data: c"):
        find_elsewhere(data, folders(tmp_path / "odd", c=3))
    (tmp_path / "odd/b").mkdir()
    (tmp_path / "odd/b/x.png").touch()
    shutil.rmtree(tmp_path / "odd/c")
    with pytest.raises(UserError, match=r"1 of 1 images cannot be used.*\n.*x\.png: not an image"):
        find_elsewhere(data, tmp_path / "odd")
    path = table(tmp_path / "t.csv", "path,label", ["own/a/000.png,b"])
    assert counts(find_elsewhere(data, path)) == {"all": [0, 1]}
    np.savez(tmp_path / "t.npz", test_images=np.zeros((2, 8, 8), np.uint8), test_labels=np.array([[1], [1]]))
    assert counts(find_elsewhere(data, tmp_path / "t.npz")) == {"test": [0, 2]}


def test_channels_mean_and_std_are_measured_on_training_images(tmp_path):
    root = folders(tmp_path, train__a=4, train__b=4, val__a=2, val__b=2)
    stack = np.stack([np.array(Image.open(p)) for p in sorted(root.glob("train/*/*"))]) / 255
    _, data = prepare(folder_data(root))
    assert data.channels == 3
    np.testing.assert_allclose(data.mean, stack.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(data.std, stack.std((0, 1, 2)), atol=1e-5)
    given = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    assert prepare(folder_data(root, **given))[1].model_dump(include=set(given)) == given
    with pytest.raises(UserError, match=r"data\.mean has 1 values, but the images have 3 channels"):
        prepare(folder_data(root, mean=[0.5]))
    assert len(prepare(folder_data(root, channels=1))[1].mean) == 1


def test_grey_only_images_have_one_channel(tmp_path):
    for i in range(16):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", i, channels=1)
    assert prepare(folder_data(tmp_path))[1].channels == 1
    write(tmp_path / "a" / "colour.png")
    assert prepare(folder_data(tmp_path))[1].channels == 3


def test_unreadable_images_are_refused_or_left_out(tmp_path, caplog):
    root = folders(tmp_path, train__a=6, train__b=6, val__a=2, val__b=2)
    for name in ("train/a/000.png", "val/b/001.png"):
        (root / name).write_bytes((root / name).read_bytes()[:300])
    with pytest.raises(UserError, match=r"(?s)2 of 16 images.*skip_bad.*train/a/000\.png.*val/b/001\.png"):
        prepare(folder_data(root))
    found, _ = prepare(folder_data(root, skip_bad=True))
    assert counts(found) == {"train": [5, 6], "val": [2, 1]}
    assert "2 images cannot be used and are left out" in caplog.text
    assert len(found.skipped) == 2
    for path in root.glob("train/a/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no training image of a"):
        prepare(folder_data(root, skip_bad=True))


def test_images_smaller_than_the_crop_are_refused_only_without_resizing(tmp_path):
    root = folders(tmp_path, a=6, b=6)
    write(root / "a/small.png", size=(50, 31))
    prepare(folder_data(root))
    with pytest.raises(UserError, match=r"smaller than data.image_size are: a/small.png \(50x31\)"):
        prepare(folder_data(root, resize="none"))


def test_an_npz_without_validation_draws_it_where_the_recipe_says_so(tmp_path):
    content = {key: value for key, value in arrays(30).items() if key.startswith("train")}
    found = find(npz_data(tmp_path / "a.npz", content, val_fraction=0.2))
    assert counts(found) == {"train": [8, 8, 8], "val": [2, 2, 2]}
    assert DATA["npz"](format="npz", root=tmp_path / "a.npz").val_fraction == 0


def labelled_sections(root: Path, **keys) -> dict[str, Data]:
    """Every format of images with a label, over 30 images or more."""
    folders(root / "tree", a=15, b=15)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    table(root / "t.csv", "path,label", [f"{file},{file.split('/')[1]}" for file in files])
    content = {key: value for key, value in arrays(30).items() if key.startswith("train")}
    return {
        "folder": folder_data(root / "tree", **keys),
        "csv": csv_data(root / "t.csv", **keys),
        "npz": npz_data(root / "a.npz", content, **keys),
        "builtin": DATA["builtin"](format="builtin", name="digits", **keys),
    }


@pytest.mark.parametrize("form", ["folder", "csv", "npz", "builtin"])
def test_every_format_draws_by_fraction_by_fold_and_by_lists(tmp_path, form):
    drawn = find(labelled_sections(tmp_path / "one", val_fraction=0.2, test_fraction=0.1)[form])
    total = len(drawn.samples)
    if form == "npz":  # whose samples are all of train, of which only val is drawn
        assert {name: len(part) for name, part in drawn.splits.items()} == {"train": 24, "val": 6}
    else:
        assert len(drawn.splits["val"]) == pytest.approx(0.2 * total, abs=2)
        assert len(drawn.splits["test"]) == pytest.approx(0.1 * total, abs=2)
    folded = find(labelled_sections(tmp_path / "two", fold=1, folds=3)[form])
    assert len(folded.splits["val"]) == pytest.approx(total / 3, abs=1)
    names = [sample.name for sample in drawn.samples]
    lists = {"train": names[5:20], "val": names[:3], "test": names[3:5]}
    for name, lines in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    given = {"lists": {name: tmp_path / f"{name}.txt" for name in lists}}
    listed = find(labelled_sections(tmp_path / "three", **given)[form])
    assert {name: names_of(listed, name) for name in listed.splits} == lists


def test_lists_that_name_images_twice_or_none_are_refused_with_the_line(tmp_path):
    folders(tmp_path / "tree", a=15, b=15)
    (tmp_path / "train.txt").write_text("a/000.png\nb/001.png\na/gone.png\n")
    (tmp_path / "val.txt").write_text("a/000.png\nb/002.png\n")
    lists = {name: tmp_path / f"{name}.txt" for name in ("train", "val")}
    with pytest.raises(
        UserError, match=r"(?s)train\.txt: no image called a/gone\.png.*a/000\.png is listed in train, val"
    ):
        prepare(folder_data(tmp_path / "tree", lists=lists))


def test_a_list_of_other_names_is_told_what_names_look_like(tmp_path):
    folders(tmp_path / "tree", a=15, b=15)
    (tmp_path / "train.txt").write_text("c/000.png\nc/001.png\n")
    message = r"train\.txt names no image of the data: c/000\.png, c/001\.png; expected names such as a/000\.png, "
    with pytest.raises(UserError, match=message):
        prepare(folder_data(tmp_path / "tree", lists={"train": tmp_path / "train.txt"}))


def test_a_list_that_is_no_text_is_refused(tmp_path):
    folders(tmp_path / "tree", a=15, b=15)
    with pytest.raises(UserError, match=r"data\.lists\.train: .*000\.png: not a text file"):
        prepare(folder_data(tmp_path / "tree", lists={"train": tmp_path / "tree/a/000.png"}))


@pytest.mark.parametrize("form", ["folder", "csv"])
def test_every_format_of_files_leaves_bad_ones_out(tmp_path, form):
    section = labelled_sections(tmp_path, skip_bad=True)[form]
    (tmp_path / "tree/a/004.png").write_bytes(b"no image")
    found, _ = prepare(section)
    assert len(found.samples) == 29
    assert len(found.skipped) == 1
    assert "a/004.png: not an image" in found.skipped[0]


@pytest.mark.parametrize("name", ["@eaDir/a.png/thumb.png", "a/@eaDir/thumb.png", "a/._000.png", "__MACOSX/a/000.png"])
def test_what_systems_leave_is_neither_a_class_nor_an_image(tmp_path, name):
    folders(tmp_path, a=10, b=10)
    write(tmp_path / name, 99)
    assert counts(find(folder_data(tmp_path))) == {"train": [8, 8], "val": [2, 2]}


@pytest.mark.parametrize("place", ["a/up", "b/deep/up"])
def test_a_link_to_a_folder_above_does_not_multiply_the_images_of_a_class(tmp_path, place):
    folders(tmp_path / "tree", a=10, b=10)
    link = tmp_path / "tree" / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "tree", target_is_directory=True)
    assert counts(find(folder_data(tmp_path / "tree"))) == {"train": [8, 8], "val": [2, 2]}


@pytest.mark.parametrize("form", ["folder", "csv"])
def test_names_that_differ_in_unicode_normalisation_only_are_one_name(tmp_path, form):
    composed, decomposed = (normalize(kind, "Zürich") for kind in ("NFC", "NFD"))
    tree = {f"train__{decomposed}": 4, f"val__{composed}": 4, f"train__{composed}": 2, "train__b": 4, "val__b": 4}
    folders(tmp_path / "tree", **tree)
    expected = {"train": [6, 4], "val": [4, 4]}
    if form == "folder":
        found = find(folder_data(tmp_path / "tree"))
    else:
        files = sorted(path.relative_to(tmp_path / "tree").as_posix() for path in tmp_path.rglob("*.png"))
        files = [file for file in files if not file.startswith(f"train/{composed}/")]
        rows = [f"{normalize('NFC', f)},{normalize('NFD', f.split('/')[1])},{f.split('/')[0]}" for f in files]
        shutil.rmtree(tmp_path / f"tree/train/{composed}")
        path = table(tmp_path / "t.csv", "path,label,part", rows)
        found = find(csv_data(path, images=tmp_path / "tree", split_column="part"))
        expected["train"] = [4, 4]
    assert found.classes == [composed, "b"]
    assert counts(found) == expected
