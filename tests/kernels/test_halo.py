"""halo_attention: reference against the definition written as loops, torch form against the reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import halo_attention, record_attention

SETTINGS = settings(max_examples=20, deadline=None)


def made(batch, size, heads, dim, block, halo, dtype=torch.float64, step=1) -> list[Tensor]:
    """q, of a map `step` times coarser, k and v, slices of one projection, and the tables of both axes."""
    generator = torch.Generator().manual_seed(sum(size) * 10 + heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = draw(batch, *(-(-length // step) for length in size), heads, dim)
    k, v = draw(batch, *size, 2 * heads * dim).unflatten(-1, (2, heads, dim)).unbind(-3)
    rows = 2 * (block + 2 * halo) - 1
    return [q, k, v, draw(rows, dim), draw(rows, dim)]


def loops(q, k, v, rel_height, rel_width, block, halo, scale) -> tuple[Tensor, Tensor]:
    """The definition, one query and one head at a time, keys outside of the map being zeros."""
    step = next(n for n in range(1, block + 1) if block % n == 0 and -(-k.shape[1] // n) == q.shape[1]
                and -(-k.shape[2] // n) == q.shape[2])  # fmt: skip
    side, per_block = block + 2 * halo, block // step
    output, lse = torch.zeros_like(q), q.new_zeros(len(q), q.shape[3], *q.shape[1:3])
    for image, y, x, head in itertools.product(*map(range, (len(q), *q.shape[1:4]))):
        query, logits, values = q[image, y, x, head], [], []
        for i, j in itertools.product(range(side), range(side)):
            row, column = (place // per_block * block - halo + n for place, n in ((y, i), (x, j)))
            inside = 0 <= row < k.shape[1] and 0 <= column < k.shape[2]
            logit = query @ k[image, row, column, head] * scale if inside else query.sum() * 0
            for table, place, n in ((rel_height, y, i), (rel_width, x, j)):
                if table is not None:
                    logit = logit + query @ table[side - 1 + n - place % per_block]
            logits.append(logit)
            values.append(v[image, row, column, head] if inside else torch.zeros_like(query))
        output[image, y, x, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
        lse[image, head, y, x] = torch.stack(logits).logsumexp(0)
    return output, lse


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


def attend(inputs: list[Tensor], block: int, halo: int, backend: str = "torch", **options) -> tuple[Tensor, Tensor]:
    q, k, v, *tables = inputs
    return halo_attention(q, k, v, block, halo, *tables, return_lse=True, backend=backend, **options)


# Map, block, halo, step.
CALLS = [
    ((6, 8), 2, 1, 1),
    ((5, 7), 4, 1, 1),
    ((5, 7), 4, 1, 2),
    ((3, 2), 4, 2, 4),
    ((4, 4), 2, 0, 1),
    ((1, 1), 1, 0, 1),
    ((2, 3), 4, 3, 1),
]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tables", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("size", "block", "halo", "step"), CALLS)
def test_follows_the_definition(size, block, halo, step, tables, backend):
    q, k, v, *rel = made(1, size, 2, 3, block, halo, step=step)
    rel = [table if given else None for table, given in zip(rel, tables, strict=True)]
    found = attend([q, k, v, *rel], block, halo, backend, scale=0.3)
    torch.testing.assert_close(found, loops(q, k, v, *rel, block, halo, 0.3), rtol=1e-12, atol=1e-12)


@st.composite
def calls(draw):
    size = tuple(draw(st.integers(1, 17)) for _ in range(2))
    block, halo = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    step = draw(st.sampled_from([n for n in (1, 2, 3) if block % n == 0]))
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))
    return draw(st.integers(0, 3)), size, heads, dim, block, halo, step, draw(st.booleans())


def agree(call, dtype: torch.dtype) -> None:
    """Torch form and reference: the same output, log-sum-exp and gradient of every input."""
    batch, size, heads, dim, block, halo, step, relative = call
    inputs = [x.detach().requires_grad_() for x in made(batch, size, heads, dim, block, halo, dtype, step)]
    inputs = inputs if relative else inputs[:3]
    found, expected = (attend(inputs, block, halo, backend) for backend in ("torch", "reference"))
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-4}[dtype]
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
        patch.setattr("visionattn.kernels.halo.CHUNK", budget)
        agree(call, torch.float64)


STAGES = [((32, 32), 8, 3, 1), ((16, 16), 8, 3, 2), ((8, 8), 8, 3, 1), ((19, 23), 8, 2, 1)]


@pytest.mark.parametrize(("size", "block", "halo", "step"), STAGES)
def test_stages_of_models_agree_with_the_reference(size, block, halo, step):
    agree((2, size, 2, 32, block, halo, step, True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_reference_in_float64(dtype):
    inputs = made(2, (13, 17), 2, 32, 4, 1, dtype)
    inputs = [x.detach().requires_grad_() for x in (*inputs[:3], *(table * 0.2 for table in inputs[3:]))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (output, lse), expected = attend(inputs, 4, 1), attend(exact, 4, 1, "reference")
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients((output,), inputs), gradients(expected[:1], exact), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_autocast_computes_in_its_dtype():
    inputs = [x.requires_grad_() for x in made(1, (9, 10), 2, 16, 4, 1, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        output = halo_attention(*inputs[:3], 4, 1, *inputs[3:])
    expected = attend(inputs, 4, 1, "reference")[0]
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() <= 3e-2 * expected.norm()
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize(("size", "block", "halo", "step"), CALLS[1:4])
def test_gradients_in_float64(size, block, halo, step):
    inputs = [x.detach().requires_grad_() for x in made(1, size, 2, 3, block, halo, step=step)]
    assert torch.autograd.gradcheck(lambda *x: attend(x, block, halo), inputs, fast_mode=True)


@pytest.mark.parametrize("which", range(5))
def test_gradient_of_one_input_only(which):
    inputs = made(1, (9, 8), 2, 4, 4, 1)
    inputs[which] = inputs[which].detach().requires_grad_()
    ours, theirs = (gradients(attend(inputs, 4, 1, backend), [inputs[which]]) for backend in ("torch", "reference"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("size", "block", "halo", "step"), STAGES)
def test_extreme_logits_stay_finite(size, block, halo, step):
    inputs = [x.detach().requires_grad_() for x in made(1, size, 2, 16, block, halo, torch.float32, step)]
    q, k, v, *tables = inputs
    output, _ = attend([q * 1e2, k * 1e2, v, *tables], block, halo, scale=1.0)
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * 1.001
    assert all(x.isfinite().all() for x in gradients((output,), inputs))


def test_keys_outside_of_the_map_are_zeros_that_take_part():
    ones = torch.ones(1, 2, 2, 1, 16)
    output, lse = attend([torch.zeros_like(ones), ones, ones], 2, 1)
    torch.testing.assert_close(output, ones / 4)  # 4 of 16 keys are in the map
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(16)))


@pytest.mark.parametrize("which", range(3))
def test_nan_propagates(which):
    inputs = made(1, (9, 10), 2, 16, 4, 1, torch.float32)
    inputs[which] = inputs[which].clone()
    inputs[which][0, 3, 4, 0] = math.nan
    found, expected = (attend(inputs, 4, 1, backend)[0].isnan() for backend in ("torch", "reference"))
    assert expected.any()
    assert found[expected].all()
    assert not found[:, :, :, 1].any()  # the other head


def test_images_of_a_batch_do_not_mix():
    q, k, v, *tables = made(3, (15, 15), 2, 16, 4, 1)
    alone = [attend([q[i : i + 1], k[i : i + 1], v[i : i + 1], *tables], 4, 1)[0] for i in range(3)]
    torch.testing.assert_close(attend([q, k, v, *tables], 4, 1)[0], torch.cat(alone))


def test_deterministic_mode_repeats_the_gradients():
    inputs = [x.detach().requires_grad_() for x in made(2, (28, 28), 2, 16, 8, 3, torch.float32)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(attend(inputs, 8, 3), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MISUSE = [
    ({"q": torch.zeros(2, 12, 32)}, r"q is .*: expected a floating tensor of \(B, H, W, heads, head_dim"),
    ({"q": torch.zeros(2, 5, 9, 2, 8)}, r"q is a map of 5 x 9 and k of 12 x 9: expected the same size, or .*"),
    ({"v": torch.zeros(2, 12, 9, 2, 8, dtype=torch.float64)}, r"v is float64 .*: expected float32"),
    ({"block_size": 0}, r"block_size=0: expected an int of at least 1"),
    ({"block_size": (4, 4)}, r"block_size=\(4, 4\): expected an int"),
    ({"halo_size": -1}, r"halo_size=-1: expected an int of at least 0"),
    ({"rel_height": torch.zeros(5, 8)}, r"rel_height is .*: expected the shape \(11, 8\)"),
    ({"rel_width": torch.zeros(11, 8, device="meta")}, r"rel_width is on meta: expected cpu"),
    ({"backend": "cuda"}, r"backend='cuda': expected one of auto, reference, torch, triton"),
    ({"backend": "triton"}, r"backend='triton' cannot run this halo call: .*use backend='auto' or 'torch'"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v, *_ = made(2, (12, 9), 2, 8, 4, 1, torch.float32)
    with pytest.raises(ValueError, match=message):
        halo_attention(**({"q": q, "k": k, "v": v, "block_size": 4, "halo_size": 1} | change))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, block_size: int, halo_size: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.tables = nn.Parameter(torch.randn(2, 2 * (block_size + 2 * halo_size) - 1, dim // heads))
        self.heads, self.sizes = heads, (block_size, halo_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return halo_attention(q, k, v, *self.sizes, *self.tables.unbind()).flatten(3)


def test_compiles_to_one_graph_for_each_size():
    layer = Layer(16, 2, 4, 1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in ((7, 9), (7, 11)):
        x = torch.randn(2, *size, 16)
        output, expected = compiled(x), layer(x)
        torch.testing.assert_close(output, expected)
        parameters = list(layer.parameters())
        torch.testing.assert_close(gradients((output,), parameters), gradients((expected,), parameters))


def test_exports_with_any_batch():
    layer = Layer(16, 2, 4, 1).eval()
    x = torch.randn(5, 23, 11, 16)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_recorded_weights_give_the_output():
    layer = Layer(16, 2, 4, 1)
    x = torch.randn(2, 7, 9, 16)
    with record_attention(layer) as record:
        output = layer(x)
    torch.testing.assert_close(output, layer(x))
    (attention,) = record[""]
    values = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)[2].flatten(1, 2)
    gathered = torch.stack([image[index] for image, index in zip(values, attention.indices, strict=True)])
    mixed = torch.einsum("bhnk,bnkhd->bnhd", attention.weights, gathered)
    torch.testing.assert_close(mixed.reshape(output.shape), output)
