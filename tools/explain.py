"""What attention passes on from the pixels to the output: rollout, relevance and flow, on arrays and on recorded maps.

Plain functions on the maps of layers whose tokens are the same throughout: `rollout`, `attention_flow` (Abnar and
Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, https://arxiv.org/abs/2005.00928) and `relevance`
(Chefer et al., Generic Attention-model Explainability, ICCV 2021, https://arxiv.org/abs/2103.15679). `trace` computes
one row of the first and the last for real networks, whose layers attend inside windows, halos, routes and
neighbourhoods of maps of several sizes: the row is pushed from the last layer to the first, and no matrix of all tokens
by all tokens is built. All of them pass over what else mixes places: convolutions and decoders.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from visionattn.kernels._record import Attention

__all__ = ["Row", "Traced", "attention_flow", "relevance", "rollout", "spread", "trace"]

CHUNK = 2**22  # weights at a time


def rollout(maps: ArrayLike, residual: bool = True) -> np.ndarray:
    """How much of each input token each output token is made of, if layers only mix tokens: (N, N), rows sum to 1.

    Args:
        maps: (layers, N, N) attention averaged over heads, or (layers, heads, N, N); rows are queries.
        residual: half of a token passes each layer by; without, the plain product of the maps.

    Raises:
        ValueError: maps of another shape.
    """
    total = np.eye(len(_square(maps)[0]))
    for weights in _square(maps):
        total = (_with_residual(weights) if residual else weights) @ total
    return total


def relevance(maps: ArrayLike, gradients: ArrayLike) -> np.ndarray:
    """How each input token counts for each output token where the gradient of a logit is positive: (N, N).

    Args:
        maps, gradients: (layers, heads, N, N), attention and the gradient of one logit with respect to it.

    Returns:
        R, which starts as the identity and grows by mean over heads of max(maps * gradients, 0) @ R at each layer. The
        row of the class token, without its own column, is the usual map.

    Raises:
        ValueError: other shapes, or shapes that differ.
    """
    maps, gradients = np.asarray(maps), np.asarray(gradients)
    if maps.ndim != 4 or maps.shape != gradients.shape:
        raise ValueError(
            f"maps of {maps.shape}, gradients of {gradients.shape}: expected (layers, heads, N, N) of both"
        )
    positive = _square(np.maximum(maps * gradients, 0))
    total = np.eye(positive.shape[-1])
    for weights in positive:
        total = total + weights @ total
    return total


def attention_flow(maps: ArrayLike) -> np.ndarray:
    """The largest flow from each output token to each input token, if attention is the capacity of edges: (N, N).

    As `rollout` with residuals, but what is passed on is limited by the narrowest layer on the way. Solved exactly, by
    linear programming, so it is for few tokens.

    Args:
        maps: as of `rollout`.

    Returns:
        flows, whose rows are not normalised.

    Raises:
        ValueError: maps of another shape.
    """
    capacities = np.stack([_with_residual(weights) for weights in _square(maps)[::-1]])
    tokens = capacities.shape[-1]
    return np.array([[_flow(capacities, source, sink) for sink in range(tokens)] for source in range(tokens)])


def _square(maps: ArrayLike) -> np.ndarray:
    """(layers, N, N), averaged over heads."""
    means = np.asarray(maps)
    if means.ndim == 4:
        means = means.mean(1)
    if means.ndim != 3 or means.shape[1] != means.shape[2] or not means.size:
        raise ValueError(f"maps of {means.shape}: expected (layers, N, N) or (layers, heads, N, N)")
    return means


def _with_residual(weights: np.ndarray) -> np.ndarray:
    weights = weights + np.eye(len(weights))
    return weights / weights.sum(-1, keepdims=True)


def _flow(capacities: np.ndarray, source: int, sink: int) -> float:
    """Of edges (steps, from, to) from a token of the first step to one after the last."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    steps, tokens, _ = capacities.shape
    step, start, end = np.indices(capacities.shape).reshape(3, -1)
    edges = np.arange(step.size)
    rows = np.concatenate([step * tokens + start, (step + 1) * tokens + end])
    signs = np.repeat([-1.0, 1.0], step.size)
    balance = csr_array((signs, (rows, np.concatenate([edges, edges]))), shape=((steps + 1) * tokens, step.size))
    inner = slice(tokens, steps * tokens)  # where all that arrives leaves
    leaving = (step == 0) & (start == source)
    limits = np.where((step == 0) & (start != source) | (step == steps - 1) & (end != sink), 0, capacities.ravel())
    bounds = np.stack([np.zeros(step.size), limits], 1)
    equal = {"A_eq": balance[inner], "b_eq": np.zeros(tokens * (steps - 1))} if steps > 1 else {}
    return -linprog(-leaving.astype(float), bounds=bounds, **equal).fun


class Traced(NamedTuple):
    """One row of rollout or relevance.

    Attributes:
        map: (B, H, W) of the finest map that was met.
        tokens: (B, P), what is left at class tokens and the like.
        outside: (B,), what was passed to places outside of the picture, of all that was passed anywhere.
    """

    map: Tensor
    tokens: Tensor
    outside: Tensor


