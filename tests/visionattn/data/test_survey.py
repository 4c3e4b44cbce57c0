"""Reading a data set once: what is kept for the next command, and what makes it be read again."""

import os
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats, survey
from visionattn.data.images import ImageFile
from visionattn.data.kept import keys_of
from visionattn.data.sample import Dataset, Reading
from visionattn.data.splits import split
from visionattn.data.survey import fingerprint, mean_std, read_through
from visionattn.tasks.classification import recipe as classification
from visionattn.tasks.detection import recipe as detection
from visionattn.tasks.segmentation import recipe as segmentation


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "visionattn" / "readings.sqlite"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the samples that are really read from now on."""
    names, whole = [], survey._read

    def read_and_note(sample, classes):
        names.append(sample.name)
        return whole(sample, classes)

    monkeypatch.setattr(survey, "_read", read_and_note)
    return names


def found(section) -> Dataset:
    samples, classes, _ = formats.find(section)
    return split(samples, classes, section)[0]


def folder(root: Path, count: int = 6) -> Dataset:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        if not (root / name).exists():
            (root / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return found(classification.DATA["folder"](format="folder", root=root))


def same(one: Dataset, other: Dataset) -> bool:
    pairs = [(a, b) for name in one.readings for a, b in zip(one.readings[name], other.readings[name], strict=True)]
    keys = ("error", "size", "channels", "kind", "mean", "square", "missing", "image", "pair", "counts")
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for a, b in pairs for key in keys)


def test_a_second_look_reads_nothing_and_says_the_same(tmp_path, read):
    first = read_through(folder(tmp_path / "a"))
    assert len(read) == 12
    second = read_through(folder(tmp_path / "a"))
    assert len(read) == 12
    assert same(first, second)
    assert fingerprint(first) == fingerprint(second)
    read_through(folder(tmp_path / "a"), "anew")
    assert len(read) == 24


def test_what_has_changed_is_read_again(tmp_path, read):
    root = tmp_path / "a"
    first = read_through(folder(root))
    read.clear()
    pixels = np.array(Image.open(root / "cat/3.png"))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(root / "cat/3.png")
    os.utime(root / "dog/2.png", ns=(1, 1))
    second = read_through(folder(root))
    assert sorted(read) == ["cat/3.png", "dog/2.png"]
    assert fingerprint(first) != fingerprint(second)


def test_unreadable_images_are_looked_at_each_time(tmp_path, read):
    root = tmp_path / "a"
    dataset = folder(root)
    (root / "cat/1.png").write_bytes(b"no image")
    for _ in range(2):
        readings = [reading for part in read_through(dataset).readings.values() for reading in part]
        assert ["cat/1.png: not an image" in (reading.error or "") for reading in readings].count(True) == 1
    assert read.count("cat/1.png") == 2
    assert len(read) == 13


def masks(root: Path, **keys) -> Dataset:
    rng = np.random.default_rng(0)
    for kind, top in (("images", 256), ("masks", 2)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, top, (20, 24), dtype=np.uint8)).save(root / kind / f"{i}.png")
    classes = {"classes": ["no", "yes"]}
    return found(segmentation.DATA["image_mask"](format="image_mask", root=root, **classes | keys))


def test_what_masks_mean_is_part_of_what_was_read(tmp_path, read):
    first = read_through(masks(tmp_path / "m"))
    assert len(read) == 4
    turned = read_through(masks(tmp_path / "m", values=[1, 0]))
    assert len(read) == 8
    for one, other in zip(first.readings["train"], turned.readings["train"], strict=True):
        assert one.counts[:2].tolist() == other.counts[:2][::-1].tolist()
    again = read_through(masks(tmp_path / "m", values=[1, 0]))
    for one, other in zip(turned.readings["train"], again.readings["train"], strict=True):
        assert one.places.keys() == other.places.keys()
        assert all(np.array_equal(one.places[k], other.places[k]) for k in one.places)


def test_samples_in_memory_are_read_each_time(read):
    dataset = found(detection.DATA["builtin"](format="builtin"))
    dataset = Dataset(dataset.classes, {"train": dataset.splits["train"][:3]})
    for _ in range(2):
        readings = read_through(dataset).readings["train"]
        assert all(reading.boxes is not None for reading in readings)
    assert len(read) == 6


@pytest.mark.parametrize("damage", ["garbage", "old", "no folder"])
def test_a_file_of_readings_that_cannot_be_used_costs_time_only(tmp_path, read, cache, damage, caplog):
    first = read_through(folder(tmp_path / "a"))
    if damage == "garbage":
        cache.write_bytes(b"garbage" * 1000)
    elif damage == "old":
        with sqlite3.connect(cache) as table:
            table.execute("UPDATE readings SET reading = '{}'")
    else:
        cache.unlink()
        cache.parent.rmdir()
        cache.parent.write_text("a file")
    second = read_through(folder(tmp_path / "a"))
    assert same(first, second)
    assert len(read) == 24
    assert "readings.sqlite: cannot be used" in caplog.text
    if damage != "no folder":
        read_through(folder(tmp_path / "a"))
        assert len(read) == 24


def test_the_keys_tell_fields_apart_whatever_stands_in_them(tmp_path):
    @dataclass(frozen=True)
    class Odd(ImageFile):
        bands: tuple[int, ...] = ()
        more: tuple[int, ...] = ()

    path = tmp_path / "a"
    path.write_bytes(b"a")
    samples = [
        Odd("a", "a", "a", path=path, bands=b, more=m) for b, m in (((1, 2), (3,)), ((1,), (2, 3)), ((), (1, 2, 3)))
    ]
    assert len(set(keys_of(samples, 2))) == 3
    assert len(set(keys_of([samples[0], replace(samples[0], group="b", split="val")], 2))) == 1


def test_of_a_set_that_is_too_large_some_are_looked_at(tmp_path, read, monkeypatch):
    monkeypatch.setattr(survey, "SOME", 5)
    dataset = read_through(folder(tmp_path / "a"), "sample")
    readings = [reading for part in dataset.readings.values() for reading in part]
    assert len(read) == sum(not reading.unread for reading in readings) == 5
    assert survey.equal_images(dataset) == []
    assert survey.doubts(dataset) == [
        "7 of 12 images were not looked at (data.survey: sample): whether they can be read, and are there only once"
    ]
    assert mean_std(dataset.readings["train"])[0].shape == (3,)
    assert {sample.name for sample in read_through(folder(tmp_path / "a"), "sample").samples} == {
        sample.name for sample in dataset.samples
    }
    assert len(read) == 5


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_means_are_those_of_the_values(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = [(rng.integers(0, 256, (9, 8, 3)) / (1 if dtype == np.uint8 else 255)).astype(dtype) for _ in range(6)]
    np.savez(
        tmp_path / "a.npz", train_images=arrays[:4], train_labels=[0, 1, 0, 1], val_images=arrays[4:], val_labels=[0, 1]
    )
    readings = read_through(found(classification.DATA["npz"](format="npz", root=tmp_path / "a.npz"))).readings["train"]
    values = np.stack(arrays[:4]).astype(np.float64) / (255 if dtype == np.uint8 else 1)
    mean, std = mean_std(readings)
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, values.std((0, 1, 2)), rtol=1e-5)
    assert isinstance(readings[0], Reading)
