"""Recipes: what a YAML file may say, and reading one with errors a person can act on.

`load` turns a file (or a shipped recipe's name) and overrides into a validated recipe; nothing here imports torch, so
a mistake is answered at once. The tasks' schemas are `visionattn/tasks/TASK/recipe.py`; `visionattn/recipe/schema.json`
is the same for editors.
"""

import importlib
import importlib.resources
import os.path
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Union

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from visionattn.errors import UserError, nearest
from visionattn.recipe.explain import explain
from visionattn.recipe.reading import Document, override, put, read, shown, text_of
from visionattn.recipe.sections import Recipe

__all__ = ["Recipe", "dump", "json_schema", "load", "loads", "part_of", "shipped", "tasks"]


def tasks() -> list[str]:
    """The tasks that there are: the folders of `visionattn/tasks`."""
    package = importlib.import_module("visionattn.tasks")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)


def part_of(task: str, name: str) -> ModuleType:
    """A file of a task's folder; every task has the same ones."""
    return importlib.import_module(f"visionattn.tasks.{task}.{name}")


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name: 'quickstart', 'segmentation/...'."""
    room = Path(str(importlib.resources.files("visionattn.recipes")))
    return {p.relative_to(room).with_suffix("").as_posix(): p for p in sorted(room.rglob("*.yaml"))}


def load(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe.
        overrides: `key.path=value` strings with values in YAML, or a mapping of key paths to values.

    Raises:
        UserError: one line for each mistake: file and line, key, what was given, what is allowed.
    """
    path = _find(recipe)
    return loads(text_of(path), path, overrides)


def loads(text: str, name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """As `load`, from YAML text; `name` stands for it in messages."""
    return _validated(read(Path(name), text, shipped()), str(name), overrides)


def of_mapping(content: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """As `load`, from plain data."""
    return loads(yaml.safe_dump(_plain(content), sort_keys=False), "recipe", overrides)


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as texts, which YAML has."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _validated(document: Document, name: str, overrides: Sequence[str] | Mapping[str, Any]) -> Recipe:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            put(document, key, _plain(value))
    else:
        for text in overrides:
            override(document, text)
    schema = _schema_of(document.content, name)
    try:
        return schema.model_validate(document.content)
    except ValidationError as error:
        raise UserError(explain(error, schema, document, name)) from None


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load` reads it back."""
    content = recipe.model_dump(mode="json")
    content["data"] = {"format": content["data"].pop("format")} | content["data"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    known = tuple(part_of(task, "recipe").Recipe for task in tasks())
    any_recipe: Any = Annotated[Union[known], Field(discriminator="task")]  # noqa: UP007 - made at run time
    return TypeAdapter(any_recipe).json_schema()


def _find(recipe: str | Path) -> Path:
    if os.path.isfile(recipe):
        return Path(recipe)
    names = shipped()
    if str(recipe) in names:
        return names[str(recipe)]
    near = nearest(str(recipe), names)
    raise UserError(
        f"{recipe}: no such recipe file, and no shipped recipe of that name{near}; shipped: {', '.join(names)}"
    )


def _schema_of(content: dict[str, Any], name: str) -> type[Recipe]:
    task, known = content.get("task"), tasks()
    if task not in known:
        given = f"task is {shown(task)}" if "task" in content else "task is missing"
        raise UserError(f"{name}: {given}; allowed: {', '.join(known)}{nearest(str(task), known)}")
    return part_of(task, "recipe").Recipe
