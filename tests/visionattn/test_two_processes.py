"""Every kind of recipe on two processes: one run directory, every sample counted once, the numbers of one process."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionattn.api import load
from visionattn.cli import main
from visionattn.runs.sharding import blocks_of

SEGMENTATION = """\
task: segmentation
model:
  name: biformer_tiny
  decoder: segformer
  decoder_args: {segmentation_channels: 8}
  args: {depth: [1, 1, 1, 1], embed_dim: [8, 8, 16, 16], head_dim: 8, n_win: 2, topks: [1, 2, 4, -2]}
data: {format: image_mask, root: ROOT, image_size: 32, batch_size: 4, workers: 0, classes: [background, square]}
optim: {lr: 3e-3}
train: {epochs: 2}
evaluate: {bootstrap: 10, surface: false}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""
DETECTION = """\
task: detection
model:
  name: biformer_tiny
  args: {depth: [1, 1, 1, 1], embed_dim: [8, 8, 16, 16], head_dim: 8, n_win: 2, topks: [1, 2, 4, -2]}
  detector_args: {fpn_channels: 16, convs: 1, finest: 4, coarsest: 16}
data: {format: coco, root: ROOT, image_size: 32, batch_size: 4, workers: 0}
optim: {lr: 3e-3, warmup_epochs: 0}
train: {epochs: 2}
evaluate: {bootstrap: 10}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


def write_squares(root: Path) -> None:
    """Images of a square each, with masks, and with boxes and polygons."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5), ("test", 5)):
        labels = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
        for i in range(count):
            mask = np.zeros((32, 32), np.uint8)
            top, left = rng.integers(0, 16, 2).tolist()
            mask[top : top + 16, left : left + 16] = 1
            labels["images"].append({"id": i, "file_name": f"images/{split}/{i}.png", "height": 32, "width": 32})
            box = {"bbox": [left, top, 16, 16], "area": 256, "iscrowd": 0}
            corners = [left, top, left + 16, top, left + 16, top + 16, left, top + 16]
            box["segmentation"] = [corners]
            labels["annotations"].append({"id": i + 1, "image_id": i, "category_id": 1} | box)
            image = (60 + 120 * mask + rng.normal(0, 20, mask.shape)).clip(0, 255).astype(np.uint8)
            for kind, pixels in (("images", image), ("masks", mask)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / kind / split / f"{i}.png")
        (root / f"instances_{split}.json").write_text(json.dumps(labels))


@pytest.fixture(params=["classification", "segmentation", "detection"])
def recipe(request, tmp_path, recipe_file) -> Path:
    if request.param == "classification":
        return recipe_file
    write_squares(tmp_path / "data")
    text, name = (SEGMENTATION, "masks") if request.param == "segmentation" else (DETECTION, "boxes")
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace("ROOT", str(tmp_path / "data")))
    return path


def visionattn(*words: object, cwd: Path, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "visionattn", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **more)


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def metrics(run: Path, split: str = "test") -> dict:
    return json.loads((run / "evaluation" / split / "metrics.json").read_text())


