"""routing_attention: the reference against the definition written as loops, the torch form against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn.kernels import routing_attention

SETTINGS = settings(max_examples=40, deadline=None)


def packed(batch: int, h: int, w: int, heads: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v as a model makes them: slices of one projection."""
    generator = torch.Generator().manual_seed(h * 1000 + w * 10 + heads)
    qkv = torch.randn(batch, h, w, 3 * heads * dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv.unflatten(-1, (3, heads, dim)).unbind(3)


def loops(q, k, v, grid, topk, scale, routes=None, route_weights=None) -> Tensor:
    """The definition, one token and one head at a time."""
    rows, columns = grid
    output = q.new_zeros(*q.shape[:4], v.shape[4])

    def region(x: Tensor, image: int, index: int) -> Tensor:
        h, w = x.shape[1] // rows, x.shape[2] // columns
        row, column = divmod(index, columns)
        return x[image, row * h : (row + 1) * h, column * w : (column + 1) * w]

    for image in range(len(q)):
        for index in range(rows * columns):
            mean = region(q, image, index).mean((0, 1)).flatten()
            products = [mean @ region(k, image, other).mean((0, 1)).flatten() for other in range(rows * columns)]
            chosen = torch.stack(products).topk(topk).indices if routes is None else routes[image, index]
            factors = torch.ones(topk, dtype=q.dtype) if route_weights is None else route_weights[image, index]
            pairs = list(zip(chosen.tolist(), factors, strict=True))
            keys = torch.cat([region(k, image, other).flatten(0, 1) * factor for other, factor in pairs])
            values = torch.cat([region(v, image, other).flatten(0, 1) * factor for other, factor in pairs])
            queries, target = region(q, image, index), region(output, image, index)
            for y in range(queries.shape[0]):
                for x in range(queries.shape[1]):
                    for head in range(q.shape[3]):
                        weights = (keys[:, head] @ queries[y, x, head] * scale).softmax(0)
                        target[y, x, head] = weights @ values[:, head]
    return output


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("grid", "topk"), [((2, 3), 1), ((3, 2), 4), ((2, 2), 4), ((1, 1), 1), ((6, 6), 5)])
def test_follows_the_definition(grid, topk, backend):
    q, k, v = packed(2, 6, 6, heads=2, dim=4)
    output = routing_attention(q, k, v, grid, topk, scale=0.3, backend=backend)
    torch.testing.assert_close(output, loops(q, k, v, grid, topk, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_follows_the_definition_with_pooled_keys_and_soft_routes(backend):
    q, _, _ = packed(2, 6, 8, heads=2, dim=4)
    _, k, _ = packed(2, 3, 4, heads=2, dim=4)
    _, _, v = packed(2, 3, 4, heads=2, dim=5)
    routes = torch.randint(12, (2, 12, 3), generator=torch.Generator().manual_seed(0))  # repeated regions too
    weights = torch.rand(2, 12, 3, dtype=torch.float64)
    soft = routing_attention(q, k, v, (3, 4), 3, routes=routes, route_weights=weights, backend=backend)
    torch.testing.assert_close(soft, loops(q, k, v, (3, 4), 3, 0.5, routes, weights), rtol=1e-12, atol=1e-12)
    hard = routing_attention(q, k, v, (3, 4), 3, routes=routes, backend=backend)
    torch.testing.assert_close(hard, loops(q, k, v, (3, 4), 3, 0.5, routes), rtol=1e-12, atol=1e-12)


@st.composite
def calls(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    h, w, key_h, key_w = (n * draw(st.integers(1, 4)) for n in (rows, columns, rows, columns))
    if draw(st.booleans()):
        key_h, key_w = h, w
    sizes = {"heads": draw(st.integers(1, 3)), "dim": draw(st.sampled_from([16, 24, 32, 48, 64, 96, 128]))}
    topk = draw(st.integers(1, rows * columns))
    batch = draw(st.integers(0, 3))
    form = draw(st.sampled_from(["own", "given", "weighted"]))
    return batch, (h, w), (key_h, key_w), (rows, columns), topk, sizes, form


def agree(call, dtype: torch.dtype) -> None:
    """Torch form and reference: the same output and the same gradient of every input."""
    batch, size, key_size, grid, topk, sizes, form = call
    q = packed(batch, *size, **sizes, dtype=dtype)[0]
    _, k, v = packed(batch, *(size if form == "own" else key_size), **sizes, dtype=dtype)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]  # detach keeps the strides of the packed projection
    options = {}
    if form != "own":
        options["routes"] = torch.rand(batch, grid[0] * grid[1], grid[0] * grid[1]).topk(topk).indices
    if form == "weighted":
        options["route_weights"] = torch.rand(batch, grid[0] * grid[1], topk, dtype=dtype).requires_grad_()
        inputs.append(options["route_weights"])
    found, expected = (
        routing_attention(*inputs[:3], grid, topk, **options, backend=backend) for backend in ("torch", "reference")
    )
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    assert found.shape == (batch, *size, sizes["heads"], sizes["dim"])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float64(call):
    agree(call, torch.float64)


@SETTINGS
@given(calls())
def test_torch_form_agrees_with_the_reference_float32(call):
    agree(call, torch.float32)


@SETTINGS
@given(calls(), st.integers(1, 2**17))
def test_chunks_of_any_size_give_the_same(call, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.routing.CHUNK_BYTES", {"cpu": budget})
        agree(call, torch.float64)


# One call for each form of the torch path: masked, selected with matmuls, selected and fused, global.
FORMS = [((14, 14), 7, 16, 8), ((28, 28), 7, 4, 4), ((64, 64), 2, 1, 2), ((7, 7), 1, 1, 2)]


@pytest.mark.parametrize(("size", "regions", "topk", "heads"), FORMS)
def test_every_form_agrees_with_the_reference(size, regions, topk, heads):
    agree((2, size, size, (regions, regions), topk, {"heads": heads, "dim": 32}, "own"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "regions", "topk", "heads"), FORMS[:2] + FORMS[3:])
def test_half_precision_is_close_to_the_reference_in_float64(size, regions, topk, heads, dtype):
    q, k, v = packed(2, *size, heads, 32, dtype)
    output = routing_attention(q, k, v, regions, topk, backend="torch")
    expected = routing_attention(q.double(), k.double(), v.double(), regions, topk, backend="reference")
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_computes_in_its_dtype_and_routes_in_float32(backend):
    q, k, v = (x.requires_grad_() for x in packed(2, 14, 14, 2, 16, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        output = routing_attention(q, k, v, 7, 4, backend=backend)
    expected = routing_attention(q, k, v, 7, 4, backend="reference")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=3e-2)
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in torch.autograd.grad(output.sum(), (q, k, v)))


@pytest.mark.parametrize(("topk", "weighted"), [(1, False), (3, False), (2, True)])
def test_gradients_in_float64(topk, weighted):
    q, k, v = (x.detach().requires_grad_() for x in packed(2, 4, 6, 2, 3))
    routes = torch.rand(2, 6, 6).topk(topk).indices
    weights = torch.rand(2, 6, topk, dtype=torch.float64, requires_grad=True) if weighted else None

    def call(q, k, v, weights=None):
        return routing_attention(q, k, v, (2, 3), topk, routes=routes, route_weights=weights, backend="torch")

    assert torch.autograd.gradcheck(call, (q, k, v, weights) if weighted else (q, k, v), fast_mode=True)


def test_gradient_of_some_inputs_only():
    q, k, v = packed(2, 6, 6, 2, 4)
    v = v.detach().requires_grad_()
    ours, theirs = (
        gradients(routing_attention(q, k, v, 3, 2, backend=backend), [v])[0] for backend in ("torch", "reference")
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("size", "regions", "topk", "heads"), FORMS)
def test_extreme_logits_stay_finite(size, regions, topk, heads):
    q, k, v = packed(1, *size, heads, 16, torch.float32)
    output = routing_attention(q * 1e4, k * 1e4, v, regions, topk, scale=1.0)
    assert output.isfinite().all()
    assert output.abs().max() <= v.abs().max() * 1.001


@pytest.mark.parametrize(("size", "regions", "topk", "heads"), FORMS)
def test_equal_tokens_give_their_value_and_nan_propagates(size, regions, topk, heads):
    ones = torch.ones(1, *size, heads, 16)
    torch.testing.assert_close(routing_attention(ones, ones, ones * 3, regions, topk), ones * 3)
    q, k, v = packed(1, *size, heads, 16, torch.float32)
    q = q.clone()
    q[0, 0, 0, 0, 0] = float("nan")
    assert routing_attention(q, k, v, regions, topk)[0, 0, 0, 0].isnan().all()


def test_images_of_a_batch_do_not_mix():
    q, k, v = packed(3, 14, 14, 2, 16)
    together = routing_attention(q, k, v, 7, 4)
    alone = torch.cat([routing_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 7, 4) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_deterministic_mode_repeats_the_gradients():
    inputs = [x.detach().requires_grad_() for x in packed(2, 28, 28, 2, 16, torch.float32)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(routing_attention(*inputs, 7, 4), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MISUSE = [
    ({"regions": 5}, r"q is a map of 12 x 12 tokens: expected multiples of regions=5"),
    ({"regions": 0}, r"regions=0"),
    ({"regions": (3, 3, 3)}, r"regions=\(3, 3, 3\): expected a positive int or \(rows, columns\)"),
    ({"topk": 10}, r"topk=10: expected 1 to 9"),
    ({"topk": 0}, r"topk=0: expected 1 to 9"),
    ({"q": torch.zeros(2, 12, 12, 16)}, r"q is float32 of \(2, 12, 12, 16\): expected .*\(B, H, W, heads, head_dim\)"),
    ({"q": torch.zeros(2, 12, 12, 2, 8, dtype=torch.int64)}, r"q is int64"),
    ({"q": torch.zeros(2, 0, 12, 2, 8)}, r"q is .*: expected no size but the batch to be 0"),
    ({"k": torch.zeros(2, 12, 12, 2, 4)}, r"k is .*4\): expected the shape \(2, 12, 12, 2, 8\)"),
    ({"v": torch.zeros(2, 6, 12, 2, 8)}, r"v is .*: expected the shape \(2, 12, 12, 2, 8\)"),
    ({"v": torch.zeros(2, 12, 12, 2, 8, dtype=torch.float64)}, r"v is float64 of .*: expected float32"),
    ({"v": torch.zeros(2, 12, 12, 2, 8, device="meta")}, r"v is on meta: expected cpu"),
    ({"routes": torch.zeros(2, 9, 3, dtype=torch.int64)}, r"routes is int64 .*: expected the shape \(2, 9, 2\)"),
    ({"routes": torch.zeros(2, 9, 2)}, r"routes is float32 .*: expected int64"),
    ({"routes": torch.full((2, 9, 2), 9)}, r"routes has values from 9 to 9: expected 0 to 8"),
    ({"route_weights": torch.ones(2, 9, 2)}, r"route_weights was given without routes"),
    ({"backend": "cuda"}, r"backend='cuda': expected one of auto, reference, torch, triton"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v = packed(2, 12, 12, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        routing_attention(**({"q": q, "k": k, "v": v, "regions": 3, "topk": 2} | change))


class Layer(nn.Module):
    def __init__(self, regions: int, topk: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(heads * 8, 3 * heads * 8)
        self.regions, self.topk, self.heads = regions, topk, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 8)).unbind(3)
        return routing_attention(q, k, v, self.regions, self.topk).flatten(3)


@pytest.mark.parametrize(("size", "regions", "topk", "heads"), FORMS)
def test_compiles_to_one_graph(size, regions, topk, heads):
    layer = Layer(regions, topk, heads)
    x = torch.randn(2, *size, heads * 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, expected = compiled(x), layer(x)
    torch.testing.assert_close(output, expected)
    weight = layer.qkv.weight
    torch.testing.assert_close(gradients(output, [weight]), gradients(expected, [weight]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "regions", "topk", "heads"), FORMS)
def test_exports_with_any_batch(size, regions, topk, heads):
    layer = Layer(regions, topk, heads).eval()
    x = torch.randn(5, *size, heads * 8)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))
