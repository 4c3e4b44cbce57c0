"""A run directory can be moved, and says what it was made with to a Python without torch."""

import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

import visionattn
from visionattn.cli import main


@pytest.fixture
def moved(run, tmp_path):
    shutil.copytree(run, tmp_path / "first")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "first").rename(tmp_path / "elsewhere" / "moved")
    return tmp_path / "elsewhere" / "moved"


def test_a_moved_run_does_all_that_it_did(moved, run, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "elsewhere")
    before, now = visionattn.load(run), visionattn.load("moved")
    assert now.evaluate().overall == before.evaluate().overall
    path = pictures / "test" / "level" / "00.png"
    assert now.predict(path)[0].probabilities == before.predict(path)[0].probabilities
    exported = now.export("torchscript")
    assert exported.path.resolve() == moved / "export-torchscript"
    assert np.isclose(exported.checks["model.pt"]["largest_relative_error"], 0, atol=1e-4)
    assert main(["evaluate", "moved", "--split", "val"]) == 0
    assert now.report.stat().st_mtime > before.report.stat().st_mtime


def test_versions_are_told_without_torch(moved):
    code = "import sys; sys.modules |= dict.fromkeys(['torch', 'lightning', 'torchvision']); import visionattn.cli"
    command = [sys.executable, "-c", f"{code}; sys.exit(visionattn.cli.main(sys.argv[1:]))", "doctor", moved]
    told = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    lines = {line.split()[0]: line.split()[1:] for line in told.stdout.splitlines()}
    assert lines["torch"] == [version("torch"), version("torch")], told.stderr


def test_folders_without_versions_are_refused(refused, tmp_path):
    assert "neither a run directory (environment.json) nor an exported folder" in refused("doctor", tmp_path)
