"""The one exception that the command line shows as a message instead of a traceback, and what messages are made of."""

import difflib
from collections.abc import Collection, Sequence
from typing import Any

__all__ = ["UserError", "listed", "nearest", "plural"]


class UserError(ValueError):
    """Something the user can mend: the message says what was wrong, where, what was expected and what to do."""


def nearest(word: str, known: Collection[str], most: int = 1, cutoff: float = 0.6) -> str:
    """`; did you mean ...?` with the nearest spellings among the known ones; '' where none is near."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)
    return f"; did you mean {', '.join(near)}?" if near else ""


def listed(items: Sequence[Any], separator: str = ", ", most: int = 20) -> str:
    """The items for a message: the first ones, and how many more."""
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*map(str, items[:most]), *rest])


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
