"""Recipes: one YAML file per experiment, shipped with the package and found by name (see `visionattn.recipe`)."""

if __name__ != "visionattn.recipes":
    raise ImportError("import visionattn.recipes, not recipes: the folder is a room of the package visionattn")
