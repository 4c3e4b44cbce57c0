"""Learning without labels, from a recipe to a run, and from that run to others."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visionattn.cli import main

RECIPE = """\
task: pretraining
model:
  name: biformer_tiny
  args: {depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, topks: [1, 2, 4, -2]}
data: {format: unlabelled, root: ROOT, image_size: 32, batch_size: 16, workers: 0}
probe: {format: folder, root: ROOT, every: 2}
optim: {lr: 3e-3}
train: {epochs: 2, ema: 0.9}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""


@pytest.fixture
def unlabelled(tmp_path, pictures) -> Path:
    path = tmp_path / "unlabelled.yaml"
    path.write_text(RECIPE.replace("ROOT", str(pictures)))
    return path


def fit(recipe: Path, run: Path, *overrides: str) -> Path:
    assert main(["fit", str(recipe), "--run", str(run), *overrides]) == 0
    return run


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def metrics(run: Path, split: str = "val") -> dict:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def state(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_without_labels_starts_a_classifier(unlabelled, recipe_file, tmp_path, capsys):
    run = fit(unlabelled, tmp_path / "first")
    measured = metrics(run)
    assert measured["overall"].keys() == {
        *("spread", "cosine", "rankme", "loss", "ratio"),
        *("linear", "linear_all", "knn", "knn_all"),
    }
    assert set(measured["probe"]) == {
        "this network", "random weights of the same network", "colour statistics", "majority",
    }  # fmt: skip
    assert measured["probe"]["majority"]["linear"] == 0.5
    assert measured["headline"] == "ratio"  # of mim the probe may fall while it learns
    page = (run / "report.html").read_text()
    assert page.count("data:image/") == 4  # reconstructions and neighbours, val and test
    assert {"val/ratio", "val/spread", "val/cosine", "val/linear", "train/ratio"} <= set(rows(run)[0])
    capsys.readouterr()
    tuned = fit(recipe_file, tmp_path / "second", f"model.checkpoint={run}", "model.freeze=backbone", "train.epochs=1")
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if str(run) in line]
    assert (
        "tensors of biformer_tiny taken; left out: objective; new: head of 2 classes; mean and std are its own" in line
    )
    given = load_file(run / "checkpoints" / "backbone.safetensors")
    taken = load_file(tuned / "checkpoints" / "backbone.safetensors")
    assert all(torch.equal(given[key], taken[key]) for key in given)


def test_a_run_that_took_over_other_bands_is_used_like_any_other(unlabelled, recipe_file, pictures, tmp_path, capsys):
    first = fit(unlabelled, tmp_path / "first", "train.epochs=1", "probe=null")
    bands = "model.bands={source: [grey], target: [red, green, blue]}"
    words = [f"model.checkpoint={first}", bands, "data.channels=3", "train.epochs=1"]
    run = fit(recipe_file, tmp_path / "second", *words)
    assert "red, green, blue from grey" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--split", "val"]) == 0
    assert main(["predict", str(run), str(pictures), "--out", str(tmp_path / "predicted")]) == 0
    fit(unlabelled, tmp_path / "third", "train.epochs=1", "probe=null", f"model.checkpoint={run}", "model.bands={}")


def test_probed_images_that_are_trained_on_are_told(unlabelled, pictures, tmp_path, capsys):
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, part in (("train", "val"), ("val", "test")):
        files = sorted((pictures / part).rglob("*.png"))
        (lists / f"{name}.txt").write_text("\n".join(str(f.relative_to(pictures)) for f in files))
    assert main(["check", str(unlabelled)]) == 0
    assert "of the images that the probe tells" not in capsys.readouterr().out
    told = f"data.lists={{train: {lists / 'train.txt'}, val: {lists / 'val.txt'}}}"
    assert main(["check", str(unlabelled), told]) == 0
    assert "24 of the images that the probe tells are trained on without labels" in capsys.readouterr().out


