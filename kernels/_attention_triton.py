"""The Triton kernels that all softmax patterns share: one walk over tiles of keys, forward and backward.

A program owns a tile of queries of one head and walks the list of keys that these attend to, with a running maximum and
sum; for the gradients of k and v it owns a tile of keys and walks the list of queries that attend to them. Tokens are
read where they lie in the (B, H, W, heads, dim) map. A pattern says with a few small functions (`Functions`) which
tokens those are and what its logits are; `Plan` is what they get and how many programs there are. To add a pattern,
write both, as `_routing_triton.py` does, and enter them in `PATTERNS`.

Softmax statistics and sums are float32. No kernel uses atomics: what many programs add to is stored apart and summed in
a fixed order, so results repeat bit by bit. A query all of whose logits are -inf yields 0, and -inf as log-sum-exp. A
NaN or infinity in a token reaches at least the queries that attend to it, and may reach others of the same tile.

Letters in comments: M queries of a tile, N keys of a tile, D and E dims of a head of q and v, padded to powers of two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LOG2E",
    "MIN_TILE",
    "OPTIONS",
    "PATTERNS",
    "Functions",
    "Pattern",
    "Plan",
    "Relative",
    "attend",
    "constant",
    "tensor_map",
    "tile_size",
    "unsupported_tensors",
]

LOG2E = tl.constexpr(math.log2(math.e))
MIN_TILE = 16  # of a matrix product in Triton
MAX_DIM = 128
# maxnreg: without it ptxas spills a few bytes to hold fewer than 100 registers. Fusion is Triton's default until 3.10.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}
# Tokens of a tile, of a step, warps, stages, by kernel and padded head dim, for 16 bits: the largest of those tried
# with which the patterns compile without spills for sm_80, sm_90 and sm_100 (but halo with tables at 128). Not timed on
# a GPU yet.
TILES = {
    "forward": {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2)},
    "queries": {32: (64, 32, 4, 2), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1)},
    "keys": {32: (64, 32, 4, 1), 64: (32, 32, 4, 2), 128: (32, 32, 8, 2)},
}
BIAS_PROGRAMS = 1024  # about as many as the gradient of a bias is split over; each keeps a partial sum


class Functions(NamedTuple):
    """The Triton functions of a pattern; `g` is the geometry of its `Plan`, n a vector of places in a list.

    Tokens are a triple of vectors (y, x, valid): row, column, and whether there is such a token to load.
    """

    query_at: Any  # (g, batch, tile, n) -> the n-th query of a tile
    key_count: Any  # (g, batch, tile) -> length of the list of keys of a tile of queries
    key_at: Any  # (g, batch, tile, n) -> the n-th key of that list
    own_key_at: Any  # (g, batch, tile, n) -> the n-th key of a tile of keys
    asker_count: Any  # (g, batch, tile) -> length of the list of queries that attend to a tile of keys
    asker_at: Any  # (g, batch, tile, n) -> the n-th query of that list
    logits: Any  # (g, logits, batch, head, y, x, key y, key x, key valid) -> logits, masked and biased, times LOG2E
    frame_at: Any = None  # as key_at, but a key's place relative to the tile's queries is the same in all tiles
    relative: Any = None  # `Relative`, of a pattern whose bias depends on the query


class Relative(NamedTuple):
    """The Triton functions of logits that are a query's product with a table (rows P) for each axis.

    Each step of queries is one block, with its keys in R rows and R columns; to it a product is a matrix [M, R].
    """

    products: Any  # (g, b_q, queries, s) -> two [M, R], times LOG2E
    logits: Any  # (g, the two, queries, keys, s) -> their sum for each query and key [M, N]
    sums: Any  # (g, b_ds, queries, keys, s) -> gradients of the two
    gradients: Any  # (g, the two gradients, b_q, queries, s) -> of q [M, D], and of the two tables [P, D]


class Plan(NamedTuple):
    geometry: Any  # named tuple of tensors and ints, for the functions
    tiles: int  # of one head of one image
    own: int  # tokens of a tile, a power of two
    walk: int  # tokens of one step along the list, a power of two
    frame: int = 0  # keys that `frame_at` numbers
    frames: int = 1  # kinds of tile with regard to `frame_at`, taking turns
    relative: tuple[int, int] = (0, 0)  # P and R of `Relative`, powers of two


class Pattern(NamedTuple):
    functions: Functions
    # (q, k, bias, table, parameters, own, walk, inverse) -> the plan for tiles of queries, or of keys if inverse;
    # own and walk are upper bounds
    plan: Callable[..., Plan]
    # (sums, plan, bias) -> gradient of the bias, from the logits' gradients summed over like tiles, (heads,
    # frames * own, frame), or of a `Relative` from those of the tables, (2, P, D)
    fold_bias: Callable[..., Tensor] | None = None


PATTERNS: dict[str, Pattern] = {}


class Map(NamedTuple):
    """A (B, H, W, heads, dim) tensor and its strides."""

    pointer: Any
    batch: Any
    row: Any
    column: Any
    head: Any
    dim: Any


class Sizes(NamedTuple):
    height: Any  # of the map of queries
    width: Any
    heads: Any
    tiles: Any
    scale: Any
    dim: Any
    dim_v: Any
    D: Any
    E: Any
    M: Any
    N: Any
    P: Any
    R: Any
    precision: Any


@triton.jit
def _place(item, s):
    """Batch, head and tile of an item of work; heads vary fastest, because they share cache lines."""
    return (item // s.heads // s.tiles).to(tl.int64), item % s.heads, item // s.heads % s.tiles


@triton.jit
def _pointers(tensor, batch, head, tokens, dims):
    y, x, _ = tokens
    start = tensor.pointer + batch * tensor.batch + head * tensor.head
    offsets = y.to(tl.int64) * tensor.row + x.to(tl.int64) * tensor.column
    return start + offsets[:, None] + dims[None, :] * tensor.dim


@triton.jit
def _load(tensor, batch, head, tokens, dim, D: tl.constexpr):
    dims = tl.arange(0, D)
    mask = tokens[2][:, None] & (dims < dim)[None, :]
    return tl.load(_pointers(tensor, batch, head, tokens, dims), mask=mask, other=0.0)


@triton.jit
def _store(tensor, values, batch, head, tokens, dim, D: tl.constexpr):
    dims = tl.arange(0, D)
    mask = tokens[2][:, None] & (dims < dim)[None, :]
    tl.store(_pointers(tensor, batch, head, tokens, dims), values.to(tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _statistic(s, batch, head, tokens):
    """Offsets in a contiguous (B, heads, H, W) tensor."""
    y, x, _ = tokens
    return ((batch * s.heads + head) * s.height + y) * s.width + x


@triton.jit
def _load_lse(pointers, queries):
    """Log-sum-exp, times LOG2E; infinity, so that all weights are zero, where there is no query or it has no key."""
    b_lse = tl.load(pointers, mask=queries[2], other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E


@triton.jit
def _scores(g, f, s, batch, head, b_q, b_k, products, queries, keys):
    """Logits, times LOG2E, of queries (rows) to keys."""
    y, x, _ = queries
    key_y, key_x, valid = keys
    b_s = tl.dot(b_q, b_k.T, input_precision=s.precision) * (s.scale * LOG2E)
    if f.relative is not None:
        b_s += f.relative.logits(g, products, queries, keys, s)
    return f.logits(g, b_s, batch, head, y[:, None], x[:, None], key_y[None, :], key_x[None, :], valid[None, :])


@triton.jit
def _forward(q, k, v, output, lse, g, f, s):
    batch, head, tile = _place(tl.program_id(0), s)
    queries = f.query_at(g, batch, tile, tl.arange(0, s.M))
    b_q = _load(q, batch, head, queries, s.dim, s.D)  # [M, D]
    products = None
    if f.relative is not None:
        products = f.relative.products(g, b_q, queries, s)
    top = tl.full([s.M], float("-inf"), tl.float32)
    total = tl.zeros([s.M], tl.float32)
    b_o = tl.zeros([s.M, s.E], tl.float32)
    for start in range(0, f.key_count(g, batch, tile), s.N):
        keys = f.key_at(g, batch, tile, start + tl.arange(0, s.N))
        b_k = _load(k, batch, head, keys, s.dim, s.D)  # [N, D]
        b_v = _load(v, batch, head, keys, s.dim_v, s.E)  # [N, E]
        b_s = _scores(g, f, s, batch, head, b_q, b_k, products, queries, keys)
        higher = tl.maximum(top, tl.max(b_s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # all masked so far: avoid -inf - -inf
        b_p = tl.exp2(b_s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * shrink[:, None], input_precision=s.precision)
        top = higher
    b_o /= tl.where(total == 0.0, 1.0, total)[:, None]  # a query without keys yields zero
    _store(output, b_o, batch, head, queries, s.dim_v, s.E)
    tl.store(lse + _statistic(s, batch, head, queries), (top + tl.log2(total)) / LOG2E, mask=queries[2])


@triton.jit
def _backward_queries(q, k, v, output, grad_output, dq, lse, grad_lse, delta, partial, items, share, g, f, s):
    """Gradient of q; also stores delta, the part of the logits' gradients that is common to a query's keys.

    partial: None, or (programs, 2, P, D), sums of the gradients of the tables of a `Relative`. A program takes `share`
    of the `items` tiles of one head; heads take turns.
    """
    program = tl.program_id(0)
    if partial is not None:
        b_dy = tl.zeros([s.P, s.D], tl.float32)
        b_dx = tl.zeros([s.P, s.D], tl.float32)
    first = program // s.heads * share
    for i in range(first, tl.minimum(first + share, items)):
        batch, head, tile = _place(i * s.heads + program % s.heads, s)
        queries = f.query_at(g, batch, tile, tl.arange(0, s.M))
        b_q = _load(q, batch, head, queries, s.dim, s.D)  # [M, D]
        b_do = _load(grad_output, batch, head, queries, s.dim_v, s.E)  # [M, E]
        b_o = _load(output, batch, head, queries, s.dim_v, s.E)  # [M, E]
        products = None
        if f.relative is not None:
            products = f.relative.products(g, b_q, queries, s)
            b_ay = tl.zeros([s.M, s.R], tl.float32)
            b_ax = tl.zeros([s.M, s.R], tl.float32)
        statistic = _statistic(s, batch, head, queries)
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
        if grad_lse is not None:
            b_delta -= tl.load(grad_lse + statistic, mask=queries[2], other=0.0)
        tl.store(delta + statistic, b_delta, mask=queries[2])
        b_lse = _load_lse(lse + statistic, queries)
        b_dq = tl.zeros([s.M, s.D], tl.float32)
        for start in range(0, f.key_count(g, batch, tile), s.N):
            keys = f.key_at(g, batch, tile, start + tl.arange(0, s.N))
            b_k = _load(k, batch, head, keys, s.dim, s.D)  # [N, D]
            b_v = _load(v, batch, head, keys, s.dim_v, s.E)  # [N, E]
            b_p = tl.exp2(_scores(g, f, s, batch, head, b_q, b_k, products, queries, keys) - b_lse[:, None])
            b_ds = b_p * (tl.dot(b_do, b_v.T, input_precision=s.precision) - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=s.precision)
            if f.relative is not None:
                sum_y, sum_x = f.relative.sums(g, b_ds.to(b_k.dtype), queries, keys, s)
                b_ay += sum_y
                b_ax += sum_x
        b_dq *= s.scale
        if f.relative is not None:
            part, part_y, part_x = f.relative.gradients(g, b_ay, b_ax, b_q, queries, s)
            b_dq += part
            if partial is not None:
                b_dy += part_y
                b_dx += part_x
        _store(dq, b_dq, batch, head, queries, s.dim, s.D)
    if partial is not None:
        places = tl.arange(0, s.P)[:, None] * s.D + tl.arange(0, s.D)[None, :]
        start = partial + program.to(tl.int64) * (2 * s.P * s.D)
        tl.store(start + places, b_dy)
        tl.store(start + s.P * s.D + places, b_dx)


@triton.jit
def _backward_keys(q, k, v, grad_output, dk, dv, lse, delta, g, f, s):
    """Gradients of k and v, for a tile of keys, from the queries that attend to them."""
    batch, head, tile = _place(tl.program_id(0), s)
    keys = f.own_key_at(g, batch, tile, tl.arange(0, s.N))
    b_k = _load(k, batch, head, keys, s.dim, s.D)  # [N, D]
    b_v = _load(v, batch, head, keys, s.dim_v, s.E)  # [N, E]
    b_dk = tl.zeros([s.N, s.D], tl.float32)
    b_dv = tl.zeros([s.N, s.E], tl.float32)
    for start in range(0, f.asker_count(g, batch, tile), s.M):
        queries = f.asker_at(g, batch, tile, start + tl.arange(0, s.M))
        b_q = _load(q, batch, head, queries, s.dim, s.D)  # [M, D]
        b_do = _load(grad_output, batch, head, queries, s.dim_v, s.E)  # [M, E]
        statistic = _statistic(s, batch, head, queries)
        b_lse = _load_lse(lse + statistic, queries)
        b_delta = tl.load(delta + statistic, mask=queries[2], other=0.0)
        y, x, _ = queries
        key_y, key_x, inside = keys
        b_s = tl.dot(b_k, b_q.T, input_precision=s.precision) * (s.scale * LOG2E)  # [N, M]
        if f.relative is not None:
            products = f.relative.products(g, b_q, queries, s)
            b_s += f.relative.logits(g, products, queries, keys, s).T
        b_s = f.logits(g, b_s, batch, head, y[None, :], x[None, :], key_y[:, None], key_x[:, None], inside[:, None])
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=s.precision)
        b_ds = b_p * (tl.dot(b_v, b_do.T, input_precision=s.precision) - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=s.precision)
    _store(dk, b_dk * s.scale, batch, head, keys, s.dim, s.D)
    _store(dv, b_dv, batch, head, keys, s.dim_v, s.E)


@triton.jit
def _backward_bias(q, k, v, grad_output, lse, delta, partial, items, share, frames, blocks, g, f, s):
    """Gradients of the logits of N keys of the frame, summed over a share of the tiles of all images.

    partial: (shares, heads, frames, blocks, M, N)
    """
    program = tl.program_id(0)
    block, frame, head = program % blocks, program // blocks % frames, program // blocks // frames % s.heads
    first = program // blocks // frames // s.heads * share
    b_sum = tl.zeros([s.M, s.N], tl.float32)
    for item in range(first, tl.minimum(first + share, items)):
        batch = (item // (s.tiles // frames)).to(tl.int64)
        tile = item % (s.tiles // frames) * frames + frame
        queries = f.query_at(g, batch, tile, tl.arange(0, s.M))
        keys = f.frame_at(g, batch, tile, block * s.N + tl.arange(0, s.N))
        b_q = _load(q, batch, head, queries, s.dim, s.D)  # [M, D]
        b_do = _load(grad_output, batch, head, queries, s.dim_v, s.E)  # [M, E]
        b_k = _load(k, batch, head, keys, s.dim, s.D)  # [N, D]
        b_v = _load(v, batch, head, keys, s.dim_v, s.E)  # [N, E]
        statistic = _statistic(s, batch, head, queries)
        b_lse = _load_lse(lse + statistic, queries)
        b_delta = tl.load(delta + statistic, mask=queries[2], other=0.0)
        b_p = tl.exp2(_scores(g, f, s, batch, head, b_q, b_k, None, queries, keys) - b_lse[:, None])
        b_sum += b_p * (tl.dot(b_do, b_v.T, input_precision=s.precision) - b_delta[:, None])
    places = tl.arange(0, s.M)[:, None] * s.N + tl.arange(0, s.N)[None, :]
    tl.store(partial + program.to(tl.int64) * (s.M * s.N) + places, b_sum)


def tensor_map(x: Tensor) -> Map:
    return Map(x, *x.stride())


def constant(value: Any) -> Any:
    """A value that the kernel is compiled for, in a geometry."""
    return tl.constexpr(value)


def tile_size(tokens: int, most: int) -> int:
    """The smallest tile, or step, that holds the tokens, between 16 and `most`."""
    return min(most, max(MIN_TILE, triton.next_power_of_2(tokens)))


def unsupported_tensors(*tensors: Tensor) -> str | None:
    """Why the kernels cannot run on these tensors (q, k, v: maps, or what stands in for them), or None."""
    dtypes = [x.dtype for x in tensors]
    if dtypes[0] not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the dtype is {dtypes[0]}, float16, bfloat16 and float32 are supported"
    if len(set(dtypes)) > 1:
        return f"the tensors have dtypes {', '.join(map(str, dtypes))}, one dtype is supported"
    dim = max(x.shape[-1] for x in tensors)
    if dim > MAX_DIM:
        return f"head_dim is {dim}, at most {MAX_DIM} is supported"
    if tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def attend(
    pattern: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Sequence[int],
    scale: float,
    bias: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, dim of v) and log-sum-exp (B, heads, H, W), float32, of a pattern of `PATTERNS`.

    bias gets a gradient, table (of whatever the pattern needs beside it) does not.
    """
    return _operator(q, k, v, bias, table, pattern, list(parameters), scale)


