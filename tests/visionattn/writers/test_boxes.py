"""Objects as files: what is written and read back is the same set, and files appear whole or not at all."""

import csv
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats
from visionattn.data.boxes import Boxes, pixels_of
from visionattn.data.formats import coco, csv_boxes, instances, vector_scenes, voc, yolo
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.files import Unwritable

pytest.importorskip("rasterio")
import rasterio
import shapely
from pyogrio import raw

from visionattn.data.formats import _rasters

CLASSES = ["cell", "Ödem, groß", "=3"]
SIZE = (90, 120)
ONE_FILE = {"boxes_csv": "out.csv", "coco": "out.json"}
ALL = ["boxes_csv", "coco", "voc", "yolo", "labels", "geojson", "gpkg"]
SCENES = ("geojson", "gpkg")


def made_boxes(seed: int, masks: bool) -> Boxes:
    """Objects apart from each other: boxes at fractions of pixels, or masks that reach the sides of theirs."""
    rng = np.random.default_rng(seed)
    places = np.argwhere(rng.random((3, 4)) < 0.7)[:, ::-1] * 30
    low = places + rng.uniform(1, 9, (len(places), 2))
    high = low + rng.uniform(3, 20, (len(places), 2))
    xyxy = np.concatenate([low, high], 1).astype(np.float32)
    scores = rng.random(len(xyxy)).round(6).astype(np.float32)
    crops = None
    if masks:
        xyxy = xyxy.round()
        crops = [rng.random(tuple(s.stop - s.start for s in pixels_of(box))) < 0.7 for box in xyxy]
        for crop in crops:
            crop[0], crop[-1], crop[:, 0], crop[:, -1] = True, True, True, True
    return Boxes(xyxy, rng.integers(0, 3, len(xyxy)), np.zeros(len(xyxy), bool), scores, crops)


@pytest.fixture
def images(tmp_path) -> Path:
    """in/a.png and in/b/ä.png, and scenes of the same names."""
    for name in ("images/a", "images/b/ä", "scenes/a", "scenes/b/ä"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, SIZE, dtype=np.uint8)
        if name.startswith("images"):
            Image.fromarray(pixels).save(path.with_suffix(".png"))
            continue
        profile = {"driver": "GTiff", "count": 1, "height": SIZE[0], "width": SIZE[1], "dtype": "uint8"}
        c, s = 0.1 * np.cos(np.pi / 6), 0.1 * np.sin(np.pi / 6)
        turned = rasterio.Affine(c, s, 500_000, s, -c, 5_000_000)
        with rasterio.open(path.with_suffix(".tif"), "w", **profile, crs="EPSG:32633", transform=turned) as sink:
            sink.write(pixels, 1)
    return tmp_path / "in"


def samples_of(images: Path, writer: str) -> list[Sample]:
    kind: ModuleType = vector_scenes if writer in SCENES else coco
    name = "geotiff" if writer in SCENES else "coco"
    folder = images / ("scenes" if writer in SCENES else "images")
    section = kind.Section(format=name, root=folder)
    samples, problems = formats.unlabelled([folder], section, 1)
    assert problems == []
    return samples


def write(writer: str, samples: Sequence[Sample], out: Path, values: Sequence[Boxes]) -> Path:
    """Into a file, or a folder."""
    target = out / ONE_FILE.get(writer, writer)
    module = importlib.import_module(f"visionattn.writers.{writer}")
    with module.open(target, CLASSES) as opened:
        opened.refuse(samples)
        for sample, value in zip(samples, values, strict=True):
            opened.write([sample], [Prediction(0, value)])
    return target


def read(writer: str, target: Path, images: Path) -> formats.Found:
    """What is written, with the images linked to where the format has them."""
    folder = images / "images"
    if writer == "boxes_csv":
        return formats.find(csv_boxes.Section(format="csv", root=target, images=folder, classes=CLASSES))
    if writer == "coco":
        return formats.find(coco.Section(format="coco", root=target, images=folder, classes=CLASSES))
    if writer in SCENES:
        section = vector_scenes.Section(format="geotiff", root=images / "scenes", labels=target, classes=CLASSES)
        return formats.find(section)
    (target / "images").symlink_to(folder)
    if writer == "voc":
        return formats.find(voc.Section(format="voc", root=target, classes=CLASSES))
    if writer == "yolo":
        return formats.find(yolo.Section(format="yolo", root=target, classes=CLASSES))
    target.rename(target.with_name("masks"))
    (target.with_name("masks") / "images").rename(target.with_name("images"))
    return formats.find(instances.Section(format="instances", root=target.parent, classes=CLASSES))


