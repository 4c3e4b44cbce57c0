"""The Triton kernels of window, neighborhood and routing attention: one loop, as in FlashAttention, and its backward.

A program takes a tile of queries (q_tile) of one head and walks over the keys that these attend to, with a running
maximum and sum; for the gradients of k and v it takes a tile of keys (kv_tile) and walks over the queries that attend
to them. Tokens are read where they lie in the (B, H, W, heads, dim) map. A walk goes over a box of the map, rows times
columns at a time: what is where is worked out before the loop, and in it addresses grow by sums. A pattern says with a
few small functions (`Functions`) which box that is and what its logits are; `Plan` is what they get and how many
programs there are. To add a pattern, write both, as `_routing_triton.py` does, and enter them in `PATTERNS`.

Softmax statistics and sums are float32. No kernel uses atomics: what many programs add to is stored apart and summed in
a fixed order, so results repeat bit by bit. A query all of whose logits are -inf yields 0, and -inf as log-sum-exp. A
NaN or infinity in a token reaches at least the queries that attend to it, and may reach others of the same tile.

Kernels are compiled for options, head dims and shapes of tiles, not for sizes of maps: these come as flat arguments
that Triton is told not to look at (`RUNTIME`), and strides as multiples of a number that it is told (ALIGN).

Names: p_ pointers, o_ offsets, m_ masks, b_ blocks in registers; b_m and b_l, running maximum and sum of the softmax;
BLOCK_M queries and BLOCK_N keys at a time; BLOCK_D and BLOCK_DV, the head dims of q and v padded to powers of two.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import Blocks, Entry, blocks
from visionattn.kernels._check import allows_tf32, transforms
from visionattn.kernels._plain import slice_step

__all__ = [
    "LOG2E",
    "MIN_BLOCK",
    "OPTIONS",
    "PATTERNS",
    "Block",
    "Functions",
    "Pattern",
    "Plan",
    "Tokens",
    "across",
    "aligned_map",
    "attend",
    "blocks_of",
    "ceil_div",
    "constant",
    "contiguous_map",
    "down",
    "fit",
    "flat",
    "in_block",
    "load",
    "lse_offsets",
    "new_output",
    "pointers",
    "precision_of",
    "store",
    "unsuited_map",
    "unsupported_tensors",
]

LOG2E = tl.constexpr(math.log2(math.e))
MIN_BLOCK = 16  # of a matrix product in Triton
MAX_DIM = 128
FEW = 2**15  # tokens of all heads and images, below which launching takes longest, by a kernel author's estimate
# maxnreg: without it ptxas spills a few bytes to hold fewer than 100 registers. Fusion is Triton's default until 3.10.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}
BIAS_PROGRAMS = 1024  # about as many as the gradient of a bias is split over; each keeps a partial sum


class Functions(NamedTuple):
    """The Triton functions of a pattern; g is the geometry of its `Plan`, n the `Sizes` of the call.

    A walk is a tuple of scalars: height and width of its box in tokens, and what else the pattern needs to tell which
    tokens are at a row and column of it.
    """

    q_tile: Any  # (g, n, batch, tile) -> `Tokens` of a q_tile [BLOCK_M], and the walk over its keys
    kv_at: Any  # (g, n, batch, walk, row, column) -> `Tokens` of keys [BLOCK_N], those of `g.k` from there on
    kv_tile: Any  # (g, n, batch, tile) -> `Tokens` of a kv_tile [BLOCK_N], and the walk over its queries
    q_at: Any  # (g, n, batch, walk, row, column) -> `Tokens` of queries [BLOCK_M], those of `g.q` from there on
    logits: Any  # (g, b_s, head, queries, keys, BY_KEY) -> [BLOCK_M, BLOCK_N] or by key its transpose, masked, biased
    # (g, n, batch, walk, block) -> `Tokens` of keys [BLOCK_N] at a place relative to the q_tile that is the same for
    # all tiles, and whether the tile attends to any; of patterns whose q_tile gives the same for all images
    bias_kv_at: Any = None
    # (g, n, batch, tile) -> of one of a plan's `summed_tiles` the `Tokens`, the first of the kv_tiles that are its
    # parts, how far these are apart and how many there are; of a pattern whose walks over queries may be long, and
    # whose walks hold as fourth whether the kv_tile is the only part
    parts: Any = None
    # (queries) -> their numbers in a map, in the order in which they are found the quickest; by default by rows
    number: Any = None


class Tokens(NamedTuple):
    y: Any  # row in the map
    x: Any  # column
    valid: Any  # whether there is such a token to load
    place: Any  # tuple of vectors or scalars: what the pattern's logits see of it


class Block(NamedTuple):
    """Tokens that are walked over at a time; all constant."""

    rows: Any
    columns: Any
    is_wide: Any  # whether boxes may have more columns


class Plan(NamedTuple):
    geometry: Any  # named tuple for the functions, of tensors, constants, and the `Block`s q and k
    tiles: int  # q_tiles, or kv_tiles, of one head of one image
    bias_blocks: int = 0  # blocks of keys that `bias_kv_at` numbers
    bias_kinds: int = 1  # kinds of q_tile with regard to `bias_kv_at`, taking turns
    summed_tiles: int = 0  # tiles of keys that kv_tiles are parts of, with regard to queries; 0: each is one
    is_closed: bool = False  # whether the tokens of a q_tile attend to each other, all at once, and to no others


class Pattern(NamedTuple):
    functions: Functions
    # (q, k, bias, table, parameters, block_m, block_n, by_key) -> the plan for q_tiles, or if by_key for kv_tiles, of
    # at most block_m queries and block_n keys
    plan: Callable[..., Plan]
    # (sums, plan, bias) -> gradient of the bias, from the logits' gradients summed over like tiles, (heads,
    # bias_kinds, BLOCK_M, bias_blocks, BLOCK_N)
    fold_bias: Callable[..., Tensor] | None = None


PATTERNS: dict[str, Pattern] = {}


class Map(NamedTuple):
    """A (B, H, W, heads, dim) tensor and its strides; that of dim is 1."""

    pointer: Any
    stride_b: Any
    stride_y: Any
    stride_x: Any
    stride_h: Any


class Sizes(NamedTuple):
    heads: Any
    height: Any  # of the map of queries
    width: Any
    key_height: Any
    key_width: Any


class Constants(NamedTuple):
    DIM: Any
    DIM_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    ALIGN: Any  # all strides are multiples of it
    SLICES: Any  # of a contiguous tensor that the gradients of q, k and v are: 3, or each one of its own
    precision: Any


SIZES = [*Sizes._fields, "tiles", "total_tiles", "tiles_per_program", "images", "kinds", "n_blocks"]
RUNTIME = [*SIZES, *(f"{x}_{stride}" for x in ("q", "k", "v", "do") for stride in "byxh")]


@triton.jit
def ceil_div(x, y):
    return (x + y - 1) // y


@triton.jit
def down(x, BY_KEY: tl.constexpr):
    """A vector of queries, or a scalar, as logits see it: along their rows, or by key along their columns."""
    if len(x.shape) > 0:
        x = x[None, :] if BY_KEY else x[:, None]
    return x


@triton.jit
def across(x, BY_KEY: tl.constexpr):
    """The same for a vector of keys."""
    if len(x.shape) > 0:
        x = x[:, None] if BY_KEY else x[None, :]
    return x


@triton.jit
def in_block(block):
    """Of its tokens which row and column each is in."""
    i = tl.arange(0, block.rows * block.columns)
    return i // block.columns, i % block.columns


@triton.jit
def _steps(walk, block):
    steps = ceil_div(walk[0], block.rows)
    if block.is_wide:
        steps *= ceil_div(walk[1], block.columns)
    return steps


@triton.jit
def _start():
    """Row and column, as numbers of Triton, whose interpreter cannot compare others."""
    zero = tl.full([], 0, tl.int32)
    return zero, zero


@triton.jit
def _advance(walk, block, row, column):
    if block.is_wide:
        column += block.columns
        row = tl.where(column >= walk[1], row + block.rows, row)
        column = tl.where(column >= walk[1], 0, column)
    else:
        row += block.rows
    return row, column


@triton.jit
def aligned_map(pointer, stride_b, stride_y, stride_x, stride_h, c):
    return Map(
        pointer,
        stride_b // c.ALIGN * c.ALIGN,
        stride_y // c.ALIGN * c.ALIGN,
        stride_x // c.ALIGN * c.ALIGN,
        stride_h // c.ALIGN * c.ALIGN,
    )


@triton.jit
def contiguous_map(pointer, n, height, width, DIM: tl.constexpr, SLICES: tl.constexpr = 1):
    """SLICES: how many maps a contiguous (B, H, W, SLICES, heads, dim) tensor holds, of which this is one."""
    stride_x = n.heads.to(tl.int64) * (DIM * SLICES)
    return Map(pointer, height * width * stride_x, width * stride_x, stride_x, DIM)


@triton.jit
def _batch_head_tile(i, n, tiles):
    """Of the i-th tile of all heads and images; heads vary fastest, because they share cache lines."""
    return (i // n.heads // tiles).to(tl.int64), i % n.heads, i // n.heads % tiles


@triton.jit
def pointers(tensor, batch, head, tokens, o_d):
    p_head = tensor.pointer + batch * tensor.stride_b + head * tensor.stride_h
    o_tokens = tokens.y.to(tl.int64) * tensor.stride_y + tokens.x.to(tl.int64) * tensor.stride_x
    return p_head + o_tokens[:, None] + o_d[None, :]


@triton.jit
def load(tensor, batch, head, tokens, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    mask = tokens.valid[:, None]
    if DIM < BLOCK_D:
        mask = mask & (o_d < DIM)[None, :]
    return tl.load(pointers(tensor, batch, head, tokens, o_d), mask=mask, other=0.0)


@triton.jit
def store(tensor, values, batch, head, tokens, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    mask = tokens.valid[:, None] & (o_d < DIM)[None, :]
    tl.store(pointers(tensor, batch, head, tokens, o_d), values.to(tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def lse_offsets(n, batch, head, queries):
    """In a contiguous (B, heads, H, W) tensor."""
    first = (batch * n.heads + head) * n.height * n.width
    return first + queries.y * n.width + queries.x


@triton.jit
def _load_lse(p_lse, queries):
    """Log-sum-exp, times LOG2E; infinity, so that all weights are zero, where there is no query or it has no key."""
    b_lse = tl.load(p_lse, mask=queries.valid, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E


@triton.jit
def _statistics(n, f, batch, head, queries):
    """Offsets in (B, heads, H * W), of what backward keeps for queries."""
    number = queries.y * n.width + queries.x if f.number is None else f.number(queries)
    return (batch * n.heads + head) * n.height * n.width + number


@triton.jit
def _scores(g, f, c, scale, head, b_q, b_k, queries, keys):
    """Logits, times LOG2E, of queries (rows) to keys."""
    b_s = tl.dot(b_q, b_k.T, input_precision=c.precision) * (scale * LOG2E)
    return f.logits(g, b_s, head, queries, keys, False)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, output, p_lse, g, f, c,
):  # fmt: skip
    n = Sizes(heads, height, width, key_height, key_width)
    q, k, v = (
        aligned_map(q, q_b, q_y, q_x, q_h, c),
        aligned_map(k, k_b, k_y, k_x, k_h, c),
        aligned_map(v, v_b, v_y, v_x, v_h, c),
    )
    batch, head, tile = _batch_head_tile(tl.program_id(0), n, tiles)
    queries, walk = f.q_tile(g, n, batch, tile)
    b_q = load(q, batch, head, queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_m = tl.full([c.BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([c.BLOCK_M], tl.float32)
    b_o = tl.zeros([c.BLOCK_M, c.BLOCK_DV], tl.float32)
    row, column = _start()
    for _ in range(_steps(walk, g.k)):
        keys = f.kv_at(g, n, batch, walk, row, column)
        b_k = load(k, batch, head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load(v, batch, head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_s = _scores(g, f, c, scale, head, b_q, b_k, queries, keys)
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # all masked so far: avoid -inf - -inf
        b_p = tl.exp2(b_s - base[:, None])
        alpha = tl.exp2(b_m - base)
        b_l = b_l * alpha + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * alpha[:, None], input_precision=c.precision)
        b_m = b_m_new
        row, column = _advance(walk, g.k, row, column)
    b_o /= tl.where(b_l == 0.0, 1.0, b_l)[:, None]  # a query without keys yields zero
    output = contiguous_map(output, n, height, width, c.DIM_V)
    store(output, b_o, batch, head, queries, c.DIM_V, c.BLOCK_DV)
    tl.store(p_lse + lse_offsets(n, batch, head, queries), (b_m + tl.log2(b_l)) / LOG2E, mask=queries.valid)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_dq(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, do, do_b, do_y, do_x, do_h,
    output, dq, p_lse, p_grad_lse, p_delta, p_log2, g, f, c,
):  # fmt: skip
    """Gradient of q; also stores delta, the part of the logits' gradients that is common to a query's keys, and the
    log-sum-exp as `_load_lse` gives it."""
    n = Sizes(heads, height, width, key_height, key_width)
    q, k, v = (
        aligned_map(q, q_b, q_y, q_x, q_h, c),
        aligned_map(k, k_b, k_y, k_x, k_h, c),
        aligned_map(v, v_b, v_y, v_x, v_h, c),
    )
    do, output = aligned_map(do, do_b, do_y, do_x, do_h, c), contiguous_map(output, n, height, width, c.DIM_V)
    batch, head, tile = _batch_head_tile(tl.program_id(0), n, tiles)
    queries, walk = f.q_tile(g, n, batch, tile)
    b_q = load(q, batch, head, queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_do = load(do, batch, head, queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    b_o = load(output, batch, head, queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    o_lse = lse_offsets(n, batch, head, queries)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=queries.valid, other=0.0)
    b_lse = _load_lse(p_lse + o_lse, queries)
    o_kept = _statistics(n, f, batch, head, queries)
    tl.store(p_delta + o_kept, b_delta, mask=queries.valid)
    tl.store(p_log2 + o_kept, b_lse, mask=queries.valid)
    b_dq = tl.zeros([c.BLOCK_M, c.BLOCK_D], tl.float32)
    row, column = _start()
    for _ in range(_steps(walk, g.k)):
        keys = f.kv_at(g, n, batch, walk, row, column)
        b_k = load(k, batch, head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load(v, batch, head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_p = tl.exp2(_scores(g, f, c, scale, head, b_q, b_k, queries, keys) - b_lse[:, None])
        b_ds = b_p * (tl.dot(b_do, b_v.T, input_precision=c.precision) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=c.precision)
        row, column = _advance(walk, g.k, row, column)
    dq = contiguous_map(dq, n, height, width, c.DIM, c.SLICES)
    store(dq, b_dq * scale, batch, head, queries, c.DIM, c.BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_dkv(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, do, do_b, do_y, do_x, do_h,
    dk, dv, p_log2, p_delta, p_parts, g, f, c,
):  # fmt: skip
    """Gradients of k and v of a kv_tile, from the queries that attend to it.

    p_parts: None, or (programs, BLOCK_N, BLOCK_D + BLOCK_DV) for those of tiles that are one of many parts.
    """
    n = Sizes(heads, height, width, key_height, key_width)
    q, k, v = (
        aligned_map(q, q_b, q_y, q_x, q_h, c),
        aligned_map(k, k_b, k_y, k_x, k_h, c),
        aligned_map(v, v_b, v_y, v_x, v_h, c),
    )
    do = aligned_map(do, do_b, do_y, do_x, do_h, c)
    batch, head, tile = _batch_head_tile(tl.program_id(0), n, tiles)
    keys, walk = f.kv_tile(g, n, batch, tile)
    b_k = load(k, batch, head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = load(v, batch, head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    b_dk = tl.zeros([c.BLOCK_N, c.BLOCK_D], tl.float32)
    b_dv = tl.zeros([c.BLOCK_N, c.BLOCK_DV], tl.float32)
    row, column = _start()
    for _ in range(_steps(walk, g.q)):
        queries = f.q_at(g, n, batch, walk, row, column)
        b_q = load(q, batch, head, queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_do = load(do, batch, head, queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        o_kept = _statistics(n, f, batch, head, queries)
        b_lse = tl.load(p_log2 + o_kept, mask=queries.valid, other=float("inf"))
        b_delta = tl.load(p_delta + o_kept, mask=queries.valid, other=0.0)
        b_s = tl.dot(b_k, b_q.T, input_precision=c.precision) * (scale * LOG2E)  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(f.logits(g, b_s, head, queries, keys, True) - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=c.precision)
        b_ds = b_p * (tl.dot(b_v, b_do.T, input_precision=c.precision) - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=c.precision)
        row, column = _advance(walk, g.q, row, column)
    dk = contiguous_map(dk, n, key_height, key_width, c.DIM, c.SLICES)
    dv = contiguous_map(dv, n, key_height, key_width, c.DIM_V, c.SLICES)
    b_dk *= scale
    is_only = True
    if p_parts is not None:
        is_only = walk[3]
        if not is_only:
            p_dk, p_dv = _part(p_parts, tl.program_id(0), c)
            tl.store(p_dk, b_dk)
            tl.store(p_dv, b_dv)
    if is_only:
        store(dk, b_dk, batch, head, keys, c.DIM, c.BLOCK_D)
        store(dv, b_dv, batch, head, keys, c.DIM_V, c.BLOCK_DV)


@triton.jit
def _part(p_parts, program, c):
    """Pointers to the gradients of k and v of one part."""
    o_n = tl.arange(0, c.BLOCK_N)[:, None] * (c.BLOCK_D + c.BLOCK_DV)
    p_part = p_parts + program.to(tl.int64) * (c.BLOCK_N * (c.BLOCK_D + c.BLOCK_DV)) + o_n
    return p_part + tl.arange(0, c.BLOCK_D)[None, :], p_part + c.BLOCK_D + tl.arange(0, c.BLOCK_DV)[None, :]


@triton.jit(do_not_specialize=RUNTIME)
def _sum_parts(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, do, do_b, do_y, do_x, do_h,
    dk, dv, p_parts, total_tiles, g, f, c,
):  # fmt: skip
    """Adds up the parts that `_backward_dkv` left of one of the total_tiles, in their order."""
    n = Sizes(heads, height, width, key_height, key_width)
    dk = contiguous_map(dk, n, key_height, key_width, c.DIM, c.SLICES)
    dv = contiguous_map(dv, n, key_height, key_width, c.DIM_V, c.SLICES)
    batch, head, tile = _batch_head_tile(tl.program_id(0), n, total_tiles)
    keys, first, step, count = f.parts(g, n, batch, tile)
    if count > 1:
        b_dk = tl.zeros([c.BLOCK_N, c.BLOCK_D], tl.float32)
        b_dv = tl.zeros([c.BLOCK_N, c.BLOCK_DV], tl.float32)
        for i in range(0, count):
            p_dk, p_dv = _part(p_parts, (batch * tiles + first + step * i) * heads + head, c)
            b_dk += tl.load(p_dk)
            b_dv += tl.load(p_dv)
        store(dk, b_dk, batch, head, keys, c.DIM, c.BLOCK_D)
        store(dv, b_dv, batch, head, keys, c.DIM_V, c.BLOCK_DV)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_tile(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, do, do_b, do_y, do_x, do_h,
    dq, dk, dv, p_lse, p_grad_lse, p_partial, total_tiles, tiles_per_program, g, f, c,
):  # fmt: skip
    """All gradients, where the tokens of a tile attend to each other and to no others.

    p_partial: None, or (shares, heads, BLOCK_M, BLOCK_N), sums of the gradients of the logits. A program takes
    `tiles_per_program` of the `total_tiles` tiles of one head; heads take turns.
    """
    n = Sizes(heads, height, width, key_height, key_width)
    q, k = aligned_map(q, q_b, q_y, q_x, q_h, c), aligned_map(k, k_b, k_y, k_x, k_h, c)
    v, do = aligned_map(v, v_b, v_y, v_x, v_h, c), aligned_map(do, do_b, do_y, do_x, do_h, c)
    dq = contiguous_map(dq, n, height, width, c.DIM, c.SLICES)
    dk = contiguous_map(dk, n, height, width, c.DIM, c.SLICES)
    dv = contiguous_map(dv, n, height, width, c.DIM_V, c.SLICES)
    program = tl.program_id(0)
    if p_partial is not None:
        b_sum = tl.zeros([c.BLOCK_M, c.BLOCK_N], tl.float32)
    first = program // heads * tiles_per_program
    row, column = _start()
    for i in range(first, tl.minimum(first + tiles_per_program, total_tiles)):
        batch, head, tile = _batch_head_tile(i * heads + program % heads, n, tiles)
        queries, walk = f.q_tile(g, n, batch, tile)
        keys = f.kv_at(g, n, batch, walk, row, column)
        b_q = load(q, batch, head, queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
        b_k = load(k, batch, head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_v = load(v, batch, head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        b_do = load(do, batch, head, queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        o_lse = lse_offsets(n, batch, head, queries)
        b_lse = _load_lse(p_lse + o_lse, queries)
        b_p = tl.exp2(_scores(g, f, c, scale, head, b_q, b_k, queries, keys) - b_lse[:, None])
        b_dv = tl.dot(b_p.to(b_do.dtype).T, b_do, input_precision=c.precision)
        b_dp = tl.dot(b_do, b_v.T, input_precision=c.precision)
        b_delta = tl.sum(b_p * b_dp, 1)
        if p_grad_lse is not None:
            b_delta -= tl.load(p_grad_lse + o_lse, mask=queries.valid, other=0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=c.precision)
        b_dk = tl.dot(b_ds.to(b_q.dtype).T, b_q, input_precision=c.precision)
        store(dq, b_dq * scale, batch, head, queries, c.DIM, c.BLOCK_D)
        store(dk, b_dk * scale, batch, head, keys, c.DIM, c.BLOCK_D)
        store(dv, b_dv, batch, head, keys, c.DIM_V, c.BLOCK_DV)
        if p_partial is not None:
            b_sum += b_ds
    if p_partial is not None:
        _store_sum(p_partial, program, b_sum)


@triton.jit
def _store_sum(p_partial, program, b_sum):
    rows: tl.constexpr = b_sum.shape[0]
    columns: tl.constexpr = b_sum.shape[1]
    o_sum = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(p_partial + program.to(tl.int64) * (rows * columns) + o_sum, b_sum)


@triton.jit(do_not_specialize=RUNTIME)
def _backward_dbias(
    q, q_b, q_y, q_x, q_h, k, k_b, k_y, k_x, k_h, v, v_b, v_y, v_x, v_h,
    heads, height, width, key_height, key_width, tiles, scale, do, do_b, do_y, do_x, do_h,
    p_log2, p_delta, p_partial, images, total_tiles, tiles_per_program, kinds, n_blocks, g, f, c,
):  # fmt: skip
    """Gradients of the logits of one of the n_blocks of keys, summed over some q_tiles of one kind, of all images.

    p_partial: (programs of a block, heads, kinds, n_blocks, BLOCK_M, BLOCK_N)
    """
    n = Sizes(heads, height, width, key_height, key_width)
    q, k, v = (
        aligned_map(q, q_b, q_y, q_x, q_h, c),
        aligned_map(k, k_b, k_y, k_x, k_h, c),
        aligned_map(v, v_b, v_y, v_x, v_h, c),
    )
    do = aligned_map(do, do_b, do_y, do_x, do_h, c)
    program = tl.program_id(0)
    block, kind = program % n_blocks, program // n_blocks % kinds
    head = program // n_blocks // kinds % heads
    first = program // n_blocks // kinds // heads * tiles_per_program
    zero = tl.full([], 0, tl.int64)
    b_sum = tl.zeros([c.BLOCK_M, c.BLOCK_N], tl.float32)
    for i in range(first, tl.minimum(first + tiles_per_program, total_tiles)):
        queries, walk = f.q_tile(g, n, zero, i * kinds + kind)
        is_near = f.bias_kv_at(g, n, zero, walk, block)[1]
        for image in range(0, tl.where(is_near, images, 0)):
            batch = zero + image
            keys = f.bias_kv_at(g, n, batch, walk, block)[0]
            b_q = load(q, batch, head, queries, c.DIM, c.BLOCK_D)  # [BLOCK_M, BLOCK_D]
            b_do = load(do, batch, head, queries, c.DIM_V, c.BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
            b_k = load(k, batch, head, keys, c.DIM, c.BLOCK_D)  # [BLOCK_N, BLOCK_D]
            b_v = load(v, batch, head, keys, c.DIM_V, c.BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            o_kept = _statistics(n, f, batch, head, queries)
            b_lse = tl.load(p_log2 + o_kept, mask=queries.valid, other=float("inf"))
            b_delta = tl.load(p_delta + o_kept, mask=queries.valid, other=0.0)
            b_p = tl.exp2(_scores(g, f, c, scale, head, b_q, b_k, queries, keys) - b_lse[:, None])
            b_sum += b_p * (tl.dot(b_do, b_v.T, input_precision=c.precision) - b_delta[:, None])
    _store_sum(p_partial, program, b_sum)


def flat(maps: Sequence[Tensor]) -> tuple[list[tuple], int]:
    """Each map and its strides but that of dim, which has to be 1, and what all of these are multiples of."""
    maps = [x if x.stride(-1) == 1 else x.contiguous() for x in maps]
    strides = [x.stride()[:-1] for x in maps]
    align = math.gcd(16 // maps[0].element_size(), *itertools.chain(*strides))
    return [(x, *stride) for x, stride in zip(maps, strides, strict=True)], align


def constant(value: Any) -> Any:
    """A value that the kernel is compiled for, in a geometry."""
    return tl.constexpr(value)


@functools.lru_cache(maxsize=1024)
def fit(height: int, width: int, most: int) -> Block:
    """Blocks to walk over boxes of this size, of 16 to `most` tokens: those that pad the boxes least."""
    tokens = max(MIN_BLOCK, min(most, triton.next_power_of_2(height) * triton.next_power_of_2(width)))

    def padded(columns: int) -> tuple[int, int]:
        return triton.cdiv(height, tokens // columns) * triton.cdiv(width, columns), -columns

    columns = min((2**i for i in range(tokens.bit_length())), key=padded)
    return Block(*map(constant, (tokens // columns, columns, columns < width)))


def blocks_of(pattern: str, kernel: str, q: Tensor, v: Tensor) -> Blocks:
    """What a kernel is launched with for these tensors."""
    dim = max(32, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))
    return blocks(Entry(_capability(q.device), pattern, kernel, 8 * q.element_size(), dim))


def precision_of(q: Tensor) -> str:
    """Of products, as Triton calls it."""
    return "ieee" if q.dtype == torch.float32 and not allows_tf32() else "tf32"


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


def unsuited_map(q: Tensor) -> str | None:
    """Why PyTorch's own operators are better for queries of this shape, or None."""
    few = q.shape[:-1].numel() < FEW
    return f"there are fewer than {FEW} tokens of all heads, for which launches take longest" if few else None