@torch.library.custom_op("visionattn::softmax_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    pattern: str,
    parameters: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    output, lse = _operator_fake(q, k, v, bias, table, pattern, parameters, scale)
    functions, plan, _ = PATTERNS[pattern]
    own, walk, options = _tile(q, v, "forward", functions)
    layout = plan(q, k, bias, table, parameters, own, walk, False)
    tensors = (*map(tensor_map, (q, k, v, output)), lse)
    sizes = _sizes(q, v, layout, scale)
    _launch(_forward, len(q) * q.shape[3] * layout.tiles, tensors, layout, functions, sizes, options)
    return output, lse


@_operator.register_fake
def _operator_fake(q, k, v, bias, table, pattern, parameters, scale):
    b, h, w, heads, _ = q.shape
    return q.new_empty((b, h, w, heads, v.shape[-1])), q.new_empty((b, heads, h, w), dtype=torch.float32)


@torch.library.custom_op("visionattn::softmax_attention_backward", mutates_args=())
def _operator_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    pattern: str,
    parameters: Sequence[int],
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    functions, plan, fold_bias = PATTERNS[pattern]
    dq, dk, dv, delta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, lse))
    maps, grad = [tensor_map(x) for x in (q, k, v)], tensor_map(grad_output)
    own, walk, options = _tile(q, v, "queries", functions)
    layout = plan(q, k, bias, table, parameters, own, walk, False)
    sizes = _sizes(q, v, layout, scale)
    items, share, partial = len(q) * layout.tiles, 1, None
    relative = needs_bias and functions.relative is not None
    if relative:
        share = max(1, items * sizes.heads // BIAS_PROGRAMS)
    programs = triton.cdiv(items, share) * sizes.heads
    if relative:
        partial = torch.empty((programs, 2, layout.relative[0], sizes.D.value), dtype=torch.float32, device=q.device)
    tensors = (*maps, tensor_map(output), grad, tensor_map(dq), lse, grad_lse, delta, partial, items, share)
    _launch(_backward_queries, programs, tensors, layout, functions, sizes, options)
    dbias = q.new_zeros(0)
    if needs_bias:
        tensors = (*maps, grad, lse, delta)
        sums = partial.sum(0) if relative else _bias_sums(tensors, layout, functions, sizes, items, options)
        dbias = fold_bias(sums, layout, bias).to(bias.dtype)
    own, walk, options = _tile(q, v, "keys", functions)
    layout = plan(q, k, bias, table, parameters, own, walk, True)
    sizes = _sizes(q, v, layout, scale)._replace(M=constant(layout.walk), N=constant(layout.own))
    tensors = (*maps, grad, tensor_map(dk), tensor_map(dv), lse, delta)
    _launch(_backward_keys, len(q) * k.shape[3] * layout.tiles, tensors, layout, functions, sizes, options)
    return dq, dk, dv, dbias


@_operator_backward.register_fake
def _operator_backward_fake(
    grad_output, grad_lse, output, lse, q, k, v, bias, table, pattern, parameters, scale, needs_bias
):
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needs_bias else q.new_empty(0)
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), dbias


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, bias, table, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, bias, table)


