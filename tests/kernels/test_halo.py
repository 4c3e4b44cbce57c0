"""halo_attention: both forms against the definition written as loops, special cases, and misuse."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from visionattn.kernels import halo_attention


def make_inputs(batch, size, heads, dim, block, halo, dtype=torch.float64, step=1) -> list[Tensor]:
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
    q, k, v, *rel = make_inputs(1, size, 2, 3, block, halo, step=step)
    rel = [table if wanted else None for table, wanted in zip(rel, tables, strict=True)]
    actual = attend([q, k, v, *rel], block, halo, backend, scale=0.3)
    torch.testing.assert_close(actual, loops(q, k, v, *rel, block, halo, 0.3), rtol=1e-12, atol=1e-12)


def test_keys_outside_of_the_map_are_zeros_that_take_part():
    ones = torch.ones(1, 2, 2, 1, 16)
    output, lse = attend([torch.zeros_like(ones), ones, ones], 2, 1)
    torch.testing.assert_close(output, ones / 4)  # 4 of 16 keys are in the map
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(16)))


MISUSE = [
    ({"q": torch.zeros(2, 12, 32)}, r"q is .*: expected a floating tensor of \(B, H, W, heads, head_dim"),
    ({"q": torch.zeros(2, 5, 9, 2, 8)}, r"q is a map of 5 x 9 and k of 12 x 9: expected the same size, or .*"),
    ({"v": torch.zeros(2, 12, 9, 2, 8, dtype=torch.float64)}, r"v is float64 .*: expected float32"),
    ({"block_size": 0}, r"block_size=0: expected an int of at least 1"),
    ({"block_size": (4, 4)}, r"block_size=\(4, 4\): expected an int"),
    ({"halo_size": -1}, r"halo_size=-1: expected an int of at least 0"),
    ({"rel_height": torch.zeros(5, 8)}, r"rel_height is .*: expected the shape \(11, 8\)"),
    ({"rel_width": torch.zeros(11, 8, device="meta")}, r"rel_width is on meta: expected cpu"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v, *_ = make_inputs(2, (12, 9), 2, 8, 4, 1, torch.float32)
    with pytest.raises(ValueError, match=message):
        halo_attention(**({"q": q, "k": k, "v": v, "block_size": 4, "halo_size": 1} | change))
