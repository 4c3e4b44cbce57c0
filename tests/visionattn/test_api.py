"""The Python interface: what the command line does, from a notebook."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from visionattn import UserError


@pytest.fixture(scope="module")
def loaded(run) -> visionattn.Run:
    return visionattn.load(run)


def test_a_run_is_trained_from_a_dict(pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "task": "classification",
        "model": {
            "name": "biformer_tiny",
            "args": {"depth": (1, 1, 1, 1), "embed_dim": [16, 16, 32, 32], "head_dim": 16},
        },
        "data": {"format": "folder", "root": pictures, "image_size": 32, "batch_size": 16, "workers": 0},
        "train": {"epochs": 3},
        "evaluate": {"bootstrap": 10},
        "trainer": {"accelerator": "cpu"},
    }
    run = visionattn.fit(recipe, {"train.epochs": 1})
    assert run.path.parent == Path("runs")
    assert run.report.is_file()
    assert [row["epoch"] for row in run.history] == [1]
    assert run.recipe.train.epochs == 1
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if not line.startswith("epoch 1 of 1: train/loss ")] == []


def test_what_is_known_of_a_run(loaded, run):
    assert set(loaded.metrics) >= {"val", "test"}
    assert loaded.metrics["test"]["accuracy"] == loaded.evaluations["test"].overall["accuracy"]
    assert not loaded.model.training
    assert loaded.model(torch.zeros(1, 1, 32, 32)).shape == (1, 2)
    assert "accuracy" in loaded._repr_html_()
    frame = loaded.history.to_pandas()
    assert len(frame) == len(loaded.history) == 5
    alone = visionattn.load(run / "checkpoints" / "best.ckpt")
    assert alone.recipe == loaded.recipe
    with pytest.raises(UserError, match="only a run directory has a history"):
        alone.history  # noqa: B018


def test_images_in_any_form_are_predicted_alike(loaded, pictures):
    path = pictures / "test" / "level" / "00.png"
    image = Image.open(path)
    forms = [path, str(path), image, np.array(image), np.array(image)[..., None], np.stack([np.array(image)] * 3, -1)]
    predictions = loaded.predict(forms)
    assert {one.label for one in predictions} == {predictions[0].label}
    for one in predictions:
        assert one.probabilities == pytest.approx(predictions[0].probabilities, abs=1e-6)
    assert predictions[2].name == "image[2]"
    assert loaded.predict(path)[0] == loaded.predict([path])[0]
    folder = loaded.predict(pictures / "test")
    assert len(folder) == 24
    right = [Path(one.name).parent.name == one.label for one in folder]
    assert np.mean(right) == pytest.approx(loaded.metrics["test"]["accuracy"])
    assert list(folder.to_pandas().columns) == ["name", "label", "level", "upright"]
    assert "upright" in folder._repr_html_()


def test_unreadable_images_stand_among_the_others(loaded, pictures, tmp_path):
    shutil.copy(pictures / "test" / "level" / "00.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    good, bad = loaded.predict(tmp_path)
    assert good.error is None
    assert bad.label is None
    assert "b.png" in bad.error


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        (np.zeros((2, 3, 4, 5)), "array of shape"),
        (5, "is a int: expected a path, a PIL image, or an array"),
    ],
)
def test_what_is_no_image_is_refused(loaded, images, words):
    with pytest.raises(UserError, match=words):
        loaded.predict(images)


def test_evaluating_writes_nothing(loaded, run, pictures):
    before = sorted(run.rglob("*"))
    evaluation = loaded.evaluate(data=pictures / "val")
    assert evaluation.samples == 24
    assert evaluation.overall["accuracy"] == pytest.approx(loaded.metrics["val"]["accuracy"])
    assert loaded.evaluate().overall == pytest.approx(loaded.metrics["test"])
    assert sorted(run.rglob("*")) == before


def test_checking_finds_what_fit_would_refuse(recipe_file):
    assert visionattn.check(recipe_file).problems == []
    assert "upright" in visionattn.check(recipe_file)._repr_html_()
    problems = visionattn.check(recipe_file, {"optim.name": "adamww"}).problems
    assert len(problems) == 1
    assert "did you mean adamw" in problems[0]


def test_errors_are_user_errors(recipe_file, tmp_path):
    with pytest.raises(UserError, match="no such recipe file"):
        visionattn.fit("nowhere.yaml")
    with pytest.raises(UserError, match=r"train\.epochs is 'many'"):
        visionattn.fit(recipe_file, {"train.epochs": "many"})
    with pytest.raises(UserError, match="expected a run directory or a checkpoint"):
        visionattn.load(tmp_path)


def test_a_dry_run_leaves_nothing_behind(recipe_file, tmp_path, monkeypatch, capsys):
    from visionattn.cli import main

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit", str(recipe_file), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"images: 48 train, 24 val, 24 test", told)
    assert re.search(r"memory: [\d.]+ GiB", told)
    assert re.search(r"the run of 2 epochs: about \d+ s", told)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_terminal_an_epoch_is_a_line(recipe_file, tmp_path):
    command = [sys.executable, "-m", "visionattn", "fit", str(recipe_file), "--run", str(tmp_path / "run")]
    done = subprocess.run([*command, "trainer.enable_progress_bar=true"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"run: {tmp_path / 'run'}"
    assert re.fullmatch(r"epoch 1 of 2: train/loss \S+, val/loss \S+, val/accuracy \S+; [\d.]+ s, \d+ s left", lines[1])
    assert "\r" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", ["fit", "evaluate", "predict", "check", "new", "list", "doctor", "completion", "benchmark"]
)
def test_help_ends_with_two_examples(command, capsys):
    from visionattn.cli import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = capsys.readouterr().out.split("examples:\n")[1].strip().splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith(f"visionattn {command}") for line in examples)


def test_a_task_that_there_is_not_is_refused_by_new(capsys):
    from visionattn.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["new", "nothing"])
    assert exit_.value.code == 2
    assert "invalid choice: 'nothing' (choose from" in capsys.readouterr().err


WRONG = {
    "load": lambda: visionattn.load(5),
    "no path": lambda: visionattn.load(""),
    "fit": lambda: visionattn.fit(None),
    "run": lambda: visionattn.fit({"task": "classification"}, run=5),
    "check": lambda: visionattn.check(["a.yaml"]),
    "overrides": lambda: visionattn.check("quickstart", "train.epochs=5"),
    "override": lambda: visionattn.check("quickstart", [5]),
    "list": lambda: visionattn.list_models(5),
    "bound": lambda: visionattn.list_models(min_params="a"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_path_or_text_is_told_as_what_it_is(what):
    with pytest.raises(UserError, match=r"is .*: expected|is missing"):
        WRONG[what]()


def test_the_name_of_a_split_is_told_from_a_folder(run):
    with pytest.raises(UserError, match=r'data is test, but .* from Python split="test"'):
        visionattn.load(run).evaluate("test")
    with pytest.raises(UserError, match="data is 5: expected a path"):
        visionattn.load(run).evaluate(5)
