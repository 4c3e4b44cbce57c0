"""Packages are found, not listed: visionattn/ with all its folders, and the rooms that lie beside it."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["backbones", "kernels", "recipes", "tools"]
LAYOUT = {"visionattn": "visionattn"} | {f"visionattn.{room}": room for room in ROOMS}

# An editable install of packages that lie in their parents' folders is a path, which type checkers follow; any other is
# an import hook, which they cannot follow. The symlinks of a checkout show the first layout.
if "editable_wheel" in sys.argv and all(Path("visionattn", room).is_dir() for room in ROOMS):
    LAYOUT = {"": "."}

setup(
    packages=sorted({*find_packages(include=["visionattn", "visionattn.*"]), *(f"visionattn.{r}" for r in ROOMS)}),
    package_dir=LAYOUT,
)
