"""Detection through the command line: training, evaluation, prediction, resuming, and what is refused."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import visionattn
from visionattn.cli import main

RECIPE = """\
task: detection
model:
  name: biformer_tiny
  args: {depth: [1, 1, 1, 1], embed_dim: [8, 8, 16, 16], head_dim: 8, n_win: 2, topks: [1, 2, 4, -2]}
  detector_args: {fpn_channels: 16, convs: 1, finest: 4, coarsest: 16}
data: {format: coco, root: ROOT, image_size: 32, batch_size: 4, workers: 0, augment: {scale: [1.0, 1.0]}}
optim: {lr: 1e-2, warmup_epochs: 0}
train: {epochs: 2}
evaluate: {bootstrap: 10}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""
COUNTS = {"train": 16, "val": 6, "test": 6}


def picture(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """(32, 32) uint8 with up to two squares; of each 0 if bright, 1 if dark, and left, top, width and height."""
    image, squares = rng.normal(128, 8, (32, 32)), []
    for corner in rng.permutation(4)[: rng.integers(0, 3)].tolist():
        left, top = corner % 2 * 16 + int(rng.integers(0, 4)), corner // 2 * 16 + int(rng.integers(0, 4))
        side, label = int(rng.integers(8, 13)), int(rng.integers(0, 2))
        image[top : top + side, left : left + side] = (230, 30)[label]
        squares.append((label, [left, top, side, side]))
    return image.clip(0, 255).astype(np.uint8), squares


def write_data(root: Path, counts: dict[str, int] = COUNTS) -> Path:
    """Images and instances_SPLIT.json; category 7 is bright and 3 dark, one object in train is a crowd."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3, "name": "dark"}, {"id": 7, "name": "bright"}],
        }
        (root / "images").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, squares = picture(rng)
            name = f"{split}{i}.png"
            Image.fromarray(image).save(root / "images" / name)
            content["images"].append({"id": i, "file_name": name, "height": 32, "width": 32})
            for label, box in squares:
                number = len(content["annotations"]) + 1
                crowd = int(split == "train" and number == 1)
                about = {"id": number, "image_id": i, "category_id": (7, 3)[label], "bbox": box, "iscrowd": crowd}
                content["annotations"].append(about | {"area": box[2] * box[3]})
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def recipe(tmp_path, squares) -> Path:
    path = tmp_path / "squares.yaml"
    path.write_text(RECIPE.replace("ROOT", str(squares)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, squares) -> Path:
    """A run that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "squares.yaml").write_text(RECIPE.replace("ROOT", str(squares)))
    assert main(["fit", str(folder / "squares.yaml"), "--run", str(folder / "run"), "train.epochs=10"]) == 0
    return folder / "run"


def fit(recipe: Path, run: Path, *overrides: str) -> Path:
    assert main(["fit", str(recipe), "--run", str(run), *overrides]) == 0
    return run


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def metrics(run: Path, split: str = "test") -> dict:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# A run


def test_a_run_is_trained_evaluated_and_reported(trained):
    overall = metrics(trained)["overall"]
    assert overall["map_50"] > 0.5
    assert 0 <= overall["map"] <= overall["map_50"]
    assert set(metrics(trained)["intervals"]) >= {"map", "map_50", "f1", "froc", "count_error"}
    assert [row["class"] for row in metrics(trained)["per_class"]] == ["dark", "bright"]
    saved = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert saved["data"]["classes"] == ["dark", "bright"]
    assert len(saved["model"]["detector_args"]["sizes"]) == 3
    assert saved["evaluate"]["max_objects"] == 100
    page = (trained / "report.html").read_text()
    for part in (
        "Class by class",
        "Confusion",
        "What is wrong",
        "FROC",
        "Precision over recall",
        "Where objects are missed",
    ):
        assert part in page, part


