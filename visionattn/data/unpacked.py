"""Files unpacked once: a part of one is then read without the rest.

What takes long is kept on the disk and mapped into memory, in a folder of each user,
`$XDG_CACHE_HOME/visionattn/unpacked` (else below ~/.cache), which may be removed at any time. It takes at most half of
the room that its disk would have without it: what was used longest ago goes first, but nothing of the last day, which a
run may still read. What one process is unpacking another one waits for.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from visionattn.data.kept import DAY, cache_folder, key_of
from visionattn.data.sample import Window
from visionattn.files import Unwritable, new_file

__all__ = ["last_made", "read_part", "unpacked"]

log = logging.getLogger(__name__)
T = TypeVar("T")
LARGE = 2048  # pixels of a side, from which an image file is unpacked to the disk
UNUSED = 30  # days, after which it goes whether there is room or not
LONGEST = 600  # seconds to wait for another process
_LAST = threading.local()


def read_part(
    path: Path, window: Window | None, size: tuple[int, int], decode: Callable[..., np.ndarray], *asked: Any
) -> np.ndarray:
    """(h, w) or (h, w, C) of a window of an image file, which is decoded once while parts of it are wanted.

    A large one is kept unpacked for all, another one by this thread until it wants parts of the next file.

    Args:
        size: (H, W) of the image.
        decode: `decode(path, *asked)` gives the whole of it.
    """
    if window is None:
        return decode(path, *asked)
    divided = [(side.start, side.stop) for side in window] != [(0, length) for length in size]
    if divided and max(size) > LARGE:
        return unpacked([path], partial(decode, path, *asked), decode.__name__, *asked)[window]
    return last_made([path], partial(decode, path, *asked), decode.__name__, *asked)[window]


def last_made(files: Sequence[Path], make: Callable[[], T], name: str, *asked: Any) -> T:
    """What is made of files, unless it is what this thread made last under this name."""
    key, made = key_of(files, name, *asked), vars(_LAST)
    if key is None or made.get(name, (None,))[0] != key:
        made[name] = key, make()
    return made[name][1]


def unpacked(files: Sequence[Path], unpack: Callable[[], np.ndarray], *asked: Any) -> np.ndarray:
    """What files unpack to, read-only and mapped; in memory where it cannot be kept, which is said once.

    Args:
        asked: what else it depends on.
    """
    key = key_of(files, "unpacked", *asked)
    if key is None:
        return unpack()
    try:
        path = cache_folder() / "unpacked" / f"{key.hex()}.npy"
        if (known := _mapped(path)) is not None:
            return known
        path.parent.mkdir(0o700, parents=True, exist_ok=True)  # of patients, perhaps
        lock = FileLock(path.with_suffix(".lock"))
        alone = lock.acquire(LONGEST)
    except (OSError, RuntimeError) as error:
        _tell(str(error))
        return unpack()
    with alone:
        if (known := _mapped(path)) is None:
            known = _kept(unpack(), path)
        Path(lock.lock_file).unlink(missing_ok=True)
        return known


def _mapped(path: Path) -> np.ndarray | None:
    """What is kept, if it is there and whole."""
    try:
        array = np.load(path, mmap_mode="r")
        os.utime(path)
    except (OSError, ValueError):
        return None
    return array


def _kept(array: np.ndarray, path: Path) -> np.ndarray:
    try:
        _make_room(path.parent, array.nbytes)
        with new_file(path, replace=True) as unfinished:
            np.save(unfinished, array)
        return np.load(path, mmap_mode="r")
    except (OSError, Unwritable) as error:
        _tell(str(error))
        return array


def _make_room(folder: Path, needed: int) -> None:
    """Remove what is not used, as the module says. Raises OSError where that is not enough."""
    now, parts = time.time(), [(path.stat(), path) for path in folder.iterdir() if path.suffix != ".lock"]
    total = sum(stat.st_size for stat, _ in parts)
    room = (shutil.disk_usage(folder).free + total) // 2
    for stat, path in sorted(parts, key=lambda part: part[0].st_mtime):
        unused = (now - stat.st_mtime) / DAY
        if unused < 1 or (unused < UNUSED and total + needed <= room):
            break
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # folders of processes that were killed
        total -= stat.st_size
    if total + needed > room:
        raise OSError(errno.ENOSPC, f"{needed >> 20:,} MiB more would be over half of its disk")


@cache
def _tell(reason: str) -> None:
    log.warning("files are unpacked each time that they are read: there is no place to keep them unpacked (%s)", reason)
