"""What reading files has shown, kept from one command to the next, so that only new and changed files are read again.

One file for each user, `$XDG_CACHE_HOME/visionattn/readings.sqlite` (else below ~/.cache), which may be removed at any
time. A reading is found by all that it depends on: path, size and time of change of its files, and what the sample says
of itself, or what was looked for.
"""

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from visionattn import __version__
from visionattn.data.boxes import Boxes
from visionattn.data.sample import Reading, Sample

__all__ = ["DAY", "cache_folder", "keep", "key_of", "keys_of", "reading_as_text", "reading_of_text", "recall"]

log = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT = 2  # of what is read from a sample, and of the keys
NOT_READ = {"split", "group", "case"}  # fields of a sample that no reading depends on
PLAIN = (str, bytes, int, float, np.generic, list, tuple, dict, set, Path, type(None))  # all else is in the files
AT_ONCE = 500  # keys of a query
DAY = 86_400  # seconds
UNUSED = 180  # days


def keys_of(samples: Sequence[Sample], classes: int) -> list[bytes | None]:
    """What each sample's reading is found by; None of those that are read from no file, or from one that is gone."""
    stamps: dict[tuple[Path, ...], bytes | None] = {}
    digests: dict[int, bytes] = {}
    keys = []
    for sample in samples:
        files = sample.files
        if files not in stamps:
            stamps[files] = _stamp(files)
        start = f"{__version__} {FORMAT} {classes}"
        stamp, key = stamps[files], hashlib.blake2b(start.encode(), digest_size=16)
        if stamp is not None:
            key.update(stamp)
            _add(key, sample, digests)
        keys.append(None if stamp is None else key.digest())
    return keys


def cache_folder() -> Path:
    """Where what is kept of files is. Raises RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "visionattn")


def key_of(files: Sequence[Path], *asked: object) -> bytes | None:
    """What is found by it is all that files say to what was asked of them; None where one is gone."""
    stamp = _stamp(files)
    return stamp and hashlib.blake2b(repr((__version__, FORMAT, asked)).encode() + stamp, digest_size=16).digest()


def _stamp(files: Sequence[Path]) -> bytes | None:
    try:
        stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(file)]]
    except OSError:
        return None
    return repr(stats).encode("utf-8", "surrogateescape") if stats else None


@cache
def _fields(kind: Any) -> list[str]:
    unread = NOT_READ if issubclass(kind, Sample) else ()
    return [field.name for field in fields(kind) if field.name not in unread]


def _add(digest: Any, value: Any, digests: dict[int, bytes]) -> None:
    """All fields of a sample or of a part of it; parts that samples share are looked through once."""
    kind: Any = type(value)
    plain: list[Any] = [kind]
    for name in _fields(kind):
        content = getattr(value, name)
        plain.append(name)
        for part in content if isinstance(content, list | tuple) else (content,):
            if isinstance(part, np.ndarray):
                plain.append(f"{part.dtype}{part.shape}")
                digest.update(np.ascontiguousarray(part).data)
            elif isinstance(part, PLAIN):
                plain.append(part)
            elif is_dataclass(part):
                if id(part) not in digests:
                    whole = hashlib.blake2b(digest_size=16)
                    _add(whole, part, digests)
                    digests[id(part)] = whole.digest()
                digest.update(digests[id(part)])
    digest.update(repr(plain).encode("utf-8", "surrogateescape"))


def recall(keys: Iterable[bytes | None], of_text: Callable[[str], T]) -> dict[bytes, T]:
    """What is kept, by its keys."""
    wanted = [key for key in keys if key is not None]
    found: dict[bytes, T] = {}
    with suppress(Unusable), _table() as table:
        today = int(time.time()) // DAY
        for first in range(0, len(wanted), AT_ONCE):
            some = wanted[first : first + AT_ONCE]
            marks = ",".join("?" * len(some))
            old = []
            for key, used, text in table.execute(f"SELECT * FROM readings WHERE key IN ({marks})", some):
                found[key] = of_text(text)
                old += [(today, key)] if used < today else []
            table.executemany("UPDATE readings SET used = ? WHERE key = ?", old)
    return found


def keep(found: Mapping[bytes, T], as_text: Callable[[T], str]) -> None:
    """Keep what was read by its keys, and forget what has not been asked for in half a year."""
    today = int(time.time()) // DAY
    rows = [(key, today, as_text(reading)) for key, reading in found.items()]
    with suppress(Unusable), _table() as table:
        table.executemany("INSERT OR REPLACE INTO readings VALUES (?, ?, ?)", rows)
        table.execute("DELETE FROM readings WHERE used < ?", [today - UNUSED])


_warn_once = cache(log.warning)


class Unusable(Exception):
    """The file cannot be read or written: everything is then read anew."""


@contextmanager
def _table() -> Iterator[sqlite3.Connection]:
    """A connection to the file. Raises Unusable, once it has been said; a damaged file is removed."""
    path = cache_folder() / "readings.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS readings (key BLOB PRIMARY KEY, used INTEGER, reading TEXT) WITHOUT ROWID"
            )
            yield connection
    except (sqlite3.Error, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        _warn_once("%s: cannot be used, so files are read anew (%s)", path, str(error))
        if not isinstance(error, sqlite3.OperationalError | OSError | RuntimeError):  # locked, full, no home
            path.unlink(missing_ok=True)
        raise Unusable from None


def reading_as_text(reading: Reading) -> str:
    content = {field.name: getattr(reading, field.name) for field in fields(reading)}
    content |= {name: content[name].hex() for name in ("image", "pair")}
    content |= {name: content[name].tolist() for name in ("mean", "square", "counts")}
    content["places"] = [[k, place.tolist()] for k, place in reading.places.items()]
    if (boxes := reading.boxes) is not None:
        content["boxes"] = [boxes.xyxy.tolist(), boxes.labels.tolist(), boxes.ignore.tolist()]
    return json.dumps(content)


def reading_of_text(text: str) -> Reading:
    content = json.loads(text)
    if content["boxes"] is not None:
        xyxy, labels, ignore = content["boxes"]
        content["boxes"] = Boxes(
            np.array(xyxy, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(ignore, bool)
        )
    content["size"] = tuple(content["size"])
    content["counts"] = np.array(content["counts"], np.int64)
    for name in ("image", "pair"):
        content[name] = bytes.fromhex(content[name])
    for name in ("mean", "square"):
        content[name] = np.array(content[name], np.float64)
    content["places"] = {k: np.array(place, np.int32).reshape(-1, 2) for k, place in content["places"]}
    return Reading(**content)
