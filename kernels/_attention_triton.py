"""The Triton kernels of all softmax patterns: one loop over tiles, forward and backward, as in FlashAttention.

A program takes a tile of queries (q_tile) of one head and loops over the keys that these attend to, with a running
maximum and sum; for the gradients of k and v it takes a tile of keys (kv_tile) and loops over the queries that attend
to them. Tokens are read where they lie in the (B, H, W, heads, dim) map. A pattern says with a few small functions
(`Functions`) which tokens those are and what its logits are; `Plan` is what they get and how many programs there are.
To add a pattern, write both, as `_routing_triton.py` does, and enter them in `PATTERNS`.

Softmax statistics and sums are float32. No kernel uses atomics: what many programs add to is stored apart and summed in
a fixed order, so results repeat bit by bit. A query all of whose logits are -inf yields 0, and -inf as log-sum-exp. A
NaN or infinity in a token reaches at least the queries that attend to it, and may reach others of the same tile.

Names: p_ pointers, o_ offsets, m_ masks, b_ blocks in registers; b_m and b_l, running maximum and sum of the softmax;
BLOCK_M queries and BLOCK_N keys at a time; BLOCK_D and BLOCK_DV, the head dims of q and v padded to powers of two.
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
    "MIN_BLOCK",
    "OPTIONS",
    "PATTERNS",
    "Functions",
    "Pattern",
    "Plan",
    "Relative",
    "attend",
    "constant",
    "fit_block",
    "tensor_map",
    "unsupported_tensors",
]

LOG2E = tl.constexpr(math.log2(math.e))
MIN_BLOCK = 16  # of a matrix product in Triton
MAX_DIM = 128
# maxnreg: without it ptxas spills a few bytes to hold fewer than 100 registers. Fusion is Triton's default until 3.10.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}
# BLOCK_M, BLOCK_N, warps, stages, by kernel and padded head dim, for 16 bits: the largest of those tried with which the
# patterns compile without spills for sm_80, sm_90 and sm_100 (but halo with tables at 128). Not timed on a GPU yet.
BLOCKS = {
    "forward": {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2)},
    "dq": {32: (64, 32, 4, 2), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1)},
    "dkv": {32: (32, 64, 4, 1), 64: (32, 32, 4, 2), 128: (32, 32, 8, 2)},
}
BIAS_PROGRAMS = 1024  # about as many as the gradient of a bias is split over; each keeps a partial sum


class Functions(NamedTuple):
    """The Triton functions of a pattern; `g` is the geometry of its `Plan`, n a vector of indices.

    Tokens are a triple of vectors (y, x, valid): row, column, and whether there is such a token to load.
    """

    q_tile_at: Any  # (g, batch, tile, n) -> the n-th query of a q_tile
    kv_count: Any  # (g, batch, tile) -> how many keys a q_tile attends to
    kv_at: Any  # (g, batch, tile, n) -> the n-th of them
    kv_tile_at: Any  # (g, batch, tile, n) -> the n-th key of a kv_tile
    q_count: Any  # (g, batch, tile) -> how many queries attend to a kv_tile
    q_at: Any  # (g, batch, tile, n) -> the n-th of them
    logits: Any  # (g, logits, batch, head, y, x, key y, key x, key valid) -> logits, masked and biased, times LOG2E
    bias_kv_at: Any = None  # as kv_at, but a key's place relative to the q_tile is the same in all tiles
    relative: Any = None  # `Relative`, of a pattern whose bias depends on the query


class Relative(NamedTuple):
    """The Triton functions of logits that are a query's product with a table (rows P) for each axis.

    The BLOCK_M queries are of one block of the map, with its keys in R rows and R columns; to it a product is a matrix
    [BLOCK_M, R].
    """

    products: Any  # (g, b_q, queries, s) -> two [BLOCK_M, R], times LOG2E
    logits: Any  # (g, the two, queries, keys, s) -> their sum for each query and key [BLOCK_M, BLOCK_N]
    grad_products: Any  # (g, b_ds, queries, keys, s) -> gradients of the two
    gradients: Any  # (g, these, b_q, queries, s) -> of q [BLOCK_M, BLOCK_D], and of the two tables [P, BLOCK_D]


class Plan(NamedTuple):
    geometry: Any  # named tuple of tensors and ints, for the functions
    tiles: int  # q_tiles, or kv_tiles, of one head of one image
    block_m: int  # BLOCK_M
    block_n: int  # BLOCK_N
    bias_keys: int = 0  # keys that `bias_kv_at` numbers
    bias_kinds: int = 1  # kinds of q_tile with regard to `bias_kv_at`, taking turns
    relative: tuple[int, int] = (0, 0)  # P and R of `Relative`, powers of two


class Pattern(NamedTuple):
    functions: Functions
    # (q, k, bias, table, parameters, block_m, block_n, by_key) -> the plan for q_tiles, or if by_key for kv_tiles, of
    # at most block_m queries and block_n keys
    plan: Callable[..., Plan]
    # (sums, plan, bias) -> gradient of the bias, from the logits' gradients summed over like tiles, (heads,
    # bias_kinds * BLOCK_M, bias_keys), or of a `Relative` from those of the tables, (2, P, BLOCK_D)
    fold_bias: Callable[..., Tensor] | None = None


PATTERNS: dict[str, Pattern] = {}


class Map(NamedTuple):
    """A (B, H, W, heads, dim) tensor and its strides."""

    pointer: Any
    stride_b: Any
    stride_y: Any
    stride_x: Any
    stride_h: Any
    stride_d: Any


class Sizes(NamedTuple):
    height: Any  # of the map of queries
    width: Any
    heads: Any
    tiles: Any
    scale: Any
    dim: Any
    dim_v: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    P: Any
    R: Any
    precision: Any


@triton.jit
def _batch_head_tile(i, s):
    """Of the i-th tile of all heads and images; heads vary fastest, because they share cache lines."""
    return (i // s.heads // s.tiles).to(tl.int64), i % s.heads, i // s.heads % s.tiles


@triton.jit
def _pointers(tensor, batch, head, tokens, o_d):
    y, x, _ = tokens
    p_head = tensor.pointer + batch * tensor.stride_b + head * tensor.stride_h
    o_tokens = y.to(tl.int64) * tensor.stride_y + x.to(tl.int64) * tensor.stride_x
    return p_head + o_tokens[:, None] + o_d[None, :] * tensor.stride_d


@triton.jit
def _load(tensor, batch, head, tokens, dim, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    mask = tokens[2][:, None] & (o_d < dim)[None, :]
    return tl.load(_pointers(tensor, batch, head, tokens, o_d), mask=mask, other=0.0)


@triton.jit
def _store(tensor, values, batch, head, tokens, dim, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    mask = tokens[2][:, None] & (o_d < dim)[None, :]
    tl.store(_pointers(tensor, batch, head, tokens, o_d), values.to(tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def _lse_offsets(s, batch, head, tokens):
    """In a contiguous (B, heads, H, W) tensor."""
    y, x, _ = tokens
    return ((batch * s.heads + head) * s.height + y) * s.width + x


@triton.jit
def _load_lse(p_lse, queries):
    """Log-sum-exp, times LOG2E; infinity, so that all weights are zero, where there is no query or it has no key."""
    b_lse = tl.load(p_lse, mask=queries[2], other=float("inf"))
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
def _forward(q, k, v, output, p_lse, g, f, s):
    batch, head, tile = _batch_head_tile(tl.program_id(0), s)
    queries = f.q_tile_at(g, batch, tile, tl.arange(0, s.BLOCK_M))
    b_q = _load(q, batch, head, queries, s.dim, s.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    products = None
    if f.relative is not None:
        products = f.relative.products(g, b_q, queries, s)
    b_m = tl.full([s.BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([s.BLOCK_M], tl.float32)
    b_o = tl.zeros([s.BLOCK_M, s.BLOCK_DV], tl.float32)
    for start in range(0, f.kv_count(g, batch, tile), s.BLOCK_N):
        keys = f.kv_at(g, batch, tile, start + tl.arange(0, s.BLOCK_N))
        b_k = _load(k, batch, head, keys, s.dim, s.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = _load(v, batch, head, keys, s.dim_v, s.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_s = _scores(g, f, s, batch, head, b_q, b_k, products, queries, keys)
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # all masked so far: avoid -inf - -inf
        b_p = tl.exp2(b_s - base[:, None])
        alpha = tl.exp2(b_m - base)
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * alpha[:, None], input_precision=s.precision)
        b_m = b_m_new
    b_o /= tl.where(b_l == 0.0, 1.0, b_l)[:, None]  # a query without keys yields zero
    _store(output, b_o, batch, head, queries, s.dim_v, s.BLOCK_DV)
    tl.store(p_lse + _lse_offsets(s, batch, head, queries), (b_m + tl.log2(b_l)) / LOG2E, mask=queries[2])


@triton.jit
def _backward_dq(
    q, k, v, output, grad_output, dq, p_lse, p_grad_lse, p_delta, p_partial, total_tiles, tiles_per_program, g, f, s
):
    """Gradient of q; also stores delta, the part of the logits' gradients that is common to a query's keys.

    p_partial: None, or (programs, 2, P, BLOCK_D), sums of the gradients of the tables of a `Relative`. A program takes
    `tiles_per_program` of the `total_tiles` tiles of one head; heads take turns.
    """
    program = tl.program_id(0)
    if p_partial is not None:
        b_dtable_y = tl.zeros([s.P, s.BLOCK_D], tl.float32)
        b_dtable_x = tl.zeros([s.P, s.BLOCK_D], tl.float32)
    first = program // s.heads * tiles_per_program
    for i in range(first, tl.minimum(first + tiles_per_program, total_tiles)):
        batch, head, tile = _batch_head_tile(i * s.heads + program % s.heads, s)
        queries = f.q_tile_at(g, batch, tile, tl.arange(0, s.BLOCK_M))
        b_q = _load(q, batch, head, queries, s.dim, s.BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_do = _load(grad_output, batch, head, queries, s.dim_v, s.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        b_o = _load(output, batch, head, queries, s.dim_v, s.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        products = None
        if f.relative is not None:
            products = f.relative.products(g, b_q, queries, s)
            b_dproduct_y = tl.zeros([s.BLOCK_M, s.R], tl.float32)
            b_dproduct_x = tl.zeros([s.BLOCK_M, s.R], tl.float32)
        o_lse = _lse_offsets(s, batch, head, queries)
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
        if p_grad_lse is not None:
            b_delta -= tl.load(p_grad_lse + o_lse, mask=queries[2], other=0.0)
        tl.store(p_delta + o_lse, b_delta, mask=queries[2])
        b_lse = _load_lse(p_lse + o_lse, queries)
        b_dq = tl.zeros([s.BLOCK_M, s.BLOCK_D], tl.float32)
        for start in range(0, f.kv_count(g, batch, tile), s.BLOCK_N):
            keys = f.kv_at(g, batch, tile, start + tl.arange(0, s.BLOCK_N))
            b_k = _load(k, batch, head, keys, s.dim, s.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_v = _load(v, batch, head, keys, s.dim_v, s.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            b_p = tl.exp2(_scores(g, f, s, batch, head, b_q, b_k, products, queries, keys) - b_lse[:, None])
            b_ds = b_p * (tl.dot(b_do, b_v.T, input_precision=s.precision) - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=s.precision)
            if f.relative is not None:
                b_dy, b_dx = f.relative.grad_products(g, b_ds.to(b_k.dtype), queries, keys, s)
                b_dproduct_y += b_dy
                b_dproduct_x += b_dx
        b_dq *= s.scale
        if f.relative is not None:
            b_dq_relative, b_dy, b_dx = f.relative.gradients(g, b_dproduct_y, b_dproduct_x, b_q, queries, s)
            b_dq += b_dq_relative
            if p_partial is not None:
                b_dtable_y += b_dy
                b_dtable_x += b_dx
        _store(dq, b_dq, batch, head, queries, s.dim, s.BLOCK_D)
    if p_partial is not None:
        o_table = tl.arange(0, s.P)[:, None] * s.BLOCK_D + tl.arange(0, s.BLOCK_D)[None, :]
        p_table = p_partial + program.to(tl.int64) * (2 * s.P * s.BLOCK_D) + o_table
        tl.store(p_table, b_dtable_y)
        tl.store(p_table + s.P * s.BLOCK_D, b_dtable_x)


@triton.jit
def _backward_dkv(q, k, v, grad_output, dk, dv, p_lse, p_delta, g, f, s):
    """Gradients of k and v of a kv_tile, from the queries that attend to it."""
    batch, head, tile = _batch_head_tile(tl.program_id(0), s)
    keys = f.kv_tile_at(g, batch, tile, tl.arange(0, s.BLOCK_N))
    b_k = _load(k, batch, head, keys, s.dim, s.BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = _load(v, batch, head, keys, s.dim_v, s.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    b_dk = tl.zeros([s.BLOCK_N, s.BLOCK_D], tl.float32)
    b_dv = tl.zeros([s.BLOCK_N, s.BLOCK_DV], tl.float32)
    for start in range(0, f.q_count(g, batch, tile), s.BLOCK_M):
        queries = f.q_at(g, batch, tile, start + tl.arange(0, s.BLOCK_M))
        b_q = _load(q, batch, head, queries, s.dim, s.BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_do = _load(grad_output, batch, head, queries, s.dim_v, s.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        o_lse = _lse_offsets(s, batch, head, queries)
        b_lse = _load_lse(p_lse + o_lse, queries)
        b_delta = tl.load(p_delta + o_lse, mask=queries[2], other=0.0)
        y, x, _ = queries
        key_y, key_x, valid = keys
        b_s = tl.dot(b_k, b_q.T, input_precision=s.precision) * (s.scale * LOG2E)  # [BLOCK_N, BLOCK_M]
        if f.relative is not None:
            products = f.relative.products(g, b_q, queries, s)
            b_s += f.relative.logits(g, products, queries, keys, s).T
        b_s = f.logits(g, b_s, batch, head, y[None, :], x[None, :], key_y[:, None], key_x[:, None], valid[:, None])
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=s.precision)
        b_ds = b_p * (tl.dot(b_v, b_do.T, input_precision=s.precision) - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=s.precision)
    _store(dk, b_dk * s.scale, batch, head, keys, s.dim, s.BLOCK_D)
    _store(dv, b_dv, batch, head, keys, s.dim_v, s.BLOCK_DV)


@triton.jit
def _backward_dbias(
    q, k, v, grad_output, p_lse, p_delta, p_partial, total_tiles, tiles_per_program, bias_kinds, n_blocks, g, f, s
):
    """Gradients of the logits of BLOCK_N of the bias_keys, summed over some q_tiles of one kind of all images.

    p_partial: (programs of a block, heads, bias_kinds, n_blocks, BLOCK_M, BLOCK_N)
    """
    program = tl.program_id(0)
    n_block, kind = program % n_blocks, program // n_blocks % bias_kinds
    head = program // n_blocks // bias_kinds % s.heads
    first = program // n_blocks // bias_kinds // s.heads * tiles_per_program
    b_sum = tl.zeros([s.BLOCK_M, s.BLOCK_N], tl.float32)
    for i in range(first, tl.minimum(first + tiles_per_program, total_tiles)):
        batch = (i // (s.tiles // bias_kinds)).to(tl.int64)
        tile = i % (s.tiles // bias_kinds) * bias_kinds + kind
        queries = f.q_tile_at(g, batch, tile, tl.arange(0, s.BLOCK_M))
        keys = f.bias_kv_at(g, batch, tile, n_block * s.BLOCK_N + tl.arange(0, s.BLOCK_N))
        b_q = _load(q, batch, head, queries, s.dim, s.BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_do = _load(grad_output, batch, head, queries, s.dim_v, s.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        b_k = _load(k, batch, head, keys, s.dim, s.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = _load(v, batch, head, keys, s.dim_v, s.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        o_lse = _lse_offsets(s, batch, head, queries)
        b_lse = _load_lse(p_lse + o_lse, queries)
        b_delta = tl.load(p_delta + o_lse, mask=queries[2], other=0.0)
        b_p = tl.exp2(_scores(g, f, s, batch, head, b_q, b_k, None, queries, keys) - b_lse[:, None])
        b_sum += b_p * (tl.dot(b_do, b_v.T, input_precision=s.precision) - b_delta[:, None])
    o_sum = tl.arange(0, s.BLOCK_M)[:, None] * s.BLOCK_N + tl.arange(0, s.BLOCK_N)[None, :]
    tl.store(p_partial + program.to(tl.int64) * (s.BLOCK_M * s.BLOCK_N) + o_sum, b_sum)


def tensor_map(x: Tensor) -> Map:
    return Map(x, *x.stride())


def constant(value: Any) -> Any:
    """A value that the kernel is compiled for, in a geometry."""
    return tl.constexpr(value)


def fit_block(tokens: int, most: int) -> int:
    """The smallest BLOCK_M or BLOCK_N that holds the tokens, between 16 and `most`."""
    return min(most, max(MIN_BLOCK, triton.next_power_of_2(tokens)))


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
    return _unsupported_device(tensors[0].device) if tensors[0].is_cuda else None


@torch.compiler.assume_constant_result
def _unsupported_device(device: torch.device) -> str | None:
    if torch.version.hip:
        return "the device is AMD's, whose Triton has no options of these kernels"
    if torch.cuda.get_device_capability(device) < (8, 0):
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
    functions, make_plan, _ = PATTERNS[pattern]
    block_m, block_n, options = _blocks(q, v, "forward", functions)
    plan = make_plan(q, k, bias, table, parameters, block_m, block_n, False)
    tensors = (*map(tensor_map, (q, k, v, output)), lse)
    sizes = _sizes(q, v, plan, scale)
    _launch(_forward, len(q) * q.shape[3] * plan.tiles, tensors, plan, functions, sizes, options)
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
    functions, make_plan, fold_bias = PATTERNS[pattern]
    dq, dk, dv, delta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, lse))
    maps, grad = [tensor_map(x) for x in (q, k, v)], tensor_map(grad_output)
    block_m, block_n, options = _blocks(q, v, "dq", functions)
    plan = make_plan(q, k, bias, table, parameters, block_m, block_n, False)
    sizes = _sizes(q, v, plan, scale)
    total_tiles, tiles_per_program, partial = len(q) * plan.tiles, 1, None
    relative = needs_bias and functions.relative is not None
    if relative:
        tiles_per_program = max(1, total_tiles * sizes.heads // BIAS_PROGRAMS)
    programs = triton.cdiv(total_tiles, tiles_per_program) * sizes.heads
    if relative:
        shape = programs, 2, plan.relative[0], sizes.BLOCK_D.value
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    maps_dq = (*maps, tensor_map(output), grad, tensor_map(dq))
    tensors = (*maps_dq, lse, grad_lse, delta, partial, total_tiles, tiles_per_program)
    _launch(_backward_dq, programs, tensors, plan, functions, sizes, options)
    dbias = q.new_zeros(0)
    if needs_bias and bias is not None and fold_bias is not None:
        tensors = (*maps, grad, lse, delta)
        if partial is None:
            sums = _bias_sums(tensors, plan, functions, sizes, total_tiles, options)
        else:
            sums = partial.sum(0)
        dbias = fold_bias(sums, plan, bias).to(bias.dtype)
    block_m, block_n, options = _blocks(q, v, "dkv", functions)
    plan = make_plan(q, k, bias, table, parameters, block_m, block_n, True)
    sizes = _sizes(q, v, plan, scale)
    tensors = (*maps, grad, tensor_map(dk), tensor_map(dv), lse, delta)
    _launch(_backward_dkv, len(q) * k.shape[3] * plan.tiles, tensors, plan, functions, sizes, options)
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


def _blocks(q: Tensor, v: Tensor, kernel: str, functions: Functions) -> tuple[int, int, dict]:
    """BLOCK_M and BLOCK_N, at most, and launch options of one of the kernels."""
    dim = max(32, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))
    if q.dtype == torch.float32:  # products of float32 take no matrix instruction, but many registers
        large = dim == 128 or functions.relative is not None
        block_m, block_n = {"forward": (32, 16), "dq": (16 if large else 32, 16), "dkv": (16, 32)}[kernel]
        warps, stages = 8 if large else 4, 1
    else:
        block_m, block_n, warps, stages = BLOCKS[kernel][dim]
    return block_m, block_n, {"num_warps": warps, "num_stages": stages}


def _sizes(q: Tensor, v: Tensor, plan: Plan, scale: float) -> Sizes:
    _, height, width, heads, dim = q.shape
    padded = (max(MIN_BLOCK, triton.next_power_of_2(x)) for x in (dim, v.shape[-1]))
    constants = (dim, v.shape[-1], *padded, plan.block_m, plan.block_n, *plan.relative)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return Sizes(height, width, heads, plan.tiles, scale, *map(constant, (*constants, precision)))


def _launch(kernel, programs: int, arguments, plan: Plan, functions: Functions, sizes: Sizes, options: dict) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0].pointer):
            kernel[(programs,)](*arguments, plan.geometry, functions, sizes, **OPTIONS, **options)


def _bias_sums(tensors, plan: Plan, functions: Functions, sizes: Sizes, total_tiles: int, options: dict) -> Tensor:
    """Gradients of the logits, summed over the q_tiles of all images that look alike to the bias.

    Returns (heads, bias_kinds * BLOCK_M, bias_keys).
    """
    kinds, n_blocks = plan.bias_kinds, triton.cdiv(plan.bias_keys, plan.block_n)
    total_tiles //= kinds
    tiles_per_program = triton.cdiv(total_tiles, max(1, BIAS_PROGRAMS // (sizes.heads * kinds * n_blocks)))
    programs = (triton.cdiv(total_tiles, max(1, tiles_per_program)), sizes.heads, kinds, n_blocks)
    shape = (*programs, plan.block_m, plan.block_n)
    partial = torch.empty(shape, dtype=torch.float32, device=tensors[0].pointer.device)
    arguments = (*tensors, partial, total_tiles, tiles_per_program, kinds, n_blocks)
    _launch(_backward_dbias, math.prod(programs), arguments, plan, functions, sizes, options | {"num_stages": 1})
    sums = partial.sum(0).permute(0, 1, 3, 2, 4)  # [heads, kinds, BLOCK_M, n_blocks, BLOCK_N]
    return sums.flatten(3).flatten(1, 2)[..., : plan.bias_keys]
