"""Using what was trained: evaluate, predict, list, check and doctor, through the command line."""

import csv
import json
import pickle
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn import environment
from visionattn.cli import main


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluating_a_run_again_gives_the_same_numbers_in_a_new_folder(run, capsys):
    first = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert main(["evaluate", str(run)]) == 0
    again = json.loads((run / "evaluation" / "test-2" / "metrics.json").read_text())
    assert again["overall"] == first["overall"]
    assert again["confusion"] == first["confusion"]
    assert "report.html" in capsys.readouterr().out


def test_a_checkpoint_is_enough_to_evaluate_other_images(run, pictures, tmp_path, monkeypatch):
    checkpoint = shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "mine.ckpt")
    shutil.copytree(pictures / "val", tmp_path / "others")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(checkpoint), "--data", str(tmp_path / "others"), "-o", "out"]) == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (result["samples"], result["classes"]) == (24, ["level", "upright"])


def test_evaluation_is_refused_with_a_reason(run, tmp_path, refused):
    assert "no checkpoints/best.ckpt" in refused("evaluate", tmp_path)
    assert "no such checkpoint" in refused("evaluate", tmp_path / "none.ckpt")
    assert "train, val, test" in refused("evaluate", run, "--split", "holdout")
    assert "never overwritten" in refused("evaluate", run, "-o", tmp_path)
    (tmp_path / "strange" / "oblique").mkdir(parents=True)
    Image.new("L", (32, 32)).save(tmp_path / "strange" / "oblique" / "a.png")
    assert "oblique" in refused("evaluate", run, "--data", tmp_path / "strange")


def test_a_damaged_checkpoint_is_told_in_one_short_line(run, tmp_path, refused):
    whole = (run / "checkpoints" / "best.ckpt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    contents = {"cut": whole[:5000], "empty": b"", "text": b"weights\n", "pickle": pickle.dumps({"a": 1})}
    for name, content in contents.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        (line,) = refused("evaluate", tmp_path / f"{name}.ckpt").splitlines()[-1:]
        assert line.endswith(
            f"{name}.ckpt: not a checkpoint of tensors and plain data (it is no file of torch.save, or a damaged one)"
        )
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    assert "flipped.ckpt: damaged, the check sum" in refused("evaluate", tmp_path / "flipped.ckpt")
    torch.save({"visionattn": 5}, tmp_path / "other.ckpt")
    assert "not a checkpoint of visionattn fit" in refused("evaluate", tmp_path / "other.ckpt")


def test_a_package_that_is_not_installed_can_be_run_from_its_folder(monkeypatch):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "requires", missing)
    assert environment.describe()["versions"].keys() >= {"visionattn", "torch", "timm"}


def test_predictions_are_a_table_with_a_row_for_each_image(run, pictures, tmp_path):
    out = tmp_path / "predictions.csv"
    single = pictures / "val" / "level" / "00.png"
    assert main(["predict", str(run), str(pictures / "test"), str(single), "-o", str(out)]) == 0
    rows = table(out)
    assert len(rows) == 25
    assert rows[-1]["path"] == str(single)
    assert all(float(row["p:level"]) + float(row["p:upright"]) == pytest.approx(1, abs=2e-6) for row in rows)
    evaluated = {row["name"]: row for row in table(run / "evaluation" / "test" / "predictions.csv")}
    for row in rows[:-1]:
        (same,) = [
            other for name, other in evaluated.items() if row["path"].endswith(name) or name.endswith(row["path"])
        ]
        assert float(row["p:level"]) == pytest.approx(float(same["p:level"]), abs=1e-5)


def test_the_order_of_rows_does_not_depend_on_workers(run, pictures, tmp_path):
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    about = checkpoint["visionattn"]
    for workers in (0, 2):
        recipe = about["recipe"].replace("workers: 0", f"workers: {workers}").replace("batch_size: 16", "batch_size: 5")
        torch.save(checkpoint | {"visionattn": about | {"recipe": recipe}}, tmp_path / f"{workers}.ckpt")
        out = tmp_path / f"{workers}.csv"
        assert main(["predict", str(tmp_path / f"{workers}.ckpt"), str(pictures), "-o", str(out)]) == 0
    assert table(tmp_path / "0.csv") == table(tmp_path / "2.csv")