def trace(start: Tensor, tokens: Tensor, calls: Iterable[Attention], relevant: bool = False) -> Traced:
    """Push a row from the last layer to the first: r <- (r + r A) / 2, or of relevance r <- r + r A.

    A layer moves what lies at its own queries, and leaves the rest. A coarser map is shared out equally over the places
    of the next finer one.

    Args:
        start: (B, h, w), how much of each place of the last map is asked about.
        tokens: (B, P), of each token before it, such as a class token; P may be 0.
        calls: recorded attention, last call first, with one map for all heads, (B, 1, N, K): its mean, or of relevance
            that of the positive parts of weights times gradients. Those of kind "channel" are passed over.
        relevant: relevance, not rollout.

    Raises:
        ValueError: attention whose places are not known.
    """
    row = Row(start, tokens, relevant)
    for call in calls:
        row.pass_on(call)
        row.leave()
    return row.traced


class Row:
    """What `trace` pushes, layer by layer, where a layer's attention comes in parts that are added up.

    Arguments as of `trace`.
    """

    def __init__(self, start: Tensor, tokens: Tensor, relevant: bool) -> None:
        self.places, self.tokens, self.relevant = start, tokens, relevant
        self.outside = tokens.new_zeros(len(tokens))
        self.layer: _Layer | None = None

    def pass_on(self, call: Attention) -> None:
        """Move what lies at the queries of a layer, or of a part of it: some rows, some heads."""
        if call.kind == "channel":
            return
        if not call.keys:
            raise ValueError(f"attention ({call.pattern}) whose places in the image are not known")
        if self.layer is None:
            self.layer = self._enter(call)
        layer, weights, rows = self.layer, call.weights[:, 0], self.layer.rows
        if call.places is not None:
            if not self.relevant:  # the mean of the rows of a place, where it has several
                rows = rows / torch.bincount(call.places, minlength=rows.shape[1]).clamp(min=1)
            rows = rows[:, call.places]
        layer.covered[slice(None) if call.places is None else call.places] = True
        if call.indices is None:
            layer.passed[:, 1:] += (rows[:, None] @ weights)[:, 0]
            return
        step = max(1, CHUNK // max(1, weights.shape[2]))
        for first in range(0, weights.shape[1], step):
            part = slice(first, first + step)
            moved = (rows[:, part, None] * weights[:, part]).flatten(1)
            layer.passed.scatter_add_(1, call.indices[:, part].flatten(1) + 1, moved)

    def _enter(self, call: Attention) -> "_Layer":
        space = call.kind == "space"
        self.places = spread(self.places, call.queries if space else call.keys)
        self.tokens = F.pad(self.tokens, (0, max(0, call.prefix - self.tokens.shape[1])))
        asking = call.prefix if space else call.weights.shape[2]
        rows = torch.cat([self.tokens[:, :asking], self.places.flatten(1)], 1) if space else self.tokens[:, :asking]
        keys = call.prefix + math.prod(call.keys) + (math.prod(call.pooled) if call.pooled else 0)
        covered = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
        return _Layer(call, rows, covered, rows.new_zeros(len(rows), 1 + keys))

    def leave(self) -> None:
        """Go on to the layer before."""
        if self.layer is None:
            return
        (call, rows, covered, passed), self.layer = self.layer, None
        if not self.relevant:
            rows, passed = rows * (1 - 0.5 * covered.to(rows.dtype)), passed / 2
        lost, to_tokens, passed = passed.split([1, call.prefix, passed.shape[1] - 1 - call.prefix], 1)
        space = call.kind == "space"
        asking = call.prefix if space else rows.shape[1]
        if space:
            self.places = rows[:, asking:].unflatten(1, call.queries)
        self.tokens = torch.cat([rows[:, :asking], self.tokens[:, asking:]], 1)
        self.tokens = self.tokens + F.pad(to_tokens, (0, self.tokens.shape[1] - call.prefix))
        finest = max(call.queries if space else call.keys, call.keys, key=math.prod)
        self.places = spread(self.places, finest)
        for keys in (call.keys, call.pooled) if call.pooled else (call.keys,):
            to_keys, passed = passed[:, : math.prod(keys)], passed[:, math.prod(keys) :]
            self.places = self.places + spread(to_keys.unflatten(1, keys), finest)
        self.outside = self.outside + lost[:, 0]

    @property
    def traced(self) -> Traced:
        total = self.outside + self.places.sum((1, 2)) + self.tokens.sum(1)
        share = self.outside / total.clamp(min=torch.finfo(total.dtype).tiny)
        return Traced(self.places, self.tokens, share)


class _Layer(NamedTuple):
    """The layer that a `Row` is in."""

    call: Attention
    rows: Tensor  # (B, queries), before it
    covered: Tensor  # (queries,), which of them it moves
    passed: Tensor  # (B, 1 + keys), to places outside of the picture, and to its keys


def spread(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) -> (B, *size): what lies at a place, shared equally by the places that it becomes, or added up."""
    for axis, length in ((1, size[0]), (2, size[1])):
        if x.shape[axis] == length:
            continue
        few, many = sorted((x.shape[axis], length))
        parent = (torch.arange(many, device=x.device) // -(-many // few)).clamp(max=few - 1)
        if length == few:
            shape = list(x.shape)
            shape[axis] = few
            x = x.new_zeros(shape).index_add_(axis, parent, x)
        else:
            shared = 1 / torch.bincount(parent, minlength=few).clamp(min=1).to(x.dtype)
            x = (x.movedim(axis, -1) * shared)[..., parent].movedim(-1, axis)
    return x
