"""From a data section to splits and batches: every format, every refusal, and batches that depend on the seed only."""

import hashlib
import pickle
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from visionattn.data.datamodule import ClassificationDataModule
from visionattn.data.labelled import LabelledImages, find, find_labelled, prepare
from visionattn.errors import UserError
from visionattn.recipe import Augment, BuiltinData, ClassificationData, CsvData, FolderData, NpzData

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


def folder_data(root: Path, **keys) -> FolderData:
    return FolderData(format="folder", root=root, **SMALL | keys)


def npz_data(path: Path, arrays: dict[str, np.ndarray], **keys) -> NpzData:
    np.savez(path, **arrays)
    return NpzData(format="npz", root=path, **SMALL | keys)


def arrays(
    count: int = 12, shape: tuple[int, ...] = (28, 28), labels: np.ndarray | None = None, dtype=np.uint8
) -> dict:
    rng = np.random.default_rng(0)
    labels = np.arange(count)[:, None] % 3 if labels is None else labels
    images = {f"{s}_images": rng.integers(0, 256, (count, *shape), dtype=np.uint8) for s in ("train", "val", "test")}
    return images | {f"{s}_labels": labels for s in ("train", "val", "test")}


def counts(found: LabelledImages) -> dict[str, list[int]]:
    return {name: split.counts(len(found.classes)).tolist() for name, split in found.splits.items()}


def test_folder_with_all_splits(tmp_path):
    root = folders(tmp_path, train__b=3, train__a=2, val__a=1, val__b=1, test__b=2)
    found = find(folder_data(root))
    assert found.classes == ["a", "b"]
    assert counts(found) == {"train": [2, 3], "val": [1, 1], "test": [0, 2]}
    assert found.splits["train"].names[0] == "train/a/000.png"
    assert found.splits["train"].images[0] == root / "train/a/000.png"
    assert found.splits["train"].labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("inside", ["train__", ""], ids=["train only", "one folder"])
def test_folder_splits_are_drawn_by_class(tmp_path, inside):
    root = folders(tmp_path, **{f"{inside}a": 20, f"{inside}b": 10})
    found = find(folder_data(root))
    assert counts(found) == {"train": [16, 8], "val": [4, 2]}
    again, other = find(folder_data(root)), find(folder_data(root, split_seed=1))
    assert again.splits["val"].names == found.splits["val"].names != other.splits["val"].names
    assert not set(found.splits["train"].names) & set(found.splits["val"].names)


def test_test_fraction_is_drawn_first(tmp_path):
    root = folders(tmp_path, a=20, b=20)
    found = find(folder_data(root, test_fraction=0.25))
    assert counts(found) == {"train": [11, 11], "val": [4, 4], "test": [5, 5]}
    other = find(folder_data(root, test_fraction=0.25, fold=1))
    assert other.splits["test"].names == found.splits["test"].names


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
        find(folder_data(folders(tmp_path, **tree), **keys))


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
    assert found.splits["train"].names[7] == "train[7]"


