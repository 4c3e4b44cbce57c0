"""What tests share: threads, made pictures, a recipe for them, a run trained by it, refused commands, a full disk."""

import atexit
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.cli import main

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # workers share the cores
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of processes that tests start, whose weights must be the same
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and commands that tests start have the same one
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

RECIPE = """\
task: classification
model:
  name: biformer_tiny
  args: {depth: [1, 1, 1, 1], embed_dim: [16, 16, 32, 32], head_dim: 16, n_win: 2, topks: [1, 2, 4, -2]}
data: {format: folder, root: ROOT, image_size: 32, resize: squash, batch_size: 16, workers: 0}
optim: {lr: 3e-3}
train: {epochs: 2}
evaluate: {bootstrap: 20}
trainer: {enable_progress_bar: false, accelerator: cpu}
"""


def stripes(rng: np.random.Generator, upright: bool) -> np.ndarray:
    """(32, 32) uint8: stripes of random phase and width, upright or level, with noise."""
    wave = 128 + 90 * np.sin(np.arange(32) / rng.uniform(0.8, 2) + rng.uniform(0, 6))
    picture = np.broadcast_to(wave, (32, 32)) + rng.normal(0, 15, (32, 32))
    return np.clip(picture if upright else picture.T, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of train/ (48), val/ (24) and test/ (24) with the classes level and upright."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12), ("test", 12)):
        for name in ("level", "upright"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(stripes(rng, name == "upright")).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def recipe_file(tmp_path, pictures) -> Path:
    path = tmp_path / "stripes.yaml"
    path.write_text(RECIPE.replace("ROOT", str(pictures)))
    return path


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs the command line, which must answer with status 2 and a message, and returns that."""

    def refused(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    return refused


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """No file may grow beyond so many bytes. Only around the call: pytest's own output may be a longer file."""

    @contextmanager
    def full_disk(size: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return full_disk


@pytest.fixture(scope="session")
def run(tmp_path_factory, pictures) -> Path:
    """A run trained on the pictures."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "stripes.yaml").write_text(RECIPE.replace("ROOT", str(pictures)))
    assert main(["fit", str(folder / "stripes.yaml"), "--run", str(folder / "run"), "train.epochs=5"]) == 0
    return folder / "run"
