"""PASCAL VOC, YOLO, tables and instance masks: how they lie on the disk, and every way in which they can be wrong."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionattn.data import formats, splits
from visionattn.data.boxes import pixels_of
from visionattn.data.formats import Found, coco, csv_boxes, instances, visdrone, voc, yolo
from visionattn.errors import UserError
from visionattn.recipe.sections import Data

H, W = 40, 60
BCCD = Path("/work/shared/data/bccd")


def image(path: Path, value: int = 0, size: tuple[int, int] = (H, W)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def boxes_of(found: Found) -> dict[str, list[tuple[str, list[float]]]]:
    assert found.problems == []
    return {
        s.name: [(found.classes[k], box) for k, box in zip(s.target().labels, s.target().xyxy.tolist(), strict=True)]
        for s in found.samples
    }


def refusal(find: Any, *arguments: Any, **keys: Any) -> str:
    """What is wrong, whether it is a line of the findings or an error."""
    try:
        return "\n".join(find(*arguments, **keys).problems)
    except UserError as error:
        return str(error)


# PASCAL VOC


def find_voc(root: Path, **keys: Any) -> Found:
    return formats.find(voc.Section(format="voc", root=root, **keys))


def annotation(*objects: str, name: str = "a.png", size: tuple[int, int] = (H, W)) -> str:
    size_text = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>1</depth></size>"
    return f"<annotation><filename>{name}</filename>{size_text}{''.join(objects)}</annotation>"


def item(name: str = "cat", box: tuple = (1, 2, 11, 12), more: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def test_real_xml_files_say_what_the_json_files_say():
    if not BCCD.is_dir():
        pytest.skip(f"{BCCD} is not on this machine")
    found = find_voc(BCCD)
    assert len(found.problems) == 2  # boxes without a side, which the conversion to COCO left out
    assert all("BloodImage_00338.xml, box 13" in p or "BloodImage_00343.xml, box 4" in p for p in found.problems)
    known = formats.find(coco.Section(format="coco", root=BCCD, classes=found.classes))
    expected = {sample.name: sample.target() for sample in known.samples}
    for sample in found.samples:
        boxes = sample.target()
        assert boxes.xyxy.tolist() == expected[sample.name].xyxy.tolist()
        assert boxes.labels.tolist() == expected[sample.name].labels.tolist()


def test_voc_s_own_layout_counts_pixels_from_1_and_ignores_what_is_difficult(tmp_path):
    image(tmp_path / "JPEGImages/a.png")
    image(tmp_path / "SegmentationObject/a.gif")
    hard, easy = "<difficult>1</difficult>", "<difficult>0</difficult><part><name>head</name></part>"
    text(tmp_path / "Annotations/a.xml", annotation(item(more=hard), item("dog", (1, 1, 60, 40), easy)))
    found = find_voc(tmp_path, first_pixel=1)
    assert boxes_of(found) == {"JPEGImages/a": [("cat", [0, 1, 11, 12]), ("dog", [0, 0, 60, 40])]}
    assert found.samples[0].target().ignore.tolist() == [True, False]


def test_xml_files_beside_the_images_of_each_split(tmp_path):
    for k, split in enumerate(("train", "valid")):
        image(tmp_path / split / "a.png", k)
        text(tmp_path / split / "a.xml", annotation(*[item()] * k))
    found = find_voc(tmp_path)
    assert boxes_of(found) == {"train/a": [], "valid/a": [("cat", [1, 2, 11, 12])]}
    assert [sample.split for sample in found.samples] == ["train", "val"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><filename>a.p", r"a.xml: not whole XML .*was it cut off\?"),
        ("<html></html>", "a.xml: <html>, expected PASCAL VOC's <annotation>"),
        (annotation(item(box=(1, 2, "x", 4))), "a.xml: object 1: no bndbox with numbers xmin, ymin, xmax, ymax"),
        (annotation("<object><name>cat</name><polygon/></object>"), "object 1: no bndbox"),
        (annotation(item("")), "a.xml: object 1: no name"),
        (annotation(item(), item(box=(5, 2, 5, 8))), r"a.xml, box 2 \[5, 2, 5, 8\]: is 0 wide and 6 high"),
        (annotation(item(box=(5, 2, "nan", 8))), "not all of it are finite numbers"),
        (annotation(item(box=(-9, -9, -1, -1))), "lies outside of the image"),
        (annotation(item(), size=(50, 60)), "says that the image is 50x60, but .*a.png is 40x60"),
        (annotation(item(box=(0.1, 0.2, 0.3, 0.4))), "boxes are fractions of the image"),
        (annotation(item(box=(30, 20, 10, 10))), "boxes have x, y, width, height where two corners"),
    ],
)
def test_what_is_wrong_with_a_voc_file_is_said(tmp_path, content, message):
    image(tmp_path / "a.png")
    text(tmp_path / "a.xml", content)
    image(tmp_path / "b.png", 1)
    text(tmp_path / "b.xml", annotation(item("dog"), name="b.png"))
    found = find_voc(tmp_path)
    with pytest.raises(UserError, match=message):
        raise UserError("\n".join(found.problems))
    assert [sample.name for sample in found.samples] == ["b"]


def test_voc_files_and_images_without_each_other_are_named(tmp_path):
    image(tmp_path / "x/a.png")
    image(tmp_path / "y/a.png", 1)
    image(tmp_path / "x/b.png", 2)
    text(tmp_path / "labels/a.xml", annotation())
    text(tmp_path / "labels/c.xml", annotation(name="c.png"))
    text(tmp_path / "labels/b.xml", annotation(name="b.png"))
    problems = "\n".join(find_voc(tmp_path).problems)
    assert "a.xml: its image could be any of" in problems
    assert "c.xml: there is no image c.png" in problems
    assert "x/a.png: no labels have an entry for it" in problems
    assert "no .xml file below" in refusal(find_voc, tmp_path / "x")


# YOLO


def find_yolo(root: Path, **keys: Any) -> Found:
    return formats.find(yolo.Section(format="yolo", root=root, **keys))


@pytest.mark.parametrize("layout", ["{split}/images/a.png", "images/{split}2017/a.png", "{split}/a.png"])
def test_yolo_s_folders(tmp_path, layout):
    text(tmp_path / "data.yaml", "names: [cat, 'dog ']\nnc: 2\n")
    lines = {"train": "1 0.5 0.5 0.1 0.2\n\n0 0.25 0.5 0.5 0.5 0.9\n", "val": ""}
    for k, (split, content) in enumerate(lines.items()):
        path = image(tmp_path / layout.format(split=split), k)
        text(Path(str(path).replace("images/", "labels/")).with_suffix(".txt"), content)
    found = find_yolo(tmp_path)
    train, val = boxes_of(found).values()
    assert [name for name, _ in train] == ["dog", "cat"]
    np.testing.assert_allclose([box for _, box in train], [[27, 16, 33, 24], [0, 10, 30, 30]], atol=1e-5)
    assert val == []
    assert [sample.split for sample in found.samples] == ["train", "val"]


def test_yolo_s_polygons_are_masks(tmp_path):
    text(tmp_path / "classes.txt", "cat\ndog\n")
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", "1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n0 0.5 0.5 0.9 0.5 0.9 0.9 0.75\n")
    (sample,), classes, problems = find_yolo(tmp_path)
    boxes = sample.target()
    assert (classes, problems) == (["cat", "dog"], [])
    np.testing.assert_allclose(boxes.xyxy, [[6, 4, 30, 20], [30, 20, 54, 36]], atol=1e-5)
    seen = np.zeros((H, W), int)
    for box, mask in zip(boxes.xyxy, boxes.masks, strict=True):
        seen[pixels_of(box)] += mask
    assert seen[4:20, 6:30].all()
    assert 16 * 24 / 2 * 0.9 < seen[20:, 30:].sum() < 16 * 24 / 2 * 1.1


def test_names_come_from_the_recipe_where_no_file_has_them(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", "1 0.5 0.5 0.1 0.2")
    assert [name for name, _ in boxes_of(find_yolo(tmp_path, classes=["cat", "dog"]))["a"]] == ["dog"]
    assert "nothing says what the class numbers are called" in refusal(find_yolo, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.2", r"a.txt, line 2: class number 2, but .*data.yaml has names for 0 to 1 \(cat, dog\)"),
        ("-1 0.5 0.5 0.1 0.2", "class number -1, expected a whole number from 0 on"),
        ("0.5 0.5 0.5 0.1 0.2", "class number 0.5, expected a whole number"),
        ("0 0.5 0.5 0.1", "4 values, expected a class number, x, y, width, height or corners"),
        ("0 30 20 10 10", "values of 10 to 30, expected shares of the image from 0 to 1"),
        ("0 nan 0.5 0.1 0.2", "values of nan to nan, expected shares"),
        ("cat 0.5 0.5 0.1 0.2", "could not convert string to float: 'cat'"),
        ("0 0.5 0.5 0 0.2", r"a.txt, box in line 2 \[30, 16, 30, 24\]: is 0 wide and 8 high"),
        ("0 0.1 0.1 0.5 0.1 0.5 0.1", "is 24 wide and 0 high"),
    ],
)
def test_what_is_wrong_with_a_yolo_line_is_said(tmp_path, line, message):
    text(tmp_path / "data.yaml", "names: {0: cat, 1: dog}")
    for k, name in enumerate("ab"):
        image(tmp_path / f"images/{name}.png", k)
        text(tmp_path / f"labels/{name}.txt", "0 0.5 0.5 0.1 0.2\n" + (line if name == "a" else ""))
    found = find_yolo(tmp_path)
    assert [sample.name for sample in found.samples] == ["images/b"]
    (problem,) = found.problems
    with pytest.raises(UserError, match=message):
        raise UserError(problem)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [cat, cat]", "data.yaml: two classes are called cat"),
        ("names: {1: cat}", r"data.yaml: names are \{1: 'cat'\}, expected a list"),
        ("names: {0: cat, x: dog}", "expected a list, or names of the numbers from 0 on"),
        ("names: [cat", "data.yaml: not readable as YAML"),
    ],
)
def test_what_is_wrong_with_the_names_is_refused(tmp_path, content, message):
    image(tmp_path / "a.png")
    text(tmp_path / "data.yaml", content)
    with pytest.raises(UserError, match=message):
        find_yolo(tmp_path)


def test_yolo_files_and_images_without_each_other_are_named(tmp_path):
    text(tmp_path / "data.yaml", "names: [cat]")
    for k, name in enumerate("ab"):
        image(tmp_path / f"images/{name}.png", k)
    for name in "bc":
        text(tmp_path / f"labels/{name}.txt", "")
    first, second = find_yolo(tmp_path).problems
    assert "a.png: no file " in first
    assert "labels/a.txt; an image without objects has one without a line" in first
    assert second.endswith("labels/c.txt: there is no image of this name")


# Tables

HEADER = "image_path,xmin,ymin,xmax,ymax,label"


def find_csv(path: Path, *lines: str, header: str = HEADER, **keys: Any) -> Found:
    text(path, "\n".join([header, *lines]) + "\n")
    return formats.find(csv_boxes.Section(format="csv", root=path, **keys))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """a.png and b/ü.png, and where a table of them lies."""
    image(tmp_path / "a.png")
    image(tmp_path / "b/ü.png", 1)
    return tmp_path / "boxes.csv"


def test_a_table_of_boxes(pictures):
    lines = ["a.png,1,2,11.5,12,cat", "b/ü.png,0,0,0,0,cat", "a.png,3,4,5,6,dog"]
    assert boxes_of(find_csv(pictures, *lines)) == {
        "a": [("cat", [1, 2, 11.5, 12]), ("dog", [3, 4, 5, 6])],
        "b/ü": [],
    }


def test_a_table_has_columns_for_splits_and_groups(pictures):
    header = "file;x0;y0;x1;y1;kind;part;patient"
    lines = ["a.png;1;2;11;12;cat;train;p1", r"b\ü.png;1;2;11;12;cat;val;p2"]
    columns = {"path_column": "file", "label_column": "kind", "box_columns": ["x0", "y0", "x1", "y1"]}
    found = find_csv(pictures, *lines, header=header, split_column="part", group_column="patient", **columns)
    assert [(s.name, s.split, s.group) for s in found.samples] == [("a", "train", "p1"), ("b/ü", "val", "p2")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,1,2,x,12,cat", r"boxes.csv: a.png, line 2: \['1', '2', 'x', '12'\] are no numbers"),
        ("a.png,1,2,11,12,", "boxes.csv: a.png, line 2: no label"),
        ("a.png,5,2,5,12,cat", r"a.png, box in line 2 \[5, 2, 5, 12\]: is 0 wide"),
        ("a.png,1,2,inf,12,cat", "not all of it are finite numbers"),
        ("a.png,100,2,110,12,cat", "lies outside of the image"),
        ("a.png,.1,.2,.3,.4,cat", "boxes.csv: boxes are fractions of the image from 0 to 1; expected pixels"),
        ("a.png,30,20,10,10,cat", "boxes have x, y, width, height where two corners"),
        ("c.png,1,2,11,12,cat", r"boxes.csv: c.png: there is no image .*c.png"),
        ("a.png,1,2,11,12", "more or fewer fields than the 6 of the header in line 2"),
        (",1,2,11,12,cat", "image_path is empty in line 2"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(pictures, line, message):
    with pytest.raises(UserError, match=message):
        raise UserError(refusal(find_csv, pictures, line))


def test_columns_that_are_missing_or_contradict_are_named(pictures):
    with pytest.raises(UserError, match=r"data.box_columns: .* has no column 'xmin'; it has .*; did you mean x_min"):
        find_csv(pictures, header=HEADER.replace("xmin", "x_min"))
    lines = ["a.png,1,2,11,12,cat,train", "a.png,1,2,11,12,cat,val"]
    problem = refusal(find_csv, pictures, *lines, header=HEADER + ",split", split_column="split")
    assert "a.png: its rows have more than one split: train, val" in problem


# Instance masks


def find_instances(root: Path, **keys: Any) -> Found:
    return formats.find(instances.Section(format="instances", root=root, **keys))


def numbers(count: int = 4) -> np.ndarray:
    """A label image with `count` blobs of any shape, whose numbers have holes."""
    rng = np.random.default_rng(count)
    image = np.zeros((H, W), np.uint16)
    for k in range(count):
        place = slice(k * 9, k * 9 + 8), slice(k * 12, k * 12 + 10)
        image[place] = (rng.random((8, 10)) < 0.6) * (300 * k + 7)
    return image


def assert_instances(sample: Any, expected: np.ndarray) -> None:
    boxes, seen = sample.target(), np.zeros((H, W), int)
    masks = [expected == k for k in np.unique(expected[expected > 0])]
    assert len(boxes) == len(masks)
    for box, mask, whole in zip(boxes.xyxy, boxes.masks, masks, strict=True):
        ys, xs = np.nonzero(whole)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.array_equal(mask, whole[pixels_of(box)])
        seen[pixels_of(box)] += mask
    assert np.array_equal(seen > 0, expected > 0)


def test_label_images(tmp_path):
    for k, split in enumerate(("train", "val")):
        image(tmp_path / "images" / split / "a.png", k)
        (tmp_path / "masks" / split).mkdir(parents=True)
        Image.fromarray(numbers(4 * k)).save(tmp_path / "masks" / split / "a.tif")
    found = find_instances(tmp_path)
    assert (found.classes, found.problems) == (["object"], [])
    for k, sample in enumerate(found.samples):
        assert (sample.name, sample.split) == (("train/a", "train"), ("val/a", "val"))[k]
        assert_instances(sample, numbers(4 * k))
    assert find_instances(tmp_path, classes=["nucleus"]).classes == ["nucleus"]
    cut = found.samples[1].target((slice(0, 12), slice(0, 20)))
    assert len(cut) == 2


def test_label_images_beside_the_images(tmp_path):
    image(tmp_path / "cells/a.png")
    Image.fromarray(numbers()).save(tmp_path / "cells/a_masks.png")
    (sample,), _, problems = find_instances(tmp_path, images="cells", masks="cells", mask_suffix="_masks")
    assert problems == []
    assert_instances(sample, numbers())


@pytest.mark.parametrize("layout", ["images/a.png masks/a", "a/images/a.png a/masks"])
def test_folders_of_masks(tmp_path, layout):
    """With a folder for each image, or as the nuclei of the Data Science Bowl 2018 lie."""
    picture, folder = (tmp_path / part for part in layout.split())
    image(picture)
    folder.mkdir(parents=True)
    for k in np.unique(numbers())[1:]:
        Image.fromarray((numbers() == k).astype(np.uint8) * 255).save(folder / f"{k:05}.png")
    (sample,), _, problems = find_instances(tmp_path)
    assert problems == []
    assert_instances(sample, numbers())


def test_tables_say_the_classes_of_the_numbers(tmp_path):
    image(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(numbers()).save(tmp_path / "masks/a.png")
    found = [int(k) for k in np.unique(numbers())[1:]]
    names = ["dog", "cat", "dog", "dirt"]
    rows = [f"{name},{k}" for name, k in zip(names, found, strict=True)]
    table = text(tmp_path / "masks/a.csv", "\n".join(["class,number", *rows]))
    (sample,), classes, problems = find_instances(tmp_path, ignored=["dirt"])
    assert (classes, problems) == (["cat", "dog"], [])
    assert sample.files == (tmp_path / "images/a.png", tmp_path / "masks/a.png", table)
    assert sample.target().labels.tolist() == [1, 0, 1, -1]
    assert sample.target().ignore.tolist() == [False, False, False, True]
    text(table, "\n".join(["class,number", *rows[:3]]))
    with pytest.raises(UserError, match=f"a.png: a.csv has no class for the numbers {found[3]}"):
        find_instances(tmp_path).samples[0].target()
    table.unlink()
    with pytest.raises(UserError, match=r"nothing says of which class an object is, as in .*a.csv"):
        find_instances(tmp_path, classes=["cat", "dog"])


def test_what_is_wrong_with_instances_is_said(tmp_path):
    for k, name in enumerate("abc"):
        image(tmp_path / f"images/{name}.png", k)
    (tmp_path / "masks").mkdir()
    Image.fromarray(numbers()[:30]).save(tmp_path / "masks/a.png")
    Image.fromarray(numbers()).save(tmp_path / "masks/d.png")
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "masks/c.png")
    samples, _, problems = find_instances(tmp_path)
    assert any("a.png is 40x60, but" in problem and "a.png is 30x60" in problem for problem in problems)
    assert any("b.png: no label image" in problem for problem in problems)
    assert any("d.png: there is no image for it" in problem for problem in problems)
    with pytest.raises(UserError, match=r"c.png: expected whole numbers from 0 on, a single channel"):
        samples[0].target()


def test_more_objects_than_a_label_image_holds_are_refused(tmp_path):
    image(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    wrapped = (np.arange(H * W) // 6 % 256).astype(np.uint8).reshape(H, W)
    Image.fromarray(wrapped).save(tmp_path / "masks/a.png")
    with pytest.raises(UserError, match=r"a.png: every number that 8 bits hold is used, so that further objects"):
        find_instances(tmp_path).samples[0].target()
    Image.fromarray(wrapped.astype(np.uint16) + 1).save(tmp_path / "masks/a.png")
    assert len(find_instances(tmp_path).samples[0].target()) == 256


def test_a_mask_without_pixels_is_refused(tmp_path):
    image(tmp_path / "images/a.png")
    (tmp_path / "masks/a").mkdir(parents=True)
    Image.fromarray(np.zeros((H, W), np.uint8)).save(tmp_path / "masks/a/1.png")
    with pytest.raises(UserError, match=r"1.png: a mask without pixels"):
        find_instances(tmp_path).samples[0].target()


# VisDrone


def find_visdrone(root: Path, **keys: Any) -> Found:
    return formats.find(visdrone.Section(format="visdrone", root=root, **keys))


def test_visdrone_s_regions_are_ignored_and_its_classes_named(tmp_path):
    """Class 0, "others" and what is not counted; the commas at the ends of its files."""
    lines = {"train": "1,2,10,20,1,4,0,1\n5,5,9,9,0,0,0,0,\n30,0,5,5,1,11,1,2\n20,20,10,10,0,1,0,0\n", "val": "\n"}
    for k, (split, content) in enumerate(lines.items()):
        image(tmp_path / f"VisDrone2019-DET-{split}/images/0{k}.jpg", k)
        text(tmp_path / f"VisDrone2019-DET-{split}/annotations/0{k}.txt", content)
    found = find_visdrone(tmp_path)
    assert found.problems == []
    assert found.classes == ["pedestrian", "car"]
    train, val = found.samples
    assert (train.split, val.split, len(val.target())) == ("train", "val", 0)
    boxes = train.target()
    assert boxes.xyxy.tolist() == [[1, 2, 11, 22], [5, 5, 14, 14], [30, 0, 35, 5], [20, 20, 30, 30]]
    assert boxes.labels.tolist() == [1, -1, -1, 0]
    assert boxes.ignore.tolist() == [False, True, True, True]
    assert find_visdrone(tmp_path, ignored=["ignored regions"]).classes == ["pedestrian", "car", "others"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,10,20,1,12,0,0", r"00.txt, line 2: '1,2,10,20,1,12,0,0', expected left, top, .* class from 0 to 11"),
        ("1,2,10,20,0.5,3,0,0", "expected left, top"),
        ("1 2 10 20 1 3", "expected left, top"),
        ("1,2,0,20,1,3,0,0", r"00.txt, box in line 2 \[1, 2, 0, 20\]: is 0 wide and 20 high"),
    ],
)
def test_what_is_wrong_with_a_line_of_visdrone_is_said(tmp_path, line, message):
    image(tmp_path / "images/00.jpg")
    text(tmp_path / "annotations/00.txt", f"1,2,10,20,1,3,0,0\n{line}\n")
    assert re.search(message, said := refusal(find_visdrone, tmp_path)), said


def test_images_and_files_of_visdrone_without_each_other_are_named(tmp_path):
    image(tmp_path / "images/00.jpg")
    text(tmp_path / "annotations/01.txt", "")
    _, first, second = refusal(find_visdrone, tmp_path).splitlines()
    assert "an image without objects has an empty one" in first
    assert "01.txt: there is no image of this name" in second


# All of them


def test_images_of_many_bands_have_all_of_them(tmp_path):
    from visionattn.data.formats._rasters import open_quietly

    pixels = np.random.default_rng(0).integers(0, 4000, (13, H, W)).astype(np.uint16)
    with open_quietly(tmp_path / "a.tif", "w", driver="GTiff", count=13, height=H, width=W, dtype="uint16") as sink:
        sink.write(pixels)
    np.save(tmp_path / "b.npy", pixels.transpose(1, 2, 0))
    text(tmp_path / "a.txt", "0 0.5 0.5 0.1 0.2")
    (of_yolo,) = find_yolo(tmp_path, classes=["x"]).samples
    of_table = find_csv(tmp_path / "boxes.csv", "a.tif,1,2,9,9,x", "b.npy,1,2,9,9,x")
    for sample in (of_yolo, *of_table.samples):
        assert (sample.channels, sample.size) == (13, (H, W))
        assert np.allclose(sample.image() * 65535, pixels)


def test_rare_classes_are_in_drawn_splits(tmp_path):
    """3 of 60 images have it; 20 % of them are one."""
    lines = [f"{image(tmp_path / f'{i}.png', i).name},1,2,9,9,common" for i in range(60)]
    lines += [f"{i}.png,11,12,19,19,rare" for i in (7, 27, 47)]
    found = find_csv(tmp_path / "boxes.csv", *lines)
    section = formats.sections("boxes", Data)["csv"](format="csv", root=tmp_path / "boxes.csv")
    for seed in range(5):
        dataset, problems = splits.split(found.samples, found.classes, section.model_copy(update={"split_seed": seed}))
        assert not problems
        assert len(dataset.splits["val"]) == 12
        assert sum(1 in sample.present for sample in dataset.splits["val"]) == 1
    for fold in range(3):
        folded = section.model_copy(update={"fold": fold, "folds": 3})
        dataset, _ = splits.split(found.samples, found.classes, folded)
        assert sum(1 in sample.present for sample in dataset.splits["val"]) == 1


@pytest.mark.parametrize("name", ["coco", "voc", "yolo", "visdrone", "csv", "instances", "geotiff"])
def test_other_data_are_read_without_what_is_said_of_the_training_data(tmp_path, name):
    keys = {
        "coco": {"images": tmp_path, "annotations": "*.json"},
        "csv": {"images": tmp_path, "split_column": "split"},
        "geotiff": {"labels": tmp_path, "areas": tmp_path},
    }
    known = formats.sections("boxes", Data)
    section = known[name](format=name, root=tmp_path, classes=["x"], fold=1, **keys.get(name, {})).at(tmp_path / "b")
    assert section.root == tmp_path / "b"
    assert (section.fold, section.classes) == (None, ["x"])
    assert {key: getattr(section, key) for key in keys.get(name, {})} == dict.fromkeys(keys.get(name, {}))
