"""neighborhood_attention: reference against the definition written as loops, torch form against the reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import neighborhood_attention, record_attention

SETTINGS = settings(max_examples=20, deadline=None)


def made(batch, size, heads, dim, kernel=None, dtype=torch.float64) -> tuple[Tensor, ...]:
    """q, k, v as a model makes them, slices of one projection, and a bias for the kernel (one int per axis)."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64).to(dtype)
    qkv = qkv.unflatten(-1, (3, heads, dim)).unbind(-3)
    if kernel is None:
        return qkv
    return *qkv, torch.randn(heads, *(2 * n - 1 for n in kernel), generator=generator, dtype=torch.float64).to(dtype)


def window(i: int, length: int, kernel: int, dilation: int, stride: int) -> list[tuple[int, int]]:
    """Keys of position i of an axis, and their places in the bias table."""
    members = [j for j in range(length) if j % dilation == i % dilation]
    place = members.index(i)
    leader = min(place - place % stride + stride // 2, len(members) - 1)
    start = min(max(leader - kernel // 2, 0), len(members) - kernel)
    return [(members[j], j - place + kernel - 1) for j in range(start, start + kernel)]


def loops(q, k, v, bias, kernel, dilation, stride, scale) -> tuple[Tensor, Tensor]:
    """The definition, one query and one head at a time: output and log-sum-exp."""
    size, heads = q.shape[1:-2], q.shape[-2]
    output, lse = torch.zeros_like(q), q.new_zeros(len(q), heads, *size)
    for query in itertools.product(*map(range, size)):
        axes = [window(*axis) for axis in zip(query, size, kernel, dilation, stride, strict=True)]
        for image, head in itertools.product(range(len(q)), range(heads)):
            logits, values = [], []
            for pairs in itertools.product(*axes):
                key, place = zip(*pairs, strict=True)
                logit = q[(image, *query, head)] @ k[(image, *key, head)] * scale
                logits.append(logit if bias is None else logit + bias[(head, *place)])
                values.append(v[(image, *key, head)])
            output[(image, *query, head)] = torch.stack(logits).softmax(0) @ torch.stack(values)
            lse[(image, head, *query)] = torch.stack(logits).logsumexp(0)
    return output, lse


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


# Map, kernel, dilation, stride, one int per axis.
CALLS = [
    ((9,), (3,), (1,), (1,)),
    ((11,), (4,), (2,), (3,)),
    ((5, 7), (3, 5), (1, 1), (1, 1)),
    ((7, 8), (3, 2), (2, 3), (1, 2)),
    ((7, 7), (7, 7), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (1, 1), (1, 1)),
    ((4, 3, 5), (2, 3, 3), (2, 1, 1), (1, 1, 2)),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("size", "kernel", "dilation", "stride"), CALLS)
def test_follows_the_definition(size, kernel, dilation, stride, biased, backend):
    q, k, v, bias = made(1, size, 2, 3, kernel)
    bias = bias if biased else None
    options = {"bias": bias, "scale": 0.3, "return_lse": True, "backend": backend}
    output = neighborhood_attention(q, k, v, kernel, dilation, stride, **options)
    torch.testing.assert_close(output, loops(q, k, v, bias, kernel, dilation, stride, 0.3), rtol=1e-12, atol=1e-12)


@st.composite
def calls(draw):
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    size = tuple(draw(st.integers(1, {1: 60, 2: 23, 3: 7}[axes])) for _ in range(axes))
    kernel = tuple(draw(st.integers(1, min(n, 9))) for n in size)
    dilation = tuple(draw(st.integers(1, n // k)) for n, k in zip(size, kernel, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))
    return draw(st.integers(0, 2)), size, heads, dim, kernel, dilation, stride, draw(st.booleans())


def agree(call, dtype: torch.dtype) -> None:
    """Torch form and reference: the same output, log-sum-exp and gradient of every input."""
    batch, size, heads, dim, kernel, dilation, stride, biased = call
    inputs = [x.detach().requires_grad_() for x in made(batch, size, heads, dim, kernel, dtype)]
    inputs = inputs if biased else inputs[:3]
    found, expected = (
        neighborhood_attention(*inputs[:3], kernel, dilation, stride, *inputs[3:], return_lse=True, backend=backend)
        for backend in ("torch", "reference")
    )
    assert found[0].shape == inputs[0].shape
    assert found[1].shape == (batch, heads, *size)
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
@given(calls(), st.integers(0, 2**18))
def test_chunks_of_any_size_give_the_same(call, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.neighborhood.CHUNK", budget)
        agree(call, torch.float64)


STAGES = [((28, 28), 7, 1), ((28, 28), 7, 4), ((14, 14), 7, 2), ((7, 7), 7, 1), ((31, 37), 5, 3), ((19, 18), 3, 1)]


@pytest.mark.parametrize(("size", "kernel", "dilation"), STAGES)
def test_stages_of_models_agree_with_the_reference(size, kernel, dilation):
    agree((2, size, 2, 32, (kernel,) * 2, (dilation,) * 2, (1, 1), True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_reference_in_float64(dtype):
    inputs = [x.detach().requires_grad_() for x in made(2, (13, 17), 2, 32, (5, 5), dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (output, lse), expected = (
        neighborhood_attention(*x[:3], 5, 2, 1, x[3], return_lse=True, backend=backend)
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
        output = neighborhood_attention(*inputs[:3], 3, bias=inputs[3])
    expected = neighborhood_attention(*inputs[:3], 3, bias=inputs[3], backend="reference")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=3e-2)
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize(("size", "kernel", "dilation", "stride"), [CALLS[1], CALLS[3], CALLS[6]])
def test_gradients_in_float64(size, kernel, dilation, stride):
    inputs = [x.detach().requires_grad_() for x in made(1, size, 2, 3, kernel)]

    def call(q, k, v, bias):
        return neighborhood_attention(q, k, v, kernel, dilation, stride, bias, return_lse=True, backend="torch")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("which", range(4))
def test_gradient_of_one_input_only(which):
    inputs = list(made(1, (9, 8), 2, 4, (3, 3)))
    inputs[which] = inputs[which].detach().requires_grad_()
    ours, theirs = (
        gradients((neighborhood_attention(*inputs[:3], 3, 2, bias=inputs[3], backend=backend),), [inputs[which]])
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(ours, theirs)


def test_two_key_sets_merge_by_their_log_sum_exp():
    q, k, v, bias = made(2, (7, 7), 2, 16, (7, 7))
    left, right = bias.clone(), bias.clone()
    left[..., 6:] = -math.inf  # keys to the left of the query only: the first column has none
    right[..., :6] = -math.inf
    whole, *parts = (
        neighborhood_attention(q, k, v, 7, bias=table, return_lse=True, backend="torch")
        for table in (bias, left, right)
    )
    lse = torch.stack([part[1][..., 1:] for part in parts])
    shares = lse.softmax(0).movedim(2, -1)[..., None]
    merged = sum(share * part[0][:, :, 1:] for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(merged, whole[0][:, :, 1:])
    torch.testing.assert_close(lse.logsumexp(0), whole[1][..., 1:])


@pytest.mark.parametrize(("size", "kernel", "dilation"), STAGES)
def test_extreme_logits_stay_finite(size, kernel, dilation):
    inputs = [x.detach().requires_grad_() for x in made(1, size, 2, 16, (kernel, kernel), torch.float32)]
    q, k, v, bias = inputs
    output = neighborhood_attention(q * 1e2, k * 1e2, v, kernel, dilation, bias=bias, scale=1.0, backend="torch")
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * 1.001
    assert all(x.isfinite().all() for x in gradients((output,), inputs))


@pytest.mark.parametrize(("size", "kernel", "dilation"), STAGES)
def test_equal_keys_give_the_mean_of_the_values_and_nan_propagates(size, kernel, dilation):
    ones = torch.ones(1, *size, 2, 16)
    torch.testing.assert_close(neighborhood_attention(ones, ones, ones * 3, kernel, dilation), ones * 3)
    for which in range(3):
        q, k, v = (x.clone() for x in made(1, size, 2, 16, dtype=torch.float32))
        (q, k, v)[which][0, 3, 4, 0] = math.nan
        expected = neighborhood_attention(q, k, v, kernel, dilation, backend="reference").isnan()
        found = neighborhood_attention(q, k, v, kernel, dilation, backend="torch").isnan()
        assert expected.any()
        assert found[expected].all()
        assert not found[:, :, :, 1].any()  # the other head


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_infinite_bias_forbids_keys(backend):
    q, k, v, bias = made(1, (6, 7), 2, 8, (3, 3))
    bias = torch.full_like(bias, -math.inf)
    bias[:, 2, 2] = 0  # each query sees itself only
    bias.requires_grad_()
    output = neighborhood_attention(q, k, v, 3, bias=bias, backend=backend)
    torch.testing.assert_close(output, v)
    assert torch.autograd.grad(output.sum(), bias)[0].eq(0).all()


def test_stride_of_the_kernel_gives_separate_windows():
    q, k, v = made(2, (6, 9), 2, 8)
    output = neighborhood_attention(q, k, v, 3, stride=3, backend="torch")
    q, k, v = (
        x.unflatten(2, (3, 3)).unflatten(1, (2, 3)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for x in (q, k, v)
    )
    expected = F.scaled_dot_product_attention(q, k, v).unflatten(4, (3, 3)).permute(0, 1, 4, 2, 5, 3, 6)
    torch.testing.assert_close(output, expected.reshape(output.shape))


def test_images_of_a_batch_do_not_mix():
    q, k, v, bias = made(3, (15, 15), 2, 16, (5, 5))
    together = neighborhood_attention(q, k, v, 5, bias=bias)
    alone = [neighborhood_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 5, bias=bias) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_deterministic_mode_repeats_the_gradients():
    inputs = [x.detach().requires_grad_() for x in made(2, (28, 28), 2, 16, (7, 7), torch.float32)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients((neighborhood_attention(*inputs[:3], 7, bias=inputs[3]),), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MISUSE = [
    ({"q": torch.zeros(2, 12, 32)}, r"q is .*\(2, 12, 32\): expected a floating tensor of \(B, L, heads, head_dim\)"),
    ({"q": torch.zeros(2, 12, 9, 2, 8, dtype=torch.int64)}, r"q is .*int64"),
    ({"q": torch.zeros(2, 0, 9, 2, 8)}, r"q is .*no size but the batch"),
    ({"k": torch.zeros(2, 9, 12, 2, 8)}, r"k is .*: expected the shape \(2, 12, 9, 2, 8\)"),
    ({"v": torch.zeros(2, 12, 9, 2, 4)}, r"v is .*: expected the shape \(2, 12, 9, 2, 8\)"),
    ({"v": torch.zeros(2, 12, 9, 2, 8, dtype=torch.float64)}, r"v is float64 .*: expected float32"),
    ({"kernel_size": 0}, r"kernel_size=0: expected an int of at least 1"),
    ({"kernel_size": (3, 3, 3)}, r"kernel_size=\(3, 3, 3\): .* one for each of the 2 axes of q"),
    ({"kernel_size": 3.0}, r"kernel_size=3.0: expected an int"),
    ({"dilation": (1, 0)}, r"dilation=\(1, 0\)"),
    ({"stride": "2"}, r"stride='2'"),
    ({"kernel_size": 11}, r"kernel_size=11 .* is 11, more than the 9 positions of axis 1 .*: pad the axis to 11"),
    ({"dilation": (5, 1)}, r"times dilation=5 is 15, more than the 12 positions of axis 0 .*: pad the axis to 15"),
    ({"stride": 4}, r"stride=4 on axis 0: expected at most kernel_size=3"),
    ({"bias": torch.zeros(2, 3, 3)}, r"bias is .*: expected the shape \(2, 5, 5\)"),
    ({"bias": torch.zeros(2, 5, 5, device="meta")}, r"bias is on meta: expected cpu"),
    ({"backend": "cuda"}, r"backend='cuda': expected one of auto, reference, torch, triton"),
    ({"backend": "triton"}, r"backend='triton' cannot run this neighborhood call: .*use backend='auto' or 'torch'"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v = made(2, (12, 9), 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**({"q": q, "k": k, "v": v, "kernel_size": 3} | change))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int = 1):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return neighborhood_attention(q, k, v, self.kernel_size, self.dilation, bias=self.bias).flatten(3)


def test_compiles_to_one_graph_for_each_size():
    layer = Layer(16, 2, 3, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in ((7, 9), (7, 11)):
        x = torch.randn(2, *size, 16)
        output, expected = compiled(x), layer(x)
        torch.testing.assert_close(output, expected)
        parameters = list(layer.parameters())
        torch.testing.assert_close(gradients((output,), parameters), gradients((expected,), parameters))


def test_exports_with_any_batch():
    layer = Layer(16, 2, 5).eval()
    x = torch.randn(5, 23, 11, 16)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_recorded_weights_give_the_output():
    layer = Layer(16, 2, 3, 2)
    x = torch.randn(2, 7, 9, 16)
    with record_attention(layer) as record:
        output = layer(x)
    torch.testing.assert_close(output, layer(x))
    (attention,) = record[""]
    values = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)[2].flatten(1, 2)
    gathered = torch.stack([image[index] for image, index in zip(values, attention.indices, strict=True)])
    mixed = torch.einsum("bhnk,bnkhd->bnhd", attention.weights, gathered)
    torch.testing.assert_close(mixed.reshape(output.shape), output)
