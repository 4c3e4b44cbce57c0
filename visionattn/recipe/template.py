"""`visionattn new`: a recipe to start from, in which every key stands with what it means."""

import json
import textwrap
import typing
from typing import Any

import yaml

from visionattn.recipe import part_of
from visionattn.recipe.sections import Section

__all__ = ["template"]


def template(task: str) -> str:
    """A valid recipe of a task, as YAML: what has to be said with an example, everything else as a comment."""
    module = part_of(task, "recipe")
    data = module.DATA[module.EXAMPLE["data"]["format"]]
    lines = [
        f"# A recipe for {task}: change what is not commented out, and say what else should differ from its default.",
        "# Then: visionattn check FILE, and visionattn fit FILE. Paths start from the folder in which that runs;",
        "# ${recipe} is the folder of this file. `extends: NAME` starts from another recipe.",
        f"task: {task}",
    ]
    for name, field in module.Recipe.model_fields.items():
        section = data if name == "data" else field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines += ["", *_section(name, section, module.EXAMPLE.get(name, {}), "")]
        elif name != "task":
            lines += ["", *_key(name, field.get_default(), field.description, set(), "# ")]
    return "\n".join([*lines, ""])


def _section(name: str, section: type[Section], example: dict[str, Any], indent: str) -> list[str]:
    about = " ".join((section.__doc__ or "").split())
    lines = [f"{indent}{'' if example else '# '}{name}:  # {about}"]
    order = [*example, *(key for key in section.model_fields if key not in example)]
    for key in order:
        field = section.model_fields[key]
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            lines += [f"{indent}  {line}" for line in _section(key, inner, example.get(key, {}), "")]
            continue
        known = key in example
        value = example[key] if known else field.get_default(call_default_factory=True)
        lines += [
            f"{indent}  {line}" for line in _key(key, value, field.description, _allowed(inner), "" if known else "# ")
        ]
    return lines


def _key(name: str, value: Any, about: str | None, allowed: set[str], comment: str) -> list[str]:
    text = f"{name}: {yaml.safe_dump([value], default_flow_style=True, width=10_000, sort_keys=False).strip()[1:-1]}"
    words = [about] if about else []
    words += [f"one of {', '.join(sorted(allowed))}"] if len(allowed) > 1 and not about else []
    line = f"{comment}{text}" + (f"  # {'; '.join(words)}" if words else "")
    if len(line) <= 118:
        return [line]
    return [*textwrap.wrap("; ".join(words), 110, initial_indent="# ", subsequent_indent="# "), f"{comment}{text}"]


def _allowed(annotation: Any) -> set[str]:
    """The texts that a key can be."""
    if typing.get_origin(annotation) is typing.Literal:
        return {arg if isinstance(arg, str) else json.dumps(arg) for arg in typing.get_args(annotation)}
    return {text for part in typing.get_args(annotation) if part is not type(None) for text in _allowed(part)}
