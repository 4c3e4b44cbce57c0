"""Runs of earlier versions still evaluate, predict and resume, to the numbers that those versions gave.

tests/older_runs/VERSION/KIND holds a run that was killed in its third epoch (run.tar.xz), its data, and what VERSION
itself made of them (expected/): `evaluate`, `predict`, and `fit --resume` to the end.
"""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.cli import main

OLDER = Path(__file__).parents[1] / "older_runs"
KINDS = sorted(OLDER.glob("*/*"))
NOW = {f"{place}{name}": f"{place}{name}_counted" for place in ("", "val/") for name in ("miou", "mf1")}
DATA = {"multi_label": "data.npz", "segmentation": "data"}


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.parent.name}-{kind.name}")
def older(request, tmp_path) -> tuple[Path, Path]:
    """Folder of what is expected, and a run directory as that version left it."""
    with tarfile.open(request.param / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ROOT", str(request.param)))
    return request.param, tmp_path / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def near(actual: dict, expected: dict) -> None:
    """All numbers of the older version are there, and are what they were."""
    for before, value in expected.items():
        name = NOW.get(before, before)
        assert actual[name] == pytest.approx(value, rel=1e-3, abs=2e-3), (
            name
        )  # of few pixels: threads and processors may move one


def test_an_older_run_evaluates_to_the_same_numbers(older, tmp_path):
    kind, run = older
    other = ["--data", str(kind / DATA[kind.name])] if kind.name in DATA else []
    assert main(["evaluate", str(run), *other, "--split", "test", "-o", str(tmp_path / "out")]) == 0
    expected = json.loads((kind / "expected" / "evaluated_test.json").read_text())
    near(json.loads((tmp_path / "out" / "metrics.json").read_text())["overall"], expected["overall"])


def test_an_older_run_predicts_the_same(older, tmp_path):
    kind, run = older
    if kind.name == "segmentation":
        assert main(["predict", str(run), str(kind / "data/images/test"), "-o", str(tmp_path / "masks")]) == 0
        for expected in (kind / "expected" / "masks").glob("*.png"):
            same = np.array(Image.open(expected)) == np.array(Image.open(tmp_path / "masks" / expected.name))
            assert same.mean() > 0.999
        return
    assert main(["predict", str(run), str(kind / "images"), "-o", str(tmp_path / "p.csv")]) == 0
    for actual, expected in zip(rows(tmp_path / "p.csv"), rows(kind / "expected" / "predictions.csv"), strict=True):
        assert Path(actual.pop("path")).name == Path(expected.pop("path")).name
        assert actual["predicted"] == expected["predicted"]
        for name in [name for name in expected if name.startswith("p:")]:
            assert float(actual[name]) == pytest.approx(float(expected[name]), abs=1e-4)


def test_an_older_run_resumes_to_the_same_numbers(older):
    kind, run = older
    assert main(["fit", "--resume", str(run)]) == 0
    actual, expected = rows(run / "metrics.csv"), rows(kind / "expected" / "metrics.csv")
    assert len(actual) == len(expected) == 3
    for one, other in zip(actual, expected, strict=True):
        other["epoch"] = str(int(other["epoch"]) + 1)  # 0.1.0 counted them from 0
        near(*({k: float(v) for k, v in row.items() if v and k != "seconds"} for row in (one, other)))
    for split in ("val", "test"):
        result = json.loads((run / "evaluation" / split / "metrics.json").read_text())
        near(result["overall"], json.loads((kind / "expected" / f"resumed_{split}.json").read_text())["overall"])
