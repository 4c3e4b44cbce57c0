"""decayed_attention: every form against the definition written as loops, golden records, and misuse."""

import itertools
import math

import numpy as np
import pytest
import torch
from golden_records import assert_same, case_input, load_record
from torch import Tensor

from visionattn.kernels import decayed_attention, record_attention

DECAY = (-0.5, -0.1)
KEYS = {  # whether a position attends to another
    "map": lambda query, key: True,
    "rows": lambda query, key: query[0] == key[0],
    "columns": lambda query, key: query[1] == key[1],
}


def make_inputs(height: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(2, height, width, 3, 2, 4, dtype=torch.float64).unbind(3))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("along", KEYS)
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 2)])
def test_follows_the_definition(size, along, backend):
    q, k, v = make_inputs(*size)
    output = decayed_attention(q, k, v, DECAY, along, 0.3, backend=backend)
    places = list(itertools.product(*map(range, size)))
    for image, head, query in itertools.product(range(2), range(2), places):
        keys = [key for key in places if KEYS[along](query, key)]
        steps = [abs(query[0] - y) + abs(query[1] - x) for y, x in keys]
        logits = [
            0.3 * q[image, *query, head] @ k[image, *key, head] + DECAY[head] * step
            for key, step in zip(keys, steps, strict=True)
        ]
        weights = torch.stack(logits).softmax(0)
        expected = sum(weight * v[image, *key, head] for weight, key in zip(weights, keys, strict=True))
        torch.testing.assert_close(output[image, *query, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_equals_the_record_of_a_manhattan_decay(plain, monkeypatch):
    """With gradients, in both forms: FlashBias states it by its definition."""
    if plain:
        monkeypatch.setattr("visionattn.kernels._dispatch.takes_plain", lambda x: True)
    for case in load_record("flashbias_manhattan_decay")["cases"]:
        heads = case["inputs"]["q"]["shape"][1]
        decay = [math.log(1 - 2 ** (-2 - 4 * head / heads)) for head in range(heads)]
        inputs = {key: case_input({"input": x}).requires_grad_() for key, x in case["inputs"].items()}
        maps = (x.transpose(1, 2).unflatten(1, case["hw"]) for x in inputs.values())
        output = decayed_attention(*maps, decay).flatten(1, 2).transpose(1, 2)
        output.backward(torch.from_numpy(np.random.RandomState(22).standard_normal(output.shape)))
        actual = {"out": output, **{f"grad_{key}": x.grad for key, x in inputs.items()}}
        for key, x in actual.items():
            assert_same(x, case["outputs"][key], key)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_what_is_recorded_says_where_the_keys_are(along):
    q, k, v = make_inputs(3, 4)
    layer = torch.nn.Identity()
    layer.forward = lambda x: decayed_attention(q, k, x, DECAY, along)
    with record_attention(layer) as record:
        layer(v)
    (attention,) = record[""]
    keys = [
        [4 * (n // 4) + x for x in range(4)] if along == "rows" else [n % 4 + 4 * y for y in range(3)]
        for n in range(12)
    ]
    assert attention.indices.tolist() == [keys, keys]
    assert (attention.queries, attention.keys) == ((3, 4), (3, 4))
    torch.testing.assert_close(attention.weights.sum(-1), torch.ones(2, 2, 12).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": (0.0,)}, "decay has 1 values: expected one for each of the 2 heads"),
        ({"along": "diagonals"}, "along='diagonals': expected one of map, rows, columns"),
        ({"k": torch.zeros(2, 3, 5, 2, 4).double()}, r"k is .*: expected the shape \(2, 3, 4, 2, 4\)"),
        (
            {"q": torch.zeros(2, 12, 2, 4).double()},
            r"q is .*: expected a floating tensor of \(B, H, W, heads, head_dim\)",
        ),
    ],
)
def test_misuse_is_refused(change, message):
    arguments = {**dict(zip("qkv", make_inputs(3, 4), strict=True)), "decay": DECAY} | change
    with pytest.raises(ValueError, match=message):
        decayed_attention(**arguments)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_recording_lines_of_a_large_map_makes_no_table_of_all_pairs(along):
    """Of which one has 34 GB here."""
    q = torch.zeros(1, 256, 256, 1, 4)
    assert decayed_attention(q, q, q, DECAY[:1], along, backend="reference").shape == q.shape