def test_npz_with_several_labels(tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (12, 5))
    found = find(npz_data(tmp_path / "a.npz", arrays(labels=labels)))
    assert found.multi_label
    assert found.splits["val"].labels.dtype == np.float32
    assert np.array_equal(found.splits["val"].labels, labels)


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        ({"val_labels": None}, {}, "missing val_labels; it has .*train_images"),
        ({"val_labels": None, "val_images": None}, {}, "no validation images; add a val split$"),
        ({"val_images": np.zeros((12, 9, 9), np.uint8)}, {}, "image shapes are"),
        ({"val_labels": np.zeros((7, 1), int)}, {}, r"val_labels has shape \(7, 1\) for 12 images"),
        ({"train_labels": np.full((12, 1), 0.5)}, {}, "float64 values"),
        ({"train_labels": np.full((12, 3), 2)}, {}, "values to 2, expected 0 and 1"),
        ({"train_labels": np.eye(12, dtype=int)}, {}, "label shapes differ"),
        ({"train_labels": np.full((12, 1), 2)}, {}, "no training image of 0, 1"),
        ({}, {"classes": ["a", "b"]}, "data.classes has 2 names, but .* 3 classes"),
        ({}, {"channels": 4}, "data.channels is 4, but the images of .* have 1"),
    ],
)
def test_npz_refusals(tmp_path, change, keys, message):
    content = {key: value for key, value in (arrays() | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        find(npz_data(tmp_path / "a.npz", content, **keys))


def test_npz_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_text("hello")
    np.savez(tmp_path / "b.npz", train_images=np.array([{}], dtype=object))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UserError, match=f"{name}: not readable as .npz of plain arrays"):
            find(NpzData(format="npz", root=tmp_path / name))
    with pytest.raises(UserError, match=r"gone\.npz: no such file"):
        find(NpzData(format="npz", root=tmp_path / "gone.npz"))


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Names of 40 image files in tmp_path."""
    return [write(tmp_path / f"{i}.png", i).name for i in range(40)]


def csv_data(path: Path, **keys) -> CsvData:
    return CsvData(format="csv", root=path, **SMALL | keys)


def test_csv_draws_splits(tmp_path, images):
    path = table(tmp_path / "t.csv", "path,label", [f"{p}, {'ab'[i % 2]} " for i, p in enumerate(images)])
    found = find(csv_data(path, test_fraction=0.1))
    assert found.classes == ["a", "b"]
    assert counts(found) == {"train": [14, 14], "val": [4, 4], "test": [2, 2]}
    for split in found.splits.values():
        assert all(int(Path(n).stem) % 2 == k for n, k in zip(split.names, split.labels, strict=True))


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
    assert found.multi_label
    together = np.concatenate([split.labels for split in found.splits.values()])
    assert together.sum(0).tolist() == [20, 20, 10]
    assert len(found.splits["val"]) == 8
    assert found.splits["val"].labels.sum(0).tolist() == [4, 4, 2]


@pytest.mark.parametrize("separator", [None, "|"])
@pytest.mark.parametrize(
    "keys", [{}, {"test_fraction": 0.2}, {"fold": 2, "folds": 4}], ids=["val", "val, test", "fold"]
)
def test_groups_stay_together(tmp_path, images, separator, keys):
    rows = [f"{p},{'ab'[i % 2]},patient{i // 4}" for i, p in enumerate(images)]
    path = table(tmp_path / "t.csv", "path,label,patient", rows)
    found = find(csv_data(path, group_column="patient", label_separator=separator, **keys))
    homes = [set(split.groups) for split in found.splits.values()]
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
        find(csv_data(table(tmp_path / "t.csv", header, [row.format(p) for p in images]), **keys))


def test_csv_groups_across_given_splits_are_refused(tmp_path, images):
    rows = [f"{p},{'ab'[i % 2]},{'train' if i < 30 else 'val'},g{i // 4}" for i, p in enumerate(images)]
    path = table(tmp_path / "t.csv", "path,label,part,who", rows)
    with pytest.raises(UserError, match=r"in more than one split: g7 \(train, val\)"):
        find(csv_data(path, split_column="part", group_column="who"))


def test_csv_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv: not readable as a table \(No such file"):
        find(csv_data(tmp_path / "gone.csv"))
    with pytest.raises(UserError, match="no rows below the header"):
        find(csv_data(table(tmp_path / "t.csv", "path,label", [])))


@pytest.mark.parametrize(("name", "size", "count"), [("mnist_5k", 28, 5000), ("digits", 8, 1797)])
def test_builtin(name, size, count):
    found = find(BuiltinData(format="builtin", name=name, test_fraction=0.1))
    assert found.classes == list("0123456789")
    assert sum(map(len, found.splits.values())) == count
    images = found.splits["train"].images
    assert images.shape[1:] == (size, size)
    assert (images.dtype, images.min(), images.max()) == (np.uint8, 0, 255)


def test_folds_partition_train_and_val(tmp_path):
    root = folders(tmp_path, train__a=12, train__b=18, val__a=8, val__b=2, test__a=3)
    found = [find(folder_data(root, fold=k, folds=4)) for k in range(4)]
    held = [set(f.splits["val"].names) for f in found]
    whole = find(folder_data(root)).splits
    assert set.union(*held) == {*whole["train"].names, *whole["val"].names}
    assert sum(map(len, held)) == 40
    for f, names in zip(found, held, strict=True):
        assert counts(f) == {"train": [15, 15], "val": [5, 5], "test": [3, 0]}
        assert not names & set(f.splits["train"].names)


def test_other_images_are_read_with_the_trained_classes(tmp_path):
    data = folder_data(folders(tmp_path / "own", a=9, b=9), classes=["a", "b"])
    assert counts(find_labelled(data)) == counts(find(data))
    assert counts(find_labelled(data, folders(tmp_path / "new", b=3))) == {"all": [0, 3]}
    with pytest.raises(UserError, match="in the data: c"):
        find_labelled(data, folders(tmp_path / "odd", c=3))
    (tmp_path / "odd/b").mkdir()
    (tmp_path / "odd/b/x.png").touch()
    shutil.rmtree(tmp_path / "odd/c")
    with pytest.raises(UserError, match=r"1 of 1 images cannot be used.*\n.*x\.png: not an image"):
        find_labelled(data, tmp_path / "odd")
    path = table(tmp_path / "t.csv", "path,label", ["own/a/000.png,b"])
    assert counts(find_labelled(data, path)) == {"all": [0, 1]}
    np.savez(tmp_path / "t.npz", test_images=np.zeros((2, 8, 8), np.uint8), test_labels=np.array([[1], [1]]))
    assert counts(find_labelled(data, tmp_path / "t.npz")) == {"test": [0, 2]}


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
    assert "2 unreadable images are left out" in caplog.text
    assert counts(find_labelled(folder_data(root, skip_bad=True))) == counts(found)
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


AUGMENT = Augment(vflip=0.5, rotate=20.0, jitter=0.3, policy="randaugment", erasing=0.3)


def module(root: Path, seed: int = 0, **keys) -> ClassificationDataModule:
    return ClassificationDataModule(*prepare(folder_data(root, **{"augment": AUGMENT, **keys})), seed)


def epoch(loader: DataLoader, number: int = 0) -> str:
    """Fingerprint of all batches of an epoch."""
    loader.sampler.set_epoch(number)
    digest = hashlib.sha256()
    for batch in loader:
        for key in ("image", "label", "index"):
            digest.update(batch[key].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def tree(tmp_path) -> Path:
    return folders(tmp_path, train__a=9, train__b=14, val__a=3, val__b=3)


def test_batches(tree):
    data = module(tree)
    batches = list(data.train_dataloader())
    assert len(batches) == 5  # 23 images: the incomplete batch is left out
    assert batches[0]["image"].shape == (4, 3, 32, 32)
    assert batches[0]["image"].dtype == torch.float32
    assert batches[0]["label"].dtype == batches[0]["index"].dtype == torch.int64
    labels = torch.as_tensor(data.images.splits["train"].labels)
    assert all(torch.equal(labels[b["index"]], b["label"]) for b in batches)
    held = [i for b in data.val_dataloader() for i in b["index"].tolist()]
    assert held == list(range(6))
    with pytest.raises(UserError, match="no test images; there are: train, val"):
        data.test_dataloader()


def test_batches_depend_on_seed_and_epoch_only(tree):
    alone, workers = module(tree, workers=0), module(tree, workers=2)
    first, later = (epoch(alone.train_dataloader(), n) for n in (0, 3))
    assert first != later
    loader = workers.train_dataloader()
    torch.rand(7)
    assert [epoch(loader, n) for n in (0, 1, 3)][::2] == [first, later]
    assert epoch(module(tree, seed=1).train_dataloader()) != first


def test_loading_leaves_the_global_generator_alone(tree):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epoch(module(tree, workers=0).train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_datasets_can_be_sent_to_other_processes(tree):
    dataset = module(tree).train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[2, 5]["image"], dataset[2, 5]["image"])
    assert not torch.equal(copy[2, 5]["image"], dataset[5]["image"])


class Watch(pl.LightningModule):
    """Takes down which images came in which epoch, and the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[int]] = {}
        self.shapes: set = set()

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
        self.shapes.add(("train", *batch["label"].shape))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.shapes.add(("val", *batch["label"].shape))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**keys) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **keys})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_training_sees_another_order_each_epoch_and_the_same_after_a_resume(tree, tmp_path, workers):
    whole, first, rest = Watch(), Watch(), Watch()
    trainer(max_epochs=4).fit(whole, module(tree, workers=workers))
    saving = [ModelCheckpoint(tmp_path / "saved", "last", save_on_train_epoch_end=True, enable_version_counter=False)]
    kept = {"enable_checkpointing": True, "callbacks": saving}
    trainer(max_epochs=2, **kept).fit(first, module(tree, workers=workers))
    trainer(max_epochs=4, **kept).fit(rest, module(tree, workers=workers), ckpt_path=tmp_path / "saved/last.ckpt")
    assert len({tuple(order) for order in whole.seen.values()}) == 4
    assert whole.seen == first.seen | rest.seen
    loader = module(tree).train_dataloader()
    loader.sampler.set_epoch(3)
    assert whole.seen[3] == [i for _, i in loader.sampler][:20]


