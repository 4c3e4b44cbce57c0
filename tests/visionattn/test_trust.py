"""How far predictions can be trusted, through the command line: fitted at the end of training, kept, written, shown."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from visionattn.cli import main

TRUST = ["evaluate.calibration=temperature", "evaluate.conformal=0.2"]
MASKS = """\
task: segmentation
model: {name: test_resnet, decoder: fpn, decoder_args: {pyramid_channels: 32, segmentation_channels: 64}}
data:
  {format: image_mask, root: ROOT, image_size: 32, batch_size: 8, workers: 0, classes: [background, square]}
optim: {lr: 5e-3}
train: {epochs: 3}
evaluate: {bootstrap: 0, surface: false, calibration: temperature, conformal: 0.3}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(run: Path, split: str = "test") -> dict:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trusted(tmp_path_factory, run) -> Path:
    """A classifier that knows how far it can be trusted."""

    folder = tmp_path_factory.mktemp("trusted")
    overrides = [*TRUST, "evaluate.ood=knn", "train.epochs=4"]
    assert main(["fit", str(run / "recipe.yaml"), "--run", str(folder / "run"), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """Pictures of 40 x 48 pixels with a bright square, and their masks: train (16), val (6) and test (4)."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6), ("test", 4)):
        for i in range(count):
            top, left = rng.integers(0, 24, 2)
            mask = np.zeros((40, 48), np.uint8)
            mask[top : top + 14, left : left + 14] = 1
            image = (60 + 90 * mask + rng.normal(0, 30, mask.shape)).clip(0, 255).astype(np.uint8)
            for kind, pixels in (("images", image), ("masks", mask)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / kind / split / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def masked(tmp_path_factory, squares) -> Path:
    """A segmenter that knows how far it can be trusted."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "masks.yaml").write_text(MASKS.replace("ROOT", str(squares)))
    assert main(["fit", str(folder / "masks.yaml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_what_was_fitted_is_kept_and_what_is_reported_follows_it(trusted):
    fitted = visionattn.load(trusted).recipe.evaluate.fitted
    assert (fitted.images, fitted.source) == (24, "val")
    assert fitted.temperature != 1
    result = metrics(trusted, "val")
    assert result["overall"]["loss"] < result["before"]["loss"]
    assert result["sets"]["covered"] >= 0.8
    assert sum(result["sets"]["sizes"]) == 24
    assert metrics(trusted)["fitted"] == fitted.model_dump()
    page = (trusted / "report.html").read_text()
    assert "Risk over coverage" in page
    assert "sets that have the class" in page


def test_a_table_says_what_an_image_may_be_and_whether_it_is_like_the_others(trusted, pictures, tmp_path):
    (tmp_path / "odd").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(np.where(noise > 250, 255, 0).astype(np.uint8)).save(tmp_path / "odd" / "noise.png")
    out = tmp_path / "table.csv"
    assert main(["predict", str(trusted), str(pictures / "test"), str(tmp_path / "odd"), "-o", str(out)]) == 0
    rows = table(out)
    least = visionattn.load(trusted).recipe.evaluate.fitted.least
    for row in rows:
        may_be = [name for name in ("level", "upright") if float(row[f"p:{name}"]) >= least]
        assert sorted(filter(None, row["set"].split(";"))) == sorted(may_be)
        assert int(row["set_size"]) == len(may_be)
    strange = next(row for row in rows if row["path"].endswith("noise.png"))
    others = [float(row["distance"]) for row in rows if row is not strange]
    assert float(strange["distance"]) > np.median(others)
    assert {row["unfamiliar"] for row in rows} <= {"0", "1"}


def test_python_gives_what_the_table_gives(trusted, pictures):
    run = visionattn.load(trusted)
    one = run.predict(pictures / "test" / "level" / "00.png")[0]
    assert one.set is not None
    assert one.doubts.keys() == {"distance", "unfamiliar"}
    html = run.predict(pictures / "test")._repr_html_()
    assert "set_size" in html


def test_a_finished_run_is_calibrated_on_other_images(run, pictures, tmp_path, capsys):
    mine = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(pictures / "test", tmp_path / "others")
    before = torch.load(mine / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert main(["calibrate", str(mine), "--data", str(tmp_path / "others"), "--conformal", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "temperature" in printed
    after = torch.load(mine / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    loaded = visionattn.load(mine)
    assert loaded.recipe.evaluate.fitted.source == str(tmp_path / "others")
    assert loaded.evaluate(tmp_path / "others").more["sets"]["covered"] >= 0.9
    fitted = loaded.calibrate(split="test", conformal=0.3, ood="knn")
    assert fitted.unfamiliar is not None
    assert visionattn.load(mine).recipe.evaluate.fitted == fitted


def test_a_run_is_calibrated_again_and_again_and_keeps_it_when_it_is_finished_again(run, tmp_path, refused):
    mine = shutil.copytree(run, tmp_path / "run")
    loaded = visionattn.load(mine)
    loaded.calibrate(conformal=0.2)
    fitted = loaded.calibrate(split="test", conformal=0.3)
    assert main(["fit", "--resume", str(mine)]) == 0
    assert visionattn.load(mine).recipe.evaluate.fitted == fitted
    assert metrics(mine)["fitted"]["source"] == "test"
    assert "--split train: the network has learned from these" in refused("calibrate", mine, "--split", "train")
    assert "evaluate.conformal" in refused("calibrate", mine, "--conformal", "0")
    assert "evaluate.conformal" in refused("calibrate", mine, "--conformal", "1.5")
    assert "99 validation images" in refused("calibrate", mine, "--conformal", "0.01")
    assert visionattn.load(mine).recipe.evaluate.fitted == fitted


def test_a_checkpoint_from_before_anything_was_fitted_predicts(trusted, pictures, tmp_path):
    content = torch.load(trusted / "checkpoints" / "last.ckpt", weights_only=True)
    assert "bank" not in content
    last = trusted / "checkpoints" / "last.ckpt"
    assert main(["predict", str(last), str(pictures / "test"), "-o", str(tmp_path / "t.csv")]) == 0
    assert not {"set", "distance", "unfamiliar"} & set(table(tmp_path / "t.csv")[0])


def test_what_others_have_fitted_is_refused(recipe_file, tmp_path, refused):
    fitted = "evaluate.fitted={images: 9, source: val, temperature: 2}"
    assert "evaluate.fitted is of other weights" in refused("fit", recipe_file, "--run", tmp_path / "new", fitted)


def test_several_labels_have_a_temperature_and_no_sets(recipe_file, pictures, tmp_path, refused):
    rows = [f"{path},{'a;b' if path.parent.name == 'level' else 'b'}" for path in sorted(pictures.rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    path = tmp_path / "labels.yaml"
    where = f"format: csv, root: {tmp_path / 'labels.csv'}, label_separator: ';', val_fraction: 0.4"
    path.write_text(recipe_file.read_text().replace(f"format: folder, root: {pictures}", where))
    monitored = ["train.monitor=loss", "train.epochs=2", "evaluate.calibration=temperature"]
    assert main(["fit", str(path), "--run", str(tmp_path / "run"), *monitored]) == 0
    assert visionattn.load(tmp_path / "run").recipe.evaluate.fitted.temperature > 0
    assert "one class an image" in refused("calibrate", tmp_path / "run", "--conformal", "0.2")
    assert "one class an image" in refused("fit", path, "--run", tmp_path / "no", *monitored, "evaluate.conformal=0.2")


def test_what_nothing_can_be_promised_of_is_refused_before_training(recipe_file, squares, run, tmp_path, refused):
    message = refused("fit", recipe_file, "--run", tmp_path / "new", "evaluate.conformal=0.01")
    assert "99 validation images of different groups are needed, but there are 24" in message
    assert not (tmp_path / "new").exists()
    path = tmp_path / "masks.yaml"
    path.write_text(MASKS.replace("ROOT", str(squares)))
    assert "validation cases" in refused("fit", path, "--run", tmp_path / "new", "evaluate.conformal=0.05")
    assert "--uncertainty is for masks" in refused(
        "predict", run, squares / "images", "-o", tmp_path / "t.csv", "--uncertainty"
    )


def test_networks_of_several_runs_are_averaged(run, trusted, pictures, tmp_path, refused):
    tables = {}
    for name, models in {"a": [run], "b": [trusted], "both": [run, trusted], "same": [run, run]}.items():
        out = tmp_path / f"{name}.csv"
        assert main(["predict", *map(str, models), str(pictures / "test"), "-o", str(out)]) == 0
        tables[name] = table(out)
    for a, b, both, same in zip(*tables.values(), strict=True):
        mean = (float(a["p:level"]) + float(b["p:level"])) / 2
        assert float(both["p:level"]) == pytest.approx(mean, abs=2e-6)
        assert float(same["mutual_information"]) < 1e-6
        p = np.array([mean, 1 - mean])
        assert float(both["entropy"]) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
    assert any(float(row["mutual_information"]) > 1e-5 for row in tables["both"])
    loaded = visionattn.load(run, trusted)
    assert loaded.predict(pictures / "test")[0].doubts.keys() == {"entropy", "mutual_information"}


def test_an_average_is_measured_and_is_one_network(run, trusted, pictures):
    loaded = visionattn.load(run, trusted)
    alone = [visionattn.load(path).predict(pictures / "test") for path in (run, trusted)]
    mean = [np.mean([one.probabilities["level"] for one in pair]) for pair in zip(*alone, strict=True)]
    truth = np.array(["/level/" in one.name for one in alone[0]])
    assert loaded.evaluate().overall["accuracy"] == pytest.approx(np.mean((np.array(mean) > 0.5) == truth))
    images = torch.randn(3, 1, 32, 32)
    probabilities = loaded.model(images).softmax(1)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    each = [logits.softmax(1) for logits in loaded.model.each(images)]
    torch.testing.assert_close(probabilities, (each[0] + each[1]) / 2)


def test_images_that_models_prepare_differently_are_not_averaged(run, recipe_file, pictures, tmp_path, refused):
    assert main(["fit", str(recipe_file), "--run", str(tmp_path / "other"), "train.epochs=1", "data.resize=crop"]) == 0
    message = refused("predict", run, tmp_path / "other", pictures / "test", "-o", tmp_path / "t.csv")
    assert "cannot be averaged: data.resize squash and crop" in message


def test_models_that_say_different_things_are_not_averaged(run, masked, pictures, tmp_path, refused):
    message = refused("predict", run, masked, pictures / "test", "-o", tmp_path / "t.csv")
    assert "cannot be averaged: task classification and segmentation" in message
    assert "no images are given" in refused("predict", run, masked, "-o", tmp_path / "t.csv")


def test_maps_of_doubts_stand_beside_masks(masked, squares, tmp_path):
    images = str(squares / "images" / "test")
    for name, models in {"one": [masked], "two": [masked, masked]}.items():
        assert main(["predict", *map(str, models), images, "-o", str(tmp_path / name), "--uncertainty"]) == 0
    fitted = visionattn.load(masked).recipe.evaluate.fitted
    assert fitted.thresholds is not None
    entropy = np.array(Image.open(tmp_path / "one" / "0_entropy.tif"))
    assert entropy.shape == (40, 48)
    assert 0 < entropy.max() <= np.log(2) + 1e-6
    assert not (tmp_path / "one" / "0_mutual_information.tif").exists()
    assert np.abs(np.array(Image.open(tmp_path / "two" / "0_mutual_information.tif"))).max() < 1e-5
    missed = []
    for i in range(4):
        may_be = np.array(Image.open(tmp_path / "one" / f"{i}_may_be_1_square.tif"))
        truth = np.array(Image.open(squares / "masks" / "test" / f"{i}.png"))
        assert set(np.unique(may_be)) <= {0.0, 1.0}
        missed.append(1 - may_be[truth == 1].mean())
    assert np.mean(missed) < 0.6
    python = visionattn.load(masked).predict(squares / "images" / "test" / "0.png", uncertainty=True)[0]
    np.testing.assert_allclose(python.doubts["entropy"], entropy, atol=1e-6)
    assert not visionattn.load(masked).predict(squares / "images" / "test" / "0.png")[0].doubts


def test_calibrated_masks_are_the_same_masks(masked):
    result = metrics(masked, "val")
    fitted = visionattn.load(masked).recipe.evaluate.fitted
    assert fitted.images == 6
    assert fitted.temperature > 0
    assert result["overall"]["calibration_error"] < 0.2


def test_folds_are_calibrated_together_on_what_each_has_not_seen(run, pictures, tmp_path, refused):
    few = {"data.folds": 2, "train.epochs": 1, "evaluate.bootstrap": 0, "evaluate.explain": False}
    folds = [visionattn.fit(run / "recipe.yaml", few | {"data.fold": k}, run=tmp_path / f"{k}").path for k in (0, 1)]
    rows = [row for fold in folds for row in visionattn.load(fold).evaluate(split="val").tables["predictions.csv"]]
    believed = np.log([[float(row[f"p:{name}"]) for name in ("level", "upright")] for row in rows])
    truth = np.array([row["label"] for row in rows]) == "upright"
    assert len({row["name"] for row in rows}) == len(rows) == 72

    def of_truth(temperature: float) -> np.ndarray:
        powers = np.exp(believed / temperature)
        return (powers / powers.sum(1, keepdims=True))[range(len(truth)), truth.astype(int)]

    assert "has no data.fold" in refused("calibrate", run, run)
    assert "the runs are of the folds 0, 0, expected each of 0 to 1 once" in refused("calibrate", folds[0], folds[0])
    fitted = visionattn.load(*folds).calibrate(conformal=0.2)
    best = min(np.geomspace(0.05, 20, 2001), key=lambda t: -np.log(of_truth(t)).mean())
    assert fitted.temperature == pytest.approx(best, rel=0.01)
    assert fitted.least == pytest.approx(np.sort(of_truth(fitted.temperature))[72 - 59], rel=1e-3)
    assert (fitted.images, fitted.source) == (72, "val of 2 folds")
    assert all(visionattn.load(fold).recipe.evaluate.fitted == fitted for fold in folds)
    together = visionattn.load(*folds)
    assert together.recipe.evaluate.fitted == fitted.model_copy(update={"temperature": 1.0})
    one = together.predict(pictures / "test" / "level" / "00.png")[0]
    assert set(one.set) == {name for name, value in one.probabilities.items() if value >= fitted.least}
