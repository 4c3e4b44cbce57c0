"""visionattn: attention backbones for vision, and what it takes to train them on real problems.

`import visionattn` registers every model of `visionattn.backbones` in timm, whichever of the two is imported first;
from then on `timm.create_model(name)` makes them. Nothing else happens: without timm, torch is not imported, so the
command line can answer a wrong recipe at once.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from visionattn.errors import UserError

if TYPE_CHECKING:
    from visionattn.acceleration import accelerate
    from visionattn.api import Run, check, fit, load
    from visionattn.kernels import record_attention
    from visionattn.listing import list_models
    from visionattn.tools.explanations import explain

__version__ = "0.2.0"
__all__ = ["Run", "UserError", "accelerate", "check", "explain", "fit", "list_models", "load", "record_attention"]

HOMES = {
    **dict.fromkeys(("Run", "check", "fit", "load"), "visionattn.api"),
    "accelerate": "visionattn.acceleration",
    "explain": "visionattn.tools.explanations",
    "list_models": "visionattn.listing",
    "record_attention": "visionattn.kernels",
}


class _RegisterAfterTimm(importlib.abc.MetaPathFinder):
    """Imports the backbones right after timm has been imported for the first time."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != "timm":
            return None
        if self in sys.meta_path:  # another thread may import timm too
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]  # of this loader only
        return spec


def _register() -> None:
    """The backbones, and the names that published segmenters and detectors have."""
    importlib.import_module("visionattn.backbones")
    importlib.import_module("visionattn.models.published")


if "timm" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
