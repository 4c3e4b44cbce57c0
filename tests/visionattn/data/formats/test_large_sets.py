"""Tar shards and Hugging Face folders: the images and labels that went in, in whatever order they are read."""

import csv
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main
from visionattn.data import formats
from visionattn.data.splits import split
from visionattn.errors import UserError
from visionattn.tasks.classification.recipe import DATA


def pixels(value: int) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encoded(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(value)).save(stream, "PNG")
    return stream.getvalue()


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shards(root: Path, label=lambda i: ("cls", str(i % 2).encode())) -> Path:
    """Two of train with 6 samples each, one of val with 4."""
    for n, (name, count) in enumerate({"set-train-000": 6, "set-train-001": 6, "set-val-000": 4}.items()):
        files = {}
        for i in range(count):
            ending, content = label(i)
            files |= {f"{i:04}.png": encoded(100 * n + i), f"{i:04}.{ending}": content}
        tar(root / f"{name}.tar", files)
    return root


def section(name: str, root: Path, **keys):
    return DATA[name](format=name, root=root, image_size=32, batch_size=2, workers=0, **keys)


def test_images_and_labels_of_shards_are_those_that_went_in(tmp_path):
    found = formats.find(section("shards", shards(tmp_path / "a")))
    assert (found.classes, found.problems) == (["0", "1"], [])
    dataset, problems = split(found.samples, found.classes, section("shards", tmp_path / "a"))
    assert ({name: len(part) for name, part in dataset.splits.items()}, problems) == ({"train": 12, "val": 4}, [])
    for k in (11, 3, 7):  # in any order, in other processes too
        sample = pickle.loads(pickle.dumps(dataset.splits["train"][k]))
        np.testing.assert_array_equal(sample.image(), pixels(100 * (k // 6) + k % 6).transpose(2, 0, 1))
        assert sample.label == k % 6 % 2


def test_tar_files_are_looked_through_once_and_again_where_they_have_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    looked, whole = [], tarfile.open
    root = shards(tmp_path / "a")
    monkeypatch.setattr(tarfile, "open", lambda path, *mode: looked.append(path.name) or whole(path, *mode))
    first = formats.find(section("shards", root))
    assert len(looked) == 3
    assert formats.find(section("shards", root)) == first
    assert len(looked) == 3
    files = {"a.png": encoded(5), "a.cls": b"1", "b.png": encoded(6), "b.cls": b"broken\ntext"}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tar(root / "set-val-000.tar", files)
    for _ in range(2):  # what cannot be used is looked at each time
        found = formats.find(section("shards", root))
        assert [sample.name for sample in found.samples[12:]] == ["set-val-000.tar/a"]
        assert "set-val-000.tar/b" in found.problems[0]
    np.testing.assert_array_equal(found.samples[12].image(), pixels(5).transpose(2, 0, 1))
    assert formats.find(section("shards", root / "set-train-001.tar")).samples[3].name == "set-train-001.tar/0003"


def test_splits_are_what_shards_are_called_and_not_where_the_set_lies(tmp_path):
    root = tmp_path / "validation study"
    tar(root / "train-0.tar", {"a.png": encoded(0), "a.cls": b"0"})
    tar(root / "test" / "0.tar", {"a.png": encoded(1), "a.cls": b"1"})
    tar(root / "test" / "val-1.tar", {"a.png": encoded(2), "a.cls": b"1"})
    found = formats.find(section("shards", root, label=".CLS"))
    assert {sample.name: sample.split for sample in found.samples} == {
        "train-0.tar/a": "train", "test/0.tar/a": "test", "test/val-1.tar/a": "val",
    }  # fmt: skip
    alone = formats.find(section("shards", root / "test" / "0.tar"))
    assert [sample.split for sample in alone.samples] == [""]
    samples, problems = formats.unlabelled([root], section("shards", root), 3)
    assert (len(samples), problems) == (3, [])


def test_labels_are_names_numbers_of_names_or_in_json(tmp_path):
    names = shards(tmp_path / "names", lambda i: ("txt", b"cat" if i % 2 else b"dog"))
    assert formats.find(section("shards", names, label="txt")).classes == ["cat", "dog"]
    numbers = formats.find(section("shards", shards(tmp_path / "n"), classes=["cat", "dog", "owl"]))
    assert (numbers.classes, numbers.samples[1].label) == (["cat", "dog", "owl"], 1)

    def described(i: int) -> tuple[str, bytes]:
        return "json", json.dumps({"a": {"class": "owl" if i % 2 else "dog"}, "patient": i // 2}).encode()

    in_json = section("shards", shards(tmp_path / "json", described), label_key="a.class", group_key="patient")
    found = formats.find(in_json)
    assert found.classes == ["dog", "owl"]
    assert [sample.group for sample in found.samples[:4]] == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("files", "keys", "words"),
    [
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"1"}, {}, ["a.tar/a", ".png, .jpg", "data.image"]),
        ({"a.png": b""}, {}, ["no .cls beside the image"]),
        ({"a.cls": b"1"}, {}, ["a.tar/a", "no image", "expected one image"]),
        ({"a.png": b"", "a.cls": b"{}"}, {}, ["expected a class number or name", "data.label_key"]),
        ({"a.png": b"", "a.json": b"[]"}, {"label_key": "x"}, ["its .json has no x"]),
        ({"a.png": b"", "a.cls": b"7"}, {"classes": ["x", "y"]}, ["2 names", "labels 7"]),
    ],
)
def test_what_a_shard_lacks_is_told_by_name(files, keys, words, tmp_path):
    tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError) as refused:
        formats.find(section("shards", tmp_path, **keys))
    assert all(word in str(refused.value) for word in words)


def test_tar_files_that_cannot_be_read_at_any_place_are_refused(tmp_path):
    tar(tmp_path / "packed.tar", {"a.png": encoded(0), "a.cls": b"0"}, "w:gz")
    with pytest.raises(UserError, match=r"packed\.tar: .*compressed.*unpack it"):
        formats.find(section("shards", tmp_path))
    (tmp_path / "packed.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"packed\.tar: no tar file"):
        formats.find(section("shards", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.tar files"):
        formats.find(section("shards", tmp_path / "empty"))


RECIPE = """\
task: classification
model:
  name: biformer_tiny
  args: {depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, topks: [1, 2, 4, -2]}
data: {format: FORMAT, root: ROOT, image_size: 32, resize: squash, batch_size: 4, workers: 1}
train: {epochs: 1}
evaluate: {bootstrap: 0}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""


def test_a_network_is_trained_on_shards_and_predicts_what_is_in_one(tmp_path):
    root = shards(tmp_path / "shards")
    path = tmp_path / "shards.yaml"
    path.write_text(RECIPE.replace("ROOT", str(root)).replace("FORMAT", "shards"))
    assert main(["fit", str(path), "--run", str(tmp_path / "run")]) == 0
    assert main(["predict", str(tmp_path / "run"), str(root / "set-val-000.tar"), "-o", str(tmp_path / "p.csv")]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + 4
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(root / "set-val-000.tar")]) == 0
    explained = ["explain", str(tmp_path / "run"), str(root / "set-val-000.tar"), "--method", "gradient"]
    assert main([*explained, "--target", "label", "-o", str(tmp_path / "explained")]) == 0
    with (tmp_path / "explained" / "explanations.csv").open() as file:
        assert [row["target"] for row in csv.DictReader(file)] == ["0", "1", "0", "1"]


def hugging(root: Path, saved: bool, several: bool = False) -> Path:
    """train (6) and validation (4), saved by the package or as parquet files."""
    import datasets

    kind = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.Sequence(kind) if several else kind,
            "patient": datasets.Value("int64"),
        }
    )
    parts = {}
    for n, (name, count) in enumerate({"train": 6, "validation": 4}.items()):
        labels = [[0, 1] if i % 2 else [] for i in range(count)] if several else [i % 2 for i in range(count)]
        images = [{"bytes": encoded(100 * n + i), "path": None} for i in range(count)]
        rows = {"image": images, "label": labels, "patient": [i // 2 for i in range(count)]}
        parts[name] = datasets.Dataset.from_dict(rows, features=features)
    if saved:
        datasets.DatasetDict(parts).save_to_disk(str(root))
    else:
        (root / "data").mkdir(parents=True)
        for name, part in parts.items():
            part.to_parquet(str(root / "data" / f"{name}-00000-of-00001.parquet"))
    return root


@pytest.mark.parametrize("saved", [True, False])
def test_images_and_labels_of_hugging_face_folders_are_those_that_went_in(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = section("huggingface", hugging(tmp_path / "set", saved), group_column="patient")
    found = formats.find(data)
    assert (found.classes, found.problems) == (["cat", "dog"], [])
    dataset, _ = split(found.samples, found.classes, data)
    assert {name: len(part) for name, part in dataset.splits.items()} == {"train": 6, "val": 4}
    for k in (5, 0):
        sample = pickle.loads(pickle.dumps(dataset.splits["train"][k]))
        np.testing.assert_array_equal(sample.image(), pixels(k).transpose(2, 0, 1))
        assert (sample.label, sample.group) == (k % 2, str(k // 2))


def test_folders_name_the_parts_of_parquet_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = hugging(tmp_path / "made", False) / "data"
    for part in ("train", "validation"):
        (tmp_path / "set" / "default" / part).mkdir(parents=True)
        (made / f"{part}-00000-of-00001.parquet").rename(tmp_path / "set" / "default" / part / "0000.parquet")
    found = formats.find(section("huggingface", tmp_path / "set"))
    assert [sample.split for sample in found.samples] == ["train"] * 6 + ["val"] * 4
    np.testing.assert_array_equal(found.samples[7].image(), pixels(101).transpose(2, 0, 1))


def test_a_folder_that_is_written_anew_is_read_anew(tmp_path):
    assert len(formats.find(section("huggingface", hugging(tmp_path / "set", True))).samples) == 10
    shutil.rmtree(tmp_path / "set")
    found = formats.find(section("huggingface", hugging(tmp_path / "set", True, several=True)))
    assert found.samples[1].label.tolist() == [1, 1]


def test_several_labels_and_wrong_columns_of_hugging_face_folders(tmp_path):
    root = hugging(tmp_path / "set", True, several=True)
    labels = [sample.label.tolist() for sample in formats.find(section("huggingface", root)).samples[:2]]
    assert labels == [[0, 0], [1, 1]]
    with pytest.raises(UserError, match=r"image_column is 'photo', but .* has image, label, patient"):
        formats.find(section("huggingface", root, image_column="photo"))
    with pytest.raises(UserError, match="image_column is 'patient', which holds"):
        formats.find(section("huggingface", root, image_column="patient"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a folder of save_to_disk nor one of"):
        formats.find(section("huggingface", tmp_path / "empty"))


def test_a_network_is_trained_on_a_hugging_face_folder(tmp_path):
    path = tmp_path / "set.yaml"
    path.write_text(RECIPE.replace("ROOT", str(hugging(tmp_path / "set", True))).replace("FORMAT", "huggingface"))
    assert main(["fit", str(path), "--run", str(tmp_path / "run")]) == 0