def assert_same(boxes: Boxes, expected: Boxes, masks: bool) -> None:
    assert len(boxes) == len(expected)
    order = [np.lexsort(b.xyxy.T) for b in (boxes, expected)]
    boxes, expected = boxes[order[0]], expected[order[1]]
    np.testing.assert_allclose(boxes.xyxy, expected.xyxy, rtol=0, atol=1e-5)  # float32 has 8e-6 here
    assert boxes.labels.tolist() == expected.labels.tolist()
    assert boxes.ignore.tolist() == expected.ignore.tolist()
    if masks:
        assert all(np.array_equal(a, b) for a, b in zip(boxes.masks, expected.masks, strict=True))


@pytest.mark.parametrize(
    ("writer", "masks"), [(writer, masks) for writer in ALL for masks in (False, True) if masks or writer != "labels"]
)
def test_what_is_written_and_read_back_is_the_same_set(tmp_path, images, writer, masks):
    samples = samples_of(images, writer)
    values = [made_boxes(1, masks), Boxes(masks=[] if masks else None)]
    found = read(writer, write(writer, samples, tmp_path, values), images)
    assert (found.classes, found.problems) == (CLASSES, [])
    assert [sample.name.removeprefix("images/") for sample in found.samples] == ["a", "b/ä"]
    has_masks = masks and writer not in ("boxes_csv", "voc")
    for sample, expected in zip(found.samples, values, strict=True):
        assert_same(sample.target(), expected, has_masks)
        assert sample.size == SIZE


@pytest.mark.parametrize("writer", ["coco", "voc"])
def test_what_is_ignored_stays_so(tmp_path, images, writer):
    boxes = made_boxes(1, False)
    boxes.ignore[2:4] = True
    found = read(writer, write(writer, samples_of(images, writer), tmp_path, [boxes, Boxes()]), images)
    assert_same(found.samples[0].target(), boxes, False)


@pytest.mark.parametrize("writer", ["boxes_csv", "yolo", "gpkg", "geojson"])
def test_what_is_ignored_is_left_out_where_a_format_cannot_say_so(tmp_path, images, writer):
    boxes = made_boxes(1, False)
    boxes.ignore[2:4] = True
    found = read(writer, write(writer, samples_of(images, writer), tmp_path, [boxes, Boxes()]), images)
    assert_same(found.samples[0].target(), boxes[~boxes.ignore], False)


def test_parts_of_a_scene_are_put_together(tmp_path, images):
    boxes = made_boxes(1, False)
    samples = samples_of(images, "gpkg")
    module = importlib.import_module("visionattn.writers.gpkg")
    with module.open(tmp_path / "gpkg", CLASSES) as opened:
        opened.write(samples[:1], [Prediction(0, boxes[np.arange(3)]), Prediction(0, boxes[np.arange(3, len(boxes))])])
        opened.write(samples[1:], [])
    assert_same(read("gpkg", tmp_path / "gpkg", images).samples[0].target(), boxes, False)


def test_a_table_has_deepforest_s_columns(tmp_path, images):
    boxes = Boxes(
        np.array([[1, 2, 3.5, 4]], np.float32), np.array([1]), np.array([False]), np.array([0.25], np.float32)
    )
    target = write("boxes_csv", samples_of(images, "boxes_csv"), tmp_path, [boxes, Boxes()])
    with target.open(newline="", encoding="utf-8") as stream:
        assert list(csv.reader(stream)) == [
            ["image_path", "xmin", "ymin", "xmax", "ymax", "label", "score"],
            ["a.png", "1.0", "2.0", "3.5", "4.0", "Ödem, groß", "0.250000"],
            ["b/ä.png", "", "", "", "", "", ""],
        ]


