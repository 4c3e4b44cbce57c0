"""gated_positional_attention: reference against the definition written as loops, torch form against the reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import gated_positional_attention, record_attention

SETTINGS = settings(max_examples=20, deadline=None)


def made(batch, size, heads, dim, dtype=torch.float64) -> list[Tensor]:
    """q, k, v as a model makes them, slices of one projection, position logits and gates."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    tokens = math.prod(size)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64)
    logits = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64)
    gate = torch.randn(heads, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*qkv.unflatten(-1, (3, heads, dim)).unbind(-3), logits, gate)]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, torch.linspace(-1, 2, output.numel()).view(output.shape).to(output))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(6,), (1,), (3, 4)])
def test_follows_the_definition(size, backend):
    q, k, v, logits, gate = made(2, size, 2, 3)
    output = gated_positional_attention(q, k, v, logits, gate, 0.3, backend=backend)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    expected = torch.zeros_like(q)
    for image, query, head in itertools.product(*map(range, q.shape[:3])):
        content = torch.stack([q[image, query, head] @ key * 0.3 for key in k[image, :, head]]).softmax(0)
        share = gate[head].sigmoid()
        weights = (1 - share) * content + share * logits[head, query].softmax(0)
        expected[image, query, head] = weights / weights.sum() @ v[image, :, head]
    torch.testing.assert_close(output, expected.view(output.shape), rtol=1e-12, atol=1e-12)


@st.composite
def calls(draw):
    size = draw(st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 7), st.integers(1, 7))))
    dim = draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))
    return draw(st.integers(0, 3)), size, draw(st.integers(1, 4)), dim


