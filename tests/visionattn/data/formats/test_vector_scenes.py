"""Scenes with vector files of objects: places to a millionth of a pixel, areas, and what does not fit together."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionattn import recipe
from visionattn.data import formats
from visionattn.data.boxes import pixels_of
from visionattn.data.formats import Found, vector_scenes
from visionattn.data.object_masks import Polygons
from visionattn.data.splits import split
from visionattn.errors import UserError

pytest.importorskip("rasterio")
import rasterio
import shapely
from pyogrio import raw
from rasterio.warp import transform as reprojected

from visionattn.data.formats import _rasters, _vectors

H, W = 300, 400
UTM = "EPSG:32633"
C, S = 0.1 * np.cos(0.4), 0.1 * np.sin(0.4)
NORTH = rasterio.Affine(0.1, 0, 500_000, 0, -0.1, 5_000_000)
TURNED = rasterio.Affine(C, S, 500_000, S, -C, 5_000_000)
NEON = Path("/work/shared/data/neon_trees")


def scene(path: Path, transform: Any = NORTH, crs: str | None = UTM, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(1, 255, (3, H, W), dtype=np.uint8) if pixels is None else pixels
    profile = {"driver": "GTiff", "count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2]}
    with _rasters.open_quietly(path, "w", **profile, dtype="uint8", crs=crs, transform=transform) as sink:
        sink.write(pixels)
    return path


def vectors(
    path: Path,
    polygons: Sequence[shapely.Geometry],
    names: Sequence[str] | None = None,
    transform: Any = NORTH,
    crs: str | None = UTM,
    **keys: Any,
) -> Path:
    """A file of polygons that are given in pixels of a scene on UTM, in another coordinate system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_ground = shapely.transform(np.array(polygons, object), lambda xy: np.stack(transform @ xy.T, axis=1))
    if crs not in (None, UTM):
        on_ground = shapely.transform(on_ground, lambda xy: np.stack(reprojected(UTM, crs, *xy.T), axis=1))
    kinds = {polygon.geom_type for polygon in polygons}
    keys = {"geometry_type": kinds.pop() if len(kinds) == 1 else "Unknown"} | keys
    columns = [] if names is None else [np.array(names, object)]
    raw.write(path, shapely.to_wkb(on_ground), columns, ["class"][: len(columns)], crs=crs, **keys)
    return path


def box(*corners: float) -> shapely.Polygon:
    return shapely.box(*corners)


def find(root: Path, **keys: Any) -> Found:
    return formats.find(vector_scenes.Section(format="geotiff", root=root, **keys))


@pytest.mark.parametrize("transform", [NORTH, TURNED])
@pytest.mark.parametrize(
    ("ending", "crs"),
    [("gpkg", UTM), ("gpkg", "EPSG:3857"), ("geojson", "EPSG:4326"), ("shp", "EPSG:25833"), ("fgb", UTM)],
)
def test_places_are_right_to_a_millionth_of_a_pixel(tmp_path, transform, ending, crs):
    scene(tmp_path / "a.tif", transform)
    points = [[(20, 30), (50.5, 31), (41, 60.25)], [(100, 100), (180, 90), (190, 170.125), (110, 160)]]
    polygons = [shapely.Polygon(ring) for ring in points]
    vectors(
        tmp_path / f"a.{ending}",
        polygons,
        ["cat", "dog"],
        transform,
        crs,
        **({"COORDINATE_PRECISION": "15"} if ending == "geojson" else {}),
    )
    (sample,), classes, problems = find(tmp_path)
    assert (classes, problems) == (["cat", "dog"], [])
    boxes = sample.target()
    order = np.argsort(boxes.labels)
    for k, polygon in zip(order, polygons, strict=True):
        (ring,) = boxes.masks.shapes[k].parts
        assert shapely.Polygon(ring).normalize().equals_exact(polygon.normalize(), 1e-6)
        np.testing.assert_allclose(boxes.xyxy[k], polygon.bounds, atol=2e-5)  # of float32


