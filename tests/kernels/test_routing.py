"""routing_attention: both forms against the definition written as loops, and misuse."""

import pytest
import torch
from torch import Tensor

from visionattn.kernels import routing_attention


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
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v = packed(2, 12, 12, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        routing_attention(**({"q": q, "k": k, "v": v, "regions": 3, "topk": 2} | change))
