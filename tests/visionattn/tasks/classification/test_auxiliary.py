"""The loss that a network has of its own, trained besides that of the labels."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from visionattn.cli import main

MIXTURE = (
    "model={name: moh_transnext_small_75, args: {embed_dims: [8, 8, 16, 16], depths: [1, 1, 1, 1], num_heads: [2, 2, 4,"
    " 4], shared_heads: [2, 2, 1, 1], active_heads: [0, 0, 1, 2], mlp_ratios: [2, 2, 2, 2]}}"
)
WORDS = [MIXTURE, "train.epochs=1", "train.grad_checkpointing=true"]


def row(run: Path) -> dict[str, str]:
    with (run / "metrics.csv").open() as file:
        return next(csv.DictReader(file))


def test_the_balance_of_heads_is_trained_and_logged(recipe_file, tmp_path):
    """Weights that do not move: the loss of the labels is that of validation, nearly."""
    words = ["loss.auxiliary=10", "optim.lr=1e-30", "--run", str(tmp_path / "run")]
    assert main(["fit", str(recipe_file), *WORDS, *words]) == 0
    values = {key: float(value) for key, value in row(tmp_path / "run").items()}
    assert 1.5 <= values["train/auxiliary"] < 3  # of one and of two active heads: in balance their number
    labels = values["train/loss"] - 10 * values["train/auxiliary"]
    assert labels == pytest.approx(values["val/loss"], abs=0.3)


def test_networks_without_such_a_loss_are_refused(recipe_file, refused):
    message = refused("fit", recipe_file, "loss.auxiliary=0.01")
    assert "loss.auxiliary is 0.01, but biformer_tiny has no loss of its own" in message


@pytest.mark.slow
def test_the_balance_of_heads_is_trained_on_two_processes(recipe_file, tmp_path):
    command = [sys.executable, "-m", "visionattn", "fit", recipe_file, *WORDS, "loss.auxiliary=0.01", "--run=run"]
    two = ["trainer.devices=2", "trainer.strategy=ddp", "train.precision=bf16-mixed"]
    done = subprocess.run([*command, *two], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert 1.5 <= float(row(tmp_path / "run")["train/auxiliary"]) < 3