@pytest.mark.parametrize("mixes", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_mixed_labels_in_training_only(tree, mixes):
    watch = Watch()
    trainer(max_epochs=1).fit(watch, module(tree, workers=0, augment=Augment(**mixes)))
    assert watch.shapes == {("train", 4, 2), ("val", 4), ("val", 2)}


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1]), torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1]])])
def test_mix_shares_images_and_labels_alike(labels):
    from visionattn.tasks.classification.transforms import mix_transform

    torch.manual_seed(0)
    pictures = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    image, label = mix_transform(Augment(mixup=1.0), 3)(pictures, labels)
    hot = torch.nn.functional.one_hot(labels, 3).float() if labels.ndim == 1 else labels
    share = image[1, 0, 0, 0]  # of picture 1 over picture 0
    torch.testing.assert_close(label[1], share * hot[1] + (1 - share) * hot[0])
    assert mix_transform(Augment(), 3) is None


def test_balanced_sampling_draws_every_class_alike(tmp_path):
    root = folders(tmp_path, train__a=60, train__b=6, val__a=1, val__b=1)
    loader = module(root, balanced_sampling=True).train_dataloader()
    labels = loader.dataset.labels
    drawn, orders = [], set()
    for number in range(40):
        loader.sampler.set_epoch(number)
        order = [i for _, i in loader.sampler]
        orders.add(tuple(order))
        drawn += labels[order].tolist()
    assert len(orders) == 40
    assert 0.45 < np.mean(drawn) < 0.55
    several = arrays(labels=np.random.default_rng(0).integers(0, 2, (12, 5)))
    with pytest.raises(UserError, match="balanced_sampling is true, but images have several labels"):
        ClassificationDataModule(*prepare(npz_data(tmp_path / "a.npz", several, balanced_sampling=True)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_an_epoch(monkeypatch, shuffle):
    from visionattn.data.loaders import EpochSampler

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        sampler = EpochSampler(20, seed=1, shuffle=shuffle)
        sampler.set_epoch(5)
        parts.append([i for _, i in sampler])
        assert len(sampler) == len(parts[-1])
    together = sorted(i for part in parts for i in part)
    assert len(set(together)) == len(together) == (18 if shuffle else 20)
    if shuffle:
        assert {len(part) for part in parts} == {6}


def dtypes(channels: int) -> list[torch.Tensor]:
    image = torch.rand(channels, 50, 40)
    return [image, (image * 255).to(torch.uint8)]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("resize", ["crop", "squash", "none"])
@pytest.mark.parametrize("size", [32, [32, 36]])
def test_transforms_give_the_size_asked_for(channels, resize, size):
    from visionattn.tasks.classification.transforms import eval_transform, train_transform

    augment = Augment(rotate=10.0, vflip=0.5, erasing=0.5, jitter=0.2 if channels < 5 else 0.0)
    statistics = {"channels": channels, "mean": [0.5] * channels, "std": [0.25] * channels}
    keys = {"image_size": size, "resize": resize, "augment": augment} | statistics
    data = FolderData(format="folder", root=Path(), **keys)
    for image in dtypes(channels):
        for transform in (train_transform(data), eval_transform(data)):
            result = transform(image)
            assert result.shape == (channels, 32, 32 if size == 32 else 36)
            assert result.dtype == torch.float32


def settings(**keys) -> ClassificationData:
    statistics = {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    return FolderData(format="folder", root=Path(), **{"image_size": 32, **statistics, **keys})


def test_evaluation_geometry():
    from visionattn.tasks.classification.transforms import eval_transform

    half = torch.zeros(3, 40, 80)
    half[:, :, 40:] = 1
    assert torch.equal(eval_transform(settings(resize="none", image_size=40))(half), half[:, :, 20:60] * 2 - 1)
    squashed = eval_transform(settings(resize="squash", interpolation="nearest"))(half)
    assert (squashed[:, :, :16] == -1).all()
    assert (squashed[:, :, 16:] == 1).all()
    covered = eval_transform(settings(crop_pct=0.8, interpolation="nearest"))(half)  # 40 x 80, its centre
    assert torch.equal(covered, half[:, 4:36, 24:56] * 2 - 1)
    assert eval_transform(settings())(torch.zeros(3, 5, 3)).shape == (3, 32, 32)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "trivialaugment", "augmix"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies(policy, channels):
    from visionattn.tasks.classification.transforms import train_transform

    statistics = {"channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
    transform = train_transform(settings(augment=Augment(policy=policy), **statistics))
    torch.manual_seed(0)
    for image in dtypes(channels) * 10:
        assert transform(image).isfinite().all()


@pytest.mark.parametrize(
    ("augment", "channels", "message"),
    [
        (Augment(policy="augmix"), 5, "policy is augmix, .* defined for 1 or 3 channels; the images have 5"),
        (Augment(jitter=0.1), 2, "jitter is 0.1"),
        (Augment(crop_scale=[1.0, 0.5]), 3, r"crop_scale is \[1.0, 0.5\], expected \[smallest, largest\]"),
        (Augment(crop_ratio=[2.0, 0.5]), 3, "crop_ratio"),
    ],
)
def test_augmentations_that_cannot_be_are_refused(augment, channels, message):
    from visionattn.tasks.classification.transforms import train_transform

    with pytest.raises(UserError, match=message):
        train_transform(settings(augment=augment, channels=channels, mean=[0.5] * channels, std=[0.5] * channels))
