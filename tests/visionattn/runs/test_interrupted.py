"""Commands that are stopped, that meet a locked place, or that are asked for what cannot be: one line, no rest."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main
from visionattn.runs.directory import History


def started(*words: object, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "visionattn", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_signal_ends_training_with_one_line(number, word, recipe_file, tmp_path):
    process = started("fit", recipe_file, "--run", tmp_path / "run", "train.epochs=200", cwd=tmp_path)
    until((tmp_path / "run" / "metrics.csv").is_file, process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert told.strip().splitlines()[-1] == f"visionattn: {word}"
    assert "Traceback" not in told
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert not list(tmp_path.rglob("*.partial"))
    last = (tmp_path / "run" / "recipe.yaml").read_text().replace("epochs: 200", "epochs: 3")
    (tmp_path / "run" / "recipe.yaml").write_text(last)
    assert main(["fit", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_prediction_with_one_line(number, run, pictures, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3000):
        os.link(pictures / "test" / "level" / "00.png", images / f"{i}.png")
    process = started("predict", run, images, "-o", tmp_path / "p.csv", cwd=tmp_path)
    until(lambda: any(path.name.startswith(".p.csv") for path in tmp_path.iterdir()), process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_run_that_is_trained_is_not_resumed_by_another(recipe_file, tmp_path, refused):
    run = tmp_path / "run"
    process = started("fit", recipe_file, "--run", run, "train.epochs=200", cwd=tmp_path)
    try:
        until((run / "metrics.csv").is_file, process)
        assert "another process is training this run" in refused("fit", "--resume", run)
    finally:
        process.kill()
        process.communicate()
    text = (run / "recipe.yaml").read_text()
    done = len((run / "metrics.csv").read_text().splitlines()) - 1
    (run / "recipe.yaml").write_text(text.replace("epochs: 200", f"epochs: {done + 2}"))
    assert main(["fit", "--resume", str(run)]) == 0  # a killed process lets go
    assert not (run / ".lock").exists()


def test_a_place_that_cannot_be_made_is_told_in_one_line(recipe_file, tmp_path, refused):
    (tmp_path / "file").write_text("no folder")
    message = refused("fit", recipe_file, "--run", tmp_path / "file" / "run")
    assert "cannot be made" in message
    assert (tmp_path / "file").read_text() == "no folder"


def test_an_output_that_is_full_is_told_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        for words in (["list"], ["new", "classification"]):
            command = [sys.executable, "-m", "visionattn", *words]
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
            assert ended.returncode == 2
            assert (
                ended.stderr
                == "visionattn: the output of this command could not be written (No space left on device)\n"
            )


def test_a_full_disk_ends_training_with_one_line_and_the_run_goes_on_once_there_is_room(
    recipe_file, tmp_path, capsys, full_disk, monkeypatch
):
    run = tmp_path / "run"
    with full_disk(100_000):
        assert main(["fit", str(recipe_file), "--run", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"visionattn: {run}/checkpoints/best.ckpt: could not be written")
    assert not list(tmp_path.rglob(".*"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))  # checkpoints are written beside their place
    assert main(["fit", "--resume", str(run)]) == 0
    assert (run / "report.html").is_file()


def test_a_run_that_is_removed_while_it_is_trained_is_not_made_anew(recipe_file, tmp_path, capsys, monkeypatch):
    run, start = tmp_path / "run", History.on_train_epoch_start

    def remove(history, trainer, task):
        start(history, trainer, task)
        if trainer.current_epoch == 1:
            shutil.rmtree(run)

    monkeypatch.setattr(History, "on_train_epoch_start", remove)
    assert main(["fit", str(recipe_file), "--run", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(run) in line
    assert not run.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer={accelerator: gpu}", "lightning.Trainer cannot be made with it"),
        ("trainer={strategy: ddpp}", "ddpp"),
        ("trainer={limit_val_batches: 0}", "every run is validated"),
        ("trainer={fast_dev_run: true}", "say it as fit --dry-run"),
        ("trainer={max_steps: 1}", "say it as train.epochs"),
        ("trainer={check_val_every_n_epoch: 3}", "check_val_every_n_epoch is 3, but train.epochs is 2"),
    ],
)
def test_a_trainer_that_cannot_work_is_refused_first(override, words, recipe_file, tmp_path, refused, capsys):
    if "gpu" in override:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            override = "trainer={accelerator: tpu}"
    assert words in refused("fit", recipe_file, "--run", tmp_path / "run", override)
    assert not (tmp_path / "run").exists()
    assert main(["check", str(recipe_file), override]) == 1
    assert words in capsys.readouterr().out


def test_validation_every_other_epoch_works(recipe_file, tmp_path):
    run = tmp_path / "run"
    every_other = ["trainer.check_val_every_n_epoch=2", "train.epochs=4"]
    assert main(["fit", str(recipe_file), "--run", str(run), *every_other]) == 0
    assert (run / "report.html").is_file()
    with (run / "metrics.csv").open() as file:
        assert [row["val/loss"] != "" for row in csv.DictReader(file)] == [False, True, False, True]


def test_a_batch_of_one_with_batch_norm_is_refused_first(tmp_path, refused):
    rng = np.random.default_rng(0)
    for kind, top in (("images", 255), ("masks", 2)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, top, (32, 32), dtype=np.uint8)).save(tmp_path / "data" / kind / f"{i}.png")
    recipe = tmp_path / "one.yaml"
    recipe.write_text(
        "task: segmentation\nmodel: {name: test_resnet, decoder: deeplabv3plus}\n"
        f"data: {{format: image_mask, root: {tmp_path / 'data'}, classes: [a, b], image_size: 32, batch_size: 1}}\n"
    )
    message = refused("fit", recipe, "--run", tmp_path / "run")
    assert "a norm would be taken over a single value" in message
    assert "data.batch_size" in message
    assert not (tmp_path / "run").exists()


def test_masks_that_are_whole_are_kept_when_prediction_goes_on(tmp_path, capsys, refused):
    rng = np.random.default_rng(0)
    for folder, top in (("data/images", 255), ("data/masks", 2), ("new", 255)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, top, (32, 32), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    recipe = tmp_path / "masks.yaml"
    recipe.write_text(
        "task: segmentation\nmodel: {name: test_resnet, decoder: segformer}\n"
        f"data: {{format: image_mask, root: {tmp_path / 'data'}, classes: [a, b], image_size: 32, batch_size: 2}}\n"
        "train: {epochs: 1}\nevaluate: {surface: false, bootstrap: 0}\n"
    )
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["fit", str(recipe), "--run", str(run)]) == 0
    assert main(["predict", str(run), str(tmp_path / "new"), "-o", str(out)]) == 0
    (out / "3.png").unlink()
    (out / "overlays" / "4.png").unlink()
    kept = (out / "0.png").stat().st_mtime_ns
    assert "never overwritten" in refused("predict", run, tmp_path / "new", "-o", out)
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "new"), "-o", str(out), "--continue"]) == 0
    assert "2 predicted, 0 unreadable" in capsys.readouterr().out
    assert (out / "0.png").stat().st_mtime_ns == kept
    assert len(list(out.rglob("*.png"))) == 12


def test_results_of_a_read_only_run_are_written_elsewhere(run, tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    copy = shutil.copytree(run, tmp_path / "run")
    copy.chmod(0o500)
    assert main(["evaluate", str(copy), "-o", str(tmp_path / "out")]) == 0
    assert "could not be written" in capsys.readouterr().err