def _gradients(ctx, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple:
    output, *tensors = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    needs_bias = ctx.needs_input_grad[3]
    *gradients, dbias = _operator_backward(grad_output, grad_lse, output, *tensors, *ctx.rest, needs_bias)
    return *gradients, dbias if needs_bias else None, None, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup_context)


def _tile(q: Tensor, v: Tensor, kernel: str, functions: Functions) -> tuple[int, int, dict]:
    """Most tokens of a tile and of a step along its list, and launch options, for one of the kernels."""
    dim = max(32, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))
    if q.dtype == torch.float32:  # products of float32 take no matrix instruction, but many registers
        large = dim == 128 or functions.relative is not None
        own, walk, warps, stages = 16 if large and kernel == "queries" else 32, 16, 8 if large else 4, 1
    else:
        own, walk, warps, stages = TILES[kernel][dim]
    return own, walk, {"num_warps": warps, "num_stages": stages}


def _sizes(q: Tensor, v: Tensor, layout: Plan, scale: float) -> Sizes:
    _, height, width, heads, dim = q.shape
    padded = (max(MIN_TILE, triton.next_power_of_2(x)) for x in (dim, v.shape[-1]))
    constants = (dim, v.shape[-1], *padded, layout.own, layout.walk, *layout.relative)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return Sizes(height, width, heads, layout.tiles, scale, *map(constant, (*constants, precision)))


