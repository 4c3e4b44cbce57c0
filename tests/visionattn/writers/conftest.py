"""What tests of writers share: the files that are there."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def files() -> Callable[[Path], list[str]]:
    """A function that lists every file below a folder, hidden ones too."""
    return lambda folder: sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
