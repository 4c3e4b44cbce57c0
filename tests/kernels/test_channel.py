"""channel_attention and cross_covariance_attention: reference against loops, torch forms against the reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import channel_attention, cross_covariance_attention, record_attention

SETTINGS = settings(max_examples=20, deadline=None)
PATTERNS = ["channel", "cross_covariance"]


def made(batch, size, heads, dim, dtype=torch.float64) -> list[Tensor]:
    """q, k, v as a model makes them, slices of one projection, and a temperature."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64).to(dtype)
    temperature = torch.randn(heads, 1, 1, generator=generator, dtype=torch.float64).to(dtype)
    return [*qkv.unflatten(-1, (3, heads, dim)).unbind(-3), temperature]


def attend(pattern: str, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, backend: str = "auto") -> Tensor:
    """Both patterns called alike; the temperature, where a pattern has none, scales q."""
    if pattern == "channel":
        return channel_attention(q * temperature[:, 0], k, v, q.shape[-2], backend=backend)
    return cross_covariance_attention(q, k, v, temperature, backend=backend)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, torch.linspace(-1, 2, output.numel()).view(output.shape).to(output))


def loops(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """softmax(scale * q^T k) v^T one channel at a time, for (B, L, heads, dim) and a scale of each head."""
    output = torch.zeros_like(v)
    for image, head, channel in itertools.product(range(len(q)), *map(range, q.shape[2:])):
        products = [(q[image, :, head, channel] * k[image, :, head, other]).sum() for other in range(q.shape[3])]
        weights = (torch.stack(products) * scale[head]).softmax(0)
        output[image, :, head, channel] = v[image, :, head] @ weights
    return output


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(7,), (1,), (3, 5)])
def test_channel_attention_follows_the_definition(size, backend):
    q, k, v, _ = made(2, size, 2, 4)
    output = channel_attention(q, k, v, 2, scale=0.3, backend=backend)
    expected = loops(*(x.flatten(1, -3) for x in (q, k, v)), torch.full((2,), 0.3, dtype=q.dtype)).view(q.shape)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(7,), (1,), (3, 5)])
def test_cross_covariance_attention_follows_the_definition(size, backend):
    q, k, v, temperature = made(2, size, 2, 4)
    output = cross_covariance_attention(q, k, v, temperature, backend=backend)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    q, k = (x / x.square().sum(1, keepdim=True).sqrt() for x in (q, k))
    expected = loops(q, k, v, temperature.flatten()).view(output.shape)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_groups_cut_the_channels_whatever_the_axes_of_q():
    q, k, v, _ = made(2, (3, 5), 4, 6)
    flat = [x.flatten(3).unsqueeze(3) for x in (q, k, v)]
    regrouped = [x.flatten(3).unflatten(3, (2, 12)) for x in (q, k, v)]
    for groups, same in ((4, (q, k, v)), (2, regrouped)):
        expected = channel_attention(*same, groups)
        torch.testing.assert_close(channel_attention(*flat, groups), expected.reshape(flat[0].shape))
        torch.testing.assert_close(channel_attention(q, k, v, groups), expected.reshape(q.shape))


@st.composite
def calls(draw):
    size = draw(st.one_of(st.tuples(st.integers(1, 60)), st.tuples(st.integers(1, 13), st.integers(1, 13))))
    dim = draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))
    return draw(st.integers(0, 3)), size, draw(st.integers(1, 4)), dim


def agree(pattern: str, call: tuple, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [x.detach().requires_grad_() for x in made(*call, dtype)]
    found, expected = (attend(pattern, *inputs, backend=backend) for backend in ("torch", "reference"))
    assert found.shape == inputs[0].shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm())


@pytest.mark.parametrize("pattern", PATTERNS)
@SETTINGS
@given(call=calls())
def test_torch_form_agrees_with_the_reference_float64(pattern, call):
    agree(pattern, call, torch.float64, 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS)
@SETTINGS
@given(call=calls())
def test_torch_form_agrees_with_the_reference_float32(pattern, call):
    agree(pattern, call, torch.float32, 3e-4)  # of one token the gradient is nothing but rounding, over its norm


