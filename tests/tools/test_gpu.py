"""The script for a GPU is rehearsed on a CPU: all of its steps run, and what cannot run is told."""

import pytest
import torch

from visionattn.errors import UserError
from visionattn.tools import gpu


@pytest.mark.slow
def test_all_steps_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in summary] == list(gpu.steps("cpu", tmp_path, True))
    assert len(list((tmp_path / "out").glob("*.csv"))) == 4


def test_a_step_that_fails_or_is_cut_is_told_and_the_others_run(tmp_path, monkeypatch, capsys):
    commands = {"bad": ["-c", "raise SystemExit(3)"], "long": ["-c", "import time; time.sleep(60)"]}
    monkeypatch.setattr(gpu, "steps", lambda *_: commands)
    assert not gpu.run("cpu", tmp_path / "out", True, minutes=0)
    told = capsys.readouterr().out
    assert "bad: failed, status 3" in told or "bad: cut" in told
    assert "long: cut, the time was over" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_refuses(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err


def test_results_are_never_overwritten(tmp_path):
    with pytest.raises(UserError, match="results are never overwritten"):
        gpu.run("cpu", tmp_path, True)
