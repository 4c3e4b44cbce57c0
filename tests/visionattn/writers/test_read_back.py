"""Predicted masks are masks: the recipe that a model was trained by reads them as the classes that were predicted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats
from visionattn.data.prediction import Prediction
from visionattn.data.sample import IGNORE
from visionattn.tasks.segmentation.recipe import Recipe
from visionattn.tasks.segmentation.task import open_writer

CLASSES = ["background", "water", "road"]
SAID = {
    "numbers": {},
    "0 and 255": {"values": [0, 255, 128]},
    "no label is 0": {"ignore_index": 0},
    "no label is a percentage": {"ignore_index": 50},
    "several values of a class": {"values": [[3, 7], 255, [0, 9]], "ignore_index": 1},
    "16 bits": {"values": [0, 300, 65535]},
    "32 bits": {"values": [0, 312782560, 7], "ignore_index": 255},
    "below 0": {"values": [-1, 0, 40000]},
    "colours": {"colors": {"background": "#FFFFFF", "water": "#0000FF", "road": "#00FE00"}},
    "colours and one without label": {
        "colors": {"background": "#000000", "water": "#0000FF", "road": "#FF0000", "ignore": "#FFFFFF"}
    },
}


def recipe(kind: str, root: Path, said: dict) -> Recipe:
    data = {"format": kind, "root": root, "classes": CLASSES, "mean": [0.0], "std": [1.0]} | said
    return Recipe(task="segmentation", model={"name": "biformer_tiny", "decoder": "fpn"}, data=data)


def regions(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)


def predict(spec: Recipe, given: Path, out: Path, predicted: np.ndarray, **options) -> None:
    """Write (slices, H, W) as what is predicted of the one case there is."""
    samples, problems = formats.unlabelled([given], spec.data, 1)
    assert problems == []
    everywhere = tuple(slice(0, side) for side in predicted.shape[1:])
    confidence = np.full(predicted.shape[1:], 90, np.uint8)
    with open_writer(spec, out, **options) as writer:
        writer.refuse(samples)
        writer.write(samples, (Prediction(i, mask, everywhere, confidence) for i, mask in enumerate(predicted)))


def read_back(spec: Recipe) -> np.ndarray:
    """(slices, H, W) class numbers of the masks in the recipe's folder."""
    samples, _, problems = formats.find(spec.data)
    assert problems == []
    return np.stack([sample.target() for sample in samples])


@pytest.mark.parametrize("said", SAID)
def test_masks_of_images(tmp_path, said):
    (tmp_path / "images").mkdir()
    Image.new("L", (30, 20)).save(tmp_path / "images" / "a.png")
    spec, predicted = recipe("image_mask", tmp_path, SAID[said]), regions(1, 20, 30)
    predict(spec, tmp_path / "images", tmp_path / "masks", predicted)
    shutil.rmtree(tmp_path / "masks" / "overlays")
    np.testing.assert_array_equal(read_back(spec), predicted)
    if said == "0 and 255":
        with Image.open(tmp_path / "masks" / "a.png") as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.array(image), np.array([0, 255, 128])[predicted[0]])


@pytest.mark.parametrize("said", [said for said in SAID if "colours" not in said])
def test_masks_of_volumes(tmp_path, said):
    nibabel = pytest.importorskip("nibabel")
    (tmp_path / "images").mkdir()
    voxels = np.arange(9 * 8 * 5, dtype=np.int16).reshape(9, 8, 5)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, 1.0, 2.0, 1.0])), tmp_path / "images" / "a.nii.gz")
    spec, predicted = recipe("nifti", tmp_path, SAID[said]), regions(5, 8, 9)
    predict(spec, tmp_path / "images", tmp_path / "masks", predicted)
    np.testing.assert_array_equal(read_back(spec), predicted)


@pytest.mark.parametrize("said", SAID)
def test_masks_of_scenes_with_pixels_without_data(tmp_path, said):
    rasterio = pytest.importorskip("rasterio")
    (tmp_path / "images").mkdir()
    profile = {"driver": "GTiff", "height": 20, "width": 30, "count": 1, "dtype": "uint8", "nodata": 0}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 5.5e6)}
    seen = np.ones((20, 30), np.uint8)
    seen[:4] = 0
    with rasterio.open(tmp_path / "images" / "a.tif", "w", **profile) as sink:
        sink.write(seen, 1)
    spec, predicted = recipe("geotiff", tmp_path, SAID[said]), regions(1, 20, 30)
    predict(spec, tmp_path / "images", tmp_path / "masks", predicted)
    expected = np.where(seen == 0, IGNORE, predicted)
    np.testing.assert_array_equal(read_back(spec), expected)
    with rasterio.open(tmp_path / "masks" / "a.tif") as written:
        assert written.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (written.read(written.count)[4:] == 90).all()
    with rasterio.open(tmp_path / "images" / "a.tif", "r+") as scene:
        scene.nodata = None
    np.testing.assert_array_equal(read_back(spec), expected, "of the mask alone")


@pytest.mark.parametrize("said", ["0 and 255", "colours"])
def test_polygons_have_class_numbers_whatever_masks_say(tmp_path, said):
    rasterio, pyogrio = pytest.importorskip("rasterio"), pytest.importorskip("pyogrio")
    pytest.importorskip("shapely")
    profile = {"driver": "GTiff", "height": 20, "width": 30, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, transform=rasterio.Affine(1, 0, 4e5, 0, -1, 5e6)) as sink:
        sink.write(np.ones((1, 20, 30), np.uint8))
    predict(
        recipe("geotiff", tmp_path, SAID[said]), tmp_path / "a.tif", tmp_path / "out", regions(1, 20, 30), polygons=True
    )
    *_, (names, numbers) = pyogrio.raw.read(
        tmp_path / "out" / "a.gpkg", columns=["class", "number"], read_geometry=False
    )
    assert set(zip(names, numbers.tolist(), strict=True)) == {("water", 1), ("road", 2)}


def test_class_numbers_can_be_asked_for(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (30, 20)).save(tmp_path / "images" / "a.png")
    predicted = regions(1, 20, 30)
    for said in SAID.values():
        predict(
            recipe("image_mask", tmp_path, said), tmp_path / "images", tmp_path / "out", predicted, class_numbers=True
        )
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "a.png")), predicted[0])
        shutil.rmtree(tmp_path / "out")