def test_boxes_are_boxes_without_masks(tmp_path):
    scene(tmp_path / "a.tif")
    vectors(
        tmp_path / "a.gpkg", [box(10, 20, 30.5, 40), box(-10, 280, 30, 320), box(390, 10, 500, 40), box(500, 0, 510, 9)]
    )
    boxes = find(tmp_path, classes=["tree"]).samples[0].target()
    assert boxes.masks is None
    np.testing.assert_allclose(boxes.xyxy, [[10, 20, 30.5, 40], [0, 280, 30, 300]], atol=2e-5)
    assert boxes.ignore.tolist() == [False, True]  # of the second less than half is on the scene, of the third a tenth


def test_holes_and_parts_are_in_masks(tmp_path):
    scene(tmp_path / "a.tif")
    ring = shapely.Polygon(box(10, 10, 50, 50).exterior, [box(20, 20, 40, 40).exterior])
    vectors(tmp_path / "a.gpkg", [shapely.MultiPolygon([ring, box(60, 10, 70, 50)])], ["x"])
    boxes = find(tmp_path).samples[0].target()
    expected = np.zeros((H, W), bool)
    expected[10:50, 10:50] = expected[10:50, 60:70] = True
    expected[20:40, 20:40] = False
    assert np.array_equal(boxes.masks[0], expected[pixels_of(boxes.xyxy[0])])


def test_a_window_shows_what_a_crop_of_the_whole_shows(tmp_path):
    scene(tmp_path / "a.tif")
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, (W, H), (200, 2))
    polygons = [
        shapely.Point(x, y).buffer(r, quad_segs=4) for (x, y), r in zip(corners, rng.uniform(3, 20, 200), strict=True)
    ]
    vectors(tmp_path / "a.gpkg", polygons, ["tree"] * 200)
    (sample,), _, problems = find(tmp_path)
    assert problems == []
    window = slice(40, 168), slice(100, 228)
    cut, whole = sample.target(window), sample.target().within(window)
    assert cut.xyxy.tolist() == whole.xyxy.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(cut.masks, whole.masks, strict=True))
    assert sample.image(window).shape == (3, 128, 128)
    again = pickle.loads(pickle.dumps(sample))
    assert again.target(window).xyxy.tolist() == cut.xyxy.tolist()


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_one_file_for_all_scenes(tmp_path, crs):
    further = NORTH @ rasterio.Affine.translation(W, 0)
    scene(tmp_path / "train/a.tif")
    scene(tmp_path / "train/b.tif", further)
    scene(tmp_path / "test/c.tif", further @ rasterio.Affine.translation(W, 0))
    file = vectors(tmp_path / "all.gpkg", [box(10, 20, 30, 40), box(W + 5, 6, W + 20, 30)], ["oak", "elm"], crs=crs)
    samples, classes, problems = find(tmp_path, labels=file)
    assert (classes, problems) == (["elm", "oak"], [])
    found = {s.name: (s.split, s.target().labels.tolist(), s.target().xyxy.round(2).tolist()) for s in samples}
    assert found == {
        "test/c": ("test", [], []),
        "train/a": ("train", [1], [[10, 20, 30, 40]]),
        "train/b": ("train", [0], [[5, 6, 20, 30]]),
    }


def test_a_file_of_labels_and_few_of_them_are_two_things(tmp_path):
    for i in range(6):
        scene(tmp_path / f"{i}.tif")
        vectors(tmp_path / f"labels/{i}.geojson", [box(10, 20, 30, 40)], ["oak"])
    keys = {"format": "geotiff", "root": str(tmp_path), "labels": str(tmp_path / "labels"), "image_size": 64}
    spec = recipe.of_mapping({"task": "detection", "model": {"name": "biformer_tiny"}, "data": {**keys, "labelled": 2}})
    found = formats.find(spec.data)
    dataset, problems = split(found.samples, found.classes, spec.data)
    assert problems == []
    assert {name: len(samples) for name, samples in dataset.splits.items()} == {"train": 2, "val": 2}