@pytest.mark.parametrize("pattern", PATTERNS)
@SETTINGS
@given(call=calls())
def test_large_maps_go_image_by_image_to_the_same_result(pattern, call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.channel.LARGE", 0)
        agree(pattern, call, torch.float64, 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_reference_in_float64(pattern, dtype):
    inputs = [x.detach().requires_grad_() for x in made(2, (13, 11), 2, 32, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = attend(pattern, *inputs), attend(pattern, *exact, backend="reference")
    assert output.dtype == dtype
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    assert (output - expected).norm() <= tolerance * expected.norm()
    for ours, theirs in zip(gradients(output, inputs), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_autocast_computes_in_its_dtype(pattern):
    inputs = [x.requires_grad_() for x in made(1, (6, 6), 2, 16, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(pattern, *inputs)
    assert output.dtype == torch.bfloat16
    expected = attend(pattern, *inputs)
    assert (output - expected).norm() <= 3e-2 * expected.norm()
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_in_float64(pattern):
    inputs = [x.detach().requires_grad_() for x in made(2, (3, 2), 2, 3)]
    assert torch.autograd.gradcheck(lambda *x: attend(pattern, *x, backend="torch"), inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_extreme_logits_stay_finite(pattern):
    q, k, v, temperature = (x.detach().requires_grad_() for x in made(2, (5, 7), 2, 16, torch.float32))
    output = attend(pattern, q, k, v, temperature * 1e4)
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * 1.001
    assert all(x.isfinite().all() for x in gradients(output, [q, k, v, temperature]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equal_channels_give_their_mean(pattern):
    q, k, v, temperature = made(2, (5, 7), 2, 16)
    output = attend(pattern, q, k[..., :1].expand_as(k), v, temperature)
    torch.testing.assert_close(output, v.mean(-1, keepdim=True).expand_as(v))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_channels_without_length_have_a_cosine_of_zero(backend):
    q, k, v, temperature = (x.detach() for x in made(2, (5, 7), 2, 16))
    q = torch.zeros_like(q).requires_grad_()
    output = cross_covariance_attention(q, k, v, temperature, backend=backend)
    torch.testing.assert_close(output, v.mean(-1, keepdim=True).expand_as(v))
    assert gradients(output, [q])[0].isfinite().all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_propagates_within_its_image_and_head(pattern, which):
    inputs = [x.clone() for x in made(2, (5, 7), 2, 16)]
    inputs[which][0, 3, 4, 0] = math.nan
    found = attend(pattern, *inputs, backend="torch").isnan()
    assert found.any()
    assert torch.equal(found, attend(pattern, *inputs, backend="reference").isnan())
    assert not found[1].any()
    assert not found[0, :, :, 1].any()


class Layer(nn.Module):
    def __init__(self, pattern: str, dim: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.pattern, self.heads = pattern, heads

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return attend(self.pattern, *qkv, self.temperature).flatten(-2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiles_to_one_graph(pattern):
    layer, x = Layer(pattern, 16, 2), torch.randn(2, 7, 9, 16)
    output, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    torch.testing.assert_close(output, expected)
    parameters = list(layer.parameters())
    torch.testing.assert_close(gradients(output, parameters), gradients(expected, parameters), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exports_with_any_batch(pattern):
    layer, x = Layer(pattern, 16, 2).eval(), torch.randn(5, 7, 9, 16)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_recorded_weights_give_the_output(pattern):
    layer, x = Layer(pattern, 16, 2), torch.randn(2, 7, 9, 16)
    with record_attention(layer) as record:
        output = layer(x)
        output.sum().backward()
    ((weights, indices),) = record[""]
    assert indices is None
    assert weights.shape == (2, 2, 8, 8)
    assert weights.grad.abs().sum() > 0
    v = layer.qkv(x)[..., 32:].unflatten(-1, (2, 8))
    torch.testing.assert_close(output, torch.einsum("bnde,bhwne->bhwnd", weights, v).flatten(3))


MISUSE = [
    ({"q": torch.zeros(2, 6, 16)}, r"q is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"q": torch.zeros(2, 6, 6, 2, 8, dtype=torch.int64)}, r"q is .*int64"),
    ({"q": torch.zeros(2, 0, 6, 2, 8)}, r"q is .*no size but the batch 0"),
    ({"k": torch.zeros(2, 6, 5, 2, 8)}, r"k is .*: expected the shape \(2, 6, 6, 2, 8\)"),
    ({"v": torch.zeros(2, 6, 6, 2, 8).double()}, r"v is float64 .*: expected float32"),
    ({"groups": 3}, r"groups=3: expected an int that divides the 16 channels"),
    ({"groups": 0}, r"groups=0: expected an int"),
    ({"backend": "triton"}, r"backend='triton' cannot run this channel call: .*use backend='auto' or 'torch'"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v, _ = made(2, (6, 6), 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        channel_attention(**({"q": q, "k": k, "v": v, "groups": 2} | change))


def test_a_temperature_of_another_shape_is_refused():
    q, k, v, _ = made(2, (6, 6), 2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"temperature is .*\(2,\): expected the shape \(2, 1, 1\)"):
        cross_covariance_attention(q, k, v, torch.ones(2))
