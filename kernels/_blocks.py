"""Shapes of tiles, warps and stages that the Triton kernels are launched with.

They stand in two tables of the same form: `_blocks.csv` beside this file, and before it the user's own, which
`visionattn benchmark kernels --tune` writes. A row is for devices of its compute capability and newer ones, as long as
no row is of one nearer to the device; one of a pattern comes before one of "any". The rows of `_blocks.csv` were chosen
without a device: the largest tiles of those tried that compile with few spilled registers or none. Rows of 90 have the
64 rows of a product that tensor cores of Hopper and of Blackwell's servers (100) want; those of 120 have no such.
"""

import csv
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ["KERNELS", "OURS", "Blocks", "Entry", "blocks", "cache", "preferring", "read", "user_file"]

KERNELS = ("forward", "dq", "dkv", "tile")
OURS = Path(__file__).parent / "_blocks.csv"


class Entry(NamedTuple):
    """What a row of a table is for."""

    capability: int  # 90 for compute capability 9.0
    pattern: str
    kernel: str
    bits: int  # of the dtype
    dim: int  # head dim, padded to 32, 64 or 128


class Blocks(NamedTuple):
    block_m: int  # queries at a time, at most
    block_n: int  # keys at a time, at most
    warps: int
    stages: int


Table = dict[Entry, Blocks]
_preferred: Table = {}  # before all tables, while they are tuned


def cache() -> Path:
    """The folder of what is kept for the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionattn"


def user_file() -> Path:
    """The user's own table, if there is one."""
    return cache() / "blocks.csv"


def blocks(entry: Entry) -> Blocks:
    """What kernels of this entry are launched with."""
    return _preferred.get(entry) or _look_up(entry)


@contextmanager
def preferring(table: Table) -> Iterator[None]:
    """While active, what this table says comes first."""
    global _preferred
    before, _preferred = _preferred, table
    try:
        yield
    finally:
        _preferred = before


@functools.lru_cache(maxsize=1024)
def _look_up(entry: Entry) -> Blocks:
    for table in (_users(), read(OURS)):
        fitting = [row for row in table if row.capability <= entry.capability and row[2:] == entry[2:]]
        for pattern in (entry.pattern, "any"):
            found = [row for row in fitting if row.pattern == pattern]
            if found:
                return table[max(found)]
    raise LookupError(f"{OURS} has no row for {entry}")


@functools.cache
def _users() -> Table:
    if not user_file().exists():
        return {}
    try:
        return read(user_file())
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{user_file()} is no table of tiles ({error}): it is not used", stacklevel=2)
        return {}


def read(file: Path) -> Table:
    """Raises ValueError or TypeError where the file is no such table."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    columns = Entry.__annotations__ | Blocks.__annotations__
    values = [{name: kind(row[name]) if name in row else kind(None) for name, kind in columns.items()} for row in rows]
    return {Entry(*list(row.values())[:5]): Blocks(*list(row.values())[5:]) for row in values}