def test_a_folder_of_labels(tmp_path):
    scene(tmp_path / "images/x/a.tif")
    vectors(tmp_path / "labels/x/a.geojson", [box(10, 20, 30, 40)], ["oak"])
    assert len(find(tmp_path).samples[0].target()) == 1
    assert len(find(tmp_path / "images", labels=tmp_path / "labels").samples[0].target()) == 1


def test_outside_of_the_labelled_areas_is_ignored(tmp_path):
    scene(tmp_path / "a.tif")
    objects = [box(20, 20, 40, 40), box(150, 20, 170, 40), box(120, 100, 140, 120)]
    vectors(tmp_path / "a.gpkg", objects, ["oak"] * 3)
    areas = [shapely.Polygon([(0, 0), (100, 0), (100, 100), (0, 100)]), shapely.Point(130, 110).buffer(30)]
    file = vectors(tmp_path / "areas/done.gpkg", areas, crs="EPSG:4326")
    sample = find(tmp_path, areas=file).samples[0]
    assert {path.name for path in sample.files} == {"a.tif", "a.gpkg", "done.gpkg"}
    boxes = sample.target()
    objects_ignored = {tuple(b): i for b, i in zip(boxes.xyxy.round().tolist(), boxes.ignore, strict=True)}
    assert [objects_ignored[o.bounds] for o in objects] == [False, True, False]
    for window in ((slice(0, H), slice(0, W)), (slice(30, 158), slice(60, 188))):
        cut = sample.target(window)
        assert (cut.labels[cut.labels < 0] == -1).all()
        assert cut.ignore[cut.labels < 0].all()
        covered = np.zeros((H, W), bool)[window]
        for rectangle in cut.xyxy[cut.labels < 0]:
            covered[pixels_of(rectangle)] = True
        inside = Polygons(tuple(shapely.get_coordinates(area)[:-1] for area in areas)).on(window)
        assert (covered == ~inside).mean() > 0.98
    assert (sample.target((slice(0, 64), slice(0, 64))).labels >= 0).all()


def test_polygons_and_areas_may_cross_themselves(tmp_path):
    scene(tmp_path / "a.tif")
    bow = [(60, 10), (110, 40), (110, 10), (60, 50)]
    vectors(tmp_path / "a.gpkg", [shapely.Polygon(bow), box(20, 100, 40, 120)], ["oak"] * 2)
    area = shapely.Polygon([(0, 0), (300, 0), (0, 300), (300, 200)])
    file = vectors(tmp_path / "areas/done.gpkg", [area])
    boxes = find(tmp_path, areas=file).samples[0].target()
    assert boxes.labels[:2].tolist() == [0, 0]
    assert boxes.ignore[:2].tolist() == [False, True]  # the second is outside of the crossed area


def test_polygons_with_areas_have_masks_of_what_is_ignored(tmp_path):
    scene(tmp_path / "a.tif")
    vectors(tmp_path / "a.gpkg", [shapely.Point(50, 50).buffer(20)], ["oak"])
    file = vectors(tmp_path / "areas/done.gpkg", [box(0, 0, 100, H)])
    sample = find(tmp_path, areas=file).samples[0]
    for boxes in (sample.target(), sample.target((slice(0, 200), slice(0, 200)))):
        assert boxes.ignore.tolist() == [False, True]
        assert boxes.masks[1].all()
        assert boxes.masks[1].shape == tuple(s.stop - s.start for s in pixels_of(boxes.xyxy[1]))