@torch.compiler.assume_constant_result
def _unsupported_device(device: torch.device) -> str | None:
    if torch.version.hip:
        return "the device is AMD's, whose Triton has no options of these kernels"
    return "the device is older than compute capability 8.0" if _capability(device) < 80 else None


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for compute capability 9.0; without a device, that of the oldest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
    output, lse = new_output(q, v)
    call = _Call(pattern, (q, k, v), bias, table, parameters, scale)
    prepared = call.prepare("forward")
    call.launch(_forward, len(q) * q.shape[3] * prepared.plan.tiles, prepared, output, lse)
    return output, lse


@_operator.register_fake
def _operator_fake(q, k, v, bias, table, pattern, parameters, scale):
    return new_output(q, v)


def new_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Empty: output (B, H, W, heads, dim of v), and log-sum-exp (B, heads, H, W) in float32."""
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
    is_packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, which `is_packed` to one, (B, H, W, 3, heads, dim), and two that are empty; and of bias."""
    call = _Call(pattern, (q, k, v), bias, table, parameters, scale, grad_output, 3 if is_packed else 1)
    *gradients, dbias = _operator_backward_fake(
        grad_output, grad_lse, output, lse, q, k, v, bias, table, pattern, parameters, scale, needs_bias, is_packed
    )
    dq, dk, dv = gradients[0].unbind(3) if is_packed else gradients
    delta, log2 = torch.empty_like(lse), torch.empty_like(lse)
    prepared = call.prepare("tile")
    if prepared.plan.is_closed:
        block_m, block_n = prepared.blocks
        programs, partial, *share = call.share(prepared, (1, block_m, 1, block_n) if needs_bias else None)
        call.launch(_backward_tile, programs, prepared, dq, dk, dv, lse, grad_lse, partial, *share)
    else:
        prepared, partial = call.prepare("dq"), None
        programs = len(q) * q.shape[3] * prepared.plan.tiles
        call.launch(_backward_dq, programs, prepared, output, dq, lse, grad_lse, delta, log2)
        call.launch_by_key(dk, dv, log2, delta)
    fold_bias = PATTERNS[pattern].fold_bias
    if needs_bias and bias is not None and fold_bias is not None:
        sums = call.sum_bias(prepared, log2, delta) if partial is None else partial.sum(0)
        dbias = fold_bias(sums, prepared.plan, bias).to(bias.dtype)
    return gradients[0], gradients[1], gradients[2], dbias


