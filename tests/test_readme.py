"""What the README and the guide tell people to run, run: on small made data, with a shortened training."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from visionattn import recipe
from visionattn.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("images", "masks", "boxes", "labels", "after", "backbones", "explain", "machines")
GUIDE = "".join((ROOT / "docs" / "guide" / f"{page}.md").read_text() for page in PAGES)
SHORT = ["train.epochs=1", "trainer.enable_progress_bar=false", "evaluate.bootstrap=10"]
SMALL = [
    "model.args={depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, topks: [1, 2, 4, -2]}",
    "data.batch_size=16",
]


def blocks(language: str, text: str = GUIDE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def visionattn(command: str, *more: str) -> int:
    words = shlex.split(command, comments=True)
    assert words[0] == "visionattn"
    return main([*words[1:], *more])


def test_the_main_job_is_one_command(tmp_path, monkeypatch, capsys):
    *setup, job = blocks("bash", README)[0].strip().split(" && ")
    assert setup == ["python3 -m venv .venv", ". .venv/bin/activate", 'pip install -e ".[quickstart]"']
    monkeypatch.chdir(tmp_path)
    assert visionattn(job, *SHORT) == 0
    report = Path(re.search(r"report: (.*)", capsys.readouterr().out)[1])
    assert report.is_file()
    assert report.parent.name.startswith("quickstart-")


def test_the_site_starts_with_the_same_command():
    (site,) = blocks("bash", (ROOT / "docs" / "index.md").read_text())
    assert site.splitlines() == blocks("bash", README)[0].strip().split(" && ")[2:]


@pytest.mark.slow
def test_the_main_job_reaches_95_percent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert visionattn(blocks("bash", README)[0].strip().split(" && ")[-1]) == 0
    accuracy = re.search(r"accuracy\s+\S+ \[.*?\]\s+(0\.\d+) \[", capsys.readouterr().out)  # the test split's column
    assert float(accuracy[1]) >= 0.95


def test_the_test_command_is_the_one_that_ci_runs():
    *setup, job = blocks("bash", README)[1].strip().split(" && ")
    assert setup == ["python3 -m venv .venv", ". .venv/bin/activate", 'pip install -e ".[dev]"']
    assert job in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_commands_on_your_own_images_work(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "scenes")
    shutil.copytree(pictures / "val", "other_scenes")
    shutil.copytree(pictures / "test" / "level", "new_scenes")
    shutil.copytree(pictures / "test" / "upright", "more")
    text = blocks("yaml")[0]
    Path("scenes.yaml").write_text(text)
    check, dry_run, fit, resume, evaluate, predict, calibrate, explain = blocks("bash")[0].strip().splitlines()
    run = re.search(r"runs/\S+", resume)[0]
    assert visionattn(check) == 0
    assert visionattn(dry_run, *SHORT, *SMALL, "data.image_size=32") == 0
    assert not Path("runs").exists()
    assert visionattn(fit, "--run", run, *SHORT, *SMALL, "data.image_size=32") == 0
    assert visionattn(resume) == 0
    assert visionattn(evaluate) == 0
    assert visionattn(predict.replace("more/*.png", " ".join(map(str, Path("more").glob("*.png"))))) == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 1 + 24
    assert visionattn(calibrate) == 0
    assert visionattn(explain, "--method", "layercam") == 0
    assert Path("explained/index.html").is_file()


def test_the_commands_on_masks_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("lesions/images", "lesions/masks", "new_lesions"):
        Path(folder).mkdir(parents=True)
    for i in range(10):
        mask = np.zeros((40, 48), np.uint8)
        y, x = rng.integers(0, 24, 2)
        mask[y : y + 16, x : x + 16] = 255
        picture = np.clip(rng.normal(90, 20, (40, 48, 3)) + mask[..., None] * 0.4, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(f"lesions/images/{i}.png")
        Image.fromarray(mask).save(f"lesions/masks/{i}.png")
        Image.fromarray(picture).save(f"new_lesions/{i}.png")
    Path("lesions.yaml").write_text(blocks("yaml")[1])
    check, fit, predict = blocks("bash")[1].strip().splitlines()
    assert visionattn(check, "data.batch_size=4") == 0
    small = ["data.image_size=32", "data.batch_size=4", f"model.{SMALL[0].removeprefix('model.')}"]
    assert visionattn(fit, "--run", re.search(r"runs/\S+", predict)[0], *SHORT, *small) == 0
    assert visionattn(predict) == 0
    assert len(list(Path("masks").rglob("*.png"))) >= 10


def test_the_commands_on_boxes_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("cells", "new_cells"):
        Path(folder).mkdir()
    images, annotations = [], []
    for i in range(10):
        picture = rng.normal(90, 20, (64, 64, 3))
        x, y = rng.integers(0, 40, 2).tolist()
        picture[y : y + 20, x : x + 20] += 100
        for folder in ("cells", "new_cells"):
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, 20, 20]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    Path("cells/labels.json").write_text(json.dumps(content))
    Path("cells.yaml").write_text(blocks("yaml")[2])
    check, fit, predict, predict_coco = blocks("bash")[2].strip().splitlines()
    small = [f"model.{SMALL[0].removeprefix('model.')}", "data.image_size=64", "model.detector_args={fpn_channels: 32}"]
    assert visionattn(check, *small) == 0
    assert visionattn(fit, "--run", re.search(r"runs/\S+", predict)[0], *SHORT, *small) == 0
    assert visionattn(predict) == 0
    assert len(list(Path("found").rglob("*.png"))) == 10
    assert visionattn(predict_coco) == 0
    assert len(json.loads(Path("found.json").read_text())["images"]) == 10


def test_the_commands_after_the_training_work(tmp_path, monkeypatch, pictures, run):
    monkeypatch.chdir(tmp_path)
    export, predict, publish = blocks("bash")[4].strip().splitlines()
    shutil.copytree(run, re.search(r"runs/\S+", export)[0])
    shutil.copytree(pictures / "test", "new_scenes")
    assert visionattn(export) == 0
    assert subprocess.run([sys.executable, *shlex.split(predict)[1:]]).returncode == 0
    assert len(Path("answers.csv").read_text().splitlines()) == 1 + 24
    assert visionattn(publish) == 0
    assert timm.create_model("local-dir:scenes_hub", pretrained=True).num_classes == 2


def test_the_readme_shows_what_the_guide_explains():
    for language, first in (("yaml", 0), ("python", 0), ("bash", 2)):
        guide = {re.sub(r"\s*#.*", "", line) for block in blocks(language) for line in block.splitlines()}
        for block in blocks(language, README)[first:]:
            assert {re.sub(r"\s*#.*", "", line) for line in block.splitlines()} <= guide


def test_the_recipes_in_the_guide_are_valid():
    names = [recipe.loads(text, "guide").model.name for text in blocks("yaml")]
    assert names == ["biformer_tiny", "emcad_pvt_v2_b0", "biformer_tiny", "biformer_tiny"]


def test_the_python_in_the_guide_runs(tmp_path, monkeypatch, pictures):
    """Every block, in order; the recipe that it names is the guide's own, narrowed."""
    monkeypatch.chdir(tmp_path)
    for source, name in (
        ("", "scenes"),
        ("val", "other_scenes"),
        ("test/level", "new_scenes"),
        ("test/upright", "more"),
    ):
        shutil.copytree(pictures / source, name)
    Path("more/00.png").rename("more/0.png")
    overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in SMALL)}
    spec = recipe.loads(blocks("yaml")[0], "guide", overrides | {"data.image_size": 32, "evaluate.bootstrap": 10})
    Path("scenes.yaml").write_text(recipe.dump(spec))
    torch.save({"model": timm.create_model("biformer_tiny").state_dict()}, "biformer_tiny_best.pth")
    names = {}
    for block in blocks("python"):
        exec(block, names | {"images": torch.randn(1, 3, 64, 64)}, names)
    assert names["run"].path.parent == Path("runs")
    assert len(names["predictions"]) == 12 + 1
    assert names["evaluation"].samples == 24
    assert names["problems"] == []
    assert {model.family for model in names["small"]} == {"biformer"}
    assert names["pyramid"].feature_info.reduction() == [4, 8, 16, 32]
    assert len(names["record"]) == 14


def test_every_command_that_is_named_exists():
    for name in set(re.findall(r"`visionattn (\w+)", README + GUIDE)):
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
