"""Halo attention in the benchmark: the stages of halonet50ts and halonet26t, and what their kernel is compared with.

Every candidate is called with q, k, v and the arguments of a case: block_size, halo_size, rel_height, rel_width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import halo_attention

__all__ = ["CANDIDATES", "cases", "macs"]

BLOCK = 8
# Model, stride of the map, heads, head_dim, halo: the stages at 256 px, but the last of halonet50ts in both.
STAGES = (
    ("halonet50ts", 8, 4, 32, 3),
    ("halonet50ts", 16, 8, 32, 3),
    ("halonet50ts", 32, 8, 64, 3),
    ("halonet26t", 16, 8, 32, 2),
    ("halonet26t", 32, 8, 64, 2),
)


def cases(size: int) -> list[tuple[str, int, int, int, tuple]]:
    """Name, side, heads, head_dim and arguments. The size is rounded up to a multiple of 256, which timm needs."""
    size = -(-size // (32 * BLOCK)) * 32 * BLOCK
    found = []
    for model, step, heads, dim, halo in STAGES:
        generator = torch.Generator().manual_seed(0)
        tables = torch.randn(2, 2 * (BLOCK + 2 * halo) - 1, dim, generator=generator) * dim**-0.5
        found.append((f"{model} / {step}, {size} px", size // step, heads, dim, (BLOCK, halo, *tables)))
    return found


def macs(side: int, heads: int, dim: int, block_size: int, halo_size: int, *_: object) -> float:
    """Multiply-adds of one image: two products of each query with its block and halo, one with a row of each table."""
    window = block_size + 2 * halo_size
    return 2 * side**2 * heads * dim * (window**2 + window)


def _relative(q: Tensor, table: Tensor, side: int) -> Tensor:
    """[N, rows, queries, dim] -> for each query its products with the table's rows for `side` keys, by timm's shift."""
    n, rows, queries, _ = q.shape
    x = F.pad((q @ table.mT).flatten(0, 1), (0, 1)).flatten(1)
    x = F.pad(x, (0, 2 * side - 1 - queries)).view(n * rows, queries + 1, 2 * side - 1)
    return x[:, :queries, side - 1 :].reshape(n, rows, queries, side)


def halo_by_timm(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, halo_size: int, rel_height: Tensor, rel_width: Tensor
) -> Tensor:
    """What timm's HaloAttn does between its projections: keys and values copied out of the padded map by unfold."""
    (b, h, w, heads, dim), side = q.shape, block_size + 2 * halo_size
    rows, columns, halo = h // block_size, w // block_size, (halo_size,) * 4
    rel_height, rel_width = rel_height.to(q), rel_width.to(q)
    q, kv = (x.permute(0, 3, 4, 1, 2).flatten(0, 1) for x in (q, torch.cat([k, v], -1)))  # [B * heads, dim, H, W]
    q = q.reshape(-1, dim, rows, block_size, columns, block_size).permute(0, 2, 4, 3, 5, 1)
    q = q.reshape(b * heads, rows * columns, block_size**2, dim)
    kv = F.pad(kv, halo).unfold(2, side, block_size).unfold(3, side, block_size)
    kv = kv.reshape(b * heads, -1, rows * columns, side**2).permute(0, 2, 3, 1)
    k, v = kv.split([dim, kv.shape[-1] - dim], -1)
    blocks = q.reshape(-1, block_size, block_size, dim)
    across = _relative(blocks, rel_width, side)[:, :, :, None]  # [blocks, y, x, 1, side]
    down = _relative(blocks.transpose(1, 2), rel_height, side).transpose(1, 2)[..., None]  # [blocks, y, x, side, 1]
    relative = (down + across).reshape(*q.shape[:3], -1)
    output = ((q @ k.mT) * dim**-0.5 + relative).softmax(-1) @ v
    output = output.view(b, heads, rows, columns, block_size, block_size, -1).permute(0, 2, 4, 3, 5, 1, 6)
    return output.reshape(b, h, w, heads, -1)


CANDIDATES = {"timm": halo_by_timm, "visionattn": halo_attention}