@_operator_backward.register_fake
def _operator_backward_fake(
    grad_output, grad_lse, output, lse, q, k, v, bias, table, pattern, parameters, scale, needs_bias, is_packed
):
    shapes = [(*q.shape[:3], 3, *q.shape[3:]), (0,), (0,)] if is_packed else [x.shape for x in (q, k, v)]
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needs_bias else q.new_empty(0)
    return *(torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes), dbias


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
    needs_bias, is_packed = ctx.needs_input_grad[3], _are_packed(*tensors[1:4])
    *gradients, dbias = _operator_backward(grad_output, grad_lse, output, *tensors, *ctx.rest, needs_bias, is_packed)
    if is_packed:
        gradients = gradients[0].unbind(3)
    return *gradients, dbias if needs_bias else None, None, None, None, None


def _are_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are the three slices of one projection, so that their gradients had better be."""
    if torch.compiler.is_compiling() or transforms() or not q.shape == k.shape == v.shape:
        return False
    step = q.shape[3] * q.shape[4]
    return q.stride(2) == 3 * step and slice_step(q, k, v) == step


_operator.register_autograd(_gradients, setup_context=_setup_context)


class _Prepared(NamedTuple):
    plan: Plan
    constants: Constants
    options: dict[str, int]

    @property
    def blocks(self) -> tuple[int, int]:
        return self.constants.BLOCK_M.value, self.constants.BLOCK_N.value


class _Call:
    """A call of a pattern: what all of its kernels get."""

    def __init__(
        self,
        pattern: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
        table: Tensor | None,
        parameters: Sequence[int],
        scale: float,
        grad_output: Tensor | None = None,
        slices: int = 1,
    ):
        self.pattern, self.functions = pattern, PATTERNS[pattern].functions
        maps, self.align = flat(qkv if grad_output is None else [*qkv, grad_output])
        self.maps, self.grad = [*itertools.chain(*maps[:3])], [*itertools.chain(*maps[3:])]
        self.q, _, self.v = qkv
        self.arguments = (*qkv[:2], bias, table, parameters)
        self.make_plan, self.scale = PATTERNS[pattern].plan, scale
        self.slices = slices

    def prepare(self, kernel: str) -> _Prepared:
        """The plan, and what is compiled for, of one of the kernels."""
        block_m, block_n, warps, stages = blocks_of(self.pattern, kernel, self.q, self.v)
        plan = self.make_plan(*self.arguments, block_m, block_n, kernel == "dkv")
        dims = self.q.shape[-1], self.v.shape[-1]
        padded = (max(MIN_BLOCK, triton.next_power_of_2(x)) for x in dims)
        tokens = (block.rows.value * block.columns.value for block in plan.geometry[:2])
        constants = *dims, *padded, *tokens, self.align, self.slices, precision_of(self.q)
        return _Prepared(plan, Constants(*map(constant, constants)), {"num_warps": warps, "num_stages": stages})

    def launch(self, kernel: Any, programs: int, prepared: _Prepared, *rest: Any) -> None:
        if not programs:
            return
        sizes = (self.q.shape[3], *self.q.shape[1:3], *self.arguments[1].shape[1:3], prepared.plan.tiles)
        compiled_for = prepared.plan.geometry, self.functions, prepared.constants
        with torch.cuda.device_of(self.q):
            kernel[(programs,)](
                *self.maps, *sizes, self.scale, *self.grad, *rest, *compiled_for, **OPTIONS, **prepared.options
            )

    def launch_by_key(self, dk: Tensor, dv: Tensor, log2: Tensor, delta: Tensor) -> None:
        prepared, images_heads = self.prepare("dkv"), len(self.q) * self.q.shape[3]
        programs, parts, c = images_heads * prepared.plan.tiles, None, prepared.constants
        if prepared.plan.summed_tiles:
            shape = programs, c.BLOCK_N.value, c.BLOCK_D.value + c.BLOCK_DV.value
            parts = torch.empty(shape, dtype=torch.float32, device=log2.device)
        self.launch(_backward_dkv, programs, prepared, dk, dv, log2, delta, parts)
        if parts is not None:
            tiles = prepared.plan.summed_tiles
            self.launch(_sum_parts, images_heads * tiles, prepared, dk, dv, parts, tiles)

    def share(self, prepared: _Prepared, summed: tuple[int, ...] | None) -> tuple[int, Tensor | None, int, int]:
        """Number of programs, and what they get: memory for a sum of this shape for each, numbers of tiles."""
        total_tiles, heads = len(self.q) * prepared.plan.tiles, self.q.shape[3]
        if summed is None:
            return total_tiles * heads, None, total_tiles, 1
        tiles_per_program = max(1, total_tiles * heads // BIAS_PROGRAMS)
        shares = triton.cdiv(total_tiles, tiles_per_program)
        partial = torch.empty((shares, heads, *summed), dtype=torch.float32, device=self.q.device)
        return shares * heads, partial, total_tiles, tiles_per_program

    def sum_bias(self, prepared: _Prepared, log2: Tensor, delta: Tensor) -> Tensor:
        """Gradients of the logits, summed over the q_tiles of all images that look alike to the bias: (heads,
        bias_kinds, BLOCK_M, bias_blocks, BLOCK_N)."""
        plan, heads = prepared.plan, self.q.shape[3]
        groups = heads, plan.bias_kinds, plan.bias_blocks
        total_tiles = plan.tiles // plan.bias_kinds
        tiles_per_program = max(1, total_tiles * math.prod(groups) // BIAS_PROGRAMS)
        programs = triton.cdiv(total_tiles, tiles_per_program), *groups
        partial = torch.empty((*programs, *prepared.blocks), dtype=torch.float32, device=log2.device)
        rest = log2, delta, partial, len(self.q), total_tiles, tiles_per_program, *groups[1:]
        self.launch(_backward_dbias, math.prod(programs), prepared, *rest)
        return partial.sum(0).transpose(2, 3)
