"""`check` finds what was planted in a data set, and nothing in a clean one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.runs.check import Findings, check
from visionattn.tasks.classification.recipe import DATA, Recipe


def folder(root: Path, train: int = 6, val: int = 2, size: tuple[int, int] = (40, 36)) -> Path:
    """Noise images of the classes cat and dog in train/ and val/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


def checked(form: str, root: Path, **keys) -> Findings:
    data = DATA[form](format=form, root=root, **{"image_size": 32, "batch_size": 4} | keys)
    trainer = {"accelerator": "cpu"}
    return check(Recipe(task="classification", model={"name": "test_resnet"}, data=data, trainer=trainer))


def findings(root: Path, **keys) -> Findings:
    return checked("folder", root, **keys)


def table(found: Findings) -> dict[str, list[str]]:
    """What the table says about each split, by the title of the row."""
    return {title: texts for title, *texts in found.rows}


def test_a_clean_set_has_no_problems(tmp_path):
    found = findings(folder(tmp_path))
    assert found.problems == found.notes == []
    assert found.dataset.classes == ["cat", "dog"]
    assert table(found) == {
        "class": ["train", "val"],
        "cat": ["6", "2"],
        "dog": ["6", "2"],
        "images": ["12", "4"],
        "unreadable": ["0", "0"],
        "smallest height x width": ["40 x 36", "40 x 36"],
        "median height x width": ["40 x 36", "40 x 36"],
        "largest height x width": ["40 x 36", "40 x 36"],
        "kinds": ["12 RGB", "4 RGB"],
    }
    np.testing.assert_allclose(found.mean, 0.5, atol=0.02)
    np.testing.assert_allclose(found.std, 0.29, atol=0.02)
    text = str(found)
    assert [line.split() for line in text.splitlines()[:4]] == [
        ["class", "train", "val"], ["cat", "6", "2"], ["dog", "6", "2"], ["images", "12", "4"],
    ]  # fmt: skip
    assert text.endswith("problems: none")


def test_leakage_and_contradicting_labels_are_problems(tmp_path):
    root = folder(tmp_path)
    Image.open(root / "train/cat/1.png").save(root / "val/cat/copy.bmp")  # equal pixels in another format
    shutil.copy(root / "train/cat/2.png", root / "train/dog/copy.png")
    found = findings(root)
    leak, conflict = found.problems
    assert leak.startswith("1 images in more than one split")
    assert leak.endswith(":\ntrain/cat/1.png (cat) = val/cat/copy.bmp (cat)")
    assert conflict == "1 images with contradicting labels:\ntrain/cat/2.png (cat) = train/dog/copy.png (dog)"
    assert "PROBLEM: 1 images in more than one split" in str(found)
    assert str(found).endswith("problems: 2")


def test_duplicates_in_a_split_are_a_note(tmp_path):
    root = folder(tmp_path)
    for copy in ("a.png", "b.png"):
        shutil.copy(root / "train/cat/2.png", root / "train/cat" / copy)
    found = findings(root)
    assert found.problems == []
    same = "train/cat/2.png (cat) = train/cat/a.png (cat) = train/cat/b.png (cat)"
    assert found.notes == [f"1 images more than once in a split:\n{same}"]


def test_all_unreadable_files_are_listed(tmp_path):
    root = folder(tmp_path)
    bad = [root / "train/cat/1.png", root / "val/dog/0.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    found = findings(root)
    assert table(found)["unreadable"] == ["1", "1"]
    assert len(found.problems) == 1
    assert all(str(path) in found.problems[0] for path in bad)
    assert [table(found)[name] for name in ("cat", "dog", "images")] == [["5", "2"], ["6", "1"], ["11", "3"]]


def test_a_class_without_readable_training_images_is_a_problem(tmp_path):
    root = folder(tmp_path)
    for path in root.glob("train/cat/*"):
        path.write_bytes(b"")
    assert "1 classes without a readable training image: cat" in findings(root).problems
    shutil.rmtree(root / "train/cat")
    assert "1 classes without a readable training image: cat" in findings(root).problems


def test_a_set_without_any_readable_image_is_still_described(tmp_path):
    root = folder(tmp_path)
    for path in root.glob("*/*/*"):
        path.write_bytes(b"")
    assert "16 cannot be read" in str(findings(root))


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
    assert table(found)["kinds"] == ["12 RGB, 20 I;16", "2 RGB"]
    text = str(found)
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
    found = checked("npz", tmp_path / "a.npz")
    (leak,) = found.problems
    assert leak.endswith(":\ntrain[3] (0;2) = val[4] (0;2)")
    assert [table(found)[str(k)][0] for k in range(3)] == [str(n) for n in content["train_labels"].sum(0)]
    assert table(found)["images"] == ["20", "20"]


def test_drawn_splits_name_the_split_of_a_leak(tmp_path):
    root = folder(tmp_path / "images")
    shutil.copy(root / "train/cat/0.png", root / "val/cat/same.png")
    files = sorted(p.relative_to(root) for p in root.rglob("*.png"))
    rows = [f"{p},{p.parent.name},{p.parts[0]}" for p in files]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,part", *rows]))
    (leak,) = checked("csv", tmp_path / "t.csv", images=root, split_column="part").problems
    assert leak.endswith(":\ntrain/cat/0.png (cat) = val/cat/same.png (cat)")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"batch_size": 20}, "data.batch_size is 20, but there are only 12 training images"),
        ({"mean": [0.5]}, "data.mean has 1 values"),
        ({"augment": {"crop_scale": [1.0, 0.5]}}, "data.augment.crop_scale"),
        ({"multi_label": True}, "data.multi_label is True"),
    ],
)
def test_what_fit_would_refuse_is_a_problem(tmp_path, keys, problem):
    assert any(problem in text for text in findings(folder(tmp_path), **keys).problems)


@pytest.mark.parametrize("parts", [{"model": {"name": "biformer_tini"}}, {"optim": {"name": "adamm"}}])
def test_a_network_or_optimizer_that_cannot_be_made_is_a_problem(tmp_path, parts):
    data = DATA["folder"](format="folder", root=folder(tmp_path), image_size=32, batch_size=4)
    keys = {"model": {"name": "test_resnet"}, "trainer": {"accelerator": "cpu"}} | parts
    (problem,) = check(Recipe(task="classification", data=data, **keys)).problems
    assert "did you mean" in problem


def test_lists_of_files_are_cut(tmp_path):
    root = folder(tmp_path, train=30)
    for path in root.glob("train/*/*"):
        path.write_bytes(b"")
    text = next(text for text in findings(root).problems if "cannot be read" in text)
    assert text.startswith("60 cannot be read:")
    assert text.endswith("and 40 more")
    assert len(text.splitlines()) == 22


def test_files_that_are_left_out_are_counted_by_ending(tmp_path):
    root = folder(tmp_path)
    for name in ("train/cat/a.heic", "val/dog/b.HEIC", "train/cat/notes.txt", "README", "train/loose.png", ".hidden"):
        (root / name).write_bytes(b"something")
    (note,) = findings(root).notes
    assert f"files below {root} that are neither an image nor a target of one: " in note
    assert set(note.split(": ")[1].split(", ")) == {"2 .heic", "1 .txt", "1 without ending", "1 .png"}
