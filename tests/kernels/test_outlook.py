"""outlook_attention: both forms against the definition written as loops, special cases, and misuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import outlook_attention


def make_inputs(batch, size, heads, dim, kernel, stride, padding=None, dtype=torch.float64) -> tuple[Tensor, Tensor]:
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


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((5, 4), 3, 2, 1), ((4, 3), 3, 1, 1), ((1, 1), 3, 2, 1), ((4, 5), 2, 1, 0), ((5, 6), 2, 3, 1), ((7, 5), 5, 4, 2)],
)
def test_follows_the_definition(size, kernel, stride, padding, backend):
    logits, v = make_inputs(2, size, 2, 3, kernel, stride, padding)
    output = outlook_attention(logits, v, kernel, stride, padding, 0.3, backend=backend)
    torch.testing.assert_close(output, loops(logits, v, kernel, stride, padding, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_unfold_and_fold(backend):
    logits, v = make_inputs(2, (9, 7), 2, 16, 3, 2)
    columns = F.unfold(v.flatten(3).permute(0, 3, 1, 2), 3, padding=1, stride=2).unflatten(1, (2, 16, 9))
    mixed = torch.einsum("bpnij,bndjp->bndip", (logits * 16**-0.5).softmax(-1).flatten(1, 2), columns).flatten(1, 3)
    expected = F.fold(mixed, (9, 7), 3, padding=1, stride=2).permute(0, 2, 3, 1).unflatten(3, (2, 16))
    torch.testing.assert_close(outlook_attention(logits, v, 3, 2, backend=backend), expected)


def test_extreme_logits_choose_one_neighbour():
    logits, v = make_inputs(2, (7, 6), 2, 16, 3, 2, dtype=torch.float32)
    logits[..., 4] = 1e4  # the middle of the window
    alone = torch.full_like(logits, -math.inf)
    alone[..., 4] = 0
    outputs = [outlook_attention(x.requires_grad_(), v, 3, 2, scale=1.0) for x in (logits, alone)]
    torch.testing.assert_close(*outputs)
    for output, x in zip(outputs, (logits, alone), strict=True):
        assert torch.autograd.grad(output.square().sum(), x)[0].isfinite().all()


def test_equal_logits_average_each_window():
    output = outlook_attention(torch.zeros(1, 3, 3, 1, 9, 9), torch.ones(1, 9, 9, 1, 4), 3, stride=3, padding=0)
    torch.testing.assert_close(output, torch.ones(1, 9, 9, 1, 4))


MISUSE = [
    ({"v": torch.zeros(2, 6, 16)}, r"v is .*\(2, 6, 16\): expected a floating tensor of \(B, H, W, heads, head_dim\)"),
    ({"v": torch.zeros(2, 0, 6, 2, 16)}, r"v is .*no size but the batch to be 0"),
    ({"logits": torch.zeros(2, 5, 6, 2, 9, 9)}, r"logits is .*: expected the shape \(2, 3, 3, 2, 9, 9\)"),
    ({"logits": torch.zeros(2, 3, 3, 2, 9, 9).double()}, r"logits is float64 .*: expected float32"),
    ({"kernel_size": 0}, r"kernel_size=0: expected an int of at least 1"),
    ({"stride": 1.5}, r"stride=1.5: expected an int of at least 1"),
    ({"padding": 2}, r"padding=2: expected an int from 0 to kernel_size // 2, here 1"),
    ({"kernel_size": 9, "padding": 0}, r"kernel_size=9: larger than the padded map of v"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    logits, v = make_inputs(2, (6, 6), 2, 16, 3, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        outlook_attention(**({"logits": logits, "v": v, "kernel_size": 3, "stride": 2} | change))
