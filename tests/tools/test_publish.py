"""Published folders: timm makes the very network from them, and the card says what it is, and no path."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from small_runs import detector, segmenter, write_blots

import visionattn
from visionattn import UserError
from visionattn.cli import main
from visionattn.tools.publish import strictest


def test_a_classifier_comes_back_bit_for_bit(run, pictures, tmp_path, capsys):
    out = tmp_path / "stripes"
    assert main(["publish", str(run), "-o", str(out), "--data-licence", "cc-by-4.0"]) == 0
    assert f"hf upload USER/stripes {out}" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "config.json", "metrics.json", "model.safetensors", "recipe.yaml"),
    ]
    model, own = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), visionattn.load(run)
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), own.model(x))
    config = timm.data.resolve_model_data_config(model)
    assert (list(config["mean"]), list(config["std"])) == (own.recipe.data.mean, own.recipe.data.std)
    assert (config["input_size"], config["crop_mode"], config["crop_pct"]) == ((1, 32, 32), "squash", 1.0)
    assert model.pretrained_cfg["label_names"] == ["level", "upright"]
    for file in out.iterdir():
        content = file.read_bytes()
        for secret in (str(pictures), str(run), str(Path.home()), "00.png", str(tmp_path)):
            assert secret.encode() not in content, (file, secret)


def test_the_card(run, tmp_path):
    card = (visionattn.load(run).publish(tmp_path / "stripes", data_licence="mit") / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["library_name"], head["license"], head["pipeline_tag"]) == (
        "timm",
        "apache-2.0",
        "image-classification",
    )
    (result,) = head["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["accuracy"] == pytest.approx(visionattn.load(run).metrics["test"]["accuracy"], abs=1e-6)
    for words in ("import visionattn", "Not for", "| train | 48 |", "95 %", "level, upright", "| data | mit |"):
        assert words in body
    content = yaml.safe_load((tmp_path / "stripes" / "recipe.yaml").read_text())
    assert content["data"]["root"] == "YOUR_ROOT"
    assert json.loads((tmp_path / "stripes" / "metrics.json").read_text()).keys() >= {"test", "val"}


def test_licences():
    assert strictest({"code": "apache-2.0", "weights": "mit"}) == "apache-2.0"
    assert strictest({"code": "apache-2.0", "data": "cc-by-4.0"}) == "cc-by-4.0"
    assert strictest({"code": "apache-2.0", "weights": "cc-by-sa-4.0"}) == "cc-by-sa-4.0"
    with pytest.raises(UserError, match=r"weights is cc-by-nc-4.0: say .* --licence"):
        strictest({"code": "apache-2.0", "weights": "cc-by-nc-4.0"})
    with pytest.raises(UserError, match=r"licence of the data is not known: .*--data-licence"):
        strictest({"code": "apache-2.0", "data": None})


def test_without_a_licence_nothing_is_written(run, refused, tmp_path):
    assert "licence of the data is not known" in refused("publish", run, "-o", tmp_path / "out")
    assert "not a run directory" in refused("publish", tmp_path, "-o", tmp_path / "out", "--licence", "mit")
    assert not (tmp_path / "out").exists()
    assert main(["publish", str(run), "-o", str(tmp_path / "out"), "--licence", "mit"]) == 0
    assert "never overwritten" in refused("publish", run, "-o", tmp_path / "out", "--licence", "mit")


@pytest.mark.parametrize("make", [pytest.param(segmenter, marks=pytest.mark.slow), detector])
def test_segmenters_and_detectors_come_back_bit_for_bit(make, tmp_path):
    own = make(write_blots(tmp_path / "blots"), tmp_path / "run")
    out = own.publish(tmp_path / "blots_hub", licence="mit")
    model, x = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        for one, other in zip(model(x), own.model(x), strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)
            else:
                assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert list(model.pretrained_cfg["mean"]) == own.recipe.data.mean
