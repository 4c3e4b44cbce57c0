"""Packages that an extra of ours installs, imported when a recipe asks for them."""

import importlib
import importlib.metadata
from typing import Any

from visionattn.errors import UserError

__all__ = ["imported", "refuse_without"]


def refuse_without(package: str, extra: str, key: str, least: str = "0") -> None:
    """Raises UserError where a package, of this version or newer, that a key of a recipe needs is not installed."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version and _numbers(version) >= _numbers(least):
        return
    wanted = package if least == "0" else f"{package} {least} or newer"
    here = f", but {version} is installed" if version else ""
    raise UserError(f"{key} needs {wanted}{here}: pip install 'visionattn[{extra}]'")


def imported(package: str, extra: str, key: str, least: str = "0") -> Any:
    """The package, or a module of it, that a key of a recipe needs.

    Raises:
        UserError: it is not installed, or too old.
    """
    refuse_without(package.partition(".")[0], extra, key, least)
    return importlib.import_module(package)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