def agree(call: tuple, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [x.detach().requires_grad_() for x in made(*call, dtype)]
    found, expected = (gated_positional_attention(*inputs, backend=backend) for backend in ("torch", "reference"))
    assert found.shape == inputs[0].shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(found, inputs), gradients(expected, inputs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float64(call):
    agree(call, torch.float64, 1e-11)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float32(call):
    agree(call, torch.float32, 2e-5)


@SETTINGS
@given(calls(), st.integers(0, 2**13))
def test_chunks_of_any_size_give_the_same(call, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.gated.BUDGET", budget)
        agree(call, torch.float64, 1e-11)


@SETTINGS
@given(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
def test_logits_by_axis_are_their_sum(batch, height, width, heads):
    *maps, _, gate = made(batch, (height, width), heads, 16)
    rows, columns = torch.randn(heads, height, height).double(), torch.randn(heads, width, width).double()
    inputs = [x.detach().requires_grad_() for x in (*maps, rows, columns, gate)]
    q, k, v, rows, columns, gate = inputs
    summed = (rows[:, :, None, :, None] + columns[:, None, :, None]).reshape(heads, height * width, height * width)
    expected = gated_positional_attention(q, k, v, summed, gate, backend="reference")
    expected_gradients = gradients(expected, inputs)
    for backend in ("torch", "reference"):
        found = gated_positional_attention(q, k, v, (rows, columns), gate, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(found, inputs), expected_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("budget", [2**26, 2**12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_reference_in_float64(dtype, budget, monkeypatch):
    monkeypatch.setattr("visionattn.kernels.gated.BUDGET", budget)
    inputs = [x.detach().requires_grad_() for x in made(2, (7, 6), 2, 32, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = gated_positional_attention(*inputs)
    expected = gated_positional_attention(*exact, backend="reference")
    assert output.dtype == dtype
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    assert (output - expected).norm() <= tolerance * expected.norm()
    for ours, theirs in zip(gradients(output, inputs), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_autocast_computes_in_its_dtype():
    inputs = [x.requires_grad_() for x in made(1, (6, 6), 2, 16, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        output = gated_positional_attention(*inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), gated_positional_attention(*inputs), rtol=0, atol=3e-2)
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("budget", [2**26, 2**9])
def test_gradients_in_float64(budget, monkeypatch):
    monkeypatch.setattr("visionattn.kernels.gated.BUDGET", budget)
    inputs = [x.detach().requires_grad_() for x in made(2, (3, 2), 2, 3)]
    assert torch.autograd.gradcheck(lambda *x: gated_positional_attention(*x, backend="torch"), inputs)


def test_extreme_logits_stay_finite():
    q, k, v, logits, gate = (x.detach().requires_grad_() for x in made(2, (5, 7), 2, 16, torch.float32))
    output = gated_positional_attention(q * 1e2, k * 1e2, v, logits * 1e4, gate)
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * 1.001
    assert all(x.isfinite().all() for x in gradients(output, [q, k, v, logits, gate]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_gate_chooses_and_infinite_logits_forbid_keys(backend):
    q, k, v, _, _ = made(2, (5, 7), 2, 16)
    itself = torch.full((35, 35), -math.inf).fill_diagonal_(0).expand(1, 2, -1, -1).double()
    closed, opened = (
        gated_positional_attention(q, k, v, itself, torch.full((2,), gate).double(), backend=backend)
        for gate in (-1e4, 1e4)
    )
    content = torch.nn.functional.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(closed, content.transpose(1, 2).reshape(q.shape))
    torch.testing.assert_close(opened, v)


@pytest.mark.parametrize("which", range(4))
def test_nan_propagates_within_its_head(which):
    inputs = [x.clone() for x in made(2, (5, 7), 2, 16)]
    inputs[which][(0, 3, 4, 0) if which < 3 else (0, 3, 4)] = math.nan
    expected = gated_positional_attention(*inputs, backend="reference").isnan()
    found = gated_positional_attention(*inputs, backend="torch").isnan()
    assert expected.any()
    assert found[expected].all()
    assert not found[:, :, :, 1].any()


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, tokens: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.logits = nn.Parameter(torch.randn(heads, tokens, tokens))
        self.gate = nn.Parameter(torch.ones(heads))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return gated_positional_attention(*qkv, self.logits, self.gate).flatten(-2)


def test_compiles_to_one_graph():
    layer, x = Layer(16, 2, 35), torch.randn(2, 5, 7, 16)
    output, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    torch.testing.assert_close(output, expected)
    parameters = list(layer.parameters())
    torch.testing.assert_close(gradients(output, parameters), gradients(expected, parameters), rtol=1e-4, atol=1e-4)


def test_exports_with_any_batch():
    layer, x = Layer(16, 2, 35).eval(), torch.randn(5, 5, 7, 16)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_recorded_weights_give_the_output():
    layer, x = Layer(16, 2, 35), torch.randn(2, 5, 7, 16)
    with record_attention(layer) as record:
        output = layer(x)
        output.sum().backward()
    ((weights, indices),) = record[""]
    assert indices is None
    assert weights.grad.abs().sum() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 35))
    v = layer.qkv(x)[..., 32:].unflatten(-1, (2, 8)).flatten(1, 2)
    torch.testing.assert_close(output, torch.einsum("bnqk,bknd->bqnd", weights, v).reshape(x.shape))


MISUSE = [
    ({"q": torch.zeros(2, 6, 16)}, r"q is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"q": torch.zeros(2, 0, 6, 2, 8)}, r"q is .*no size but the batch 0"),
    ({"k": torch.zeros(2, 6, 5, 2, 8)}, r"k is .*: expected the shape \(2, 6, 6, 2, 8\)"),
    ({"v": torch.zeros(2, 6, 6, 2, 8).double()}, r"v is float64 .*: expected float32"),
    ({"position_logits": torch.zeros(2, 36, 35)}, r"position_logits is .*: expected the shape \(2, 36, 36\)"),
    ({"position_logits": torch.zeros(2, 2, 36, 36)}, r"position_logits is .*: expected the shape \(2, 36, 36\)"),
    ({"gate": torch.zeros(3)}, r"gate is .*: expected the shape \(2,\)"),
    ({"gate": torch.zeros(2, device="meta")}, r"gate is on meta: expected cpu"),
    ({"backend": "triton"}, r"backend='triton' cannot run this gated call: .*use backend='auto' or 'torch'"),
    ({"position_logits": (torch.zeros(2, 6, 6), torch.zeros(2, 5, 6))}, r"position_logits is .*: expected the shape"),
    ({"position_logits": (torch.zeros(2, 6, 6),)}, r"position_logits in 1 parts: expected two"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    names = ("q", "k", "v", "position_logits", "gate")
    inputs = dict(zip(names, made(2, (6, 6), 2, 8, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        gated_positional_attention(**(inputs | change))
