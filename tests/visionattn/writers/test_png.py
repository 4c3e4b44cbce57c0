"""Masks of images: PNG whose pixels are class numbers, and overlays for people."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats
from visionattn.data.labels import MaskCode
from visionattn.data.prediction import PackedMask, Prediction
from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.files import Unwritable
from visionattn.tasks.segmentation.recipe import DATA
from visionattn.writers import png

CLASSES, COLORS = ["background", "water", "road"], [None, (0, 0, 255), (255, 0, 0)]
CODE = MaskCode(CLASSES, [0, 1, 2])


@pytest.fixture
def images(tmp_path) -> Path:
    """in/a.png and in/b/a.png, black."""
    for name in ("a", "b/a"):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (30, 20)).save(path)
    return tmp_path / "in"


def mask() -> np.ndarray:
    mask = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    mask[0] = IGNORE
    return mask


def write(images: Path, out: Path, predictions: list[Prediction] | None = None) -> None:
    """The same predictions of every image, by default the whole mask."""
    section = DATA["image_mask"](format="image_mask", root=Path(), classes=CLASSES)
    samples, problems = formats.unlabelled([images], section, 1)
    assert problems == []
    with png.open(out, CODE, COLORS, [], polygons=False) as writer:
        writer.refuse(samples)
        for sample in samples:
            writer.write([sample], predictions or [Prediction(0, PackedMask(mask()))])


def test_masks_and_overlays_are_pictures(tmp_path, images, files):
    write(images, tmp_path / "out")
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), mask())
        shown = np.array(image.convert("RGB"))
    assert (shown[mask() == 2] == (255, 0, 0)).all()
    with Image.open(tmp_path / "out/overlays/a.png") as image:
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert (np.array(image)[mask() == 1][:, 2] > 0).all()
    assert files(tmp_path / "out") == ["a.png", "b/a.png", "overlays/a.png", "overlays/b/a.png"]


def test_parts_of_an_image_are_put_together(tmp_path, images):
    windows = [(slice(0, 20), slice(0, 11)), (slice(0, 20), slice(11, 30))]
    write(images, tmp_path / "out", [Prediction(0, mask()[window], window) for window in windows])
    with Image.open(tmp_path / "out/b/a.png") as image:
        np.testing.assert_array_equal(np.array(image), mask())


def test_an_image_with_an_unreadable_part_is_not_written(tmp_path, images, files):
    with pytest.raises(UserError, match="a: damaged"):
        write(images, tmp_path / "out", [Prediction(0, mask()), Prediction(0, error="a: damaged")])
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == []


@pytest.mark.parametrize("there", ["b/a.png", "overlays/b/a.png"])
def test_what_is_there_is_never_overwritten_and_refused_before_work(tmp_path, images, files, there):
    (tmp_path / "out" / there).parent.mkdir(parents=True)
    (tmp_path / "out" / there).write_text("mine")
    with pytest.raises(Unwritable, match=rf"{there} exists; predictions are never overwritten"):
        write(images, tmp_path / "out")
    assert files(tmp_path / "out") == [there]
    assert (tmp_path / "out" / there).read_text() == "mine"


def test_a_full_disk_leaves_no_half_picture(tmp_path, images, files, full_disk):
    with full_disk(100), pytest.raises(Unwritable, match=r"a\.png: could not be written .*has been removed"):
        write(images, tmp_path / "out")
    assert files(tmp_path / "out") == []


def test_a_mask_with_the_name_of_an_overlay_is_refused_before_work(tmp_path, images, files):
    (images / "overlays").mkdir()
    Image.new("L", (30, 20)).save(images / "overlays" / "a.png")
    with pytest.raises(UserError, match=r"a and overlays/a would both be written as .*/out/overlays/a\.png"):
        write(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path, images):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Unwritable, match=r"file/out: the folder cannot be made \(Not a directory\)"):
        write(images, tmp_path / "file" / "out")


def test_polygons_are_for_scenes(tmp_path):
    with pytest.raises(UserError, match="--polygons is for scenes"):
        png.open(tmp_path / "out", CODE, COLORS, [], polygons=True)
