"""gated_positional_attention: both forms against the definition written as loops, special cases, and misuse."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionattn.kernels import gated_positional_attention

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)  # the same calls everywhere


def make_inputs(batch, size, heads, dim, dtype=torch.float64) -> list[Tensor]:
    """q, k, v as a model makes them, slices of one projection, position logits and gates."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    tokens = math.prod(size)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64)
    logits = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64)
    gate = torch.randn(heads, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*qkv.unflatten(-1, (3, heads, dim)).unbind(-3), logits, gate)]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, torch.linspace(-1, 2, output.numel()).view(output.shape).to(output))


@pytest.fixture(autouse=True, params=["small", "large"])
def size_of_maps(request, large, monkeypatch):
    """What counts as a small map, which has a form of its own on a CPU: all or none."""
    monkeypatch.setattr("visionattn.kernels.gated.SMALL", 2**20 if request.param == "small" else 0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(6,), (1,), (3, 4)])
def test_follows_the_definition(size, backend):
    q, k, v, logits, gate = make_inputs(2, size, 2, 3)
    output = gated_positional_attention(q, k, v, logits, gate, 0.3, backend=backend)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    expected = torch.zeros_like(q)
    for image, query, head in itertools.product(*map(range, q.shape[:3])):
        content = torch.stack([q[image, query, head] @ key * 0.3 for key in k[image, :, head]]).softmax(0)
        share = gate[head].sigmoid()
        weights = (1 - share) * content + share * logits[head, query].softmax(0)
        expected[image, query, head] = weights / weights.sum() @ v[image, :, head]
    torch.testing.assert_close(output, expected.view(output.shape), rtol=1e-12, atol=1e-12)


@SETTINGS
@given(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
def test_logits_by_axis_are_their_sum(batch, height, width, heads):
    *maps, _, gate = make_inputs(batch, (height, width), heads, 16)
    rows, columns = torch.randn(heads, height, height).double(), torch.randn(heads, width, width).double()
    inputs = [x.detach().requires_grad_() for x in (*maps, rows, columns, gate)]
    q, k, v, rows, columns, gate = inputs
    summed = (rows[:, :, None, :, None] + columns[:, None, :, None]).reshape(heads, height * width, height * width)
    expected = gated_positional_attention(q, k, v, summed, gate, backend="reference")
    expected_gradients = gradients(expected, inputs)
    for backend in ("torch", "reference"):
        actual = gated_positional_attention(q, k, v, (rows, columns), gate, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(actual, inputs), expected_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_gate_chooses_and_infinite_logits_forbid_keys(backend):
    q, k, v, _, _ = make_inputs(2, (5, 7), 2, 16)
    itself = torch.full((35, 35), -math.inf).fill_diagonal_(0).expand(1, 2, -1, -1).double()
    closed, opened = (
        gated_positional_attention(q, k, v, itself, torch.full((2,), gate).double(), backend=backend)
        for gate in (-1e4, 1e4)
    )
    content = torch.nn.functional.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(closed, content.transpose(1, 2).reshape(q.shape))
    torch.testing.assert_close(opened, v)


MISUSE = [
    ({"q": torch.zeros(2, 6, 16)}, r"q is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"q": torch.zeros(2, 0, 6, 2, 8)}, r"q is .*no size but the batch to be 0"),
    ({"k": torch.zeros(2, 6, 5, 2, 8)}, r"k is .*: expected the shape \(2, 6, 6, 2, 8\)"),
    ({"v": torch.zeros(2, 6, 6, 2, 8).double()}, r"v is float64 .*: expected float32"),
    ({"position_logits": torch.zeros(2, 36, 35)}, r"position_logits is .*: expected the shape \(2, 36, 36\)"),
    ({"position_logits": torch.zeros(2, 2, 36, 36)}, r"position_logits is .*: expected the shape \(2, 36, 36\)"),
    ({"gate": torch.zeros(3)}, r"gate is .*: expected the shape \(2,\)"),
    ({"gate": torch.zeros(2, device="meta")}, r"gate is on meta: expected cpu"),
    ({"position_logits": (torch.zeros(2, 6, 6), torch.zeros(2, 5, 6))}, r"position_logits is .*: expected the shape"),
    ({"position_logits": (torch.zeros(2, 6, 6),)}, r"position_logits in 1 parts: expected two"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    names = ("q", "k", "v", "position_logits", "gate")
    inputs = dict(zip(names, make_inputs(2, (6, 6), 2, 8, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        gated_positional_attention(**(inputs | change))