def test_tables_agree_with_the_numbers(trained):
    folder = trained / "evaluation" / "test"
    images, objects = table(folder / "images.csv"), table(folder / "objects.csv")
    assert len(images) == metrics(trained)["samples"] == COUNTS["test"]
    for column, kinds in (("right", {"right"}), ("missed", None), ("wrong", None)):
        total = sum(int(row[column]) for row in images)
        if kinds:
            assert total == sum(row["kind"] in kinds for row in objects)
    right, wrong, missed = (sum(int(row[name]) for row in images) for name in ("right", "wrong", "missed"))
    assert metrics(trained)["overall"]["f1"] == pytest.approx(2 * right / (2 * right + wrong + missed))
    found = [row for row in objects if row["kind"] != "missed"]
    assert len(found) == right + wrong
    confusion = np.array(metrics(trained)["confusion"])
    assert confusion[:-1].sum() == right + missed
    assert confusion[:, :-1].sum() == right + wrong


def test_scores_are_chosen_on_validation_and_stay(trained, tmp_path):
    """Test uses those of validation; the checkpoint alone knows them; evaluate and predict give the same again."""
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["visionattn"]
    chosen = yaml.safe_load(content["recipe"])["evaluate"]["score"]
    assert metrics(trained, "val")["scores"] == pytest.approx(chosen)
    assert metrics(trained)["scores"] == pytest.approx(chosen)
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["evaluate"]["score"] == "auto"
    best = trained / "checkpoints" / "best.ckpt"
    assert main(["evaluate", str(best), "--split", "test", "-o", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["overall"] == pytest.approx(metrics(trained)["overall"])


RT_DETR = ["model.detector=rt_detr", "model.detector_args={fpn_channels: 16, layers: 1, finest: 4, coarsest: 16}"]


@pytest.mark.parametrize("detector", ["fcos", pytest.param("rt_detr", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_weights(detector, recipe, tmp_path):
    words = ["train.epochs=3", "data.augment={vflip: 0.5, rot90: 0.5, jitter: 0.1}"]
    words += RT_DETR if detector == "rt_detr" else []
    whole = fit(recipe, tmp_path / "whole", *words)
    command = [sys.executable, "-m", "visionattn", "fit", str(recipe), "--run", str(tmp_path / "cut")]
    process = subprocess.Popen([*command, *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["fit", "--resume", str(tmp_path / "cut")]) == 0
    for name in ("best", "last"):
        assert all(
            torch.equal(value, weights(whole, name)[key]) for key, value in weights(tmp_path / "cut", name).items()
        )
    assert metrics(tmp_path / "cut")["overall"] == metrics(whole)["overall"]


FEATURES = {
    "retinanet": ["model.detector=retinanet", "loss.box_weight=0.5", "train.monitor=f1"],
    "rt_detr": [*RT_DETR, "train.ema=0.5", "optim.layer_decay=0.7", "train.precision=bf16-mixed"],
    "d_fine": [*RT_DETR, "model.detector=d_fine", "evaluate.tta=[hflip]", "model.freeze=backbone"],
    "ema": ["train.ema=0.5", "train.monitor=loss"],
    "layer decay": ["optim.layer_decay=0.7", "train.grad_checkpointing=true"],
    "frozen": ["model.freeze=backbone", "evaluate.match=centre", "train.monitor=froc"],
    "bfloat16": ["train.precision=bf16-mixed", "train.channels_last=true"],
    "views": ["evaluate.tta=[hflip, rot90]", "evaluate.scales=[0.75, 1.5]", "evaluate.score=0.3"],
    "folds": ["data.fold=1", "data.folds=3", "data.object_crops=1.0", "data.resize=none"],
    "drawn": ["data.balanced_sampling=true", "data.empty_crops=0.1", "data.augment.copy_paste=0.5"],
    "augmented": [
        "data.augment={scale: [0.5, 2.0], vflip: 0.5, rot90: 0.5, rotate: 10, jitter: 0.2, band_dropout: 0.2}"
    ],
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_trains(name, recipe, tmp_path):
    run = fit(recipe, tmp_path / "run", "train.epochs=1", *FEATURES[name])
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert metrics(run)["overall"]["map"] is not None


def test_queries_are_measured_printed_and_kept_and_predict_again(recipe, squares, tmp_path, capsys, refused):
    run = fit(recipe, tmp_path / "run", *RT_DETR, "train.epochs=1")
    assert "rt_detr: 100 queries, for at most 2 objects at once" in capsys.readouterr().out
    saved = yaml.safe_load((run / "recipe.yaml").read_text())["model"]["detector_args"]
    assert (saved["queries"], saved["layers"]) == (100, 1)
    words = ["predict", run, squares / "images", "-o", tmp_path / "out.csv", "--score", "0.02"]
    assert main(list(map(str, words))) == 0
    assert {row["image_path"] for row in table(tmp_path / "out.csv")} == {
        p.name for p in (squares / "images").iterdir()
    }
    message = refused("fit", recipe, "--run", tmp_path / "few", *RT_DETR, "model.detector_args.queries=1")
    assert "model.detector_args.queries is 1, but the network sees 2 objects at once" in message


# Prediction


def test_images_are_predicted_into_a_folder_to_look_at(trained, squares, tmp_path, capsys):
    assert main(["predict", str(trained), str(squares / "images"), "-o", str(tmp_path / "out")]) == 0
    assert "28 predicted" in capsys.readouterr().out
    rows, counts = table(tmp_path / "out" / "objects.csv"), table(tmp_path / "out" / "counts.csv")
    assert {row["image_path"] for row in rows} == {row["image_path"] for row in counts}
    assert len(counts) == 28
    assert sum(int(row["dark"]) + int(row["bright"]) for row in counts) == sum(bool(row["label"]) for row in rows)
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == 28
    least = dict(zip(["dark", "bright"], metrics(trained)["scores"], strict=True))
    assert all(float(row["score"]) >= least[row["label"]] - 1e-6 for row in rows if row["label"])


@pytest.mark.parametrize(
    ("format", "out"), [("csv", "boxes.csv"), ("coco", "boxes.json"), ("yolo", "labels"), ("voc", "xml")]
)
def test_other_formats_are_written_on_demand(trained, squares, tmp_path, format, out):
    words = ["predict", trained, squares / "images", "-o", tmp_path / out, "--format", format, "--score", "0.2"]
    assert main(list(map(str, words))) == 0
    assert (tmp_path / out).exists()


def test_predictions_of_arrays(trained, squares):
    run = visionattn.load(trained)
    pixels = np.array(Image.open(squares / "images" / "test0.png"))
    one, other = run.predict([pixels, squares / "images" / "test0.png"])
    assert np.allclose(one.boxes.xyxy, other.boxes.xyxy)
    assert one.classes == ["dark", "bright"]
    assert run.predict([pixels]).to_pandas()["dark"].tolist() == [int((one.boxes.labels == 0).sum())]


# Before training


def test_check_says_what_there_is(recipe, capsys):
    assert main(["check", str(recipe)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "class: objects (images)",
        "without an object",
        "objects in an image, median and most",
        "fewer than 10",
    ):
        assert part in printed, part


REFUSED = {
    "an unknown detector": (["model.detector=fcoz"], "fcos"),
    "a class that never occurs": (["data.classes=[dark, bright, grey]"], "no training image has an object of grey"),
    "a limit below the densest image": (["evaluate.max_objects=1"], "max_objects is 1, but an image has 2 objects"),
    "scores of other classes": (["evaluate.score=[0.5]"], "1 scores, but there are 2 classes"),
    "sizes of other maps": (["model.detector_args.sizes=[8.0]"], "sizes"),
    "more than an epoch in a batch": (["data.batch_size=17"], "only 16 training crops"),
    "a finer coarsest map": (["model.detector_args={finest: 16, coarsest: 16}", "data.image_size=16"], "image_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_run_directory_exists(name, recipe, tmp_path, refused):
    overrides, message = REFUSED[name]
    assert message in refused("fit", recipe, "--run", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_formats_of_objects_are_refused_elsewhere(run, pictures, tmp_path, refused):
    assert "--format and --score are for objects" in refused(
        "predict", run, pictures / "test", "-o", tmp_path / "p.csv", "--format", "coco"
    )


def test_what_a_detector_of_boxes_cannot_do_is_refused_before_work(trained, squares, tmp_path, refused):
    words = ["predict", trained, squares / "images", "-o", tmp_path / "out"]
    assert "--format labels is for masks, but fcos finds boxes" in refused(*words, "--format", "labels")
    for score in ("7", "-1", "nan"):
        assert f"--score is {score}, expected 0 to 1" in refused(*words, f"--score={score}")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_named(trained, squares, tmp_path, refused):
    message = refused("predict", trained, squares / "images", "-o", tmp_path / "p", "--format", "cocoa")
    assert "coco" in message
    assert "geojson" in message


# Scenes


def write_scene(image: Path, boxes: list[list[int]], size: tuple[int, int], east: float = 500_000) -> None:
    """4 bands with bright boxes (left, top, right, bottom) and their GeoPackage in another coordinate system."""
    import rasterio
    import shapely
    from pyogrio import raw
    from rasterio.warp import transform

    pixels = np.random.default_rng(0).normal(128, 8, (4, *size))
    for left, top, right, bottom in boxes:
        pixels[:, top:bottom, left:right] = 230
    image.parent.mkdir(exist_ok=True, parents=True)
    place = rasterio.Affine(10, 0, east, 0, -10, 5_000_000)
    profile = {"driver": "GTiff", "count": 4, "height": size[0], "width": size[1], "dtype": "uint8"}
    with rasterio.open(image, "w", **profile, crs="EPSG:32633", transform=place) as sink:
        sink.write(pixels.clip(1, 255).astype(np.uint8))
    polygons = np.array([shapely.box(*box) for box in boxes], object)
    in_metres = shapely.transform(polygons, lambda xy: np.stack(place @ xy.T, axis=1))
    shapes = shapely.transform(in_metres, lambda xy: np.stack(transform("EPSG:32633", "EPSG:4326", *xy.T), axis=1))
    roofs = np.array(["roof"] * len(boxes), object)
    file = image.with_suffix(".gpkg")
    raw.write(file, shapely.to_wkb(shapes), [roofs], ["class"], crs="EPSG:4326", geometry_type="Polygon")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Scenes that are larger than the tiles, in train/ and val/."""
    pytest.importorskip("pyogrio")
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for n, name in enumerate(("train/a", "train/b", "val/c")):
        sides = rng.integers(8, 11, 5).tolist()
        corners = ((4, 5), (25, 26), (50, 10), (8, 40), (52, 38))
        boxes = [[x, y, x + side, y + side] for (x, y), side in zip(corners, sides, strict=True)]
        write_scene(root / f"{name}.tif", boxes, (60, 75), 500_000 + 2000 * n)  # no ground in common
    return root


SCENES = ["data.format=geotiff", "data.batch_size=2", "data.overlap=0.4", "data.image_size=32"]


def test_scenes_are_trained_on_by_crops_and_measured_and_predicted_whole(recipe, scenes, tmp_path):
    run = fit(recipe, tmp_path / "run", f"data.root={scenes}", *SCENES, "data.crops_per_image=4")
    found = metrics(run, "val")
    assert found["samples"] == 1
    assert found["per_class"][0]["objects"] == 5
    (row,) = table(run / "evaluation" / "val" / "images.csv")
    assert row["image"] == "val/c"
    assert main(["predict", str(run), str(scenes / "val"), "-o", str(tmp_path / "out"), "--score", "0.02"]) == 0
    from pyogrio import raw

    meta, _, geometry, _ = raw.read(next((tmp_path / "out").rglob("*.gpkg")), layer="objects")
    assert meta["crs"] == "EPSG:32633"
    import shapely

    left, bottom, right, top = shapely.total_bounds(shapely.from_wkb(geometry))
    assert 504_000 - 1e-6 <= left < right <= 504_750 + 1e-6
    assert 4_999_400 - 1e-6 <= bottom < top <= 5_000_000 + 1e-6


def test_tiles_that_share_less_than_an_object_are_refused(recipe, scenes, tmp_path, refused):
    message = refused("fit", recipe, "--run", tmp_path / "run", f"data.root={scenes}", *SCENES, "data.overlap=0.1")
    assert "data.overlap 0.1 of tiles of 32 pixels is 3 pixels" in message
    assert "set data.overlap to 0.3" in message


def test_a_scene_may_have_more_objects_than_count_in_a_tile(recipe, tmp_path):
    pytest.importorskip("pyogrio")
    boxes = [[x, y, x + 7, y + 7] for x in range(2, 110, 10) for y in range(2, 110, 10)]
    for n, name in enumerate(("train/a", "val/b")):
        write_scene(tmp_path / "dense" / f"{name}.tif", boxes, (110, 110), 500_000 + 2000 * n)
    keys = [f"data.root={tmp_path / 'dense'}", *SCENES, "data.crops_per_image=4", "train.epochs=1"]
    run = fit(recipe, tmp_path / "run", *keys)
    assert metrics(run, "val")["per_class"][0]["objects"] == len(boxes) == 121


# Masks


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    """Bright discs that touch each other, with label images of 16 bits."""
    root, rng = tmp_path_factory.mktemp("discs"), np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for i in range(24):
        image, numbers = rng.normal(100, 8, (32, 32)), np.zeros((32, 32), np.uint16)
        for n, x in enumerate((8, 22), 1):
            disc = (rows - rng.integers(9, 22)) ** 2 + (columns - x) ** 2 < rng.integers(6, 8) ** 2
            image[disc], numbers[disc] = 220, n * 300
        split = "train" if i < 16 else "val"
        for kind, pixels in (("images", image.clip(0, 255).astype(np.uint8)), ("masks", numbers)):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / split / kind / f"{i}.png")
    return root


MASKS = ["data.format=instances", "data.classes=[disc]", "model.detector=mask_rcnn", "optim.lr=3e-3"]


@pytest.mark.slow
def test_instances_are_learned_measured_and_written_as_they_are_read(recipe, discs, tmp_path):
    run = fit(recipe, tmp_path / "run", f"data.root={discs}", *MASKS, "train.epochs=12")
    overall = metrics(run, "val")["overall"]
    assert overall["map_50"] > 0.5
    assert overall["mask_map_50"] > 0.5
    assert "mask AP50" in (run / "report.html").read_text()
    out = tmp_path / "out"
    assert main(["predict", str(run), str(discs / "val/images"), "-o", str(out), "--format", "labels"]) == 0
    shared = [len(table(out / f"{i}.csv")) for i in range(16, 24)]
    assert sum(shared) > 8
    found, truth = (np.array(Image.open(p)) > 0 for p in (out / "16.tif", discs / "val/masks/16.png"))
    assert (found & truth).sum() / (found | truth).sum() > 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.instances=boxes"], "data.instances is boxes, but mask_rcnn learns masks; others: fcos, retinanet"),
        (["model.detector=fcos", "data.instances=masks"], "fcos learns boxes; others: mask_rcnn"),
        (["evaluate.tta=[hflip]"], "evaluate.tta is ['hflip'], but the masks of mask_rcnn are not averaged over views"),
        (["evaluate.scales=[2.0]"], "evaluate.scales is [2.0], but the masks of mask_rcnn are not averaged"),
    ],
)
def test_masks_that_cannot_be_learned_are_refused(recipe, discs, tmp_path, refused, keys, message):
    assert message in refused("fit", recipe, "--run", tmp_path / "run", f"data.root={discs}", *MASKS, *keys)


def test_boxes_without_masks_are_refused_by_a_detector_of_masks(recipe, tmp_path, refused):
    message = refused("fit", recipe, "--run", tmp_path / "run", "model.detector=mask_rcnn")
    assert "mask_rcnn learns masks, but the objects are boxes only: choose faster_rcnn" in message
