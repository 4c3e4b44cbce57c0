"""Parts of large files: decoded once, by whichever process, and kept as long as there is room."""

import functools
import multiprocessing
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats, images, unpacked
from visionattn.data.formats import image_mask
from visionattn.tasks.detection import recipe as detection
from visionattn.tasks.detection.transforms import WholeImages as Tiles
from visionattn.tasks.segmentation import recipe as segmentation
from visionattn.tasks.segmentation.transforms import TrainingCrops, WholeImages

STATISTICS = {"mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unpacked, "_LAST", type(unpacked._LAST)())
    unpacked._tell.cache_clear()
    return tmp_path / "cache" / "visionattn" / "unpacked"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded from now on."""
    names: list[str] = []

    def noted(decode):
        @functools.wraps(decode)
        def decode_and_note(path, *more, **others):
            names.append(path.name)
            return decode(path, *more, **others)

        return decode_and_note

    monkeypatch.setattr(images, "decode", noted(images.decode))
    monkeypatch.setattr(image_mask, "read_mask", noted(image_mask.read_mask))
    return names


def pictures(root: Path, size: tuple[int, int], count: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for k in range(count):
        for kind, shape, top in (("images", (*size, 3), 256), ("masks", size, 2)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            made[f"{kind}/{k}"] = rng.integers(0, top, shape, dtype=np.uint8)
            Image.fromarray(made[f"{kind}/{k}"]).save(root / kind / f"{k}.png", compress_level=1)
    return made


def samples(root: Path, **keys):
    section = segmentation.DATA["image_mask"](
        format="image_mask", root=root, classes=2, resize="none", image_size=64, **STATISTICS, **keys
    )
    return formats.find(section).samples, section


def test_a_large_image_is_decoded_once_for_all_its_parts_and_all_who_want_them(tmp_path, decoded, cache):
    made = pictures(tmp_path / "a", (2100, 500))
    (one, other), section = samples(tmp_path / "a", crops_per_image=4)
    window = slice(2010, 2060), slice(7, 300)
    for sample in (one, other, one, other):
        pixels, mask = sample.read(window)
        np.testing.assert_array_equal(pixels, made[f"images/{sample.name}"][window].transpose(2, 0, 1))
        np.testing.assert_array_equal(mask, made[f"masks/{sample.name}"][window])
    crops = TrainingCrops([one, other], [], section, 0)
    assert [crops[0, k]["image"].shape for k in range(len(crops))] == [(3, 64, 64)] * 8
    assert [item["index"] for item in WholeImages([one, other], section)] == [0, 0, 1, 1]
    assert sorted(decoded) == ["0.png", "0.png", "1.png", "1.png"]
    assert len(list(cache.iterdir())) == 4
    made = pictures(tmp_path / "a", (2100, 500), count=1)
    pixels = np.flipud(made["images/0"])
    Image.fromarray(pixels).save(tmp_path / "a/images/0.png")
    np.testing.assert_array_equal(one.image(window), pixels[window].transpose(2, 0, 1))
    assert len(decoded) == 5


def test_tiles_of_an_image_in_turn_decode_it_once(tmp_path, decoded, cache):
    pictures(tmp_path / "a", (200, 150))
    keys = {"resize": "none", "image_size": 64, "overlap": 0.0, **STATISTICS}
    section = detection.DATA["instances"](format="instances", root=tmp_path / "a", **keys)
    tiles = Tiles(formats.find(section).samples, section)
    assert len([tile["objects"] for tile in tiles]) == 2 * 4 * 3
    assert sorted(decoded) == ["0.png", "1.png"]
    assert not cache.exists()


def test_what_is_not_divided_is_not_kept(tmp_path, decoded, cache):
    pictures(tmp_path / "a", (2100, 50), count=1)
    (sample,), _ = samples(tmp_path / "a")
    sample.read((slice(0, 2100), slice(0, 50)))
    sample.read()
    assert decoded == ["0.png"] * 4
    assert not cache.exists()


def counting(path: Path, out: Path) -> np.ndarray:
    with out.open("a") as file:
        file.write("unpacked\n")
    time.sleep(0.3)
    return np.frombuffer(path.read_bytes(), np.uint8)


def test_processes_that_want_the_same_unpack_it_once(tmp_path):
    path, out = tmp_path / "a", tmp_path / "log"
    path.write_bytes(bytes(range(256)))
    context = multiprocessing.get_context("fork")
    work = functools.partial(counting, path, out)
    others = [context.Process(target=unpacked.unpacked, args=([path], work)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]
    np.testing.assert_array_equal(unpacked.unpacked([path], work), np.arange(256))
    assert out.read_text() == "unpacked\n"


def test_without_a_place_files_are_read_as_they_are_which_is_said_once(tmp_path, cache, caplog, full_disk):
    path, values = tmp_path / "a", np.arange(100_000)
    path.write_bytes(b"a")
    with full_disk(1000):
        for _ in range(2):
            np.testing.assert_array_equal(unpacked.unpacked([path], lambda: values), values)
    assert caplog.text.count("there is no place to keep them unpacked") == 1
    assert not list(cache.iterdir())
    shutil.rmtree(cache)
    cache.write_text("a file")
    np.testing.assert_array_equal(unpacked.unpacked([path], lambda: values), values)
    assert caplog.text.count("there is no place to keep them unpacked") == 2


def test_what_was_used_longest_ago_makes_room_but_nothing_of_today(tmp_path, cache, monkeypatch, caplog):
    paths = [tmp_path / str(k) for k in range(4)]
    for path in paths:
        path.write_text(path.name)
    one = np.zeros(2**20, np.uint8)

    def keep(k: int, days: float) -> Path:
        before = set(cache.glob("*"))
        unpacked.unpacked([paths[k]], lambda: one)
        (made,) = set(cache.glob("*")) - before
        os.utime(made, (time.time() - days * 86_400,) * 2)
        return made

    old, older, new = keep(0, 2), keep(1, 3), keep(2, 0)
    free = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free(3 * 2**20 + 2000))
    last = keep(3, 0)
    assert {old, new, last} == set(cache.iterdir())
    assert not older.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free(2**20))
    values = unpacked.unpacked([paths[1]], lambda: one)
    assert not isinstance(values, np.memmap)
    assert {new, last} == set(cache.iterdir())
    assert "over half of its disk" in caplog.text
    monkeypatch.undo()


def test_a_kept_file_that_was_cut_is_made_anew(tmp_path, cache):
    path = tmp_path / "a"
    path.write_bytes(b"a")
    unpacked.unpacked([path], lambda: np.arange(1000))
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:500])
    np.testing.assert_array_equal(unpacked.unpacked([path], lambda: np.arange(1000)), np.arange(1000))
