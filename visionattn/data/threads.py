"""Work on many files by threads: reading and decoding release the interpreter's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 256  # items that wait for a thread: of a million files not all at once


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items, a few of which are worked on while others are looked at."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
