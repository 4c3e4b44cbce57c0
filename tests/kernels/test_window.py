"""window_attention: both forms against the definition written as loops, special cases, and misuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionattn.kernels import window_attention


def make_inputs(batch, size, heads, dim, window=None, dtype=torch.float64) -> tuple[Tensor, ...]:
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
    members = next(members for members in windows if i in members)
    seen = [(key, place) for place, key in enumerate(members) if key < length and (key < shift) == (i < shift)]
    return members.index(i), seen


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
    q, k, v, bias = make_inputs(2, size, 2, 3, window)
    bias = bias if extras in ("bias", "both") else None
    mask = some_keys(2, size) if extras in ("mask", "both") else None
    options = {"bias": bias, "mask": mask, "scale": 0.3, "backend": backend}
    actual = window_attention(q, k, v, window, shift, dilated, return_lse=True, **options)
    expected = loops(q, k, v, bias, mask, window, shift, dilated, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(window_attention(q, k, v, window, shift, dilated, **options), expected[0])


def test_two_key_sets_merge_by_their_log_sum_exp():
    q, k, v, bias = make_inputs(2, (8, 8), 2, 16, (4, 4))
    left = torch.arange(8).expand(1, 8, 8) % 4 < 2
    whole, *parts = (
        window_attention(q, k, v, 4, bias=bias, mask=mask, return_lse=True, backend="torch")
        for mask in (None, left, ~left)
    )
    lse = torch.stack([part[1] for part in parts])
    shares = lse.softmax(0).movedim(2, -1)[..., None]
    torch.testing.assert_close(sum(share * part[0] for share, part in zip(shares, parts, strict=True)), whole[0])
    torch.testing.assert_close(lse.logsumexp(0), whole[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_infinite_bias_forbids_keys(backend):
    q, k, v, bias = make_inputs(1, (6, 7), 2, 8, (3, 3))
    bias = torch.full_like(bias, -math.inf)
    bias.diagonal(dim1=1, dim2=2).zero_()  # each query sees itself only
    bias.requires_grad_()
    output = window_attention(q, k, v, 3, 1, bias=bias, backend=backend)
    torch.testing.assert_close(output, v)
    assert torch.autograd.grad(output.sum(), bias)[0].eq(0).all()


def test_one_window_over_a_large_map_takes_bounded_memory():
    """64 x 64 tokens have 16 Mi logits a head, 64 MiB; chunks of queries take 3."""
    q, k, v, bias = (x.detach().requires_grad_() for x in make_inputs(1, (20, 20), 1, 16, (20, 20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.kernels.window.CHUNK", {"forward": 2**14, "backward": 2**14})
        output = window_attention(q, k, v, 20, bias=bias)
    expected = F.scaled_dot_product_attention(*(x.flatten(1, 2).mT.mT.transpose(1, 2) for x in (q, k, v)), bias[None])
    torch.testing.assert_close(output.flatten(1, 2).transpose(1, 2), expected)


@pytest.mark.parametrize("window", [(32, 32), (32, 4), (8, 8)])
def test_reference_copies_no_key_for_each_query(window):
    """What is recorded takes the memory of its weights, not that times the dimension."""
    q = torch.zeros(1, 32, 32, 1, 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            result = op(*args, **(kwargs or {}))
            largest = max(largest, result.numel())
            return result

    with Watch():
        window_attention(q, q, q, window, backend="reference")
    assert largest == max(q.numel() + 64, 32 * 32 * math.prod(window))


MISUSE = [
    ({"q": torch.zeros(2, 12, 32)}, r"q is .*\(2, 12, 32\): expected a floating tensor of \(B, H, W, heads, head_dim"),
    ({"q": torch.zeros(2, 0, 9, 2, 8)}, r"q is .*no size but the batch"),
    (
        {"k": torch.zeros(2, 9, 12, 2, 8), "v": torch.zeros(2, 9, 12, 2, 8)},
        r"k is .*: expected the shape of q, \(2, 12",
    ),
    ({"v": torch.zeros(2, 12, 9, 2, 8, dtype=torch.float64)}, r"v is float64 .*: expected float32"),
    ({"window_size": 0}, r"window_size=0: expected an int of at least 1"),
    ({"window_size": (3, 3, 3)}, r"window_size=\(3, 3, 3\): expected an int .* one for each of the 2 axes"),
    ({"window_size": 3.0}, r"window_size=3.0: expected an int"),
    ({"shift": 3}, r"shift=3: expected less than window_size=3"),
    ({"shift": -1}, r"shift=-1: expected an int of at least 0"),
    ({"shift": 1, "dilated": True}, r"shift=1 with dilated=True: expected one of them"),
    ({"bias": torch.zeros(2, 3, 3)}, r"bias is .*: expected the shape \(2, 9, 9\)"),
    ({"bias": torch.zeros(2, 9, 9, device="meta")}, r"bias is on meta: expected cpu"),
    ({"mask": torch.zeros(3, 12, 9, dtype=torch.bool)}, r"mask is .*: expected the shape \(2, 12, 9\)"),
    ({"mask": torch.zeros(2, 12, 9)}, r"mask is float32 .*: expected bool"),
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v = make_inputs(2, (12, 9), 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        window_attention(**({"q": q, "k": k, "v": v, "window_size": 3} | change))