def _launch(kernel, programs: int, arguments, layout: Plan, functions: Functions, sizes: Sizes, options: dict) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0].pointer):
            kernel[(programs,)](*arguments, layout.geometry, functions, sizes, **OPTIONS, **options)


def _bias_sums(tensors, layout: Plan, functions: Functions, sizes: Sizes, items: int, options: dict) -> Tensor:
    """Gradients of the logits, summed over the tiles of all images that look alike to the bias.

    Returns (heads, frames * M, keys of the frame).
    """
    m, n, frames, blocks = layout.own, layout.walk, layout.frames, triton.cdiv(layout.frame, layout.walk)
    items //= frames
    share = triton.cdiv(items, max(1, BIAS_PROGRAMS // (sizes.heads * frames * blocks)))
    shape = (triton.cdiv(items, max(1, share)), sizes.heads, frames, blocks)
    partial = torch.empty((*shape, m, n), dtype=torch.float32, device=tensors[0].pointer.device)
    arguments = (*tensors, partial, items, share, frames, blocks)
    _launch(_backward_bias, math.prod(shape), arguments, layout, functions, sizes, options | {"num_stages": 1})
    return partial.sum(0).permute(0, 1, 3, 2, 4).reshape(sizes.heads, frames * m, blocks * n)[..., : layout.frame]
