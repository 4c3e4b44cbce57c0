"""Attention through a matrix of channels by channels, linear in the number of tokens.

Three patterns. Of channels, each of which attends to those of its group, its features being all tokens:
channel_attention: Ding et al., DaViT: Dual Attention Vision Transformers, ECCV 2022, https://arxiv.org/abs/2204.03645;
cross_covariance_attention: El-Nouby et al., XCiT: Cross-Covariance Image Transformers, NeurIPS 2021,
    https://arxiv.org/abs/2106.09681.
Of tokens, whose products with keys are weights without a softmax, so that keys and values can be multiplied first:
linear_attention: Katharopoulos et al., Transformers are RNNs, ICML 2020, https://arxiv.org/abs/2006.16236.

All are two matmuls around a matrix of head_dim x head_dim, and have no Triton kernel: none has been measured against
the matmuls yet.

Sizes in comments: B images, L tokens, N groups (heads), D channels of a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.kernels import _record
from visionattn.kernels._check import check_alike, check_tensor, precise
from visionattn.kernels._dispatch import Forms, dispatch
from visionattn.kernels._function import Function
from visionattn.kernels._plain import together

__all__ = ["channel_attention", "cross_covariance_attention", "linear_attention"]

EPSILON = 1e-12  # least norm, as in torch.nn.functional.normalize
LARGE = 8 * 2**20  # bytes of a map


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, None]:
    weights = torch.einsum("blnd,blne->bnde", q * scale, k).softmax(-1)
    return torch.einsum("bnde,blne->blnd", weights, v), weights, None


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _mix((_products(q, k) * scale).softmax(-1), v)


def _cross_reference(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, None]:
    q, k = (torch.nn.functional.normalize(x, dim=1, eps=EPSILON) for x in (q, k))
    weights = (torch.einsum("blnd,blne->bnde", q, k) * temperature).softmax(-1)
    return torch.einsum("bnde,blne->blnd", weights, v), weights, None


def _cross_on_cpu(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return _mix((_cosines(q, k) * temperature).softmax(-1), v)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = together(_groups, q, k, v)
    products = _GroupProducts.run(q.flatten(0, 1), k.flatten(0, 1)).view(*q.shape[:2], q.shape[3], k.shape[3])
    return _mix_groups(products * scale, v)


def _cross_plain(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = together(_groups, q, k, v)
    products = _GroupProducts.run(q.flatten(0, 1), k.flatten(0, 1)).view(*q.shape[:2], q.shape[3], k.shape[3])
    of_q, of_k = (_norm(x, 2) for x in (q, k))
    return _mix_groups(products / of_q[..., :, None] / of_k[..., None, :] * temperature, v)


def _linear_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, None]:
    if not _record.active():  # what runs under torch.func and TorchScript too: linear in tokens
        return torch.einsum("bqnd,bnde->bqne", q, torch.einsum("bknd,bkne->bnde", k, v) / k.shape[1]), None, None
    weights = torch.einsum("bqnd,bknd->bnqk", q, k) / k.shape[1]
    return torch.einsum("bnqk,bknd->bqnd", weights, v), weights, None


def _linear_strip(rows: int, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple]]:
    yield from ((first, (q[:, first : first + rows], k, v)) for first in range(0, q.shape[1], rows))


def _linear_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _mix(_products(v, k) / k.shape[1], q)


def _linear_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = together(_groups, q, k, v)
    products = _GroupProducts.run(k.flatten(0, 1), v.flatten(0, 1)).view(*k.shape[:2], k.shape[3], v.shape[3])
    return (q @ (products / k.shape[2]).to(q.dtype)).transpose(1, 2)


def _groups(x: Tensor) -> Tensor:
    """[B, L, P, N, D] -> [P, B, N, L, D], copied."""
    return x.permute(2, 0, 3, 1, 4).contiguous()


class _GroupProducts(Function):
    """[n, L, D], [n, L, D] -> [n, D, D] in float32 at least: those of many tokens are too large for 16 bits."""

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        if q.is_cuda and q.dtype != precise(q) and not torch.version.hip:
            return torch.bmm(q.mT, k, out_dtype=torch.float32)
        return q.to(precise(q)).mT @ k.to(precise(q))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        grad = grad.to(q.dtype)
        return k @ grad.mT, q @ grad


def _mix_groups(logits: Tensor, v: Tensor) -> Tensor:
    """[B, N, D, D], [B, N, L, D] -> [B, L, N, D]"""
    return (v @ logits.softmax(-1).to(v.dtype).mT).transpose(1, 2)


def _cosines(q: Tensor, k: Tensor) -> Tensor:
    """[B, L, N, D], [B, L, N, D] -> cosines of the channels over the tokens: [B, N, D, D]

    Dividing the products by the norms saves the two normalised maps.
    """
    if _large(q):
        return _Cosines.run(q, k)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))  # group by group, as all that follows reads
    return _products(q, k) / _norm(q)[..., :, None] / _norm(k)[..., None, :]


def _norm(x: Tensor, dim: int = 1) -> Tensor:
    """Norms over the tokens: [B, L, N, D] -> [B, N, D]"""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        norm = torch.linalg.vector_norm(x, dim=dim, dtype=precise(x))
    else:
        norm = x.to(precise(x)).square().sum(dim).sqrt()  # which takes a CPU less time
    return norm.clamp_min(EPSILON)


def _large(x: Tensor) -> bool:
    """Whether to go image by image, which on a CPU reads the maps in place and keeps no copies of them.

    Matmuls of all images at once copy the maps, and keep the copies for backward. At 9 MiB and more (DaViT's first
    stage, XCiT's patches of 8 pixels, batch 8) the two take about the same time; below, all at once is up to 2x faster.
    """
    return x.numel() * x.element_size() > LARGE


def _products(q: Tensor, k: Tensor) -> Tensor:
    """[B, L, N, D], [B, L, N, D] -> products of the channels over the tokens, in float32 at least: [B, N, D, D]"""
    if _large(q):
        return _Products.run(q, k)
    products = _by_group(q.to(precise(q))).mT @ _by_group(k.to(precise(q)))
    return products.unflatten(0, (q.shape[0], q.shape[2]))


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """[B, N, D, D], [B, L, N, D] -> channels mixed by the weights: [B, L, N, D]"""
    if _large(v):
        return _Mix.run(weights, v)
    mixed = _by_group(v) @ weights.to(v.dtype).flatten(0, 1).mT
    return mixed.unflatten(0, (v.shape[0], v.shape[2])).transpose(1, 2)


def _by_group(x: Tensor) -> Tensor:
    """[B, L, N, D] -> [B * N, L, D], copied group by group, or for one image not at all.

    A matmul of [B, N, D, L] copies channel by channel: with that the attention takes 1.1 to 1.5 times as long on a CPU.
    """
    return x.transpose(1, 2).flatten(0, 1)


class _Products(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return _products_by_image(q, k)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        return _mix_by_image(grad, k), _mix_by_image(grad.mT, q)


class _Mix(Function):
    @staticmethod
    def forward(weights: Tensor, v: Tensor) -> Tensor:
        return _mix_by_image(weights, v)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, v = ctx.saved_tensors
        return _products_by_image(grad, v).to(weights.dtype), _mix_by_image(weights.mT, grad)


class _Cosines(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return _products_by_image(q, k) / _norm(q)[..., :, None] / _norm(k)[..., None, :]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k, cosines = ctx.saved_tensors
        grad_products, radial = grad / _norm(q)[..., :, None] / _norm(k)[..., None, :], grad * cosines
        grads = _mix_by_image(grad_products, k), _mix_by_image(grad_products.mT, q)
        for x, grad_x, factor in zip((q, k), grads, (radial.sum(-1), radial.sum(-2)), strict=True):
            norm = _norm(x)
            factor = torch.where(norm > EPSILON, factor / norm.square(), 0)  # a norm at its least does not change
            for image, grad_image, by_channel in zip(x, grad_x, factor, strict=True):
                grad_image.addcmul_(image, by_channel.to(grad_image.dtype), value=-1)
        return grads


def _products_by_image(q: Tensor, k: Tensor) -> Tensor:
    b, _, groups, dim = q.shape
    products = q.new_empty(b, groups, dim, dim, dtype=precise(q))
    for x, y, out in zip(q, k, products, strict=True):
        torch.bmm(x.to(out.dtype).permute(1, 2, 0), y.to(out.dtype).transpose(0, 1), out=out)
    return products


def _mix_by_image(weights: Tensor, v: Tensor) -> Tensor:
    mixed = torch.empty_like(v, memory_format=torch.contiguous_format)
    for x, w, out in zip(v, weights.mT.to(v.dtype), mixed, strict=True):
        torch.bmm(x.transpose(0, 1), w, out=out.transpose(0, 1))
    return mixed


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: int, scale: float | None = None, *, backend: str = "auto"
) -> Tensor:
    """Attention of channels to the channels of their group: softmax(scale * q^T k) v^T, over all tokens of an image.

    q, k, v: maps (B, H, W, heads, head_dim) or sequences (B, L, heads, head_dim), any strides, of one shape.
    groups: the channels, heads * head_dim in their order, are cut into this many groups of equal size: usually `heads`,
        but the axes of q need not be those of the groups; (B, H, W, 1, C) works as well.
    scale: multiplies the logits; by default (channels of a group) ** -0.5, the paper's. DaViT's published code weighs
        by k^T v and mixes q: pass (k, v, q). Its dynamic variant scales by (number of tokens) ** -0.5.
    backend: "auto", "reference", "torch" or "triton".

    Returns q's shape. Recorded weights are those over channels: (B, groups, C / groups, C / groups), rows are q's.
    Raises ValueError for shapes, dtypes, devices or parameters that do not fit.
    Source: Ding et al., DaViT, https://arxiv.org/abs/2204.03645, equation 4.
    """
    check_alike(q, k, v, axes=(2, 1))
    channels = q.shape[-2] * q.shape[-1]
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups={groups!r}: expected an int that divides the {channels} channels (heads * head_dim)")
    scale = (channels // groups) ** -0.5 if scale is None else scale
    maps = [x.flatten(1, -3) for x in (q, k, v)]
    if groups != q.shape[-2]:
        maps = [x.flatten(2).unflatten(2, (groups, -1)) for x in maps]
    return dispatch("channel", backend, Forms(_reference, _on_cpu, _plain, "channel"), *maps, scale).reshape(q.shape)


def cross_covariance_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Attention of channels to the channels of their head by the cosine of their features over all tokens of an image.

    softmax(temperature * norm(q)^T norm(k)) v^T, norm dividing each channel by its l2 norm over the tokens (1e-12 at
    least).

    q, k, v: maps (B, H, W, heads, head_dim) or sequences (B, L, heads, head_dim), any strides, of one shape.
    temperature: (heads, 1, 1), multiplies the cosines; has a gradient.
    backend: "auto", "reference", "torch" or "triton".

    Returns q's shape. Recorded weights are those over channels: (B, heads, head_dim, head_dim), rows are q's.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: El-Nouby et al., XCiT, https://arxiv.org/abs/2106.09681, section 3.2.
    """
    check_alike(q, k, v, axes=(2, 1))
    check_tensor("temperature", temperature, (q.shape[-2], 1, 1), q, temperature.dtype)
    maps = (x.flatten(1, -3) for x in (q, k, v))
    forms = Forms(_cross_reference, _cross_on_cpu, _cross_plain, "channel")
    output = dispatch("cross_covariance", backend, forms, *maps, temperature)
    return output.reshape(q.shape)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """q (mean over tokens of k^T v): attention whose weights are products of queries and keys, linear in the tokens.

    q, k, v: maps (B, H, W, heads, head_dim) or sequences (B, L, heads, head_dim), any strides, of one shape. What makes
        q and k positive, and what they are divided by so that rows sum to 1, is the caller's: papers differ in it.
    backend: "auto", "reference", "torch" or "triton".

    Returns q's shape. Recorded weights are q k^T / N, (B, heads, N, N).
    Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: Katharopoulos et al., Transformers are RNNs, https://arxiv.org/abs/2006.16236, equations 4 and 5.
    """
    check_alike(q, k, v, axes=(2, 1))
    maps = (x.flatten(1, -3) for x in (q, k, v))
    forms = Forms(_linear_reference, _linear_on_cpu, _linear_plain, strip=_linear_strip)
    return dispatch("linear", backend, forms, *maps).reshape(q.shape)
