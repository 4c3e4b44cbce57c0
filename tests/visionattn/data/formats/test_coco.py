"""COCO's annotation files: real ones, masks, turned pictures, and every way in which they can be wrong."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_masks
from PIL import Image

from visionattn.data import formats
from visionattn.data.boxes import pixels_of
from visionattn.data.formats import Found, coco
from visionattn.errors import UserError

H, W = 40, 60
CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 5, "name": "cow"}]


def image(path: Path, value: int = 0, size: tuple[int, int] = (H, W), orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8))
    picture.getexif()[0x0112] = orientation
    picture.save(path, exif=picture.getexif())
    return path


def content(names: list[str], boxes: dict[int, list[dict]], **keys: Any) -> dict[str, Any]:
    """Images numbered from 7, and the annotations of each."""
    images = [{"id": 7 + k, "file_name": name, "height": H, "width": W} for k, name in enumerate(names)]
    flat = [
        {"image_id": number, "category_id": 1, "bbox": [1, 2, 10, 10]} | a for number, of in boxes.items() for a in of
    ]
    annotations = [{"id": 100 + k} | annotation for k, annotation in enumerate(flat)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES} | keys


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def find(root: Path, **keys: Any) -> Found:
    return formats.find(coco.Section(format="coco", root=root, **keys))


@pytest.fixture
def one(tmp_path) -> Callable[..., Found]:
    """A function that finds one image with these annotations, with changes to the file."""

    def find_one(*annotations: dict, **keys: Any) -> Found:
        image(tmp_path / "a.png")
        image(tmp_path / "b.png", 1)
        made = content(["a.png", "b.png"], {7: list(annotations), 8: [{}]})
        save(tmp_path / "labels.json", made | keys.pop("change", {}))
        return find(tmp_path, **keys)

    return find_one


@pytest.mark.parametrize(
    ("name", "classes", "counts"),
    [
        ("bccd", ["RBC", "WBC", "Platelets"], {"train": (205, 2835), "val": (87, 1176), "test": (72, 875)}),
        ("neon_trees", ["Tree"], {"train": (42, 710), "val": (12, 408), "test": (2, 98)}),
    ],
)
def test_real_sets_are_read_as_they_are(name, classes, counts):
    root = Path("/work/shared/data") / name
    if not root.is_dir():
        pytest.skip(f"{root} is not on this machine")
    samples, found_classes, problems = find(root)
    assert (found_classes, problems) == (classes, [])
    for split in counts:
        known = json.loads((root / f"annotations/instances_{split}.json").read_text())
        mine = {sample.path.name: sample for sample in samples if sample.split == split}
        assert len(mine) == len(known["images"]) == counts[split][0]
        files = {entry["id"]: entry["file_name"] for entry in known["images"]}
        expected = sorted((files[a["image_id"]], *a["bbox"]) for a in known["annotations"])
        boxes = [(file, *box) for file, sample in mine.items() for box in sample.target().xyxy.tolist()]
        assert sorted((file, x, y, r - x, b - y) for file, x, y, r, b in boxes) == expected
        assert all(sample.image().shape == (3, *sample.size) for sample in list(mine.values())[:3])


def test_classes_go_by_name_and_empty_images_are_kept(tmp_path):
    image(tmp_path / "images/a.png")
    image(tmp_path / "images/b.png", 1)
    save(tmp_path / "train.json", content(["a.png"], {7: [{"category_id": 90}, {"category_id": 5}]}))
    other = [{"id": 0, "name": "cow"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    save(tmp_path / "valid.json", content(["b.png"], {}, categories=other))
    samples, classes, problems = find(tmp_path)
    assert (classes, problems) == (["cow", "cat"], [])
    assert [(s.name, s.split, s.size, s.target().labels.tolist()) for s in samples] == [
        ("images/a", "train", (H, W), [1, 0]),
        ("images/b", "val", (H, W), []),
    ]
    assert find(tmp_path, classes=["cat", "dog", "cow"]).samples[0].target().labels.tolist() == [0, 2]
    pickle.loads(pickle.dumps(samples))


def test_an_ignored_category_is_of_no_class(one):
    sample = one({"category_id": 90}, {"category_id": 1}, ignored=["cat"]).samples[0]
    assert sample.target().labels.tolist() == [-1, 0]
    assert sample.target().ignore.tolist() == [True, False]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_files_in_folders_with_names_of_any_script(tmp_path, form):
    names = ["train2017/Zürich 1/ä.png", "train2017/細胞/b.png"]
    for k, name in enumerate(names):
        image(tmp_path / "images" / normalize(form, name), k)
    save(tmp_path / "annotations/instances_train2017.json", content([name[10:] for name in names], {7: [{}]}))
    save(tmp_path / "annotations/captions_train2017.json", {"images": [], "annotations": []})
    samples, _, problems = find(tmp_path)
    assert problems == []
    assert [(normalize("NFC", s.name), s.split) for s in samples] == [
        ("images/" + name.removesuffix(".png"), "train") for name in names
    ]


def test_a_file_in_each_split_s_folder(tmp_path):
    for k, split in enumerate(["train", "valid", "test"]):
        image(tmp_path / split / "a.png", k)
        save(tmp_path / split / "_annotations.coco.json", content(["a.png"], {7: [{}]}))
    samples, _, problems = find(tmp_path)
    assert problems == []
    assert {(s.name, s.split) for s in samples} == {("train/a", "train"), ("valid/a", "val"), ("test/a", "test")}


def test_masks_are_crops_of_their_boxes(tmp_path):
    mask = np.zeros((H, W), bool)
    mask[5:20, 10:30] = np.random.default_rng(0).random((15, 20)) < 0.7
    mask[5, 10] = mask[19, 29] = True
    text = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    borders = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=False))
    counts = np.diff(borders, prepend=0, append=H * W).tolist()
    where = {"bbox": [10, 5, 20, 15]}
    annotations = [
        where | {"segmentation": {"size": [H, W], "counts": text}},
        {"bbox": [2, 3, 8, 9], "segmentation": [[2, 3, 10, 3, 10, 12, 2, 12]]},
        where | {"iscrowd": 1, "segmentation": {"size": [H, W], "counts": counts}},
        where | {"iscrowd": 1},
    ]
    image(tmp_path / "a.png")
    path = save(tmp_path / "labels.json", content(["a.png"], {7: annotations}))
    (sample,), _, problems = find(path)
    boxes = sample.target()
    assert problems == []
    assert boxes.ignore.tolist() == [False, False, True, True]
    for k, expected in enumerate([mask, None, mask, None]):
        crop = np.ones_like(boxes.masks[k]) if expected is None else expected[pixels_of(boxes.xyxy[k])]
        assert np.array_equal(boxes.masks[k], crop)
    window = slice(0, H), slice(0, 20)
    cut = sample.target(window)
    assert np.array_equal(cut.masks[0], mask[5:20, 10:20][mask[5:20, 10:20].any(1).nonzero()[0][0] :])
    assert len(pickle.loads(pickle.dumps(sample)).target().masks) == 4


def test_masks_of_some_objects_only_are_left_out_and_that_is_said(one, caplog):
    with caplog.at_level(logging.WARNING):
        found = one({"bbox": [2, 3, 8, 9], "segmentation": [[2, 3, 10, 3, 10, 12, 2, 12]]})
    assert found.samples[0].target().masks is None
    assert "objects without masks in 1 images, as in" in caplog.text


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("said", ["stored", "upright"])
def test_pictures_turned_by_exif(tmp_path, orientation, said):
    """A white object on black, found again in the upright picture, whichever picture the labels are of."""
    for name, turn in (("a.png", orientation), ("b.png", 6)):
        pixels = np.zeros((H, W), np.uint8)
        pixels[5:11, 40:50] = 255
        picture = Image.fromarray(pixels)
        picture.getexif()[0x0112] = turn
        picture.save(tmp_path / name, exif=picture.getexif())
    upright = coco.Section(format="coco", root=tmp_path)
    unlabelled, _ = formats.unlabelled([tmp_path / "a.png", tmp_path / "b.png"], upright, 1)
    images, annotations = [], {}
    for k, sample in enumerate(unlabelled):
        size = (H, W) if said == "stored" else sample.size
        rows, columns = np.nonzero(pixels if said == "stored" else sample.image()[0])
        box = [columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]
        x, y, w, h = box = [int(value) for value in box]
        images.append({"id": 7 + k, "file_name": f"{sample.name}.png", "height": size[0], "width": size[1]})
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations[7 + k] = [{"bbox": box, "segmentation": outline}]
    save(tmp_path / "labels.json", content([], annotations, images=images))
    samples, _, problems = find(tmp_path)
    assert problems == []
    for sample in samples:
        boxes, seen = sample.target(), np.zeros(sample.size, bool)
        seen[pixels_of(boxes.xyxy[0])] = boxes.masks[0]
        assert np.array_equal(seen, sample.image()[0] == 255)
    assert coco.notes(samples) == [f"2 pictures turned by EXIF: boxes are taken to be of the {said} picture"]


def test_labels_of_stored_and_of_upright_pictures_are_not_mixed(tmp_path):
    images = [{"id": k, "file_name": f"{k}.png", "height": s[0], "width": s[1]} for k, s in enumerate([(H, W), (W, H)])]
    for k in range(2):
        image(tmp_path / f"{k}.png", k, orientation=6)
    save(tmp_path / "labels.json", content([], {0: [{}]}, images=images))
    assert "1 image turned by EXIF have labels of the picture as it is stored" in find(tmp_path).problems[0]


def test_boxes_over_the_border_are_clipped_and_counted(one):
    found = one({"bbox": [-5, 30, 20, 30]}, {"bbox": [50.5, 1, 9.5, 3]})
    assert found.problems == []
    assert found.samples[0].target().xyxy.tolist() == [[0, 30, 15, 40], [50.5, 1, 60, 4]]
    assert coco.notes(found.samples) == ["boxes that reach over the border of their image, and are clipped: 1, as in a"]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"bbox": [1, 2, 0, 5]}, r"labels.json: image 7 \(a.png\), box 100 \[1, 2, 0, 5\]: is 0 wide and 5 high"),
        ({"bbox": [1, 2, 5, -5]}, r"is 5 wide and -5 high, expected more than 0"),
        ({"bbox": [1, 2, 5, 1e-12]}, r"outside of the image|high"),
        ({"bbox": [1, 2, float("nan"), 5]}, r"box 100 \[1, 2, nan, 5\]: not all of it are finite numbers"),
        ({"bbox": [1, 2, float("inf"), 5]}, "not all of it are finite numbers"),
        ({"bbox": [70, 2, 5, 5]}, r"lies outside of the image, which is 40x60 \(height x width\)"),
        ({"bbox": [1, 2, 5]}, r"annotation 100: bbox is \[1, 2, 5\], expected x, y, width, height"),
        ({"bbox": [1, 2, 5, "6"]}, "expected x, y, width, height"),
        ({"bbox": None}, "bbox is None"),
        (
            {"category_id": 2},
            r"image 7 \(a.png\), annotation 100: category id 2 is not among the categories \(1, 5, 90\)",
        ),
        ({"image_id": 99}, "annotation 100 is of an unknown image id: 99"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 100: a polygon of 2 points, expected x and y of at least 3"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "a polygon of 3.5 points"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "a polygon with values that are not finite"),
        ({"segmentation": {"size": [W, H], "counts": "0"}}, "run lengths of 60x40 pixels, but the image has 40x60"),
        ({"segmentation": {"size": [H, W], "counts": [5, 5]}}, "run lengths that do not add up to 40x60 pixels"),
        ({"segmentation": {"size": [H, W], "counts": [float("inf")]}}, "annotation 100: cannot convert"),
        ({"segmentation": {"size": [H, W], "counts": "~"}}, "not in COCO's compressed form"),
        ({"segmentation": {"size": [H, W], "counts": [H * W]}}, "its mask has no pixels"),
        ({"segmentation": [[20, 2, 30, 2, 30, 12, 20, 12]]}, r"its mask has the box \[20.0, 2.0, 30.0, 12.0\]"),
    ],
)
def test_what_is_wrong_with_an_object_is_one_line_and_leaves_its_image_out(one, annotation, message):
    found = one(annotation)
    assert len(found.problems) == 1
    assert "\n" not in found.problems[0]
    with pytest.raises(UserError, match=message):
        raise UserError(found.problems[0])
    if "image_id" not in annotation:
        assert [sample.name for sample in found.samples] == ["b"]


def test_another_form_of_boxes_is_said_once(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 30, (20, 2))
    sides = rng.integers(3, 10, (20, 2))
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", 1)

    def problems(boxes: np.ndarray) -> list[str]:
        made = content(["a.png", "b.png"], {7: [{"bbox": box} for box in boxes.tolist()], 8: [{}]})
        save(tmp_path / "labels.json", made)
        with pytest.raises(UserError) as refused:
            find(tmp_path)
        return str(refused.value).splitlines()[1:]

    (line,) = problems(np.concatenate([corners, corners + sides], 1))
    assert "boxes have two corners (x, y, x, y) where x, y, width, height are expected, such as" in line
    (line,) = problems(np.concatenate([corners, sides], 1) / 60)
    assert "boxes are fractions of the image from 0 to 1; expected pixels, such as" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]},
            "id 7 is both a.png and b.png",
        ),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "a.png"}]}, "8: a.png is listed twice"),
        ({"images": [{"id": 7}, {"id": 8, "file_name": "b.png"}]}, "image 7: no id or no file_name"),
        (
            {"images": [{"id": 7, "file_name": "c.png"}, {"id": 8, "file_name": "b.png"}]},
            r"image 7 \(c.png\): there is no image .*c.png",
        ),
        (
            {"images": [{"id": 8, "file_name": "b.png"}], "annotations": []},
            "a.png: no labels have an entry for it",
        ),
        (
            {"images": [{"id": 7, "file_name": "a.png", "height": 41, "width": W}, {"id": 8, "file_name": "b.png"}]},
            "says that the image is 41x60, but .*a.png is 40x60",
        ),
    ],
)
def test_what_is_wrong_with_an_image_is_one_line(one, change, message):
    problems = one(change=change).problems
    with pytest.raises(UserError, match=message):
        raise UserError("\n".join(problems))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "category id 1 is both cat and dog"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]}, "two categories are called cat"),
        ({"categories": [{"id": 1}]}, "expected an id and a name"),
        ({"categories": None}, "no list categories"),
    ],
)
def test_what_is_wrong_with_the_file_is_refused(one, change, message):
    with pytest.raises(UserError, match=rf"labels.json: .*{message}"):
        one(change=change)


def test_classes_that_the_recipe_does_not_know_are_refused(one):
    with pytest.raises(
        UserError, match=r"b.png\), box .*: dog is not in data.classes \(cat\); the data have dog besides"
    ):
        one(classes=["cat"])
    with pytest.raises(UserError, match=r"data.classes and data.ignored both name dog"):
        one(classes=["dog"], ignored=["dog"])


@pytest.mark.parametrize("name", ["background", "__background__", "Background"])
def test_the_background_is_no_class(one, name):
    """A number 0 that means that there is no object, as masks have it."""
    categories = [{"id": 0, "name": name}, {"id": 1, "name": "cat"}]
    assert one(change={"categories": categories}).classes == ["cat"]
    with pytest.raises(
        UserError, match=rf"image 7 \(a.png\), box 100 .*: {name} is no class of objects, since what is"
    ):
        one({"category_id": 0}, change={"categories": categories})
    with pytest.raises(UserError, match=f"data.classes: {name} is no class of objects"):
        one(change={"categories": categories}, classes=[name, "cat"])
    assert one({"category_id": 0}, change={"categories": categories}, ignored=[name]).classes == ["cat"]


def test_categories_that_differ_between_files_are_refused(tmp_path):
    for k, split in enumerate(("train", "val")):
        image(tmp_path / f"{split}.png", k)
        save(tmp_path / f"{split}.json", content([f"{split}.png"], {7: [{}]}, categories=CATEGORIES[k:]))
    with pytest.raises(UserError, match=r"train.json has the categories .* but .*val.json has .* they differ in cat$"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1, "file_na', r"labels.json: not whole JSON \(.*\); was it cut off\?"),
        ("[]", "a list, as predictions are; expected COCO's images, annotations and categories"),
        ('{"images": []}', "no list annotations"),
        ("\xff\xfe", "not whole JSON"),
    ],
)
def test_what_is_no_annotation_file_is_refused(tmp_path, text, message):
    (tmp_path / "labels.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        find(tmp_path)


def test_missing_roots_and_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.root: .*nowhere: no such file or folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no annotation file \(\*\.json\) below this folder; see data.annotations"):
        find(tmp_path)
    with pytest.raises(UserError, match="no labelled image that can be used"):
        find(save(tmp_path / "a.json", content([], {})))


def test_groups_are_found_in_names(tmp_path):
    for k in range(2):
        image(tmp_path / f"p{k}_0.png", k)
    save(tmp_path / "a.json", content(["p0_0.png", "p1_0.png"], {7: [{}]}))
    assert [sample.group for sample in find(tmp_path, group="p[0-9]+").samples] == ["p0", "p1"]


def test_many_objects_in_an_image(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 1990, (1500, 2))
    boxes = np.concatenate([corners, rng.integers(4, 10, (1500, 2))], 1).tolist()
    outlines = [[[x, y, x + w, y, x + w, y + h, x, y + h]] for x, y, w, h in boxes]
    image(tmp_path / "a.png", size=(2000, 2000))
    annotations = [{"bbox": box, "segmentation": outline} for box, outline in zip(boxes, outlines, strict=True)]
    images = [{"id": 7, "file_name": "a.png", "height": 2000, "width": 2000}]
    save(tmp_path / "a.json", content([], {7: annotations}, images=images))
    (sample,), _, problems = find(tmp_path)
    assert problems == []
    assert len(sample.target()) == 1500
    inside = [x + w <= 1000 and y + h <= 1000 for x, y, w, h in boxes]
    assert len(sample.target((slice(0, 1000), slice(0, 1000)))) >= sum(inside)