def test_unreadable_images_are_named_and_the_others_predicted(run, pictures, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(pictures / "test" / "level", folder)
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:200])
    assert main(["predict", str(run), str(folder), "-o", str(tmp_path / "p.csv")]) == 1
    assert "broken.png" in capsys.readouterr().err
    rows = {Path(row["path"]).name: row for row in table(tmp_path / "p.csv")}
    assert len(rows) == 13
    assert rows["broken.png"]["p:level"] == ""
    assert rows["00.png"]["p:level"] != ""


def test_any_kind_of_image_is_predicted(run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (50, 40, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "rgba.png")
    Image.fromarray(noise[..., :3]).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(noise[..., :3]).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert main(["predict", str(run), str(tmp_path), "-o", str(tmp_path / "p.csv")]) == 0
    assert len(table(tmp_path / "p.csv")) == 4


def test_prediction_is_refused_before_work(run, pictures, tmp_path, refused):
    (tmp_path / "there.csv").write_text("precious")
    assert "never overwritten" in refused("predict", run, pictures, "-o", tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "precious"
    assert "make it first" in refused("predict", run, pictures, "-o", tmp_path / "no" / "p.csv")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused("predict", run, tmp_path / "empty", "-o", tmp_path / "p.csv")
    assert "nowhere" in refused("predict", run, pictures, tmp_path / "nowhere", "-o", tmp_path / "p.csv")
    assert "is for masks" in refused("predict", run, pictures, "-o", tmp_path / "p.csv", "--class-numbers")
    for option in (["--format", "coco"], ["--score", "0.5"]):
        assert "are for objects" in refused("predict", run, pictures, "-o", tmp_path / "p.csv", *option)
    assert not (tmp_path / "p.csv").exists()


def test_list_shows_our_models(capsys):
    assert main(["list", "biformer_t*"]) == 0
    heading, row = capsys.readouterr().out.strip().splitlines()
    assert heading.split()[0] == "model"
    assert row.split()[:3] == ["biformer_tiny", "13.14", "2.22"]
    assert "mit" in row
    assert "2303.08810" in row


def test_check_answers_by_its_status(recipe_file, pictures, tmp_path, capsys):
    assert main(["check", str(recipe_file)]) == 0
    assert "upright" in capsys.readouterr().out
    leaky = shutil.copytree(pictures, tmp_path / "leaky")
    shutil.copy(leaky / "train" / "level" / "00.png", leaky / "test" / "level" / "copied.png")
    assert main(["check", str(recipe_file), f"data.root={leaky}"]) == 1
    assert "copied.png" in capsys.readouterr().out


def test_doctor_tells_versions_devices_and_kernels(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for word in ("torch", "timm", "cpu", "routing"):
        assert word in told


def test_a_run_says_which_kernels_computed_its_attention(run):
    assert "routing: on_cpu" in json.loads((run / "environment.json").read_text())["kernels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_doctor_of_kernels_says_in_one_line_that_there_is_no_gpu(capsys):
    assert main(["doctor", "--kernels"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no GPU: ")


def test_classes_that_look_like_formulas_are_no_formulas_in_a_table(tmp_path, pictures, recipe_file):
    for split in ("train", "val"):
        for old, new in (("level", "=HYPERLINK(1)"), ("upright", "@b")):
            shutil.copytree(pictures / split / old, tmp_path / "data" / split / new)
    run = tmp_path / "run"
    assert main(["fit", str(recipe_file), f"data.root={tmp_path / 'data'}", "--run", str(run)]) == 0
    rows = table(run / "evaluation/val/predictions.csv")
    assert {row["label"] for row in rows} == {"'=HYPERLINK(1)", "'@b"}
    page = (run / "report.html").read_text()
    assert "=HYPERLINK(1)" in page
    assert "&#x27;=HYPERLINK" not in page
    auroc = json.loads((run / "evaluation/val/metrics.json").read_text())["overall"]["auroc"]
    assert f"{auroc:.3f}" in page
