"""Masks of scenes: on the scene's own grid, whole or not at all, and their regions as polygons."""

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from visionattn.data import formats
from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.files import Unwritable
from visionattn.inference import sliding
from visionattn.tasks.segmentation.recipe import Recipe
from visionattn.tasks.segmentation.task import open_writer, predictions

rasterio = pytest.importorskip("rasterio")
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402

from visionattn.data.formats._rasters import open_quietly, opened  # noqa: E402

CLASSES = ["background", "water", "road"]
MEAN, STD = [10.0, 20.0], [2.0, 4.0]
SECTION = {"format": "geotiff", "root": Path(), "classes": CLASSES, "mean": MEAN, "std": STD, "batch_size": 4}
MODEL = {"name": "biformer_tiny", "decoder": "fpn"}


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


def save(path: Path, image: np.ndarray, **keys) -> Path:
    """A GeoTIFF."""
    profile = {"driver": "GTiff", "count": len(image), "height": image.shape[1], "width": image.shape[2]}
    profile |= {"dtype": image.dtype, "crs": "EPSG:32633"}
    profile |= {"transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_500_000)}
    with open_quietly(path, "w", **profile | keys) as sink:
        sink.write(image)
    return path


@pytest.fixture
def scene(tmp_path) -> Path:
    return save(tmp_path / "scene.tif", blobs(64, 64))


def predict_scene(
    scene: Path,
    out: Path,
    predict: Callable[[torch.Tensor], torch.Tensor] = brightest,
    polygons: bool = False,
    overlap: float = 0.25,
    uncertainty: bool = False,
    **data,
) -> None:
    """Write a scene's mask, into `out`, with a network whose probabilities are those of `predict`."""
    data = SECTION | {"image_size": 128} | data
    spec = Recipe(task="segmentation", model=MODEL, data=data, evaluate={"overlap": overlap})
    samples, problems = formats.unlabelled([scene], spec.data, len(MEAN))
    assert problems == []
    task = SimpleNamespace(averaged=predict, doubting=uncertainty, trusted=_trusted)
    fabric = Fabric(accelerator="cpu", devices=1)
    with (
        open_writer(spec, out, polygons, uncertainty=uncertainty) as writer,
        closing(predictions(task, samples, spec, fabric)) as predicted,
    ):
        writer.refuse(samples)
        writer.write(samples, predicted)


def _trusted(looked: torch.Tensor) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Probabilities, and where one more plane was blended with them that."""
    return looked[:3], {"entropy": looked[3].numpy()} if len(looked) > 3 else {}


def test_maps_of_doubts_lie_on_the_grid_of_the_scene(tmp_path):
    image = blobs(600, 700)
    image[:, :50, :60] = 0

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([brightest(images), images[:, :1]], 1)

    path = save(tmp_path / "scene.tif", image, nodata=0)
    predict_scene(path, tmp_path / "out", predict, uncertainty=True)
    with opened(path) as source, opened(tmp_path / "out" / "scene_entropy.tif") as written:
        assert (written.crs, written.transform, written.shape) == (source.crs, source.transform, source.shape)
        values = written.read(1)
    assert np.isnan(values[:50, :60]).all()
    seen = values[60:, 70:]
    np.testing.assert_allclose(seen, (image[0, 60:, 70:] - MEAN[0]) / STD[0], atol=1e-3, rtol=1e-3)


def bands_of(path: Path) -> np.ndarray:
    with opened(path) as source:
        return source.read()


@pytest.mark.parametrize("size", [(530, 1050), (60, 50)])
def test_a_scene_becomes_a_cloud_optimised_geotiff_on_its_grid(tmp_path, files, size):
    image = blobs(*size)
    scene = save(tmp_path / "scene.tif", image)
    predict_scene(scene, tmp_path / "out")
    with opened(scene) as source, opened(tmp_path / "out/scene.tif") as written:
        assert (written.shape, written.crs, written.transform) == (source.shape, source.crs, source.transform)
        assert written.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert written.dtypes == ("uint8", "uint8")
        assert written.descriptions == ("class", "confidence in percent")
        assert written.tags()["classes"] == "0: background; 1: water; 2: road"
        numbers, confidence = written.read()
    np.testing.assert_array_equal(numbers, expected(image))
    assert (confidence == 80).all()
    assert files(tmp_path) == ["out/scene.tif", "scene.tif"]


def control_points() -> tuple[list[GroundControlPoint], rasterio.CRS]:
    corners = [(row, column) for row in (0, 64) for column in (0, 64)]
    points = [GroundControlPoint(row, column, 4e5 + column, 5.5e6 - row - column / 9) for row, column in corners]
    return points, rasterio.CRS.from_epsg(32633)


def polynomials() -> RPC:
    offsets = {f"{axis}_off": 32.0 for axis in ("line", "samp")} | {"lat_off": 49.0, "long_off": 11.0}
    scales = {f"{axis}_scale": 32.0 for axis in ("line", "samp")} | {"lat_scale": 1.0, "long_scale": 1.0}
    terms = {f"{axis}_{part}_coeff": [1.0, *[0.01] * 19] for axis in ("line", "samp") for part in ("num", "den")}
    return RPC(height_off=100.0, height_scale=9.0, **offsets, **scales, **terms)


PLACES = {
    "rotated": ("transform", rasterio.Affine(0.4, 0.3, 4e5, 0.3, -0.4, 5.5e6)),
    "south up": ("transform", rasterio.Affine(0.5, 0, 4e5, 0, 0.5, 5.5e6)),
    "control points": ("gcps", control_points()),
    "polynomials": ("rpcs", polynomials()),
}


@pytest.mark.parametrize("how", PLACES)
def test_the_place_is_kept_however_a_scene_says_it(tmp_path, how):
    scene = tmp_path / "scene.tif"
    crs = "EPSG:32633" if how in ("rotated", "south up") else None
    with open_quietly(scene, "w", driver="GTiff", count=2, height=64, width=64, dtype="float32", crs=crs) as sink:
        sink.write(blobs(64, 64))
        setattr(sink, *PLACES[how])

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([brightest(images), images[:, :1]], 1)

    predict_scene(scene, tmp_path / "out", predict, uncertainty=True)
    for name in ("scene.tif", "scene_entropy.tif"):
        with opened(scene) as source, opened(tmp_path / "out" / name) as written:
            assert (written.crs, written.transform) == (source.crs, source.transform)
            (points, system), (truth, expected_system) = written.gcps, source.gcps
            assert [(p.row, p.col, p.x, p.y) for p in points] == [(p.row, p.col, p.x, p.y) for p in truth]
            assert system == expected_system
            assert (written.rpcs and written.rpcs.to_dict()) == (source.rpcs and source.rpcs.to_dict())
            assert {"rotated": source.crs, "south up": source.crs, "control points": truth}.get(how, source.rpcs)


def test_strips_of_columns_make_the_same_map(tmp_path, monkeypatch):
    scene = save(tmp_path / "scene.tif", blobs(100, 2100))
    predict_scene(scene, tmp_path / "whole")
    monkeypatch.setattr(sliding, "BAND_BYTES", 1)
    assert len(list(sliding.strips(2100, 1))) > 1
    predict_scene(scene, tmp_path / "strips")
    np.testing.assert_array_equal(bands_of(tmp_path / "strips/scene.tif"), bands_of(tmp_path / "whole/scene.tif"))


def test_pixels_without_data_stay_without(tmp_path):
    image = blobs(600, 700)
    image[:, :, :250] = -1
    image[1, :, 300:350] = -1  # of one band only: its mean is taken
    scene = save(tmp_path / "scene.tif", image, nodata=-1)
    seen = []

    def predict(batch: torch.Tensor) -> torch.Tensor:
        assert batch.isfinite().all()
        seen.append(len(batch))
        return brightest(batch)

    predict_scene(scene, tmp_path / "out", predict, image_size=96, overlap=0.0)
    numbers, confidence = bands_of(tmp_path / "out/scene.tif")
    image[1, :, 300:350] = MEAN[1]
    np.testing.assert_array_equal(numbers[:, 250:], expected(image)[:, 250:])
    assert (numbers[:, :250] == IGNORE).all()
    assert (confidence[:, :250] == IGNORE).all()
    assert sum(seen) == 7 * 6  # two columns of windows have nothing to see


def test_bands_are_chosen(tmp_path):
    image = blobs(64, 64)
    scene = save(tmp_path / "scene.tif", np.concatenate([image[1:], image[:1], image]))
    predict_scene(scene, tmp_path / "out", bands=[2, 1])
    np.testing.assert_array_equal(bands_of(tmp_path / "out/scene.tif")[0], expected(image))


def test_regions_become_polygons(tmp_path, monkeypatch):
    polygons = pytest.importorskip("visionattn.writers.polygons")
    shapely = pytest.importorskip("shapely")
    from pyogrio import raw
    from rasterio.features import rasterize, shapes

    monkeypatch.setattr(polygons, "STRIP", 64)  # regions are cut several times
    monkeypatch.setattr(polygons, "AT_ONCE", 100)
    scene = save(tmp_path / "scene.tif", blobs(300, 200))
    predict_scene(scene, tmp_path / "out", polygons=True)
    meta, _, outlines, (names, numbers) = raw.read(tmp_path / "out/scene.gpkg")
    outlines = shapely.from_wkb(outlines)
    assert meta["crs"] == "EPSG:32633"
    assert shapely.is_valid(outlines).all()
    assert [CLASSES[k] for k in numbers] == names.tolist()
    with opened(tmp_path / "out/scene.tif") as source:
        mask, transform = source.read(1), source.transform
    whole = [shape for shape, number in shapes(mask, mask=mask > 0)]
    assert len(outlines) == len(whole)  # none is left in pieces
    again = rasterize(zip(outlines, numbers, strict=True), mask.shape, transform=transform)
    np.testing.assert_array_equal(again, mask)
    assert shapely.area(outlines).sum() == (mask > 0).sum() * 0.25


def test_a_scene_without_regions_has_an_empty_layer(tmp_path):
    pytest.importorskip("pyogrio")
    from pyogrio import read_info

    scene = save(tmp_path / "scene.tif", np.zeros((2, 40, 40), np.float32))
    predict_scene(scene, tmp_path / "out", polygons=True)
    assert read_info(tmp_path / "out/scene.gpkg")["features"] == 0


def never(batch: torch.Tensor) -> torch.Tensor:
    raise AssertionError("work has started")


def test_polygons_without_coordinates_are_refused_before_work(tmp_path, files):
    scene = save(tmp_path / "scene.tif", blobs(64, 64), crs=None)
    with pytest.raises(UserError, match=r"no coordinate reference system, so no polygons: .*scene\.tif; assign one"):
        predict_scene(scene, tmp_path / "out", never, polygons=True)
    assert files(tmp_path) == ["scene.tif"]
    predict_scene(scene, tmp_path / "out")
    assert files(tmp_path) == ["out/scene.tif", "scene.tif"]


def test_a_scene_without_a_place_is_segmented_without_a_warning(tmp_path):
    scene = save(tmp_path / "scene.tif", blobs(64, 64), crs=None, transform=rasterio.Affine.identity())
    predict_scene(scene, tmp_path / "out")
    np.testing.assert_array_equal(bands_of(tmp_path / "out/scene.tif")[0], expected(blobs(64, 64)))


@pytest.mark.parametrize(
    ("there", "out", "polygons", "says"),
    [
        ("out/scene.tif", "out", False, r"out/scene\.tif exists; predictions are never overwritten"),
        ("out/scene.gpkg", "out", True, r"out/scene\.gpkg exists; predictions are never overwritten"),
        ("mine", "mine", False, r"mine is a file; a file for each image is written into a folder"),
    ],
)
def test_what_is_there_is_never_overwritten_and_refused_before_work(tmp_path, scene, files, there, out, polygons, says):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    with pytest.raises(Unwritable, match=says):
        predict_scene(scene, tmp_path / out, never, polygons)
    assert (tmp_path / there).read_text() == "mine"
    assert files(tmp_path) == sorted([there, "scene.tif"])


def test_an_error_halfway_leaves_nothing(tmp_path, files):
    scene = save(tmp_path / "scene.tif", blobs(300, 64))

    def predict(batch: torch.Tensor) -> torch.Tensor:
        predict.calls += 1
        if predict.calls > 1:
            raise RuntimeError("out of memory")
        return brightest(batch)

    predict.calls, threads = 0, threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_scene(scene, tmp_path / "out", predict)
    assert files(tmp_path) == ["scene.tif"]
    assert threading.active_count() == threads  # none reads on


def test_a_scene_that_is_damaged_halfway_leaves_nothing(tmp_path, files):
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    scene = save(tmp_path / "scene.tif", blobs(600, 64), **tiles)
    content = bytearray(scene.read_bytes())
    content[-20_000:-10_000] = bytes(10_000)
    scene.write_bytes(content)
    seen = []

    def predict(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return brightest(batch)

    with pytest.raises(UserError, match=r"scene\.tif: damaged, cannot be read"):
        predict_scene(scene, tmp_path / "out", predict)
    assert seen
    assert files(tmp_path) == ["scene.tif"]


@pytest.mark.parametrize(("name", "size"), [("scene.tif", 10_000), ("scene.gpkg", 90_000)])
def test_a_full_disk_leaves_nothing_half_done(tmp_path, files, full_disk, name, size):
    pytest.importorskip("pyogrio")
    scene = save(tmp_path / "scene.tif", blobs(500, 500))
    threads = threading.active_count()
    with full_disk(size), pytest.raises(Unwritable, match=rf"out/{name}: could not be written .*has been removed"):
        predict_scene(scene, tmp_path / "out", polygons=True)
    assert threading.active_count() == threads
    assert files(tmp_path) == ["scene.tif"]
