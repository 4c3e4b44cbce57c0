"""`check` finds what was planted in a data set, and nothing in a clean one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.errors import UserError
from visionattn.recipe import CsvData, FolderData, NpzData
from visionattn.tasks.classification.check import Findings, check, format_findings


def folder(root: Path, train: int = 6, val: int = 2, size: tuple[int, int] = (40, 36)) -> Path:
    """Noise images of the classes cat and dog in train/ and val/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


def findings(root: Path, **keys) -> Findings:
    return check(FolderData(format="folder", root=root, **{"image_size": 32, "batch_size": 4} | keys))


def test_a_clean_set_has_no_problems(tmp_path):
    found = findings(folder(tmp_path))
    assert found.problems == found.notes == []
    assert found.classes == ["cat", "dog"]
    assert {name: n.tolist() for name, n in found.counts.items()} == {"train": [6, 6], "val": [2, 2]}
    assert found.images == {"train": 12, "val": 4}
    assert found.sizes["train"].tolist() == [[40, 36]] * 3
    assert found.kinds == {"train": {"RGB": 12}, "val": {"RGB": 4}}
    np.testing.assert_allclose(found.mean, 0.5, atol=0.02)
    np.testing.assert_allclose(found.std, 0.29, atol=0.02)
    text = format_findings(found)
    assert [line.split() for line in text.splitlines()[:4]] == [
        ["class", "train", "val"], ["cat", "6", "2"], ["dog", "6", "2"], ["images", "12", "4"],
    ]  # fmt: skip
    assert text.endswith("problems: none")


def test_leakage_and_contradicting_labels_are_problems(tmp_path):
    root = folder(tmp_path)
    Image.open(root / "train/cat/1.png").save(root / "val/cat/copy.bmp")  # equal pixels in another format
    shutil.copy(root / "train/cat/2.png", root / "train/dog/copy.png")
    found = findings(root)
    assert found.leakage == [["train/cat/1.png (cat)", "val/cat/copy.bmp (cat)"]]
    assert found.conflicts == [["train/cat/2.png (cat)", "train/dog/copy.png (dog)"]]
    assert len(found.problems) == 2
    assert "PROBLEM: 1 images in more than one split" in format_findings(found)


def test_duplicates_in_a_split_are_a_note(tmp_path):
    root = folder(tmp_path)
    for copy in ("a.png", "b.png"):
        shutil.copy(root / "train/cat/2.png", root / "train/cat" / copy)
    found = findings(root)
    assert found.problems == []
    assert found.duplicates == [["train/cat/2.png (cat)", "train/cat/a.png (cat)", "train/cat/b.png (cat)"]]
    assert len(found.notes) == 1


def test_all_unreadable_files_are_listed(tmp_path):
    root = folder(tmp_path)
    bad = [root / "train/cat/1.png", root / "val/dog/0.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    found = findings(root)
    assert [len(reasons) for reasons in found.unreadable.values()] == [1, 1]
    assert len(found.problems) == 1
    assert all(str(path) in found.problems[0] for path in bad)
    assert found.counts["train"].tolist() == [5, 6]


def test_a_class_without_readable_training_images_is_a_problem(tmp_path):
    root = folder(tmp_path)
    for path in root.glob("train/cat/*"):
        path.write_bytes(b"")
    assert "1 classes without a readable training image: cat" in findings(root).problems
    shutil.rmtree(root / "train/cat")
    with pytest.raises(UserError, match="no training image of cat"):
        findings(root)


def test_a_set_without_any_readable_image_is_still_described(tmp_path):
    root = folder(tmp_path)
    for path in root.glob("*/*/*"):
        path.write_bytes(b"")
    assert "16 cannot be read" in format_findings(findings(root))


def test_images_smaller_than_the_crop_are_a_problem_without_resizing(tmp_path):
    root = folder(tmp_path)
    assert findings(root, image_size=38).problems == []
    assert "0.png (40x36)" in findings(root, image_size=38, resize="none").problems[0]


def test_mixtures_and_imbalance_are_notes(tmp_path):
    root = folder(tmp_path)
    for i in range(20):
        Image.fromarray(np.full((40, 40), i, dtype=np.uint16)).save(root / f"train/dog/deep{i}.png")
    shutil.rmtree(root / "val/cat")
    found = findings(root)
    assert found.problems == []
    assert found.kinds["train"] == {"RGB": 12, "I;16": 20}
    text = format_findings(found)
    for words in (
        "26 of dog, 6 of cat",
        "20 grey images among 14 in colour",
        r"deeper than 8 bits (I;16)",
        "image of: cat",
    ):
        assert words in text


def test_arrays_and_several_labels(tmp_path):
    rng = np.random.default_rng(0)
    content = {}
    for split in ("train", "val"):
        content[f"{split}_images"] = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        content[f"{split}_labels"] = rng.integers(0, 2, (20, 3))
    content["val_images"][4] = content["train_images"][3]
    content["val_labels"][4] = content["train_labels"][3] = [1, 0, 1]
    np.savez(tmp_path / "a.npz", **content)
    found = check(NpzData(format="npz", root=tmp_path / "a.npz", batch_size=4))
    assert found.leakage == [["train[3] (0;2)", "val[4] (0;2)"]]
    assert found.conflicts == []
    assert found.counts["train"].tolist() == content["train_labels"].sum(0).tolist()
    assert found.images == {"train": 20, "val": 20}


def test_drawn_splits_name_the_split_of_a_leak(tmp_path):
    root = folder(tmp_path / "images")
    shutil.copy(root / "train/cat/0.png", root / "val/cat/same.png")
    files = sorted(p.relative_to(root) for p in root.rglob("*.png"))
    rows = [f"{p},{p.parent.name},{p.parts[0]}" for p in files]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,part", *rows]))
    data = CsvData(format="csv", root=tmp_path / "t.csv", images=root, split_column="part", batch_size=4)
    assert check(data).leakage == [["train/cat/0.png (cat)", "val/cat/same.png (cat)"]]
