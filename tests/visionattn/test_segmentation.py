"""Segmentation through the command line: what a run leaves behind, resuming, predicting, and what is refused."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.cli import main
from visionattn.data.sample import Dataset, Reading
from visionattn.recipe import load
from visionattn.runs.directory import History
from visionattn.tasks.segmentation.task import make

ROOT = Path(__file__).parents[2]

RECIPE = """\
task: segmentation
model: {name: test_resnet, decoder: fpn, decoder_args: {pyramid_channels: 32, segmentation_channels: 64}}
data:
  format: image_mask
  root: ROOT
  image_size: 32
  batch_size: 8
  workers: 0
  classes: [background, disc, square]
  ignore_index: 255
optim: {lr: 5e-3}
train: {epochs: 2}
evaluate: {bootstrap: 20}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""


def scene(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with a red disc and a blue square, and its mask; the outermost pixels have no label."""
    rows, columns = np.mgrid[:side, :side]
    mask = np.zeros((side, side), np.uint8)
    centre = rng.integers(10, side - 10, (2, 2))
    mask[(abs(rows - centre[1, 0]) < 6) & (abs(columns - centre[1, 1]) < 6)] = 2
    mask[(rows - centre[0, 0]) ** 2 + (columns - centre[0, 1]) ** 2 < 50] = 1
    colors = np.array([(90, 90, 90), (220, 60, 60), (60, 60, 220)])
    picture = (colors[mask] + rng.normal(0, 12, (side, side, 3))).clip(0, 255).astype(np.uint8)
    mask[0] = mask[-1] = 255
    return picture, mask


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """images/ and masks/ with train (24), val (6) and test (6), 36 to 44 pixels a side."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            picture, mask = scene(rng, int(rng.integers(36, 45)))
            Image.fromarray(picture).save(root / "images" / split / f"{i:02d}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{i:02d}.png")
    return root


@pytest.fixture
def recipe_file(tmp_path, scenes) -> Path:
    path = tmp_path / "scenes.yaml"
    path.write_text(RECIPE.replace("ROOT", str(scenes)))
    return path


@pytest.fixture(scope="session")
def segmented(tmp_path_factory, scenes) -> Path:
    """A run trained on the scenes."""
    folder = tmp_path_factory.mktemp("segmented")
    (folder / "scenes.yaml").write_text(RECIPE.replace("ROOT", str(scenes)))
    run = folder / "run"
    assert main(["fit", str(folder / "scenes.yaml"), "--run", str(run), "train.epochs=6"]) == 0
    return run


def fit(recipe: Path, run: Path, *overrides: str) -> Path:
    assert main(["fit", str(recipe), "--run", str(run), *overrides]) == 0
    return run


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def metrics(run: Path, split: str = "test") -> dict:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def test_a_run_learns_and_says_how_well_on_which_rule(segmented):
    result = metrics(segmented)
    assert result["overall"]["dice"] > 0.6
    low, high = result["intervals"]["dice"]
    assert low <= result["overall"]["dice"] <= high
    assert result["rules"]["left_out"] == ["background"]
    assert [row["class"] for row in result["per_class"]] == ["background", "disc", "square"]
    assert sum(map(sum, result["confusion"])) == sum(row["pixels"] for row in result["per_class"])
    page = (segmented / "report.html").read_text()
    for text in ("Class by class", "Lowest Dice", "Highest Dice", "Calibration", "background"):
        assert text in page


def test_every_case_has_a_row_whose_mean_is_the_reported_one(segmented):
    table = rows(segmented / "evaluation" / "test" / "cases.csv")
    assert [row["case"] for row in table] == [f"test/{i:02d}" for i in range(6)]
    for k, name in enumerate(("background", "disc", "square")):
        values = [float(row[f"dice:{name}"]) for row in table if row[f"dice:{name}"]]
        assert np.mean(values) == pytest.approx(metrics(segmented)["per_class"][k]["dice"], abs=1e-5)


def test_the_best_weights_are_those_of_the_best_validation_epoch_and_the_last_are_evaluated_too(segmented):
    epochs = rows(segmented / "metrics.csv")
    best = max(epochs, key=lambda row: float(row["val/dice"]))
    assert metrics(segmented, "val")["epoch"] == int(best["epoch"])
    assert f"best: {best['epoch']}, by validation Dice" in (segmented / "report.html").read_text()
    assert metrics(segmented, "val")["overall"]["dice"] == pytest.approx(float(best["val/dice"]), abs=1e-5)
    if best is not epochs[-1]:
        assert metrics(segmented, "test-last")["epoch"] == len(epochs)
    else:
        assert "which is the last epoch too" in (segmented / "report.html").read_text()


def test_evaluating_again_gives_the_same(segmented, scenes, tmp_path):
    assert main(["evaluate", str(segmented), "--data", str(scenes), "--split", "test", "-o", str(tmp_path / "e")]) == 0
    again = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert again["overall"] == pytest.approx(metrics(segmented)["overall"])


def test_masks_are_predicted_in_native_pixels(segmented, scenes, tmp_path, capsys, refused):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(scenes / "images" / "test" / "00.png", tmp_path / "in" / "a.png")
    shutil.copy(scenes / "images" / "test" / "01.png", tmp_path / "in" / "deep" / "b.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    assert main(["predict", str(segmented), str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    assert "bad.png" in capsys.readouterr().err
    for name, number in (("a", "00"), ("deep/b", "01")):
        mask = Image.open(tmp_path / "out" / f"{name}.png")
        truth = np.array(Image.open(scenes / "masks" / "test" / f"{number}.png"))
        assert mask.mode == "P"
        assert np.array(mask).shape == truth.shape
        right = (np.array(mask) == truth)[truth != 255].mean()
        assert right > 0.8
        assert (tmp_path / "out" / "overlays" / f"{name}.png").is_file()
    assert "never overwritten" in refused("predict", segmented, tmp_path / "in", "-o", tmp_path / "out")


FEATURES = {
    "native pixels in crops": [
        "data.resize=none", "data.rare_crops=0.5", "data.crops_per_image=2", "loss.class_weights=balanced",
        "data.augment={scale: [0.5, 1.5], vflip: 0.5, rot90: 0.5, rotate: 20, jitter: 0.2, band_dropout: 0.1}",
    ],
    "shorter side, views, several scales": [
        "data.resize=shorter", "data.augment.multi_scale=[0.75, 1, 1.25]", "evaluate.tta=[hflip, vflip, rot90]",
        "train.monitor=miou", "evaluate.empty=transunet", "data.fold=1", "data.folds=3",
    ],
    "every output, averaged, half frozen": [
        "model.decoder=emcad", "model.decoder_args={}", "loss.name=mutation", "train.ema=0.9", "model.freeze=backbone",
        "train.precision=bf16-mixed", "optim.layer_decay=0.8", "evaluate.surface=false",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_every_training_feature_trains(name, recipe_file, tmp_path):
    run = fit(recipe_file, tmp_path / "run", *FEATURES[name], "train.epochs=1")
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert 0 <= metrics(run)["overall"]["dice"] <= 1


def test_an_interrupted_run_resumes_to_the_same_weights(recipe_file, tmp_path, monkeypatch):
    overrides = ["data.resize=none", "data.rare_crops=0.5", "data.augment.multi_scale=[1, 1.5]", "train.epochs=3"]
    whole = fit(recipe_file, tmp_path / "whole", *overrides)
    run = tmp_path / "interrupted"

    def break_off(history, trainer, task):
        if trainer.current_epoch == 2:
            raise RuntimeError("the power went")
        after_epoch(history, trainer, task)

    after_epoch = History.on_train_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_epoch_end", break_off)
        with pytest.raises(RuntimeError, match="the power went"):
            main(["fit", str(recipe_file), "--run", str(run), *overrides])
    assert main(["fit", "--resume", str(run)]) == 0
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(run).items())
    assert metrics(run)["overall"] == metrics(whole)["overall"]


def spoil(root: Path, how: str) -> None:
    """Break a copy of the data in one of the ways that users break theirs."""
    mask, image = root / "masks" / "train" / "03.png", root / "images" / "train" / "03.png"
    match how:
        case "misspelt":
            (root / "masks").rename(root / "mask")
        case "missing":
            mask.unlink()
        case "unknown value":
            Image.fromarray(np.array(Image.open(mask)) % 255 + 3).save(mask)
        case "size":
            Image.open(mask).crop((0, 0, 20, 20)).save(mask)
        case "colours":
            Image.fromarray(np.array([[110, 193, 228], [60, 16, 152]], np.uint8)[np.array(Image.open(mask)) % 2]).save(
                mask
            )
        case "no image":
            image.unlink()
        case "damaged":
            image.write_bytes(image.read_bytes()[:300])


SPOILT = {
    "misspelt": (["masks is missing", "did you mean mask?"], []),
    "missing": (["images/train/03.png", "no mask"], []),
    "unknown value": (["masks/train/03.png", "classes are"], []),
    "size": (["images/train/03.png", "20x20"], []),
    "colours": (["masks/train/03.png", "RGB", "data.colors"], []),
    "no image": (["masks/train/03.png", "no image"], []),
    "damaged": (["images/train/03.png", "truncated"], []),
    "nothing but a group in several splits": (["00 (test, train, val)"], ["data.group='[0-9]+$'"]),
}


@pytest.mark.parametrize("how", SPOILT)
def test_bad_data_are_refused_by_name_before_anything_is_written(how, recipe_file, scenes, tmp_path, capsys, refused):
    words, overrides = SPOILT[how]
    root = tmp_path / "spoilt"
    shutil.copytree(scenes, root)
    spoil(root, how)
    message = refused("fit", recipe_file, "--run", tmp_path / "run", f"data.root={root}", *overrides)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()
    status = main(["check", str(recipe_file), f"data.root={root}", *overrides])
    text = capsys.readouterr()
    assert status in (1, 2)
    assert all(word in text.out + text.err for word in words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.decoder=fpnn data.root=nowhere", ["model.decoder is 'fpnn'", "did you mean fpn"]),
        ("model.decoder=null model.decoder_args={} data.batch_size=100", ["test_resnet", "no segmenter"]),
        ("model.args.depths=3 data.batch_size=100", ["test_resnet cannot be made", "depths"]),
        ("loss.class_weights=[1.0,2.0]", ["class_weights", "3"]),
        ("data.mean=[0.5,0.5]", ["data.mean", "3 channels"]),
        ("data.batch_size=100", ["batch_size is 100", "batch_size to at most 24", "crops_per_image to at least 5"]),
        ("data.batch_size=49 data.crops_per_image=2", ["batch_size to at most 48", "crops_per_image to at least 3"]),
        ("data.classes=[a,b]", ["masks/train", "classes are"]),
        ("data.values=[0,1]", ["values has 2 entries for 3 classes"]),
        ("data.group='('", ["data", "regular expression"]),
        ("data.lists.train=nowhere.txt", ["nowhere.txt"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(override, words, recipe_file, tmp_path, refused):
    message = refused("fit", recipe_file, "--run", tmp_path / "run", *override.split())
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("nifti", "nibabel", "medical"), ("dicom", "pydicom", "medical"), ("geotiff", "rasterio", "geo")],
)
def test_a_format_without_its_extra_is_refused(kind, package, extra, recipe_file, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    message = refused("fit", recipe_file, "--run", tmp_path / "run", f"data.format={kind}")
    assert f"data.format {kind} needs {package}: pip install 'visionattn[{extra}]'" in message
    assert not (tmp_path / "run").exists()


def test_without_monai_surface_distances_are_left_out_with_a_warning(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)  # as if not installed
    run = fit(recipe_file, tmp_path / "run", "train.epochs=1")
    assert "visionattn[medical]" in capsys.readouterr().err
    assert metrics(run)["overall"]["hd95"] is None
    assert metrics(run)["overall"]["dice"] is not None


def test_check_counts_classes_and_finds_equal_images(recipe_file, scenes, tmp_path, capsys):
    assert main(["check", str(recipe_file)]) == 0
    text = capsys.readouterr().out
    assert "disc" in text
    assert "problems: none" in text
    root = tmp_path / "leaking"
    shutil.copytree(scenes, root)
    for kind in ("images", "masks"):
        shutil.copy(root / kind / "train" / "00.png", root / kind / "test" / "copy.png")
    mask = root / "masks" / "train" / "05.png"
    Image.fromarray(np.zeros_like(np.array(Image.open(mask)))).save(mask)
    assert main(["check", str(recipe_file), f"data.root={root}"]) == 1
    text = capsys.readouterr().out
    assert "train/00 = test/copy" in text
    assert "train masks have nothing but background: train/05" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "segmentation").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_network_of_every_shipped_recipe_can_be_trained(path):
    channels, classes = 1 if path.stem == "quickstart" else 3, 0
    spec = load(path, ["model.pretrained=false", "trainer={}"])
    classes = len(spec.data.class_names)
    statistics = {"mean": [0.0] * channels, "std": [1.0] * channels}
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=statistics)})
    reading = Reading(counts=np.full(classes + 1, 100))
    task = make(spec, Dataset(spec.data.class_names, {"train": [], "val": []}, {"train": [reading]}))
    image, mask = torch.rand(2, channels, 64, 64), torch.randint(classes, (2, 64, 64))
    value = task.loss(task(image, deep=True) if task.deep else task(image), mask)
    value.backward()
    assert torch.isfinite(value)
    trained = task.network.decoder.parameters() if task.deep else task.network.heads[0].parameters()
    assert all(p.grad is not None for p in trained)