def test_a_run_on_two_processes_is_one_run(recipe, tmp_path):
    done = visionattn("fit", recipe, *TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert done.stdout.count("report: ") == 1
    assert (run / "report.html").is_file()
    assert len(rows(run)) == 2
    samples = {"classification": 24, "segmentation": 5, "detection": 5}
    assert metrics(run)["samples"] == samples[metrics(run)["task"]]
    alone = main(["evaluate", str(run), "--split", "test", "-o", str(tmp_path / "alone")])
    assert alone == 0
    again = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert again["overall"] == pytest.approx(metrics(run)["overall"], abs=1e-5)
    assert not [path for path in tmp_path.rglob(".*") if "visionattn" in path.name]


@pytest.mark.slow
def test_trust_is_the_same_on_two_processes(recipe, tmp_path):
    if "boxes" in recipe.name:
        pytest.skip("detectors have no probabilities of classes")
    asked = ["evaluate.calibration=temperature", "evaluate.conformal=0.3"]
    done = visionattn("fit", recipe, "--run", tmp_path / "run", *asked, *TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = load(tmp_path / "run").recipe.evaluate.fitted
    again = load(tmp_path / "run").calibrate(split="val")
    assert (again.images, again.source) == (kept.images, kept.source)
    assert again.temperature == pytest.approx(kept.temperature, rel=1e-3)
    assert (again.least or 0.0) == pytest.approx(kept.least or 0.0, rel=1e-3)
    bounds, others = ([t or 0.0 for t in fitted.thresholds or []] for fitted in (again, kept))
    assert bounds == pytest.approx(others, abs=2e-3)


@pytest.mark.slow
def test_adapters_are_trained_on_two_processes(recipe, tmp_path):
    done = visionattn(
        "fit", recipe, *TWO, "model.adapter={lora: {rank: 2}}", "train.ema=0.5", "--run=run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    network = load(tmp_path / "run").model.state_dict()
    unmerged = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["unmerged"]
    layers = [key.removesuffix(".base_layer.weight") for key in unmerged if key.endswith(".base_layer.weight")]
    assert layers
    for layer in layers:
        own, down, up = (unmerged[f"{layer}.{x}.weight"] for x in ("base_layer", "lora_A.default", "lora_B.default"))
        assert up.any()
        torch.testing.assert_close(network[layer.removeprefix("network.") + ".weight"], own + up @ down)


@pytest.mark.slow
def test_a_teacher_is_asked_on_two_processes(recipe, tmp_path):
    if recipe.name in ("masks.yaml", "boxes.yaml"):
        pytest.skip("classifiers are what a teacher of logits teaches")
    done = visionattn("fit", recipe, "--run=first", "train.epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = visionattn("fit", recipe, *TWO, "model.teacher={checkpoint: first}", "--run=taught", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher biformer_tiny") == 1
    taught, teacher = (load(tmp_path / run).model.state_dict() for run in ("taught", "first"))
    assert taught.keys() == teacher.keys()
    assert any(not torch.equal(taught[key], teacher[key]) for key in taught)
    assert main(["evaluate", str(tmp_path / "taught"), "--split", "test", "-o", str(tmp_path / "alone")]) == 0
    again = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert again["overall"] == pytest.approx(metrics(tmp_path / "taught")["overall"], abs=1e-5)


DETECTORS = {
    "retinanet": [],
    "faster_rcnn": [],
    "mask_rcnn": [],
    "rt_detr": ["model.detector_args.layers=1"],
    "d_fine": ["model.detector_args.layers=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_is_trained_and_measured_on_two_processes(detector, tmp_path):
    """Whose every parameter has a gradient in every step, or these would wait for each other for ever."""
    write_squares(tmp_path / "data")
    path = tmp_path / "boxes.yaml"
    path.write_text(DETECTION.replace("ROOT", str(tmp_path / "data")))
    words = [*TWO, f"model.detector={detector}", *DETECTORS[detector], "train.epochs=1", "--run", tmp_path / "run"]
    done = visionattn("fit", path, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")["samples"] == 5


def test_validation_on_two_processes_gives_the_numbers_of_one(recipe, tmp_path):
    """Weights that do not move, and no batch norm: what is measured does not depend on the number of processes."""
    decoder = "decoder: fpn, decoder_args: {pyramid_channels: 32, segmentation_channels: 64}"
    network = f"model={{name: test_convnext, {decoder if 'masks' in recipe.name else ''}}}"
    still = [
        network,
        "data.image_size=64",
        "optim.lr=1e-30",
        "optim.weight_decay=0",
        "optim.min_lr=0",
        "train.epochs=1",
    ]
    two = visionattn("fit", recipe, *TWO, *still, "--run", tmp_path / "two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert main(["fit", str(recipe), *still, "--run", str(tmp_path / "one")]) == 0
    ones, twos = (rows(tmp_path / name)[0] for name in ("one", "two"))
    for name in [name for name in ones if name.startswith("val/")]:
        assert twos[name] == pytest.approx(ones[name], rel=1e-4, abs=1e-5), name
    assert metrics(tmp_path / "two")["overall"] == pytest.approx(metrics(tmp_path / "one")["overall"], abs=1e-5)


@pytest.mark.parametrize("launcher", [[], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["fit", "torchrun"])
def test_a_run_whose_second_process_was_killed_resumes(launcher, recipe_file, tmp_path):
    command = [sys.executable, *launcher, "-m", "visionattn", "fit"]
    words = [str(recipe_file), *TWO, "train.epochs=40"]
    process = subprocess.Popen([*command, *words], start_new_session=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while not (found := list(tmp_path.glob("runs/*/metrics.csv"))) or len(rows(found[0].parent)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        assert process.wait(timeout=60) != 0  # the first process does not wait for ever
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    run = found[0].parent
    saved = (run / "recipe.yaml").read_text().replace("epochs: 40", f"epochs: {len(rows(run)) + 1}")
    (run / "recipe.yaml").write_text(saved)
    words = ["--resume", str(run)]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_shared_out_parameters_train_resume_and_predict_as_whole_ones(recipe_file, pictures, tmp_path):
    """A narrow va_davit_giant by FSDP, interrupted, beside the same by DDP."""
    narrow = "{embed_dims: [16, 16, 32, 32], num_heads: [1, 1, 2, 2], depths: [1, 1, 3, 1]}"
    words = [
        f"model={{name: va_davit_giant, args: {narrow}}}",
        "optim.clip_grad=1",
        "optim.schedule=plateau",
        "data.batch_size=4",
    ]
    sharded = ["trainer.devices=2", "trainer.strategy=fsdp"]
    whole = visionattn("fit", recipe_file, *TWO, *words, "--run=ddp", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    done = visionattn("fit", recipe_file, *sharded, *words, "train.epochs=1", "--run=fsdp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "fsdp"
    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace("train: {epochs: 1,", "train: {epochs: 2,"))
    done = visionattn("fit", "--resume", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows(run), rows(tmp_path / "ddp"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("fsdp", "ddp")]
    ours, theirs = (state["state_dict"] for state in states)
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        torch.testing.assert_close(values, theirs[key], rtol=1e-3, atol=1e-4)
    assert main(["evaluate", str(run), "--split", "test", "-o", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert alone["overall"] == pytest.approx(metrics(run)["overall"], abs=1e-5)
    assert main(["predict", str(run), str(pictures / "test"), "-o", str(tmp_path / "told.csv")]) == 0
    assert len((tmp_path / "told.csv").read_text().splitlines()) == 1 + 24


def test_parameters_are_shared_out_by_blocks_and_what_does_not_go_with_it_is_refused(recipe_file, refused):
    network = timm.create_model("va_davit_giant", embed_dims=(8,) * 4, num_heads=(1,) * 4, depths=(1, 1, 3, 2))
    names = {module: name for name, module in network.named_modules()}
    assert {"stages.2.blocks.1", "stages.2.blocks.2", "stages.3.blocks.1"} < {names[b] for b in blocks_of(network)}
    for words, about in (("train.ema=0.9", "train.ema"), ("model.adapter={lora: {rank: 2}}", "model.adapter")):
        message = refused("fit", recipe_file, "trainer.devices=2", "trainer.strategy=fsdp", words)
        assert f"trainer.strategy fsdp does not go with {about}" in message


def test_processes_that_torchrun_starts_share_a_run(recipe_file, tmp_path):
    command = [sys.executable, *TORCHRUN, "-m", "visionattn"]
    words = ["fit", str(recipe_file), *TWO, "train.epochs=1"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert done.stdout.count("report: ") == 1
    refused = subprocess.run(
        [*command, "fit", str(recipe_file), *TWO, "data.root=nowhere"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert refused.stderr.count("nowhere is missing") == 1
    assert not list(tmp_path.glob(".visionattn*"))


def test_fewer_samples_than_processes_are_refused_by_all(recipe, tmp_path):
    words = ["data.val_fraction=0.2", f"data.lists.train={tmp_path}/train.txt", f"data.lists.val={tmp_path}/val.txt"]
    if "masks" not in recipe.name:
        pytest.skip("lists are by name, which the other recipe has too")
    (tmp_path / "train.txt").write_text("\n".join(f"train/{i}" for i in range(16)))
    (tmp_path / "val.txt").write_text("val/0\n")
    done = visionattn("fit", recipe, *TWO, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "1 images for 2 processes" in done.stderr


def test_each_of_two_processes_predicts_its_share(recipe, tmp_path):
    assert main(["fit", str(recipe), "--run", str(tmp_path / "run"), "train.epochs=1"]) == 0
    masks = "stripes" not in recipe.name  # or boxes: into a folder
    images = tmp_path / "data" / "images" / "test" if masks else Path(re.search(r"root: (\S+),", recipe.read_text())[1])
    one, two = (tmp_path / (name if masks else f"{name}.csv") for name in ("one", "two"))
    assert main(["predict", str(tmp_path / "run"), str(images), "-o", str(one)]) == 0
    command = [sys.executable, *TORCHRUN, "-m", "visionattn", "predict"]
    words = [str(tmp_path / "run"), str(images), "-o", str(two)]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    if not masks:
        assert one.read_text() == two.read_text()
        assert not list(tmp_path.glob(".two*"))
        return
    names = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert names == sorted(path.relative_to(two) for path in two.rglob("*.png"))
    assert all(np.array_equal(Image.open(one / name), Image.open(two / name)) for name in names)
    assert {p.name: p.read_text() for p in one.glob("*.csv")} == {p.name: p.read_text() for p in two.glob("*.csv")}


@pytest.mark.slow
def test_scenes_are_shared_out_and_each_is_written_once(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    rng, place = np.random.default_rng(0), rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    for split, count in (("train", 4), ("val", 1), ("test", 5)):
        for i in range(count):
            mask = rng.integers(0, 2, (1, 40, 48), np.uint8)
            for kind, bands in (("images", np.repeat(60 + 120 * mask, 4, axis=0)), ("masks", mask)):
                path = tmp_path / "data" / kind / split / f"{i}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                about = {"count": len(bands), "height": 40, "width": 48, "dtype": "uint8", "transform": place}
                with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", **about) as sink:
                    sink.write(bands)
    recipe = tmp_path / "scenes.yaml"
    recipe.write_text(SEGMENTATION.replace("image_mask", "geotiff").replace("ROOT", str(tmp_path / "data")))
    run, images = tmp_path / "run", tmp_path / "data" / "images" / "test"
    assert main(["fit", str(recipe), "--run", str(run), "train.epochs=1"]) == 0
    assert main(["predict", str(run), str(images), "-o", str(tmp_path / "one")]) == 0
    command = [sys.executable, *TORCHRUN, "-m", "visionattn", "predict", str(run), str(images), "-o", "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr  # a second process would be refused to write what there is
    scenes = sorted(path.name for path in (tmp_path / "one").glob("*.tif"))
    assert len(scenes) == 5
    assert sorted(path.name for path in (tmp_path / "two").glob("*.tif")) == scenes
    for name in scenes:
        with rasterio.open(tmp_path / "one" / name) as one, rasterio.open(tmp_path / "two" / name) as two:
            assert np.array_equal(one.read(), two.read())
            assert one.transform == two.transform == place
