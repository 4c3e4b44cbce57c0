"""Packages that an extra of ours installs, imported when a recipe asks for them."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

from visionattn import kernels
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
    """The package that a key of a recipe needs.

    Raises:
        UserError: it is not installed, or too old.
    """
    refuse_without(package, extra, key, least)
    _hide_our_kernels()
    return importlib.import_module(package)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _hide_our_kernels() -> None:
    """transformers asks for a package called kernels, and would find our folder where this is a checkout."""
    found = importlib.util.find_spec("kernels") if "kernels" not in sys.modules else None
    if found is not None and found.origin and os.path.samefile(found.origin, kernels.__file__):
        sys.modules["kernels"] = None  # type: ignore[assignment]  # as Python marks what is not to be found
