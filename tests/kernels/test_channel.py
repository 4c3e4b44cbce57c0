"""channel_attention, cross_covariance_attention and linear_attention against their definitions written as loops, and
their misuse."""

import itertools

import pytest
import torch
from torch import Tensor

from visionattn.kernels import channel_attention, cross_covariance_attention, linear_attention


def make_inputs(batch, size, heads, dim, dtype=torch.float64) -> list[Tensor]:
    """q, k, v as a model makes them, slices of one projection, and a temperature."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64).to(dtype)
    temperature = torch.randn(heads, 1, 1, generator=generator, dtype=torch.float64).to(dtype)
    return [*qkv.unflatten(-1, (3, heads, dim)).unbind(-3), temperature]


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
    q, k, v, _ = make_inputs(2, size, 2, 4)
    output = channel_attention(q, k, v, 2, scale=0.3, backend=backend)
    expected = loops(*(x.flatten(1, -3) for x in (q, k, v)), torch.full((2,), 0.3, dtype=q.dtype)).view(q.shape)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(7,), (1,), (3, 5)])
def test_cross_covariance_attention_follows_the_definition(size, backend):
    q, k, v, temperature = make_inputs(2, size, 2, 4)
    output = cross_covariance_attention(q, k, v, temperature, backend=backend)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    q, k = (x / x.square().sum(1, keepdim=True).sqrt() for x in (q, k))
    expected = loops(q, k, v, temperature.flatten()).view(output.shape)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [(7,), (1,), (3, 5)])
def test_linear_attention_follows_the_definition(size, backend):
    q, k, v, _ = make_inputs(2, size, 2, 4)
    output = linear_attention(q, k, v, backend=backend)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    expected = torch.zeros_like(v)
    for image, query, head in itertools.product(*map(range, q.shape[:3])):
        for key in range(k.shape[1]):
            weight = q[image, query, head] @ k[image, key, head] / k.shape[1]
            expected[image, query, head] += weight * v[image, key, head]
    torch.testing.assert_close(output, expected.view(output.shape), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_linear_attention_of_many_tokens_stays_finite_in_half_precision():
    """Sums of so many products are larger than float16 has: they are means, made in float32."""
    q = torch.full((1, 300, 300, 1, 16), 2.0, dtype=torch.float16)
    torch.testing.assert_close(linear_attention(q, q, q), torch.full_like(q, 128))


def test_groups_cut_the_channels_whatever_the_axes_of_q():
    q, k, v, _ = make_inputs(2, (3, 5), 4, 6)
    flat = [x.flatten(3).unsqueeze(3) for x in (q, k, v)]
    regrouped = [x.flatten(3).unflatten(3, (2, 12)) for x in (q, k, v)]
    for groups, same in ((4, (q, k, v)), (2, regrouped)):
        expected = channel_attention(*same, groups)
        torch.testing.assert_close(channel_attention(*flat, groups), expected.reshape(flat[0].shape))
        torch.testing.assert_close(channel_attention(q, k, v, groups), expected.reshape(q.shape))


def test_equal_channels_give_their_mean():
    q, k, v, temperature = make_inputs(2, (5, 7), 2, 16)
    k = k[..., :1].expand_as(k)
    for output in (channel_attention(q, k, v, 2), cross_covariance_attention(q, k, v, temperature)):
        torch.testing.assert_close(output, v.mean(-1, keepdim=True).expand_as(v))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_channels_without_length_have_a_cosine_of_zero(backend):
    q, k, v, temperature = (x.detach() for x in make_inputs(2, (5, 7), 2, 16))
    q = torch.zeros_like(q).requires_grad_()
    output = cross_covariance_attention(q, k, v, temperature, backend=backend)
    torch.testing.assert_close(output, v.mean(-1, keepdim=True).expand_as(v))
    assert torch.autograd.grad(output.square().sum(), q)[0].isfinite().all()


MISUSE = [
    ({"q": torch.zeros(2, 6, 16)}, r"q is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"q": torch.zeros(2, 6, 6, 2, 8, dtype=torch.int64)}, r"q is .*int64"),
    ({"q": torch.zeros(2, 0, 6, 2, 8)}, r"q is .*no size but the batch to be 0"),
    ({"k": torch.zeros(2, 6, 5, 2, 8)}, r"k is .*: expected the shape \(2, 6, 6, 2, 8\)"),
    ({"v": torch.zeros(2, 6, 6, 2, 8).double()}, r"v is float64 .*: expected float32"),
    ({"groups": 3}, r"groups=3: expected an int that divides the 16 channels"),
    ({"groups": 0}, r"groups=0: expected an int"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v, _ = make_inputs(2, (6, 6), 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        channel_attention(**({"q": q, "k": k, "v": v, "groups": 2} | change))


def test_a_temperature_of_another_shape_is_refused():
    q, k, v, _ = make_inputs(2, (6, 6), 2, 8, torch.float32)
    with pytest.raises(ValueError, match=r"temperature is .*\(2,\): expected the shape \(2, 1, 1\)"):
        cross_covariance_attention(q, k, v, torch.ones(2))