def test_coco_s_own_tools_read_the_annotations(tmp_path, images):
    from faster_coco_eval import COCO

    boxes = made_boxes(3, True)
    known = COCO(
        write("coco", samples_of(images, "coco"), tmp_path, [boxes, Boxes(masks=[])]), print_function=lambda *_: None
    )
    assert [image["file_name"] for image in known.loadImgs([1, 2])] == ["a.png", "b/ä.png"]
    annotations = known.loadAnns(known.getAnnIds(imgIds=[1]))
    assert [known.cats[a["category_id"]]["name"] for a in annotations] == [CLASSES[k] for k in boxes.labels]
    np.testing.assert_allclose([a["score"] for a in annotations], boxes.scores, atol=1e-6)
    for annotation, box, mask in zip(annotations, boxes.xyxy, boxes.masks, strict=True):
        assert np.array_equal(known.annToMask(annotation)[pixels_of(box)], mask)
        assert known.annToMask(annotation).sum() == mask.sum() == annotation["area"]


def test_a_geopackage_has_outlines_and_rotated_rectangles_on_the_ground(tmp_path, images):
    """A bar of 20 x 4 pixels of 0.1 m, in a scene that is turned by 30 degrees."""
    bar = Boxes(np.array([[10, 10, 30, 14]], np.float32), np.array([0]), np.array([False]), np.array([0.5], np.float32))
    bar = Boxes(bar.xyxy, bar.labels, bar.ignore, bar.scores, [np.ones((4, 20), bool)])
    sample = samples_of(images, "gpkg")[0]
    target = write("gpkg", [sample], tmp_path, [bar])
    about, _, wkb, (names, scores, *box) = raw.read(target / "a.gpkg", layer="objects")
    assert about["crs"] == "EPSG:32633"
    assert (names.tolist(), scores.tolist()) == (["cell"], [0.5])
    assert [values.tolist() for values in box] == [[10], [10], [30], [14]]
    with _rasters.opened(sample.path) as source:
        corners = [source.transform @ corner for corner in ((10, 10), (30, 10), (30, 14), (10, 14))]
    assert shapely.from_wkb(wkb)[0].equals_exact(shapely.MultiPolygon([shapely.Polygon(corners)]), 1e-6)
    about, _, _, (names, length, width, angle) = raw.read(target / "a.gpkg", layer="rectangles")
    np.testing.assert_allclose([length[0], width[0], angle[0]], [2, 0.4, 30], rtol=1e-5)


def test_geojson_of_an_image_is_in_pixels(tmp_path, images):
    boxes = made_boxes(2, False)
    target = write("geojson", samples_of(images, "coco"), tmp_path, [boxes, Boxes()])
    content = json.loads((target / "a.geojson").read_text())
    assert "crs" not in content
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in content["features"]]
    np.testing.assert_allclose([shape.bounds for shape in shapes], boxes.xyxy, atol=1e-5)
    assert content["features"][0]["properties"]["classification"] == {"name": CLASSES[boxes.labels[0]]}
    assert json.loads((target / "b/ä.geojson").read_text())["features"] == []


def test_where_instances_overlap_the_label_image_shows_the_higher_score(tmp_path, images):
    xyxy = np.array([[0, 0, 10, 10], [5, 5, 15, 15]], np.float32)
    boxes = Boxes(
        xyxy, np.zeros(2, np.int64), np.zeros(2, bool), np.array([0.9, 0.5], np.float32), [np.ones((10, 10), bool)] * 2
    )
    target = write("labels", samples_of(images, "labels")[:1], tmp_path, [boxes])
    with Image.open(target / "a.tif") as image:
        numbers = np.array(image)
    assert numbers.dtype == np.uint16
    assert [(numbers == k).sum() for k in (1, 2)] == [100, 75]


