"""How far work has come: a bar in a terminal, a plain line now and then elsewhere, nothing where it is soon done."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["duration", "progress"]

T = TypeVar("T")
SECONDS_BEFORE = 2.0
SECONDS_BETWEEN_LINES = 10.0


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, as they are asked for; on stderr how many of `total` are done, and how long the rest will take."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, title, total, leave=False, delay=SECONDS_BEFORE)
        return
    began = time.monotonic()
    told = began + SECONDS_BEFORE - SECONDS_BETWEEN_LINES
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES and done < total:
            left = (now - began) / done * (total - done)
            print(f"{title}: {done:,} of {total:,}, {duration(left)} left", file=sys.stderr)
            told = now


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3 h 05 min."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"
