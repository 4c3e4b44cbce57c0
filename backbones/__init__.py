"""Attention backbones, one file a family; importing this room registers every model in timm."""

import importlib
import pkgutil

if __name__ != "visionattn.backbones":
    raise ImportError("import visionattn.backbones, not backbones: the folder is a room of the package visionattn")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