def test_features_are_predicted(unlabelled, pictures, tmp_path):
    run = fit(unlabelled, tmp_path / "run", "train.epochs=1", "probe=null")
    assert metrics(run)["headline"] == "ratio"
    assert main(["predict", str(run), str(pictures / "test"), "-o", str(tmp_path / "features.csv")]) == 0
    with (tmp_path / "features.csv").open() as file:
        table = list(csv.reader(file))
    assert (len(table), len(table[0])) == (25, 33)
    assert main(["evaluate", str(run), "-o", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["overall"] == pytest.approx(metrics(run, "test")["overall"], rel=1e-4)
    assert main(["check", str(unlabelled)]) == 0


@pytest.mark.parametrize("objective", ["mim", pytest.param("distill", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_weights(objective, unlabelled, tmp_path, request):
    words = ["train.epochs=4", f"objective.name={objective}"]
    if objective == "distill":
        words += ["probe=null", f"model.teacher={{checkpoint: {request.getfixturevalue('run')}}}"]
    whole = fit(unlabelled, tmp_path / "whole", *words)
    command = [sys.executable, "-m", "visionattn", "fit", str(unlabelled), "--run", str(tmp_path / "run")]
    process = subprocess.Popen([*command, *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "metrics.csv").is_file() or len(rows(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows(tmp_path / "run")) < 4
    assert main(["fit", "--resume", str(tmp_path / "run")]) == 0
    mine, theirs = state(tmp_path / "run"), state(whole)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(mine[key][name], theirs[key][name]) for name in theirs[key]), key
    assert metrics(tmp_path / "run")["overall"] == metrics(whole)["overall"]


def test_the_features_of_a_teacher_are_learned(unlabelled, run, pictures, tmp_path, capsys, refused):
    teacher = f"model.teacher={{checkpoint: {run}, image_size: 64}}"
    words = ["objective.name=distill", "probe=null", "train.epochs=4"]
    taught = fit(unlabelled, tmp_path / "taught", teacher, *words)
    assert f"teacher biformer_tiny (of {run}" in capsys.readouterr().out
    losses = [float(row["val/loss"]) for row in rows(taught)]
    assert losses[-1] < losses[0] < 2
    keys = set(state(taught)["state_dict"])
    assert {key for key in keys if ".objective." in key} == {
        f"network.objective.{name}"
        for name in (
            *("overall.weight", "overall.bias", "local.weight", "local.bias"),
            *("taught.running_mean", "taught.running_var", "taught.num_batches_tracked"),
        )
    }
    assert not [key for key in keys if "teacher" in key]
    facts = json.loads((taught / "environment.json").read_text())
    assert facts["teacher"]["of"] == str(run)
    run.rename(run.with_name("moved"))  # what was learned is used without the teacher
    try:
        assert main(["predict", str(taught), str(pictures / "test"), "-o", str(tmp_path / "features.csv")]) == 0
        assert main(["evaluate", str(taught)]) == 0
    finally:
        run.with_name("moved").rename(run)
    assert "need each other" in refused("fit", unlabelled, teacher)
    assert "need each other" in refused("fit", unlabelled, "objective.name=distill")


def test_two_processes_train_one_run(unlabelled, tmp_path):
    words = ["trainer.devices=2", "trainer.strategy=ddp", "train.ema=null", "data.batch_size=8"]
    command = [sys.executable, "-m", "visionattn", "fit", str(unlabelled), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert main(["evaluate", str(run), "--split", "val", "-o", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert alone["overall"] == pytest.approx(metrics(run)["overall"], rel=1e-3)


def test_images_that_are_all_alike_train_without_nan_and_are_reported(unlabelled, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i in range(24):
        Image.fromarray(np.full((40, 40), 7, np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    words = ["probe=null", "objective.target=norm_patch", "train.epochs=1", "train.ema=null"]
    run = fit(unlabelled, tmp_path / "run", f"data.root={tmp_path / 'flat'}", *words)
    assert all(np.isfinite(float(row["train/loss"])) for row in rows(run))
    assert "all images look alike to the network" in capsys.readouterr().err
    assert any("spread 0.000" in line for line in metrics(run)["collapse"])
    assert "Signs of collapse" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_size=500", "set data.batch_size to at most"),
        ("objective.mask_size=32", "objective.mask_size is 32"),
        ("model={name: emcad_pvt_v2_b0}", "is a whole segmenter: name its encoder alone"),
        ("probe.root=nowhere", "nowhere is missing"),
        ("model.bands={}", "there is neither model.checkpoint nor model.pretrained: true"),
        ("trainer.strategy=fsdp", "trainer.strategy fsdp shares out no parameters for task pretraining: take ddp"),
        ("data.labels=10", "labelled"),
        ("objective.name=moco", "objective.name is 'moco'; allowed: 'mim', 'vicreg' or 'distill'"),
        ("data.group='^nothing'", "finds nothing in this name"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(override, words, unlabelled, tmp_path, refused):
    assert words in refused("fit", unlabelled, "--run", tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_two_views_are_learned_from(unlabelled, recipe_file, tmp_path):
    pytest.importorskip("lightly")
    run = fit(unlabelled, tmp_path / "run", "objective={name: vicreg, width: 32}", "probe=null", "train.ema=null")
    assert metrics(run)["headline"] == "spread"
    assert [row["val/epoch"] for row in rows(run)] == ["1.0", "2.0"]
    best, last = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["epoch"] == last["epoch"]
    fit(recipe_file, tmp_path / "tuned", f"model.checkpoint={run / 'checkpoints' / 'last.ckpt'}", "train.epochs=1")
