"""Attention operators shared by the backbones: one file a pattern, public functions only here.

    from visionattn.kernels import routing_attention, set_backend, record_attention

A pattern's file is found by being in this folder; `_dispatch` tells what to write in it.
"""

import importlib
import pkgutil

if __name__ != "visionattn.kernels":
    raise ImportError("import visionattn.kernels, not kernels: the folder is a room of the package visionattn")

from visionattn.kernels._dispatch import describe_backends, set_backend
from visionattn.kernels._record import record_attention

__all__ = ["describe_backends", "record_attention", "set_backend"]
for _info in pkgutil.iter_modules(__path__):
    if not _info.name.startswith("_"):
        _pattern = importlib.import_module(f"{__name__}.{_info.name}")
        globals().update({name: getattr(_pattern, name) for name in _pattern.__all__})
        __all__ += _pattern.__all__
