"""Evaluation folders: what is written is read back, and those of version 0.1.0 are read too."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from visionattn.files import Unwritable
from visionattn.report.evaluation import Evaluation, format_table, read_rows
from visionattn.report.page import write_report

OLDER = sorted(Path(__file__).parents[2].glob("older_runs/0.1.0/*/expected/*.json"))


def evaluation(**more) -> Evaluation:
    row = {"class": "a", "support": 3, "f1": 0.5}
    return Evaluation(
        task="classification",
        split="test",
        noun="image",
        samples=1200,
        classes=["a", "b"],
        headline="accuracy",
        overall={"accuracy": 0.75, "auroc": None},
        intervals={"accuracy": [0.5, 1.0]},
        per_class=[row],
        **more,
    )


def test_what_is_written_is_read_back(tmp_path):
    tables = {"rows.csv": ({"name": name, "n": n} for n, name in enumerate("ab"))}
    pictures = {"mistakes/00.png": Image.new("L", (3, 2))}
    about = {"checkpoint": "checkpoints/best.ckpt", "epoch": 4, "tta": ["hflip"], "data": None}
    written = evaluation(more={"confusion": [[1, 0], [0, 2]]}, about=about, tables=tables, pictures=pictures)
    written.write(tmp_path / "evaluation" / "test")
    read = Evaluation.read(tmp_path / "evaluation" / "test")
    assert read.as_dict() == written.as_dict()
    assert (read.more, read.about, read.folder) == (written.more, about, tmp_path / "evaluation" / "test")
    with (read.folder / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "a", "n": "0"}, {"name": "b", "n": "1"}]
    with Image.open(read.folder / "mistakes/00.png") as picture:
        assert picture.size == (3, 2)


def test_the_file_has_intervals_by_name(tmp_path):
    evaluation().write(tmp_path / "test")
    content = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert content["intervals"] == {"accuracy": [0.5, 1.0]}
    assert "interval" not in content


def test_a_folder_is_replaced_only_if_asked(tmp_path):
    evaluation().write(tmp_path / "test")
    (tmp_path / "test" / "mine.txt").write_text("mine")
    with pytest.raises(Unwritable, match="test exists; results are never overwritten"):
        evaluation().write(tmp_path / "test")
    assert (tmp_path / "test" / "mine.txt").exists()
    evaluation().write(tmp_path / "test", replace=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["test", "metrics.json"]


def test_an_error_halfway_leaves_nothing(tmp_path):
    def rows():
        yield {"name": "a"}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluation(tables={"rows.csv": rows()}).write(tmp_path / "test")
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_column_for_each_evaluation():
    lines = format_table([evaluation(), evaluation()]).splitlines()
    assert lines[0].split("  ")[-1].strip() == "test (1,200 images)"
    assert lines[1].split() == ["accuracy"] + ["0.7500", "[0.500,", "1.000]"] * 2
    assert len(lines) == 2  # what nobody could measure is left out


@pytest.mark.parametrize("path", OLDER, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_folders_of_0_1_0_are_read(tmp_path, path):
    content = json.loads(path.read_text())
    folder = tmp_path / "run" / "evaluation" / content["split"]
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "metrics.json")
    read, old = Evaluation.read(folder), content["interval"]
    assert read.task == ("segmentation" if path.parts[-3] == "segmentation" else "classification")
    assert (read.split, read.samples, read.classes) == (content["split"], content["samples"], content["classes"])
    renamed = {
        name.replace("miou", "miou_counted").replace("mf1", "mf1_counted"): v for name, v in content["overall"].items()
    }
    assert (read.overall, read.per_class) == (renamed, content["per_class"])
    assert read.intervals[read.headline] == [old["low"], old["high"]]
    assert read.more["confusion"] == content["confusion"]
    assert read.about["epoch"] == content["epoch"] + 1, "epochs were counted from 0"
    html = re.sub(r"\s", " ", write_report(tmp_path / "run").read_text(encoding="utf-8"))
    percent = read.headline == "accuracy"
    values = [content["overall"][read.headline], old["low"], old["high"]]
    value, low, high = (f"{100 * v:.1f}" if percent else f"{v:.3f}" for v in values)
    assert f"{value} %" in html if percent else value in html
    assert f"{low} – {high}" in html
    read.write(tmp_path / "again")
    assert Evaluation.read(tmp_path / "again").as_dict() == read.as_dict()


def test_there_are_older_folders_of_every_task():
    assert {path.parts[-3] for path in OLDER} == {"classification", "multi_label", "segmentation"}


@pytest.mark.parametrize("text", ["=1+1", "+a", "-b", "@c", "'=d", "\t=e", "'quoted'", "-0.5", "1e3", "", "f=g"])
def test_no_text_of_a_table_is_a_formula_and_each_is_read_back(tmp_path, text):
    evaluation(tables={"rows.csv": [{"name": text, text or "-": -0.5}]}).write(tmp_path / "test")
    with (tmp_path / "test/rows.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    numbers = {"-0.5", "1e3"}
    assert [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t")) and cell not in numbers] == []
    assert read_rows(tmp_path / "test/rows.csv") == [{"name": text, text or "-": "-0.5"}]