def test_real_chips_as_scenes(tmp_path):
    if not NEON.is_dir():
        pytest.skip(f"{NEON} is not on this machine")
    content = json.loads((NEON / "annotations/instances_val.json").read_text())
    for entry in content["images"][:4]:
        pixels = np.array(Image.open(NEON / "images" / entry["file_name"])).transpose(2, 0, 1)
        path = scene(tmp_path / f"{entry['id']}.tif", TURNED, pixels=pixels)
        known = [a["bbox"] for a in content["annotations"] if a["image_id"] == entry["id"]]
        vectors(
            path.with_suffix(".gpkg"), [box(x, y, x + w, y + h) for x, y, w, h in known], ["Tree"] * len(known), TURNED
        )
    samples, classes, problems = find(tmp_path)
    assert (len(samples), classes, problems) == (4, ["Tree"], [])
    for sample in samples:
        known = [a["bbox"] for a in content["annotations"] if a["image_id"] == int(sample.name)]
        expected = [[x, y, x + w, y + h] for x, y, w, h in known]
        np.testing.assert_allclose(sample.target().xyxy, expected, atol=5e-5)
        assert sample.target().masks is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crs": None}, "a.gpkg: no coordinate reference system; assign one"),
        ({"polygons": [shapely.Point(5, 5)]}, r"a.gpkg: 1 of 1 features are no polygons, such as 1 \(Point\)"),
        ({"polygons": [box(900, 0, 910, 10)]}, "a.gpkg: none of its 1 polygons lie on .*a.tif"),
        ({"names": None}, "a.gpkg has no column 'class'; it has none; set data.label_column, or name the one class"),
        ({"names": [""]}, "a.gpkg: class is empty in the features 1"),
        (
            {"polygons": [shapely.Polygon([(5, 5), (9, 9), (5, 5)])]},
            "a.tif: of .*a.gpkg polygons without an area: the features 1",
        ),
        ({"polygons": [shapely.Polygon([(5, 5.6), (9, 5.6), (9, 5.7)])]}, "hold no pixel's centre: the features 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_what_is_wrong_with_a_vector_file_is_said(tmp_path, keys, message):
    scene(tmp_path / "a.tif")
    vectors(tmp_path / "a.gpkg", **{"polygons": [box(10, 20, 30, 40)], "names": ["x"]} | keys)
    with pytest.raises(UserError, match=message):
        find(tmp_path)


def test_a_scene_without_a_place_is_named(tmp_path):
    scene(tmp_path / "a.tif")
    scene(tmp_path / "b.tif", crs=None)
    for name in "ab":
        vectors(tmp_path / f"{name}.gpkg", [box(10, 20, 30, 40)], ["x"])
    problems = find(tmp_path).problems
    assert any("b.tif: no coordinate reference system, so its labels have no place" in problem for problem in problems)


def test_scenes_and_files_without_each_other_are_named(tmp_path):
    for name in "abc":
        scene(tmp_path / f"{name}.tif")
    for name in ("a.gpkg", "b.gpkg", "b.geojson", "d.gpkg"):
        vectors(tmp_path / name, [box(10, 20, 30, 40)], ["x"])
    problems = "\n".join(find(tmp_path).problems)
    assert "c.tif: no vector file of its name in" in problems
    assert "b.tif: any of" in problems
    assert "d.gpkg: there is no scene of this name" in problems


def test_labels_that_miss_every_scene_are_refused(tmp_path):
    scene(tmp_path / "a.tif")
    file = vectors(tmp_path / "all.gpkg", [box(900, 20, 930, 40)], ["x"])
    with pytest.raises(UserError, match=r"data.labels: .*all.gpkg: none of its polygons lie on any of the 1 scenes"):
        find(tmp_path, labels=file)
    areas = vectors(tmp_path / "areas/done.gpkg", [box(900, 20, 930, 40)])
    vectors(tmp_path / "a.gpkg", [box(10, 20, 30, 40)], ["x"])
    with pytest.raises(UserError, match=r"a.tif: no area of .*done.gpkg lies on it, so nothing of it is labelled"):
        find(tmp_path, areas=areas)


def test_what_another_coordinate_system_cannot_show_lies_elsewhere(tmp_path):
    scene(tmp_path / "a.tif")
    wide = [shapely.box(-180, 89.9, 180, 90), shapely.box(-170, -10, -169, -9)]
    x, y = reprojected(UTM, "EPSG:4326", [500_001, 500_003], [4_999_999, 4_999_997])
    raw.write(
        tmp_path / "a.gpkg",
        shapely.to_wkb(np.array([*wide, shapely.box(x[0], y[1], x[1], y[0])], object)),
        [np.array(["x"] * 3, object)],
        ["class"],
        crs="EPSG:4326",
        geometry_type="Polygon",
    )
    (box,) = find(tmp_path).samples[0].target().xyxy
    np.testing.assert_allclose(box, [10, 10, 30, 30], atol=0.01)


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_of_a_large_layer_what_is_near_the_scenes_is_read(tmp_path, crs):
    scene(tmp_path / "a.tif")
    corners = np.stack(np.meshgrid(np.arange(-5000, 5000, 250), np.arange(-5000, 5000, 250)), -1).reshape(-1, 2)
    everywhere = list(shapely.box(*corners.T, *(corners + 20).T))
    file = vectors(tmp_path / "all.gpkg", everywhere, ["x"] * len(everywhere), crs=crs)
    found = find(tmp_path, labels=file)
    (sample,) = found.samples
    assert len(sample.target()) == sum(box(0, 0, W, H).intersects(one) for one in everywhere)
    layer = _vectors.Layer(file, [sample], column="class")
    assert layer.count == len(everywhere)
    assert len(layer.shapes) < 20


def test_layers_and_columns_are_chosen(tmp_path):
    scene(tmp_path / "a.tif")
    for layer, polygon in (("old", box(10, 20, 30, 40)), ("new", box(50, 20, 60, 40))):
        vectors(tmp_path / "a.gpkg", [polygon], [layer], layer=layer, append=(tmp_path / "a.gpkg").exists())
    with pytest.raises(UserError, match=r"a.gpkg has the layers old, new; choose with data.layer"):
        find(tmp_path)
    with pytest.raises(UserError, match=r"has no layer newer; .*did you mean new"):
        find(tmp_path, layer="newer")
    assert find(tmp_path, layer="new").classes == ["new"]
    assert find(tmp_path, layer="new", classes=["tree"], label_column="species").classes == ["tree"]
    with pytest.raises(UserError, match=r"no column 'clas'; it has class; did you mean class\?"):
        find(tmp_path, layer="new", label_column="clas")


def test_an_empty_file_is_a_scene_without_objects(tmp_path):
    for name in "ab":
        scene(tmp_path / f"{name}.tif")
    vectors(tmp_path / "a.gpkg", [box(10, 20, 30, 40)], ["x"])
    vectors(tmp_path / "b.gpkg", [], [], geometry_type="Polygon")
    assert [len(sample.target()) for sample in find(tmp_path).samples] == [1, 0]


def test_many_objects_in_a_large_scene(tmp_path):
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 1, "height": 16_000, "width": 16_000, "dtype": "uint8", "sparse_ok": True}
    with rasterio.open(path, "w", **profile, tiled=True, crs=UTM, transform=NORTH):
        pass
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 15_900, (20_000, 2))
    polygons = shapely.box(*corners.T, *(corners + rng.uniform(5, 60, (20_000, 2))).T)
    vectors(tmp_path / "a.gpkg", list(polygons), ["car"] * 20_000)
    (sample,), _, problems = find(tmp_path)
    assert problems == []
    assert len(sample.target()) == 20_000
    window = slice(4000, 4512), slice(8000, 8512)
    touching = shapely.intersects(polygons, box(8000, 4000, 8512, 4512)).sum()
    assert 0 < len(sample.target(window)) <= touching
