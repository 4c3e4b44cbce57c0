"""Training through the command line: what a run leaves behind, every training feature, and what is refused."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from visionattn.cli import main


def fit(recipe: Path, run: Path, *overrides: str) -> Path:
    assert main(["fit", str(recipe), "--run", str(run), *overrides]) == 0
    return run


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def metrics(run: Path, split: str = "test") -> dict:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def test_a_run_is_trained_evaluated_and_reported(recipe_file, tmp_path, capsys):
    run = fit(recipe_file, tmp_path / "run", "train.epochs=6")
    printed = capsys.readouterr().out
    assert f"report: {run / 'report.html'}" in printed
    assert metrics(run)["overall"]["accuracy"] >= 0.9
    assert f"{metrics(run)['overall']['accuracy']:.4f}" in printed
    assert len(rows(run)) == 6
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml", "environment.json", "metrics.csv", "checkpoints", "evaluation", "report.html",
    }  # fmt: skip
    with (run / "evaluation" / "test" / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == metrics(run)["samples"] == 24
    right = sum(row["label"] == row["predicted"] for row in table)
    assert right / len(table) == pytest.approx(metrics(run)["overall"]["accuracy"])


def test_the_saved_recipe_is_the_one_that_ran_and_runs_again(recipe_file, tmp_path, monkeypatch, capsys):
    run = fit(recipe_file, tmp_path / "run", "train.seed=3", "data.batch_size=10")
    assert "an epoch trains on 40 of 48 images" in capsys.readouterr().out
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert saved["train"]["seed"] == 3
    assert saved["data"]["classes"] == ["level", "upright"]
    assert saved["data"]["channels"] == 1
    monkeypatch.chdir(tmp_path)
    again = fit(run / "recipe.yaml", tmp_path / "again")
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(run).items())


def test_a_run_directory_is_never_overwritten(recipe_file, tmp_path, refused):
    (tmp_path / "run").mkdir()
    message = refused("fit", recipe_file, "--run", tmp_path / "run")
    assert "never overwritten" in message
    assert "--resume" in message
    assert not list((tmp_path / "run").iterdir())


FEATURES = {
    "ema": ["train.ema=0.9"],
    "mixup and cutmix": ["data.augment.mixup=0.8", "data.augment.cutmix=1.0", "loss.label_smoothing=0.1"],
    "randaugment": ["data.channels=3", "data.augment.policy=randaugment", "data.augment.erasing=0.5"],
    "autoaugment": ["data.channels=3", "data.augment.policy=autoaugment", "data.augment.jitter=0.4"],
    "trivialaugment": ["data.augment.policy=trivialaugment", "data.augment.rotate=30"],
    "class weights": ["loss.class_weights=balanced"],
    "balanced sampling": ["data.balanced_sampling=true"],
    "focal": ["loss.name=focal", "loss.class_weights=[1.0, 2.0]"],
    "bce": ["loss.name=bce", "loss.label_smoothing=0.1"],
    "layer decay": ["optim.layer_decay=0.7", "optim.no_decay=['*.pos_embed.*']"],
    "sgd with steps": ["optim.name=sgd", "optim.schedule=step", "optim.decay_epochs=1", "optim.warmup_epochs=1"],
    "plateau": ["optim.schedule=plateau", "optim.patience_epochs=0"],
    "poly": ["optim.schedule=poly", "optim.clip_grad=1.0", "optim.accumulate=2"],
    "constant": ["optim.schedule=constant", "optim.args={betas: [0.9, 0.95]}"],
    "bfloat16": ["train.precision=bf16-mixed"],
    "checkpointing": ["train.grad_checkpointing=true", "model.drop_path_rate=0.1", "model.drop_rate=0.1"],
    "channels last": ["train.channels_last=true", "train.deterministic=true"],
    "early stopping": ["train.early_stopping=1", "train.monitor=loss", "train.epochs=3"],
    "cross-validation": ["data.fold=1", "data.folds=3"],
    "views": ["evaluate.tta=[hflip, vflip, rot90]"],
    "tensorboard": ["log.tensorboard=true"],
    "lightning's callbacks": ["trainer.callbacks=[LearningRateMonitor]", "log.tensorboard=true"],
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_training_feature_trains(name, recipe_file, tmp_path):
    run = fit(recipe_file, tmp_path / "run", *FEATURES[name])
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert all(float(row["train/loss"]) < 10 for row in rows(run))
    assert metrics(run)["overall"]["accuracy"] >= 0


@pytest.mark.slow
def test_a_compiled_network_trains_and_is_saved_like_any_other(recipe_file, tmp_path):
    run = fit(recipe_file, tmp_path / "run", "train.compile=true", "train.ema=0.9")
    assert not [key for key in weights(run) if "_orig_mod" in key]
    assert main(["evaluate", str(run)]) == 0


def test_wandb_works_offline(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit(recipe_file, tmp_path / "run", "log.wandb=true", "train.epochs=1")
    assert list((run / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("freeze", ["backbone", ["stages.*", "downsample_layers.*"]])
def test_what_is_frozen_does_not_move(freeze, recipe_file, tmp_path):
    short = fit(recipe_file, tmp_path / "short", f"model.freeze={freeze}", "train.epochs=1")
    longer = fit(recipe_file, tmp_path / "long", f"model.freeze={freeze}", "train.epochs=3")
    before, after = weights(short), weights(longer)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all(key.startswith(("network.head", "network.norm")) for key in moved)
    assert freeze != "backbone" or all(key.startswith("network.head") for key in moved)


ADAPTER = "model.adapter={lora: {rank: 2}}"


def test_adapted_weights_are_kept_merged_and_all_others_stay(recipe_file, tmp_path, capsys):
    overrides = [ADAPTER, "optim.layer_decay=0.7", "train.precision=bf16-mixed", "model.freeze=['stages.0.*']"]
    short = fit(recipe_file, tmp_path / "short", *overrides, "train.epochs=1")
    assert re.search(r"^stages +[\d,]+ +[\d,]+ +\d+\.\d%$", capsys.readouterr().out, re.MULTILINE)
    longer = fit(recipe_file, tmp_path / "long", *overrides, "train.epochs=3")
    before, after = weights(short), weights(longer)
    assert not [key for key in before if "lora" in key or "base_layer" in key]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {"network.head.weight", "network.stages.3.0.attn.qkv.weight"} <= moved
    linear = re.compile(r"network\.(head\..*|stages\.[123]\..*(qkv|proj|mlp|fc|wo).*\.weight)")
    assert not [key for key in moved if not linear.fullmatch(key)]
    validated = [float(row["val/accuracy"]) for row in rows(longer)]  # with adapters
    assert metrics(longer, "val")["overall"]["accuracy"] == pytest.approx(max(validated), abs=1e-6)


def test_what_was_trained_with_adapters_is_used_without_peft(recipe_file, tmp_path, pictures, monkeypatch):
    run = fit(recipe_file, tmp_path / "run", ADAPTER)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["evaluate", str(run)]) == 0
    assert main(["predict", str(run), str(pictures / "test"), "-o", str(tmp_path / "table.csv")]) == 0
    fit(recipe_file, tmp_path / "next", f"model.checkpoint={run / 'checkpoints/best.ckpt'}", "train.epochs=1")


def test_a_teacher_is_no_part_of_its_student(run, recipe_file, tmp_path, capsys, refused):
    taught = fit(recipe_file, tmp_path / "taught", f"model.teacher={{checkpoint: {run}}}", "train.ema=0.9")
    assert f"teacher biformer_tiny (of {run}, weights" in capsys.readouterr().out
    alone = fit(recipe_file, tmp_path / "alone", "train.ema=0.9")
    kept, usual = (torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (taught, alone))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert list(kept[key]) == list(usual[key])
    parameters = [sum(len(g["params"]) for g in c["optimizer_states"][0]["param_groups"]) for c in (kept, usual)]
    assert parameters[0] == parameters[1]
    assert rows(taught)[0]["train/loss"] != rows(alone)[0]["train/loss"]
    facts = json.loads((taught / "environment.json").read_text())
    facts["teacher"]["weights"] = "of another run"
    (taught / "environment.json").write_text(json.dumps(facts))
    assert "the teacher is" in refused("fit", "--resume", taught)


def test_a_run_that_knows_other_classes_is_no_teacher(run, recipe_file, pictures, tmp_path, refused):
    shutil.copytree(pictures, tmp_path / "other")
    for folder in (tmp_path / "other").glob("*/upright"):
        folder.rename(folder.with_name("slanted"))
    told = refused("fit", recipe_file, f"model.teacher={{checkpoint: {run}}}", f"data.root={tmp_path / 'other'}")
    assert "knows the classes level, upright, but the images have level, slanted" in told
    assert "not a checkpoint" in refused("fit", recipe_file, f"model.teacher={{checkpoint: {recipe_file}}}")


RESUMED = {
    "adapted": [ADAPTER, "train.ema=0.9", "model.drop_path_rate=0.2"],
    "plain": [],
    "averaged and mixed": ["train.ema=0.9", "data.augment.mixup=0.8", "model.drop_path_rate=0.2", "optim.accumulate=2"],
    "taught": ["data.image_size=48", "data.augment.cutmix=1.0", "train.precision=bf16-mixed"],
    "plateau": ["optim.schedule=plateau", "optim.patience_epochs=1", "optim.lr=0.02", "data.workers=2"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_resumes_to_the_same_weights(name, recipe_file, tmp_path, request):
    overrides = [*RESUMED[name], "train.epochs=5"]
    if name == "taught":
        overrides.append(f"model.teacher={{checkpoint: {request.getfixturevalue('run')}}}")
    whole = fit(recipe_file, tmp_path / "whole", *overrides)
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "visionattn", "fit", str(recipe_file), "--run", str(run), *overrides]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(lambda: (run / "metrics.csv").is_file() and len(rows(run)) >= 2, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "report.html").exists()
    assert main(["fit", "--resume", str(run)]) == 0
    for checkpoint in ("last", "best"):
        expected = weights(whole, checkpoint)
        assert all(torch.equal(value, expected[key]) for key, value in weights(run, checkpoint).items())
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(r)] for r in (run, whole)]
    assert timeless[0] == timeless[1]
    assert metrics(run)["overall"] == metrics(whole)["overall"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(recipe_file, tmp_path):
    whole = fit(recipe_file, tmp_path / "whole")
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "visionattn", "fit", str(recipe_file), "--run", str(run)]
    process = subprocess.Popen(command, start_new_session=True)
    wait_for((run / "environment.json").is_file, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert main(["fit", "--resume", str(run)]) == 0
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(run).items())


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoints(recipe_file, tmp_path, refused):
    run = tmp_path / "run"
    overrides = ["optim.lr=1e30", "optim.warmup_epochs=1", "optim.warmup_lr=1e-4", "train.epochs=3"]
    message = refused("fit", recipe_file, "--run", run, *overrides)
    assert "epoch" in message
    assert "batch" in message
    assert ".png" in message
    assert "optim.lr" in message


def test_resuming_needs_the_same_images(recipe_file, tmp_path, pictures, refused):
    run = fit(recipe_file, tmp_path / "run")
    spec = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(spec.replace("fold: null", "fold: 0"))
    assert "images are not those" in refused("fit", "--resume", run)
    assert "not a run directory" in refused("fit", "--resume", tmp_path)
    assert "give no recipe" in refused("fit", recipe_file, "--resume", run)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=biformer_tinny", ["model.name", "biformer_tiny"]),
        ("model.args={n_wim: 2}", ["biformer_tiny", "n_wim"]),
        ("model={name: vit_tiny_patch16_224, args: {num_heads: 5}}", ["vit_tiny_patch16_224", "divisible"]),
        ("model.checkpoint=nowhere.pth", ["nowhere.pth", "no such checkpoint"]),
        ("model.freeze=['blocks.*']", ["model.freeze", "blocks.*", "names look like"]),
        ("model.freeze=['*']", ["nothing to train"]),
        ("model.pretrained=true", ["biformer_tiny", "pretrained"]),
        ("optim.name=adamww", ["optim.name", "did you mean adamw"]),
        ("optim.args={betaz: [0, 1]}", ["optim.args", "betaz"]),
        ("trainer.devises=2", ["trainer.devises", "did you mean devices"]),
        ("trainer.max_epochs=2", ["say it as train.epochs"]),
        ("trainer.barebones=true", ["trainer.barebones: every run decides this itself"]),
        ("trainer.limit_predict_batches=1", ["trainer.limit_predict_batches: every run decides this itself"]),
        ("trainer.limit_train_batches=0", ["trainer.limit_train_batches is 0", "none of the 3 batches"]),
        ("trainer.limit_train_batches=0.1", ["trainer.limit_train_batches is 0.1", "none of the 3 batches"]),
        ("trainer.limit_val_batches=0.01", ["trainer.limit_val_batches is 0.01", "none of the 2 batches"]),
        ("trainer.num_nodes=2", ["trainer.num_nodes is 2", "started on one node only", "torchrun"]),
        ("trainer.callbacks=[os.system]", ["trainer.callbacks", "none of lightning's"]),
        ("loss.class_weights=[1.0]", ["loss.class_weights", "2 classes"]),
        ("data.root=nowhere", ["nowhere"]),
        (
            "model={name: vit_tiny_patch16_224, args: {img_size: 64}}",
            ["vit_tiny_patch16_224 cannot take images of 1 x 32 x 32", "data.image_size", "64"],
        ),
        ("data.batch_size=500", ["data.batch_size is 500", "set it to at most 48"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(override, words, recipe_file, tmp_path, refused):
    message = refused("fit", recipe_file, "--run", tmp_path / "run", override)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_training_starts_from_a_checkpoint_with_another_head(recipe_file, tmp_path, capsys, refused):
    first = fit(recipe_file, tmp_path / "first", "train.epochs=1")
    start = f"model.checkpoint={first / 'checkpoints' / 'best.ckpt'}"
    digits = ["data={format: builtin, name: digits, image_size: 32, batch_size: 100}", "train.epochs=1"]
    run = fit(recipe_file, tmp_path / "second", start, *digits, "model.freeze=backbone")
    assert "left out: head of 2 classes; new: head of 10 classes" in capsys.readouterr().out
    same = [key for key in weights(first) if "head" not in key]
    assert all(torch.equal(weights(first)[key], weights(run)[key]) for key in same)
    message = refused("fit", recipe_file, start, "model.args={depth: [2, 1, 1, 1]}")
    assert "not a checkpoint of biformer_tiny" in message
    assert "missing" in message


def test_a_checkpoint_cannot_execute_code(recipe_file, tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "hacked",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    message = refused("fit", recipe_file, f"model.checkpoint={tmp_path / 'evil.pth'}")
    assert "not a checkpoint of tensors and plain data" in message
    assert not (tmp_path / "hacked").exists()
