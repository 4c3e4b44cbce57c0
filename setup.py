"""Packages are found, not listed: visionattn/ with all its folders, and the rooms that lie beside it."""

from setuptools import find_packages, setup

ROOMS = ["backbones", "kernels", "recipes", "tools"]

setup(
    packages=sorted({*find_packages(include=["visionattn", "visionattn.*"]), *(f"visionattn.{r}" for r in ROOMS)}),
    package_dir={"visionattn": "visionattn"} | {f"visionattn.{room}": room for room in ROOMS},
)