def test_more_objects_than_16_bits_have_32(tmp_path, images):
    count = 70_000
    xyxy = np.stack([np.arange(count) % 120, np.arange(count) // 120 % 90], 1)
    xyxy = np.concatenate([xyxy, xyxy + 1], 1).astype(np.float32)
    boxes = Boxes(xyxy, np.zeros(count, np.int64), np.zeros(count, bool), None, [np.ones((1, 1), bool)] * count)
    target = write("labels", samples_of(images, "labels")[:1], tmp_path, [boxes])
    with Image.open(target / "a.tif") as image:
        assert np.array(image).max() == count


def test_label_images_of_scenes_have_their_grid(tmp_path, images):
    sample = samples_of(images, "gpkg")[0]
    boxes = made_boxes(4, True)
    target = write("labels", [sample], tmp_path, [boxes])
    with rasterio.open(target / "a.tif") as labels, rasterio.open(sample.path) as scene:
        assert (labels.crs, labels.transform) == (scene.crs, scene.transform)
        assert (labels.read(1) > 0).sum() == sum(mask.sum() for mask in boxes.masks)


@pytest.mark.parametrize("writer", ALL)
def test_what_is_there_is_never_overwritten(tmp_path, images, files, writer):
    samples, values = samples_of(images, writer), [made_boxes(1, True)] * 2
    (tmp_path / "out").mkdir()
    write(writer, samples, tmp_path / "out", values)
    before = files(tmp_path / "out")
    with pytest.raises(Unwritable, match=r"exists; .*never overwritten"):
        write(writer, samples, tmp_path / "out", values)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("writer", ALL)
def test_a_full_disk_leaves_nothing_half_written(tmp_path, images, files, full_disk: Callable, writer):
    (tmp_path / "out").mkdir()
    with full_disk(100), pytest.raises(Unwritable, match="could not be written"):
        write(writer, samples_of(images, writer), tmp_path / "out", [made_boxes(1, True)] * 2)
    assert [name for name in files(tmp_path / "out") if not name.endswith("data.yaml")] == []


@pytest.mark.parametrize("writer", ALL)
def test_an_unreadable_image_is_not_written(tmp_path, images, files, writer):
    module = importlib.import_module(f"visionattn.writers.{writer}")
    samples = samples_of(images, writer)
    (tmp_path / "out").mkdir()
    with module.open(tmp_path / "out" / ONE_FILE.get(writer, writer), CLASSES) as opened:
        with pytest.raises(UserError, match="a: damaged"):
            opened.write(samples[:1], [Prediction(0, made_boxes(1, True)), Prediction(0, error="a: damaged")])
        opened.leave_out("a")
    for name in files(tmp_path / "out"):
        if Path(name).stem != "data":
            assert "a.png" not in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize("writer", ONE_FILE)
def test_several_processes_make_one_file(tmp_path, images, files, writer):
    module = importlib.import_module(f"visionattn.writers.{writer}")
    samples, values = samples_of(images, writer), [made_boxes(k, False) for k in range(2)]
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / ONE_FILE[writer]
    for process in (1, 0):
        with module.open(target, CLASSES).share(process, 2) as opened:
            opened.write([samples[process]], [Prediction(0, values[process])])
    assert files(tmp_path / "out") == [target.name]
    found = read(writer, target, images)
    for sample, expected in zip(found.samples, values, strict=True):
        assert_same(sample.target(), expected, False)


@pytest.mark.parametrize("writer", ["labels"])
def test_boxes_are_no_label_image(tmp_path, images, writer):
    with pytest.raises(UserError, match="a: boxes without masks cannot be written as a label image"):
        write(writer, samples_of(images, writer)[:1], tmp_path, [made_boxes(1, False)])


def test_a_geopackage_needs_a_place(tmp_path, images):
    with pytest.raises(UserError, match=r"no coordinate reference system, so no polygons: .*a.png"):
        write("gpkg", samples_of(images, "coco"), tmp_path, [Boxes(), Boxes()])


@pytest.mark.parametrize("writer", ONE_FILE)
def test_the_ending_of_one_file_is_asked_for(tmp_path, writer):
    module = importlib.import_module(f"visionattn.writers.{writer}")
    with pytest.raises(UserError, match=rf"out.png: .* give an --out that ends with {Path(ONE_FILE[writer]).suffix}"):
        module.open(tmp_path / "out.png", CLASSES)
