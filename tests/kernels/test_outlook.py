"""outlook_attention: reference against the definition written as loops, torch form against the reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import outlook_attention, record_attention

SETTINGS = settings(max_examples=20, deadline=None)


def made(batch, size, heads, dim, kernel, stride, padding=None, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """logits, and v as a slice of a wider projection."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    padding = kernel // 2 if padding is None else padding
    windows = [(n + 2 * padding - kernel) // stride + 1 for n in size]
    logits = torch.randn(batch, *windows, heads, kernel**2, kernel**2, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, *size, heads, 2, dim, generator=generator, dtype=torch.float64)
    return logits.to(dtype), v.to(dtype)[..., 1, :]


def loops(logits: Tensor, v: Tensor, kernel: int, stride: int, padding: int, scale: float) -> Tensor:
    """The definition, one window at a time."""
    output = torch.zeros_like(v)
    height, width = v.shape[1:3]
    for image, y, x, head in itertools.product(*map(range, logits.shape[:4])):
        places = [(stride * y + i - padding, stride * x + j - padding) for i in range(kernel) for j in range(kernel)]
        inside = [0 <= row < height and 0 <= column < width for row, column in places]
        for i, place in enumerate(places):
            weights = (logits[image, y, x, head, i] * scale).softmax(0)
            for j, other in enumerate(places):
                if inside[i] and inside[j]:
                    output[(image, *place, head)] += weights[j] * v[(image, *other, head)]
    return output


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, torch.linspace(-1, 2, output.numel()).view(output.shape).to(output))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((5, 4), 3, 2, 1), ((4, 3), 3, 1, 1), ((1, 1), 3, 2, 1), ((4, 5), 2, 1, 0), ((5, 6), 2, 3, 1), ((7, 5), 5, 4, 2)],
)
def test_follows_the_definition(size, kernel, stride, padding, backend):
    logits, v = made(2, size, 2, 3, kernel, stride, padding)
    output = outlook_attention(logits, v, kernel, stride, padding, 0.3, backend=backend)
    torch.testing.assert_close(output, loops(logits, v, kernel, stride, padding, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_unfold_and_fold(backend):
    logits, v = made(2, (9, 7), 2, 16, 3, 2)
    columns = F.unfold(v.flatten(3).permute(0, 3, 1, 2), 3, padding=1, stride=2).unflatten(1, (2, 16, 9))
    mixed = torch.einsum("bpnij,bndjp->bndip", (logits * 16**-0.5).softmax(-1).flatten(1, 2), columns).flatten(1, 3)
    expected = F.fold(mixed, (9, 7), 3, padding=1, stride=2).permute(0, 2, 3, 1).unflatten(3, (2, 16))
    torch.testing.assert_close(outlook_attention(logits, v, 3, 2, backend=backend), expected)


@st.composite
def calls(draw):
    kernel = draw(st.integers(1, 4))
    padding = draw(st.integers(0, kernel // 2))
    size = draw(st.tuples(*[st.integers(max(1, kernel - 2 * padding), 13)] * 2))
    dim = draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))
    return draw(st.integers(0, 2)), size, draw(st.integers(1, 3)), dim, kernel, draw(st.integers(1, 4)), padding


def agree(call: tuple, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [x.detach().requires_grad_() for x in made(*call, dtype)]
    found, expected = (outlook_attention(*inputs, *call[4:], backend=backend) for backend in ("torch", "reference"))
    assert found.shape == inputs[1].shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(found, inputs), gradients(expected, inputs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float64(call):
    agree(call, torch.float64, 1e-12)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float32(call):
    agree(call, torch.float32, 1e-5)


@SETTINGS
@given(calls(), st.integers(0, 2**14))
def test_bands_of_any_size_give_the_same(call, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.outlook.BAND", {"cpu": budget})
        agree(call, torch.float64, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_reference_in_float64(dtype):
    inputs = [x.detach().requires_grad_() for x in made(2, (13, 11), 2, 32, 3, 2, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = outlook_attention(*inputs, 3, 2), outlook_attention(*exact, 3, 2, backend="reference")
    assert output.dtype == dtype
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(output, inputs), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_autocast_computes_in_its_dtype():
    logits, v = made(1, (6, 6), 2, 16, 3, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = outlook_attention(logits.bfloat16(), v, 3, 2)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), outlook_attention(logits, v, 3, 2), rtol=0, atol=6e-2)


def test_gradients_in_float64():
    inputs = [x.requires_grad_() for x in made(1, (5, 4), 2, 3, 3, 2)]

    def call(logits, v):
        return outlook_attention(logits, v, 3, 2, backend="torch")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_extreme_logits_choose_one_neighbour():
    logits, v = made(2, (7, 6), 2, 16, 3, 2, dtype=torch.float32)
    logits[..., 4] = 1e4  # the middle of the window
    alone = torch.full_like(logits, -math.inf)
    alone[..., 4] = 0
    outputs = [outlook_attention(x.requires_grad_(), v, 3, 2, scale=1.0) for x in (logits, alone)]
    torch.testing.assert_close(*outputs)
    assert all(gradients(outputs[i], [x])[0].isfinite().all() for i, x in enumerate((logits, alone)))


def test_equal_logits_average_each_window():
    output = outlook_attention(torch.zeros(1, 3, 3, 1, 9, 9), torch.ones(1, 9, 9, 1, 4), 3, stride=3, padding=0)
    torch.testing.assert_close(output, torch.ones(1, 9, 9, 1, 4))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_propagates(which):
    inputs = made(2, (8, 8), 2, 16, 3, 2, dtype=torch.float32)
    inputs[which][0, 1, 2, 0] = math.nan
    expected = outlook_attention(*inputs, 3, 2, backend="reference").isnan()
    found = outlook_attention(*inputs, 3, 2, backend="torch").isnan()
    assert found.any()
    assert torch.equal(found, expected)


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, stride: int):
        super().__init__()
        self.v, self.logits = nn.Linear(dim, dim), nn.Linear(dim, heads * 81)
        self.heads, self.stride = heads, stride

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x[:, :: self.stride, :: self.stride]).unflatten(-1, (self.heads, 9, 9))
        return outlook_attention(logits, self.v(x).unflatten(-1, (self.heads, -1)), 3, self.stride).flatten(3)


def test_compiles_to_one_graph():
    layer, x = Layer(16, 2, 2), torch.randn(2, 7, 9, 16)
    output, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    torch.testing.assert_close(output, expected)
    parameters = list(layer.parameters())
    torch.testing.assert_close(gradients(output, parameters), gradients(expected, parameters))


def test_exports_with_any_batch():
    layer, x = Layer(16, 2, 2).eval(), torch.randn(5, 7, 9, 16)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_recorded_weights_give_the_output():
    layer, x = Layer(16, 2, 2), torch.randn(2, 7, 9, 16)
    with record_attention(layer) as record:
        output = layer(x)
        output.sum().backward()
    ((weights, indices),) = record[""]
    assert weights.shape == (2, 2, 4 * 5 * 9, 9)
    assert weights.grad.abs().sum() > 0
    assert indices.shape == (2, 4 * 5 * 9, 9)
    assert (int(indices.min()), int(indices.max())) == (-1, 62)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 180))
    values = F.pad(layer.v(x).flatten(1, 2).unflatten(-1, (2, 8)), (0, 0, 0, 0, 0, 1))  # -1 is a place of zeros
    mixed = torch.einsum("bnij,bijnd->bind", weights, values[torch.arange(2)[:, None, None], indices])
    places = indices[0].unflatten(0, (20, 9))[:, 0].flatten() % 64
    expected = torch.zeros(2, 64, 2, 8).index_add(1, places, mixed)[:, :63].view(2, 7, 9, 16)
    torch.testing.assert_close(output, expected)


MISUSE = [
    ({"v": torch.zeros(2, 6, 16)}, r"v is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"v": torch.zeros(2, 0, 6, 2, 16)}, r"v is .*no size but the batch 0"),
    ({"logits": torch.zeros(2, 5, 6, 2, 9, 9)}, r"logits is .*: expected the shape \(2, 3, 3, 2, 9, 9\)"),
    ({"logits": torch.zeros(2, 3, 3, 2, 9, 9).double()}, r"logits is float64 .*: expected float32"),
    ({"kernel_size": 0}, r"kernel_size=0: expected an int of at least 1"),
    ({"stride": 1.5}, r"stride=1.5: expected an int of at least 1"),
    ({"padding": 2}, r"padding=2: expected an int from 0 to kernel_size // 2, here 1"),
    ({"kernel_size": 9, "padding": 0}, r"kernel_size=9: larger than the padded map of v"),
    ({"backend": "triton"}, r"backend='triton' cannot run this outlook call: .*use backend='auto' or 'torch'"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    logits, v = made(2, (6, 6), 2, 16, 3, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        outlook_attention(**({"logits": logits, "v": v, "kernel_size": 3, "stride": 2} | change))
