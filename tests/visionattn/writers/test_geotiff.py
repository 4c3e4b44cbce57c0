"""Masks come out in the format the images came in, whole or not at all."""

import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.writers import geotiff as outputs

CLASSES = ["background", "water", "road"]
MEAN, STD = [10.0, 20.0], [2.0, 4.0]


def brightest(image: torch.Tensor) -> torch.Tensor:
    """(B, 2, h, w) normalised -> road where the first band is above its mean, water where only the second one is."""
    road, water = image[:, 0] > 0, image[:, 1] > 0
    numbers = torch.where(road, 2, torch.where(water, 1, 0))
    return 0.7 * torch.nn.functional.one_hot(numbers, 3).movedim(-1, 1) + 0.1


def expected(image: np.ndarray) -> np.ndarray:
    return np.where(image[0] > 10, 2, np.where(image[1] > 20, 1, 0))


def blobs(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(2, height, width) float32 with regions of some extent."""
    noise = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, 1, 4)[0] * 20
    return smooth.numpy() + np.array(MEAN, dtype=np.float32)[:, None, None]


@pytest.fixture
def tif():
    """A function that writes a GeoTIFF."""
    rasterio = pytest.importorskip("rasterio")
    from visionattn.data.formats.geotiff import open_quietly

    def save(path: Path, image: np.ndarray, **keys) -> Path:
        profile = {"driver": "GTiff", "count": len(image), "height": image.shape[1], "width": image.shape[2]}
        profile |= {"dtype": image.dtype, "crs": "EPSG:32633"}
        profile |= {"transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_500_000)}
        with open_quietly(path, "w", **profile | keys) as sink:
            sink.write(image)
        return path

    return save


def predict_scene(scene: Path, out: Path, predict=brightest, **keys) -> None:
    defaults = {"classes": CLASSES, "mean": MEAN, "std": STD, "window": (128, 128), "overlap": 0.25}
    outputs.predict_scene(predict, scene, out, **defaults | keys)


def bands_of(path: Path) -> np.ndarray:
    from visionattn.data.formats.geotiff import opened

    with opened(path) as source:
        return source.read()


@pytest.mark.parametrize("size", [(530, 1050), (60, 50)])
def test_a_scene_becomes_a_cloud_optimised_geotiff_on_its_grid(tmp_path, tif, size):
    from visionattn.data.formats.geotiff import opened

    image = blobs(*size)
    scene, out = tif(tmp_path / "scene.tif", image), tmp_path / "mask.tif"
    predict_scene(scene, out)
    with opened(scene) as source, opened(out) as found:
        assert (found.shape, found.crs, found.transform) == (source.shape, source.crs, source.transform)
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert found.dtypes == ("uint8", "uint8")
        assert found.descriptions == ("class", "confidence in percent")
        assert found.tags()["classes"] == "0: background; 1: water; 2: road"
        numbers, confidence = found.read()
    np.testing.assert_array_equal(numbers, expected(image))
    assert (confidence == 80).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.tif", "scene.tif"]


def test_strips_of_columns_make_the_same_map(tmp_path, tif, monkeypatch):
    scene = tif(tmp_path / "scene.tif", blobs(100, 2100))
    predict_scene(scene, tmp_path / "whole.tif")
    monkeypatch.setattr(outputs, "BAND_BYTES", 1)
    predict_scene(scene, tmp_path / "strips.tif")
    np.testing.assert_array_equal(bands_of(tmp_path / "strips.tif"), bands_of(tmp_path / "whole.tif"))


def test_pixels_without_data_stay_without(tmp_path, tif):
    image = blobs(600, 700)
    image[:, :, :250] = -1
    image[1, :, 300:350] = -1  # of one band only: its mean is taken
    scene = tif(tmp_path / "scene.tif", image, nodata=-1)
    seen = []

    def predict(batch: torch.Tensor) -> torch.Tensor:
        assert batch.isfinite().all()
        seen.append(len(batch))
        return brightest(batch)

    predict_scene(scene, tmp_path / "mask.tif", predict, window=(96, 96), overlap=0)
    numbers, confidence = bands_of(tmp_path / "mask.tif")
    image[1, :, 300:350] = MEAN[1]
    np.testing.assert_array_equal(numbers[:, 250:], expected(image)[:, 250:])
    assert (numbers[:, :250] == IGNORE).all()
    assert (confidence[:, :250] == IGNORE).all()
    assert sum(seen) == 7 * 6  # two columns of windows have nothing to see


def test_bands_are_chosen_and_checked(tmp_path, tif):
    image = blobs(64, 64)
    scene = tif(tmp_path / "scene.tif", np.concatenate([image[1:], image[:1], image]))
    predict_scene(scene, tmp_path / "mask.tif", bands=[2, 1])
    np.testing.assert_array_equal(bands_of(tmp_path / "mask.tif")[0], expected(image))
    with pytest.raises(UserError, match=r"scene\.tif: 4 bands, but the network was trained on 2 bands"):
        predict_scene(scene, tmp_path / "other.tif")
    with pytest.raises(UserError, match=r"scene\.tif: 4 bands, but the network was trained on bands 1, 5"):
        predict_scene(scene, tmp_path / "other.tif", bands=[1, 5])


def test_regions_become_polygons(tmp_path, tif, monkeypatch):
    polygons = pytest.importorskip("visionattn.polygons")
    shapely = pytest.importorskip("shapely")
    from pyogrio import raw
    from rasterio.features import rasterize, shapes

    from visionattn.data.formats.geotiff import opened

    monkeypatch.setattr(polygons, "STRIP", 64)  # regions are cut several times
    monkeypatch.setattr(polygons, "AT_ONCE", 100)
    scene, layer = tif(tmp_path / "scene.tif", blobs(300, 200)), tmp_path / "mask.gpkg"
    predict_scene(scene, tmp_path / "mask.tif", polygons=layer)
    meta, _, outlines, (names, numbers) = raw.read(layer)
    outlines = shapely.from_wkb(outlines)
    assert meta["crs"] == "EPSG:32633"
    assert shapely.is_valid(outlines).all()
    assert [CLASSES[k] for k in numbers] == names.tolist()
    with opened(tmp_path / "mask.tif") as source:
        mask, transform = source.read(1), source.transform
    whole = [shape for shape, number in shapes(mask, mask=mask > 0)]
    assert len(outlines) == len(whole)  # none is left in pieces
    again = rasterize(zip(outlines, numbers, strict=True), mask.shape, transform=transform)
    np.testing.assert_array_equal(again, mask)
    assert shapely.area(outlines).sum() == (mask > 0).sum() * 0.25


def test_a_scene_without_regions_has_an_empty_layer(tmp_path, tif):
    pytest.importorskip("pyogrio")
    from pyogrio import read_info

    scene, layer = tif(tmp_path / "scene.tif", np.zeros((2, 40, 40), np.float32)), tmp_path / "mask.gpkg"
    predict_scene(scene, tmp_path / "mask.tif", polygons=layer)
    assert read_info(layer)["features"] == 0


def never(batch: torch.Tensor) -> torch.Tensor:
    raise AssertionError("work has started")


def test_polygons_without_coordinates_are_refused_before_work(tmp_path, tif):
    scene = tif(tmp_path / "scene.tif", blobs(64, 64), crs=None)
    with pytest.raises(UserError, match=r"scene\.tif: no coordinate reference system, so no polygons"):
        predict_scene(scene, tmp_path / "mask.tif", never, polygons=tmp_path / "mask.gpkg")
    predict_scene(scene, tmp_path / "mask.tif")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.tif", "scene.tif"]


def test_a_scene_without_a_place_is_segmented_without_a_warning(tmp_path, tif):
    from rasterio import Affine

    scene = tif(tmp_path / "scene.tif", blobs(64, 64), crs=None, transform=Affine.identity())
    predict_scene(scene, tmp_path / "mask.tif")
    np.testing.assert_array_equal(bands_of(tmp_path / "mask.tif")[0], expected(blobs(64, 64)))


def test_outputs_that_cannot_be_are_refused_before_work(tmp_path, tif):
    scene = tif(tmp_path / "scene.tif", blobs(64, 64))
    (tmp_path / "there.tif").write_text("mine")
    (tmp_path / "there.gpkg").write_text("mine")
    for out, keys, says in (
        ("there.tif", {}, "there.tif exists; predictions are never overwritten"),
        ("nowhere/mask.tif", {}, "nowhere does not exist"),
        ("mask.png", {}, "ends with .tif"),
        ("mask.tif", {"polygons": tmp_path / "there.gpkg"}, "there.gpkg: exists"),
    ):
        with pytest.raises(UserError, match=says.replace(".", r"\.")):
            predict_scene(scene, tmp_path / out, never, **keys)
    assert (tmp_path / "there.tif").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif", "there.gpkg", "there.tif"]


def test_an_error_halfway_leaves_nothing(tmp_path, tif):
    scene = tif(tmp_path / "scene.tif", blobs(300, 64))

    def predict(batch: torch.Tensor) -> torch.Tensor:
        predict.calls += 1
        if predict.calls > 1:
            raise RuntimeError("out of memory")
        return brightest(batch)

    predict.calls, threads = 0, threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_scene(scene, tmp_path / "mask.tif", predict)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]
    assert threading.active_count() == threads  # none reads on from the closed scene


@contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes. Only around the call: pytest's own output may be a longer file."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("name", "size"), [("mask.tif", 10_000), ("mask.gpkg", 90_000)])
def test_a_full_disk_leaves_nothing_half_done(tmp_path, tif, name, size):
    pytest.importorskip("pyogrio")
    scene = tif(tmp_path / "scene.tif", blobs(500, 500))
    threads = threading.active_count()
    with full_disk(size), pytest.raises(UserError, match=rf"{name}: could not be written .*has been removed"):
        predict_scene(scene, tmp_path / "mask.tif", polygons=tmp_path / "mask.gpkg")
    assert threading.active_count() == threads
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


def segment(images: np.ndarray) -> np.ndarray:
    """(B, 1, H, W) in 0..1 -> three classes by brightness."""
    assert images.dtype == np.float32
    return np.digitize(images[:, 0], [0.3, 0.6])


def voxels(codes: str = "RAS") -> tuple[np.ndarray, np.ndarray]:
    """A noise volume and an oblique affine."""
    pytest.importorskip("nibabel")
    from nibabel.eulerangles import euler2mat

    affine = np.eye(4)
    affine[:3, :3] = euler2mat(0.1, 0.2, 0.05) @ np.diag([-0.8, 0.9, 2.5])
    affine[:3, 3] = 10, -20, 30
    return np.random.default_rng(0).integers(0, 100, (9, 8, 7), dtype=np.int16), affine


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_keeps_its_grid_and_header(tmp_path, axis):
    array, affine = voxels()
    import nibabel

    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)
    image.set_qform(affine, code="scanner")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    out = tmp_path / "mask.nii.gz"
    outputs.predict_volume(segment, tmp_path / "scan.nii.gz", out, axis=axis, contrast=(100, 50), batch_size=3)
    found, source = nibabel.load(out), nibabel.load(tmp_path / "scan.nii.gz")
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.affine, source.affine)
    for name in ("qform_code", "sform_code", "xyzt_units"):
        assert found.header[name] == source.header[name]
    np.testing.assert_array_equal(found.get_fdata(), np.digitize(array / 100, [0.3, 0.6]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.nii.gz", "scan.nii.gz"]


def test_volumes_that_do_not_fit_are_refused(tmp_path):
    array, affine = voxels()
    import nibabel

    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "scan.nii")
    with pytest.raises(UserError, match=r"scan\.nii: 1 channels, but the network was trained on 4"):
        outputs.predict_volume(segment, tmp_path / "scan.nii", tmp_path / "mask.nii", channels=4)
    with pytest.raises(UserError, match=r"mask\.png: expected a name that ends with \.nii"):
        outputs.predict_volume(segment, tmp_path / "scan.nii", tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"scan\.nii exists"):
        outputs.predict_volume(segment, tmp_path / "scan.nii", tmp_path / "scan.nii")


def test_a_full_disk_leaves_no_volume(tmp_path):
    array, affine = voxels()
    import nibabel

    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "scan.nii")
    with full_disk(400), pytest.raises(UserError, match=r"mask\.nii: could not be written .*has been removed"):
        outputs.predict_volume(segment, tmp_path / "scan.nii", tmp_path / "mask.nii")
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii"]


def test_masks_and_overlays_are_pictures(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (20, 30))
    mask[0] = IGNORE
    colors = [None, (0, 0, 255), (255, 0, 0)]
    outputs.write_mask(mask, colors, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), mask)
        shown = np.array(image.convert("RGB"))
    assert (shown[mask == 2] == (255, 0, 0)).all()
    outputs.write_overlay(np.zeros((1, 20, 30), np.float32), mask, colors, tmp_path / "overlay.png")
    with Image.open(tmp_path / "overlay.png") as image:
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert (np.array(image)[mask == 1][:, 2] > 0).all()
    with pytest.raises(UserError, match=r"mask\.png exists"):
        outputs.write_mask(mask, colors, tmp_path / "mask.png")
