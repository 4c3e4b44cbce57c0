"""GeoTIFF scenes: windows, missing pixels, masks, and what does not fit together."""

import os
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visionattn.data import formats
from visionattn.data.formats import geotiff
from visionattn.data.ground import same_ground
from visionattn.data.images import read_image
from visionattn.data.sample import IGNORE, blocks
from visionattn.data.splits import split
from visionattn.errors import UserError
from visionattn.recipe.sections import Data, Lists
from visionattn.tasks.segmentation.recipe import DATA

rasterio = pytest.importorskip("rasterio")
from rasterio.warp import transform_bounds  # noqa: E402

from visionattn.data.formats import _rasters  # noqa: E402

SIZE = (40, 50)
UTM = "EPSG:32633"
PLACE = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)


def bands(count: int = 4, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(count).integers(1, 200, (count, *SIZE)).astype(dtype)


def numbers() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 3, SIZE).astype(np.uint8)


def save(path: Path, array: np.ndarray, crs=UTM, transform=PLACE, valid: np.ndarray | None = None, **keys) -> Path:
    """A GeoTIFF of (bands, H, W) or (H, W); `valid` (H, W) becomes an internal mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = array[None] if array.ndim == 2 else array
    profile = {"driver": "GTiff", "count": len(array), "height": array.shape[1], "width": array.shape[2]}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        _rasters.open_quietly(path, "w", **profile, dtype=array.dtype, crs=crs, transform=transform, **keys) as sink,
    ):
        sink.write(array)
        if valid is not None:
            sink.write_mask(valid)
    return path


def section(root: Path, **keys) -> Data:
    return DATA["geotiff"](format="geotiff", root=root, **{"classes": ["other", "water", "road"]} | keys)


@pytest.fixture
def root(tmp_path) -> Path:
    save(tmp_path / "images/a.tif", bands())
    save(tmp_path / "masks/a.tif", numbers())
    return tmp_path


def only(root: Path, **keys) -> _rasters.Scene:
    (scene,), _, problems = formats.find(section(root, **keys))
    assert problems == []
    return scene


def test_a_scene_is_read_by_windows(root):
    scene = only(root)
    assert (scene.name, scene.case, scene.group, scene.size, scene.channels) == ("a", "a", "a", SIZE, 4)
    np.testing.assert_array_equal(scene.image(), bands())
    np.testing.assert_array_equal(scene.target(), numbers())
    assert (scene.image().dtype, scene.target().dtype) == (np.float32, np.int64)
    window = slice(3, 20), slice(11, 50)
    np.testing.assert_array_equal(scene.image(window), bands()[:, *window])
    np.testing.assert_array_equal(scene.target(window), numbers()[window])
    assert (scene.crs, scene.resolution) == (UTM, (10.0, 10.0))


@pytest.mark.parametrize(
    ("transform", "corner"),
    [
        (PLACE, (500_500, 4_999_600)),
        (rasterio.Affine(10, 0, 500_000, 0, 10, 5_000_000), (500_500, 5_000_400)),
        (rasterio.Affine(4, 3, 500_000, 3, -4, 5_000_000), (500_320, 4_999_990)),
    ],
    ids=["north up", "south up", "rotated"],
)
@pytest.mark.parametrize("points", [False, True])
def test_the_ground_of_a_scene(tmp_path, transform, corner, points):
    keys = {"transform": transform}
    if points:  # as scanners and radar give it
        ends = [(0, 0), (0, SIZE[1]), (SIZE[0], 0), (SIZE[0], SIZE[1])]
        places = [rasterio.control.GroundControlPoint(*end, *(transform @ end[::-1])) for end in ends]
        keys = {"transform": None, "gcps": places}
    save(tmp_path / "images/a.tif", bands(), **keys)
    save(tmp_path / "masks/a.tif", numbers(), **keys)
    crs, corners = only(tmp_path).ground
    assert crs == UTM
    np.testing.assert_allclose([corners[0], corners[2]], [(500_000, 5_000_000), corner], atol=1e-6)


def test_scenes_can_be_sent_to_another_process(root):
    scene = only(root)
    again = pickle.loads(pickle.dumps(scene))
    assert again == scene
    np.testing.assert_array_equal(again.image(), bands())


def test_bands_are_chosen_by_number(root):
    scene = only(root, bands=[4, 1])
    assert scene.channels == 2
    np.testing.assert_array_equal(scene.image(), bands()[[3, 0]])


def test_nodata_is_nan_in_images_and_ignored_in_masks(tmp_path):
    image = bands()
    image[:, :10] = 0  # no band has data
    image[1, 20:30] = 0  # one band has none
    save(tmp_path / "images/a.tif", image, nodata=0)
    save(tmp_path / "masks/a.tif", numbers())
    scene = only(tmp_path)
    np.testing.assert_array_equal(np.isnan(scene.image()), image == 0)
    assert (scene.target()[:10] == IGNORE).all()
    np.testing.assert_array_equal(scene.target()[10:], numbers()[10:])


def test_the_recipe_says_what_is_nodata(root):
    scene = only(root, nodata=7)
    np.testing.assert_array_equal(np.isnan(scene.image()), bands() == 7)


def test_internal_masks_are_obeyed(tmp_path):
    valid = np.ones(SIZE, dtype=bool)
    valid[:, 30:] = False
    save(tmp_path / "images/a.tif", bands(3), valid=valid)
    save(tmp_path / "masks/a.tif", numbers(), valid=np.roll(valid, 5, axis=1))
    scene = only(tmp_path)
    np.testing.assert_array_equal(np.isnan(scene.image()).all(0), ~valid)
    np.testing.assert_array_equal(scene.target() == IGNORE, ~valid | ~np.roll(valid, 5, axis=1))


def test_pages_of_one_size_are_refused_and_masks_and_overviews_are_no_pages(tmp_path):
    save(tmp_path / "a.tif", bands(3), valid=np.arange(SIZE[1]) < 30 * np.ones((SIZE[0], 1)))
    with rasterio.open(tmp_path / "a.tif", "r+") as scene:
        scene.build_overviews([2])
    assert read_image(tmp_path / "a.tif").shape == (3, *SIZE)
    with _rasters.opened(tmp_path / "a.tif") as source:
        assert source.count == 3
    first, second = (Image.fromarray(numbers().squeeze().astype(np.uint8) + k) for k in range(2))
    first.save(tmp_path / "b.tif", save_all=True, append_images=[second])
    for read in (read_image, lambda path: _rasters.opened(path).__enter__()):
        with pytest.raises(UserError, match=r"b\.tif: .*pages.* expected one"):
            read(tmp_path / "b.tif")


def test_a_fourth_band_called_alpha_is_data_unless_it_is_left_out(tmp_path):
    image = bands(4, "uint8")
    image[3, :15] = 0
    save(tmp_path / "images/a.tif", image, photometric="rgb", alpha="yes")
    save(tmp_path / "masks/a.tif", numbers())
    np.testing.assert_array_equal(only(tmp_path).image(), image)
    without = only(tmp_path, bands=[1, 2, 3])
    np.testing.assert_array_equal(np.isnan(without.image()), np.broadcast_to(image[3] == 0, (3, *SIZE)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_nodata_of_a_mask_is_no_label(root, dtype):
    mask = numbers().astype(dtype)
    mask[5:9] = 99
    save(root / "masks/a.tif", mask, nodata=99)
    assert (only(root).target()[5:9] == IGNORE).all()
    np.testing.assert_array_equal(only(root).target()[9:], numbers()[9:])


def test_a_class_stays_a_class_though_masks_call_it_nodata(root):
    save(root / "masks/a.tif", numbers(), nodata=0)
    np.testing.assert_array_equal(only(root).target(), numbers())


def test_infinite_values_are_missing(tmp_path):
    image = bands(2, "float32")
    image[0, 0, 0], image[1, 0, 1], image[:, 0, 2] = np.inf, np.nan, np.nan
    save(tmp_path / "images/a.tif", image)
    save(tmp_path / "masks/a.tif", numbers())
    np.testing.assert_array_equal(np.isnan(only(tmp_path).image()), ~np.isfinite(image))
    assert np.argwhere(only(tmp_path).target() == IGNORE).tolist() == [[0, 2]]


def test_masks_of_colours(root):
    colours = {"other": "#000000", "water": "#0000FF", "road": "#FF8000"}
    table = np.array([[0, 0, 0], [0, 0, 255], [255, 128, 0]], dtype=np.uint8)
    valid = np.ones(SIZE, dtype=bool)
    valid[:4] = False
    save(root / "masks/a.tif", np.moveaxis(table[numbers()], -1, 0), photometric="rgb", valid=valid)
    mask = only(root, colors=colours).target()
    np.testing.assert_array_equal(mask, np.where(valid, numbers(), IGNORE))
    with pytest.raises(UserError, match=r"masks/a\.tif: an RGB mask; give the colour"):
        only(root).target()


def test_values_that_are_no_classes_are_named(root):
    save(root / "masks/a.tif", numbers() * 5)
    with pytest.raises(UserError, match=r"masks/a\.tif: the mask has 5, 10, but classes are 0, 1, 2"):
        only(root).target()


@pytest.mark.parametrize(
    ("mask", "keys", "says"),
    [
        (numbers()[:-1], {}, r"images/a\.tif is 40x50, but .*masks/a\.tif is 39x50"),
        (numbers(), {"crs": "EPSG:4326"}, r"images/a\.tif has the CRS EPSG:32633, but .*masks/a\.tif has EPSG:4326"),
        (numbers(), {"transform": PLACE @ PLACE.scale(2)}, r"a\.tif has pixels of \(10.*of \(20\.0, 20\.0\) units"),
        (
            numbers(),
            {"transform": PLACE @ PLACE.translation(3, 4)},
            r"the same ground.* 5\.0 pix",
        ),
    ],
)
def test_masks_of_another_grid_are_problems(root, mask, keys, says):
    save(root / "masks/a.tif", mask, **keys)
    scenes, _, problems = geotiff.find(section(root))
    assert scenes == []
    assert len(problems) == 1
    assert re.search(says, problems[0])


def test_masks_without_a_place_are_taken_by_their_pixels(root):
    save(root / "masks/a.tif", numbers(), crs=None, transform=rasterio.Affine.identity())
    np.testing.assert_array_equal(only(root).target(), numbers())


def test_mixed_band_counts_are_problems(root):
    for name, count in (("b", 4), ("c", 3)):
        save(root / f"images/{name}.tif", bands(count))
        save(root / f"masks/{name}.tif", numbers())
    *_, (problem,) = formats.find(section(root))
    assert re.search(r"images/c\.tif: 3 bands, but 2 of 3 scenes have 4", problem)
    scenes, _, problems = formats.find(section(root, bands=[1, 3]))
    assert problems == []
    assert {scene.channels for scene in scenes} == {2}
    *_, (problem,) = formats.find(section(root, bands=[1, 4]))
    assert re.search(r"images/c\.tif: 3 bands, but data\.bands asks for band 4", problem)


def test_scenes_of_other_coordinates_or_resolution_are_a_note(root):
    assert geotiff.notes(formats.find(section(root)).samples) == []
    others = {"b": {"crs": "EPSG:32634"}, "c": {"transform": PLACE @ PLACE.scale(0.5)}, "d": {"crs": None}}
    for name, keys in others.items():
        save(root / f"images/{name}.tif", bands(), **keys)
        save(root / f"masks/{name}.tif", numbers(), **keys)
    scenes, _, problems = formats.find(section(root))
    assert problems == []
    assert geotiff.notes(scenes) == [
        "scenes have different coordinate systems: 2 EPSG:32633, 1 EPSG:32634, 1 none",
        "scenes have different resolutions: pixels from 5 (c) to 10 (a) units of the CRS",
    ]


def split_of(root: Path, tmp_path: Path, train: str, val: str) -> list[str]:
    """What is said of scenes in two splits, given as lines of names."""
    for part, names in (("train", train), ("val", val)):
        (tmp_path / f"{part}.txt").write_text(names)
    data = section(root, lists=Lists(train=tmp_path / "train.txt", val=tmp_path / "val.txt"))
    samples, classes, _ = formats.find(data)
    return same_ground(split(samples, classes, data)[0])


@pytest.mark.parametrize(
    ("columns", "rows", "shared"), [(25, 30, True), (SIZE[1], 0, False), (0.1 - SIZE[1], 0, False)]
)
@pytest.mark.parametrize("up", [False, True])
def test_scenes_of_different_splits_must_not_share_ground(root, tmp_path, columns, rows, shared, up):
    beside = PLACE @ PLACE.translation(columns, rows)
    beside = beside @ PLACE.translation(0, SIZE[0]) @ PLACE.scale(1, -1) if up else beside
    for name, place in (("b", beside), ("c", PLACE @ PLACE.translation(25, 30))):
        crs = UTM if name == "b" else "EPSG:32634"
        save(root / f"images/{name}.tif", bands() + np.uint16(1), transform=place, crs=crs)
        save(root / f"masks/{name}.tif", numbers(), transform=place, crs=crs)
    problems = split_of(root, tmp_path, "a\nc", "b")
    assert len(problems) == shared
    assert not shared or "train: a and val: b" in problems[0]


@pytest.mark.parametrize("crs", ["EPSG:32634", "EPSG:4326", "EPSG:3857", "EPSG:3035"])
@pytest.mark.parametrize("scale", [1.0, 0.02, 50.0])
@pytest.mark.parametrize("away", [False, True])
def test_ground_is_shared_whatever_the_coordinate_system(root, tmp_path, crs, scale, away):
    """A scene round the middle of the first one, as large, far smaller or larger, or beside it."""
    middle = np.array([500_250.0, 4_999_800.0]) + (np.array([510, 410]) * max(scale, 1) if away else 0)
    half = np.array([250, 200]) * scale
    west, south, east, north = transform_bounds(UTM, crs, *(middle - half), *(middle + half))
    place = rasterio.Affine((east - west) / SIZE[1], 0, west, 0, (south - north) / SIZE[0], north)
    save(root / "images/b.tif", bands() + np.uint16(1), transform=place, crs=crs)
    save(root / "masks/b.tif", numbers(), transform=place, crs=crs)
    for train, val in ("ab", "ba"):
        problems = split_of(root, tmp_path, train, val)
        assert len(problems) == (not away)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_unreadable_files_are_problems(root, folder):
    (root / folder / "a.tif").write_bytes(b"not a raster")
    scenes, _, problems = geotiff.find(section(root))
    assert scenes == []
    assert re.search(rf"{folder}/a\.tif: not a readable raster", problems[0])


def test_a_damaged_scene_is_named(root):
    path = save(root / "images/a.tif", bands(), tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    scene = only(root)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"images/a\.tif: (damaged|not a readable)"):
        scene.image()


def test_a_missing_mask_is_named(root):
    save(root / "images/b.tif", bands())
    scenes, _, problems = formats.find(section(root))
    assert len(scenes) == 1
    assert re.search(r"images/b\.tif: no mask", problems[0])


# Files that stay open


@pytest.fixture
def opened(monkeypatch) -> list[rasterio.DatasetReader]:
    """The files that are opened from now on, by whichever thread."""
    files: list[rasterio.DatasetReader] = []
    real = rasterio.open

    def open_and_note(*arguments, **keys):
        files.append(real(*arguments, **keys))
        return files[-1]

    monkeypatch.setattr(rasterio, "open", open_and_note)
    return files


def windows(step: int = 10) -> Iterator[tuple[slice, slice]]:
    for top in range(0, SIZE[0], step):
        for left in range(0, SIZE[1], step):
            yield slice(top, top + step), slice(left, left + step)


def test_many_windows_open_each_file_once(root, opened):
    scene = only(root)
    opened.clear()
    for window in windows():
        np.testing.assert_array_equal(scene.image(window), bands()[:, *window])
        np.testing.assert_array_equal(scene.target(window), numbers()[window])
    assert sorted(Path(file.name).parent.name for file in opened) == ["images", "masks"]


def test_a_crop_reads_the_image_and_the_mask_once(tmp_path, monkeypatch):
    save(tmp_path / "images/a.tif", bands(), nodata=0)
    save(tmp_path / "masks/a.tif", numbers())
    scene, read, whole = only(tmp_path), [], rasterio.io.DatasetReader.read
    window = slice(2, 9), slice(1, 8)
    wanted = scene.image(window), scene.target(window)

    def read_and_note(file, *words, **more):
        read.append(Path(file.name).parent.name)
        return whole(file, *words, **more)

    monkeypatch.setattr(rasterio.io.DatasetReader, "read", read_and_note)
    for one, other in zip(scene.read(window), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert sorted(read) == ["images", "masks"]


def test_files_of_a_thread_are_its_own(root):
    scene = only(root)

    def read(window: tuple[slice, slice]) -> bool:
        image, mask = scene.image(window), scene.target(window)
        return np.array_equal(image, bands()[:, *window]) and np.array_equal(mask, numbers()[window])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, list(windows(5)) * 3))


@pytest.mark.parametrize("same_time", [False, True])
def test_a_file_that_is_written_anew_is_read_anew(root, same_time):
    scene, path = only(root), root / "images/a.tif"
    np.testing.assert_array_equal(scene.image(), bands())
    before = path.stat()
    save(root / "new/a.tif", bands() + np.uint16(7))
    if same_time:  # as copies that keep their times have it
        os.utime(root / "new/a.tif", ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "new/a.tif").replace(path)
    np.testing.assert_array_equal(scene.image(), bands() + 7)
    path.unlink()
    with pytest.raises(UserError, match=r"images/a\.tif: not a readable raster"):
        scene.image()


def test_only_some_files_stay_open(tmp_path, opened):
    for i in range(30):
        save(tmp_path / f"images/{i}.tif", bands())
        save(tmp_path / f"masks/{i}.tif", numbers())
    scenes = formats.find(section(tmp_path)).samples
    opened.clear()
    for scene in scenes:
        scene.image()
        scene.target()
    assert len(opened) == 60
    assert sum(not file.closed for file in opened) == _rasters.KEPT_OPEN


class Windows(torch.utils.data.Dataset):
    """Square windows of a scene, as a loader reads them."""

    def __init__(self, scene: _rasters.Scene, side: int) -> None:
        self.scene, self.places = scene, list(blocks(scene.size, side))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[int, np.ndarray, np.ndarray]:
        return i, self.scene.image(self.places[i]), self.scene.target(self.places[i])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loading_processes_read_what_this_one_has_open(tmp_path, start):
    """A fork that read by its parent's file descriptors would move the places of the others in the files."""
    rng = np.random.default_rng(0)
    image, mask = rng.integers(1, 60_000, (3, 640, 640), dtype=np.uint16), rng.integers(0, 3, (640, 640), np.uint8)
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
    save(tmp_path / "images/a.tif", image, **tiles)
    save(tmp_path / "masks/a.tif", mask, **tiles)
    windows = Windows(only(tmp_path), 32)
    windows[0]  # opens both files here
    loader = DataLoader(windows, batch_size=None, num_workers=4, multiprocessing_context=start)
    seen = set()
    for i, *read in loader:
        for pixels, labels in (read, windows[i][1:]):
            np.testing.assert_array_equal(pixels, image[:, *windows.places[i]])
            np.testing.assert_array_equal(labels, mask[windows.places[i]])
        seen.add(i)
    assert len(seen) == 400


# Scenes to predict


def test_scenes_with_other_bands_are_named_and_the_others_predicted(tmp_path):
    for name, count in (("a", 4), ("b", 3), ("c", 4)):
        save(tmp_path / f"{name}.tif", bands(count))
    (tmp_path / "d.tif").write_bytes(b"not a raster")
    scenes, problems = formats.unlabelled([tmp_path], section(Path()), 4)
    assert [scene.name for scene in scenes] == ["a", "c"]
    assert [scene.target() for scene in scenes] == [None, None]
    other, unreadable = problems
    assert re.search(r"b\.tif: 3 bands, but the network was trained on 4 bands", other)
    assert re.search(r"d\.tif: not a readable raster", unreadable)
    scenes, (problem,) = formats.unlabelled([tmp_path / "a.tif", tmp_path / "b.tif"], section(Path(), bands=[1, 4]), 2)
    np.testing.assert_array_equal(scenes[0].image(), bands()[[0, 3]])
    assert re.search(r"b\.tif: 3 bands, but the network was trained on bands 1, 4", problem)


def test_a_scene_is_measured_in_pixels(root):
    scene = only(root)
    assert (scene.spacing, scene.unit) == ((1.0, 1.0), "pixels")
