"""neighborhood_attention: both forms against the definition written as loops, special cases, and misuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import _dispatch, neighborhood, neighborhood_attention


def make_inputs(batch, size, heads, dim, kernel=None, dtype=torch.float64) -> tuple[Tensor, ...]:
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
    q, k, v, bias = make_inputs(1, size, 2, 3, kernel)
    bias = bias if biased else None
    options = {"bias": bias, "scale": 0.3, "return_lse": True, "backend": backend}
    output = neighborhood_attention(q, k, v, kernel, dilation, stride, **options)
    torch.testing.assert_close(output, loops(q, k, v, bias, kernel, dilation, stride, 0.3), rtol=1e-12, atol=1e-12)


def test_two_key_sets_merge_by_their_log_sum_exp():
    q, k, v, bias = make_inputs(2, (7, 7), 2, 16, (7, 7))
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


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_infinite_bias_forbids_keys(backend):
    q, k, v, bias = make_inputs(1, (6, 7), 2, 8, (3, 3))
    bias = torch.full_like(bias, -math.inf)
    bias[:, 2, 2] = 0  # each query sees itself only
    bias.requires_grad_()
    output = neighborhood_attention(q, k, v, 3, bias=bias, backend=backend)
    torch.testing.assert_close(output, v)
    assert torch.autograd.grad(output.sum(), bias)[0].eq(0).all()


def test_stride_of_the_kernel_gives_separate_windows():
    q, k, v = make_inputs(2, (6, 9), 2, 8)
    output = neighborhood_attention(q, k, v, 3, stride=3, backend="torch")
    q, k, v = (
        x.unflatten(2, (3, 3)).unflatten(1, (2, 3)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for x in (q, k, v)
    )
    expected = F.scaled_dot_product_attention(q, k, v).unflatten(4, (3, 3)).permute(0, 1, 4, 2, 5, 3, 6)
    torch.testing.assert_close(output, expected.reshape(output.shape))


@pytest.mark.parametrize("return_lse", [False, True])
def test_images_in_parts_are_the_same(return_lse, monkeypatch):
    monkeypatch.setattr(_dispatch, "takes_plain", lambda x: True)
    results = []
    for budget in (neighborhood.GATHERED, {"cpu": 1}):  # one image at a time
        monkeypatch.setattr(neighborhood, "GATHERED", budget)
        *maps, bias = (x.requires_grad_() for x in make_inputs(3, (9, 10), 2, 8, (3, 3)))
        output = neighborhood_attention(*maps, 3, bias=bias, return_lse=return_lse, backend="torch")
        outputs = output if return_lse else (output,)
        results.append([*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), [*maps, bias])])
        with torch.no_grad():
            again = neighborhood_attention(*maps, 3, bias=bias, return_lse=return_lse, backend="torch")
        torch.testing.assert_close(again, output)
    torch.testing.assert_close(*results)


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
]


@pytest.mark.parametrize(("change", "message"), MISUSE)
def test_misuse_is_refused_with_a_reason(change, message):
    q, k, v = make_inputs(2, (12, 9), 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**({"q": q, "k": k, "v": v, "kernel_size": 3} | change))
