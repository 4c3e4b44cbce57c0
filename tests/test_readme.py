"""What the README tells people to run, run: on small made data, and with overrides that shorten the training."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch

from visionattn import recipe
from visionattn.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["train.epochs=1", "trainer.enable_progress_bar=false", "evaluate.bootstrap=10"]
SMALL = [
    "model.args={depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, topks: [1, 2, 4, -2]}",
    "data.batch_size=16",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def visionattn(command: str, *more: str) -> int:
    words = shlex.split(command, comments=True)
    assert words[0] == "visionattn"
    return main([*words[1:], *more])


def test_the_main_job_is_one_command(tmp_path, monkeypatch, capsys):
    *setup, job = blocks("bash")[0].strip().split(" && ")
    assert setup == ["python3 -m venv .venv", ". .venv/bin/activate", "pip install -e ."]
    monkeypatch.chdir(tmp_path)
    assert visionattn(job, *SHORT) == 0
    report = Path(re.search(r"report: (.*)", capsys.readouterr().out)[1])
    assert report.is_file()
    assert report.parent.name.startswith("quickstart-")


@pytest.mark.slow
def test_the_main_job_reaches_95_percent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert visionattn(blocks("bash")[0].strip().split(" && ")[-1]) == 0
    accuracy = re.search(r"accuracy\s+\S+ \[.*?\]\s+(0\.\d+) \[", capsys.readouterr().out)  # the test split's column
    assert float(accuracy[1]) >= 0.95


def test_the_test_command_is_the_one_that_ci_runs():
    *setup, job = blocks("bash")[1].strip().split(" && ")
    assert setup == ["python3 -m venv .venv", ". .venv/bin/activate", 'pip install -e ".[dev]"']
    assert job in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_commands_on_your_own_images_work(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "scenes")
    shutil.copytree(pictures / "val", "other_scenes")
    shutil.copytree(pictures / "test" / "level", "new_scenes")
    shutil.copytree(pictures / "test" / "upright", "more")
    (text,) = blocks("yaml")
    Path("scenes.yaml").write_text(text)
    check, fit, resume, evaluate, predict = blocks("bash")[2].strip().splitlines()
    run = re.search(r"runs/\S+", resume)[0]
    assert visionattn(check) == 0
    assert visionattn(fit, "--run", run, *SHORT, *SMALL, "data.image_size=32") == 0
    assert visionattn(resume) == 0
    assert visionattn(evaluate) == 0
    assert visionattn(predict.replace("more/*.png", " ".join(map(str, Path("more").glob("*.png"))))) == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 1 + 24


def test_the_recipe_in_the_readme_is_valid():
    (text,) = blocks("yaml")
    assert recipe.loads(text, "README.md").model.name == "biformer_tiny"


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm.create_model("biformer_tiny").state_dict()}, "biformer_tiny_best.pth")
    names = {}
    for block in blocks("python"):
        exec(block, names | {"images": torch.randn(1, 3, 64, 64)}, names)
    assert names["pyramid"].feature_info.reduction() == [4, 8, 16, 32]
    assert len(names["record"]) == 14


def test_every_command_the_readme_names_exists():
    for name in set(re.findall(r"`visionattn (\w+)", README)):
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
