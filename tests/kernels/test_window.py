"""window_attention: reference against the definition written as loops, torch form against the reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import record_attention, window_attention

SETTINGS = settings(max_examples=20, deadline=None)


def made(batch, size, heads, dim, window=None, dtype=torch.float64) -> tuple[Tensor, ...]:
    """q, k, v as a model makes them, slices of one projection, and a bias for the window."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64).to(dtype)
    qkv = qkv.unflatten(-1, (3, heads, dim)).unbind(-3)
    if window is None:
        return qkv
    return *qkv, torch.randn(heads, *(math.prod(window),) * 2, generator=generator, dtype=torch.float64).to(dtype)


def some_keys(batch, size) -> Tensor:
    return torch.rand(batch, *size, generator=torch.Generator().manual_seed(1)) > 0.4


def keys_of(i: int, length: int, window: int, shift: int, dilated: bool) -> tuple[int, list[tuple[int, int]]]:
    """Place of position i of an axis in its window, and the keys (position, place) that it sees there."""
    count = -(-length // window)
    if dilated:
        windows = [[start + place * count for place in range(window)] for start in range(count)]
    else:
        windows = [[(start + place + shift) % (count * window) for place in range(window)]
                   for start in range(0, count * window, window)]  # fmt: skip
    own = next(members for members in windows if i in members)
    seen = [(key, place) for place, key in enumerate(own) if key < length and (key < shift) == (i < shift)]
    return own.index(i), seen


def loops(q, k, v, bias, mask, window, shift, dilated, scale) -> tuple[Tensor, Tensor]:
    """The definition, one query and one head at a time: output and log-sum-exp."""
    height, width, heads = q.shape[1:4]
    output, lse = torch.zeros_like(v), q.new_full((len(q), heads, height, width), -math.inf)
    for y, x in itertools.product(range(height), range(width)):
        row, rows = keys_of(y, height, window[0], shift[0], dilated)
        column, columns = keys_of(x, width, window[1], shift[1], dilated)
        for image, head in itertools.product(range(len(q)), range(heads)):
            logits, values = [], []
            for (ky, py), (kx, px) in itertools.product(rows, columns):
                if mask is not None and not mask[image % len(mask), ky, kx]:
                    continue
                logit = q[image, y, x, head] @ k[image, ky, kx, head] * scale
                if bias is not None:
                    logit = logit + bias[head, row * window[1] + column, py * window[1] + px]
                logits.append(logit)
                values.append(v[image, ky, kx, head])
            if logits:
                output[image, y, x, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
                lse[image, head, y, x] = torch.stack(logits).logsumexp(0)
    return output, lse


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of the finite outputs: a query without keys has -inf as log-sum-exp."""
    total = sum(
        (x.where(x.isfinite(), 0) * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum()
        for x in outputs
    )
    return torch.autograd.grad(total, inputs)


# Map, window, shift, dilated.
CALLS = [
    ((6, 9), (3, 3), (0, 0), False),
    ((6, 9), (3, 3), (1, 2), False),
    ((5, 7), (3, 4), (2, 0), False),
    ((6, 6), (2, 3), (0, 0), True),
    ((5, 7), (3, 2), (0, 0), True),
    ((2, 3), (4, 4), (0, 0), False),
    ((2, 3), (4, 4), (0, 0), True),
    ((4, 4), (4, 4), (0, 0), False),
    ((1, 1), (1, 1), (0, 0), False),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("extras", ["bias", "mask", "both", "none"])
@pytest.mark.parametrize(("size", "window", "shift", "dilated"), CALLS)
def test_follows_the_definition(size, window, shift, dilated, extras, backend):
    q, k, v, bias = made(2, size, 2, 3, window)
    bias = bias if extras in ("bias", "both") else None
    mask = some_keys(2, size) if extras in ("mask", "both") else None
    options = {"bias": bias, "mask": mask, "scale": 0.3, "backend": backend}
    found = window_attention(q, k, v, window, shift, dilated, return_lse=True, **options)
    expected = loops(q, k, v, bias, mask, window, shift, dilated, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(window_attention(q, k, v, window, shift, dilated, **options), expected[0])


@st.composite
def calls(draw):
    size, window = (tuple(draw(st.integers(1, most)) for _ in range(2)) for most in (17, 7))
    dilated = draw(st.booleans())
    shift = (0, 0) if dilated else tuple(draw(st.integers(0, side - 1)) for side in window)
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))
    return draw(st.integers(0, 3)), size, heads, dim, window, shift, dilated, draw(st.booleans()), draw(st.booleans())


def agree(call, dtype: torch.dtype) -> None:
    """Torch form and reference: the same output, log-sum-exp and gradient of every input."""
    batch, size, heads, dim, window, shift, dilated, biased, masked = call
    inputs = [x.detach().requires_grad_() for x in made(batch, size, heads, dim, window, dtype)]
    inputs = inputs if biased else inputs[:3]
    options = {"bias": inputs[3] if biased else None, "mask": some_keys(batch, size) if masked else None}
    found, expected = (
        window_attention(*inputs[:3], window, shift, dilated, return_lse=True, backend=backend, **options)
        for backend in ("torch", "reference")
    )
    tolerance = {torch.float64: 1e-11, torch.float32: 5e-5}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(found, inputs), gradients(expected, inputs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float64(call):
    agree(call, torch.float64)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float32(call):
    agree(call, torch.float32)


@SETTINGS
@given(calls(), st.integers(0, 2**16), st.integers(0, 2**16))
def test_chunks_of_any_size_give_the_same(call, chunk, keep):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.window.CHUNK", chunk)
        patch.setattr("visionattn.kernels.window.KEEP", keep)
        agree(call, torch.float64)


STAGES = [((28, 28), 7, 3, False), ((14, 14), 7, 0, True), ((23, 19), 7, 3, False), ((20, 20), 7, 0, True)]


@pytest.mark.parametrize(("size", "window", "shift", "dilated"), STAGES)
def test_stages_of_models_agree_with_the_reference(size, window, shift, dilated):
    agree((2, size, 3, 32, (window,) * 2, (shift,) * 2, dilated, True, False), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_reference_in_float64(dtype):
    inputs = [x.detach().requires_grad_() for x in made(2, (13, 17), 2, 32, (5, 5), dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (output, lse), expected = (
        window_attention(*x[:3], 5, 2, bias=x[3], return_lse=True, backend=backend)
        for x, backend in ((inputs, "torch"), (exact, "reference"))
    )
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients((output,), inputs), gradients(expected[:1], exact), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_autocast_computes_in_its_dtype():
    inputs = [x.requires_grad_() for x in made(1, (9, 10), 2, 16, (3, 3), torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        output = window_attention(*inputs[:3], 3, 1, bias=inputs[3])
    expected = window_attention(*inputs[:3], 3, 1, bias=inputs[3], backend="reference")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=3e-2)
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize(("size", "window", "shift", "dilated"), [CALLS[2], CALLS[4], CALLS[7]])
def test_gradients_in_float64(size, window, shift, dilated):
    inputs = [x.detach().requires_grad_() for x in made(1, size, 2, 3, window)]

    def call(q, k, v, bias):
        return window_attention(q, k, v, window, shift, dilated, bias, return_lse=True, backend="torch")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_two_key_sets_merge_by_their_log_sum_exp():
    q, k, v, bias = made(2, (8, 8), 2, 16, (4, 4))
    left = torch.arange(8).expand(1, 8, 8) % 4 < 2
    whole, *parts = (
        window_attention(q, k, v, 4, bias=bias, mask=mask, return_lse=True, backend="torch")
        for mask in (None, left, ~left)
    )
    lse = torch.stack([part[1] for part in parts])
    shares = lse.softmax(0).movedim(2, -1)[..., None]
    torch.testing.assert_close(sum(share * part[0] for share, part in zip(shares, parts, strict=True)), whole[0])
    torch.testing.assert_close(lse.logsumexp(0), whole[1])


@pytest.mark.parametrize(("size", "window", "shift", "dilated"), STAGES)
def test_extreme_logits_stay_finite(size, window, shift, dilated):
    inputs = [x.detach().requires_grad_() for x in made(1, size, 2, 16, (window, window), torch.float32)]
    q, k, v, bias = inputs
    output = window_attention(q * 1e2, k * 1e2, v, window, shift, dilated, bias, scale=1.0, backend="torch")
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * 1.001
    assert all(x.isfinite().all() for x in gradients((output,), inputs))


@pytest.mark.parametrize(("size", "window", "shift", "dilated"), STAGES)
def test_equal_keys_give_the_mean_of_the_values_and_nan_propagates(size, window, shift, dilated):
    ones = torch.ones(1, *size, 2, 16)
    torch.testing.assert_close(window_attention(ones, ones, ones * 3, window, shift, dilated), ones * 3)
    for which in range(3):
        q, k, v = (x.clone() for x in made(1, size, 2, 16, dtype=torch.float32))
        (q, k, v)[which][0, 3, 4, 0] = math.nan
        found, expected = (
            window_attention(q, k, v, window, shift, dilated, backend=backend).isnan()
            for backend in ("torch", "reference")
        )
        assert expected.any()
        assert found[expected].all()
        assert not found[:, :, :, 1].any()  # the other head


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_infinite_bias_forbids_keys(backend):
    q, k, v, bias = made(1, (6, 7), 2, 8, (3, 3))
    bias = torch.full_like(bias, -math.inf)
    bias.diagonal(dim1=1, dim2=2).zero_()  # each query sees itself only
    bias.requires_grad_()
    output = window_attention(q, k, v, 3, 1, bias=bias, backend=backend)
    torch.testing.assert_close(output, v)
    assert torch.autograd.grad(output.sum(), bias)[0].eq(0).all()


def test_images_of_a_batch_do_not_mix():
    q, k, v, bias = made(3, (15, 15), 2, 16, (5, 5))
    together = window_attention(q, k, v, 5, 2, bias=bias)
    alone = [window_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 5, 2, bias=bias) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_deterministic_mode_repeats_the_gradients():
    inputs = [x.detach().requires_grad_() for x in made(2, (28, 28), 2, 16, (7, 7), torch.float32)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients((window_attention(*inputs[:3], 7, 3, bias=inputs[3]),), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_window_over_a_large_map_takes_bounded_memory():
    """64 x 64 tokens have 16 Mi logits a head, 64 MiB; chunks of queries take 3."""
    q, k, v, bias = (x.detach().requires_grad_() for x in made(1, (20, 20), 1, 16, (20, 20), torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.window.CHUNK", 2**14)
        output = window_attention(q, k, v, 20, bias=bias)
    expected = F.scaled_dot_product_attention(*(x.flatten(1, 2).mT.mT.transpose(1, 2) for x in (q, k, v)), bias[None])
    torch.testing.assert_close(output.flatten(1, 2).transpose(1, 2), expected)


MISUSE = [
    ({"q": torch.zeros(2, 12, 32)}, r"q is .*\(2, 12, 32\): expected a floating tensor of \(B, H, W, heads, head_dim"),
    ({"q": torch.zeros(2, 0, 9, 2, 8)}, r"q is .*no size but the batch"),
    (
        {"k": torch.zeros(2, 9, 12, 2, 8), "v": torch.zeros(2, 9, 12, 2, 8)},
        r"k is .*: expected the shape of q, \(2, 12",
    ),
    ({"v": torch.zeros(2, 12, 9, 2, 8, dtype=torch.float64)}, r"v is float64 .*: expected float32"),
    ({"window_size": 0}, r"window_size=0: expected an int of at least 1"),
    ({"window_size": (3, 3, 3)}, r"window_size=\(3, 3, 3\): expected an int .* or two"),
    ({"window_size": 3.0}, r"window_size=3.0: expected an int"),
    ({"shift": 3}, r"shift=3: expected less than window_size=3"),
    ({"shift": -1}, r"shift=-1: expected an int of at least 0"),
    ({"shift": 1, "dilated": True}, r"shift=1 with dilated=True: expected one of them"),
    ({"bias": torch.zeros(2, 3, 3)}, r"bias is .*: expected the shape \(2, 9, 9\)"),
    ({"bias": torch.zeros(2, 9, 9, device="meta")}, r"bias is on meta: expected cpu"),
    ({"mask": torch.zeros(3, 12, 9, dtype=torch.bool)}, r"mask is .*: expected the shape \(2, 12, 9\)"),
    ({"mask": torch.zeros(2, 12, 9)}, r"mask is float32 .*: expected bool"),
    ({"backend": "cuda"}, r"backend='cuda': expected one of auto, reference, torch, triton"),
    ({"backend": "triton"}, r"backend='triton' cannot run this window call: .*use backend='auto' or 'torch'"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v = made(2, (12, 9), 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        window_attention(**({"q": q, "k": k, "v": v, "window_size": 3} | change))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, window_size: int, shift: int = 0, dilated: bool = False):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = nn.Parameter(torch.randn(heads, window_size**2, window_size**2))
        self.heads, self.window = heads, (window_size, shift, dilated)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return window_attention(q, k, v, *self.window, self.bias).flatten(3)


@pytest.mark.parametrize("window", [(3, 1, False), (3, 0, True)])
def test_compiles_to_one_graph_for_each_size(window):
    layer = Layer(16, 2, *window)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in ((7, 9), (7, 11)):
        x = torch.randn(2, *size, 16)
        output, expected = compiled(x), layer(x)
        torch.testing.assert_close(output, expected)
        parameters = list(layer.parameters())
        torch.testing.assert_close(gradients((output,), parameters), gradients((expected,), parameters))


@pytest.mark.parametrize("window", [(5, 2, False), (5, 0, True)])
def test_exports_with_any_batch(window):
    layer = Layer(16, 2, *window).eval()
    x = torch.randn(5, 23, 11, 16)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_recorded_weights_give_the_output():
    layer = Layer(16, 2, 3, 1)
    x = torch.randn(2, 7, 9, 16)
    with record_attention(layer) as record:
        output = layer(x)
    torch.testing.assert_close(output, layer(x))
    (attention,) = record[""]
    values = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)[2].flatten(1, 2)
    gathered = torch.stack([image[index] for image, index in zip(values, attention.indices, strict=True)])
    mixed = torch.einsum("bhnk,bnkhd->bnhd", attention.weights, gathered)
    torch.testing.assert_close(mixed.reshape(output.shape), output)
