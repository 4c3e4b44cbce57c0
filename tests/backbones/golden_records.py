"""Golden records: what the reference implementations compute in float64, with weights that a formula gives by name.

`tests/golden/*.json` hold no weights and no code. A record has the reference's class and arguments, the keys and shapes
of its state dict, and for each case an input's seed and a summary of every output: moments and 64 samples.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def load_record(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def fill_value(key: str, shape: list[int]) -> np.ndarray:
    """The formula: values of the float tensor `key` of the reference's state dict."""
    x = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return np.abs(x) * 0.5 + 0.5
    if leaf == "running_mean":
        return x * 0.1
    if len(shape) <= 1:
        return 1 + 0.1 * x if leaf in ("weight", "gamma", "g") else 0.1 * x
    return x / np.sqrt(max(1, np.prod(shape[1:])))


def filled_state_dict(record: dict) -> dict[str, Tensor]:
    """The state dict of the reference, filled; integer buffers are zero and those it keeps as built are left out."""
    kept = {buffer["key"] if isinstance(buffer, dict) else buffer for buffer in record.get("kept_buffers", ())}
    return {
        key: torch.zeros(shape, dtype=torch.int64) if "int" in dtype else torch.from_numpy(fill_value(key, shape))
        for key, shape, _, dtype in record["state"]
        if key not in kept
    }


def case_input(case: dict) -> Tensor:
    return torch.from_numpy(np.random.RandomState(case["input"]["seed"]).standard_normal(case["input"]["shape"]))


def assert_same(actual: Tensor, expected: dict, what: str, tolerance: float = 1e-9) -> None:
    """Every sample and moment within tolerance * (|value| + std) of the record."""
    actual = actual.detach().double().contiguous()
    assert list(actual.shape) == expected["shape"], what
    index, value = (torch.tensor(column, dtype=torch.float64) for column in zip(*expected["samples"], strict=True))
    error = (actual.flatten()[index.long()] - value).abs() / (value.abs() + expected["std"])
    assert error.max() <= tolerance, f"{what}: relative error {error.max():.1e}"
    rms = expected["l2"] / actual.numel() ** 0.5
    moments = {"mean": actual.mean(), "std": actual.std(correction=0), "l2": actual.norm()}
    for name, moment in moments.items():
        scale = expected["l2"] if name == "l2" else rms
        assert abs(moment.item() - expected[name]) <= tolerance * scale, f"{what}: {name}"
