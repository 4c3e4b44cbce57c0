"""What is made when the site is built: the reference (recipe keys, commands, models, families, kernels), and tables."""

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import visionattn
from visionattn.cli import main

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What mkdocs calls: the pages are added to those in the folder."""
    for name, text in {
        "recipes": recipes(),
        "commands": commands(),
        "models": models(),
        "families": families(),
        "kernels": kernels(),
    }.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls: `<!-- table: NAME -->` becomes that of `benchmarks/NAME.csv`."""
    return re.sub(r"<!-- table: (\S+) -->", lambda found: table(ROOT / "benchmarks" / found[1]), markdown)


def table(stem: Path) -> str:
    """Of models, where a .json says where it was measured, else as the file has it."""
    if stem.with_suffix(".json").exists():
        return measured(stem)
    with stem.with_suffix(".csv").open() as file:
        head, *rows = csv.reader(file)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)


def measured(stem: Path) -> str:
    """Of models: time, that of a GMAC over the first model's, and memory."""
    about = json.loads(stem.with_suffix(".json").read_text())
    with stem.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| images | pass | model | ms | faster than its peer | a GMAC's time over the peer's | MiB |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        first = next(other for other in rows if (other["case"], other["step"]) == (row["case"], row["step"]))
        cost = float(row["ms_per_gmac"]) / float(first["ms_per_gmac"])
        lines.append(
            f"| {row['batch']} of {row['case'].rpartition(', ')[2]} | {row['step']} | `{row['candidate']}` | "
            f"{float(row['median_ms']):.0f} | {float(row['speedup']):.2f} | {cost:.2f} | {float(row['peak_mib']):.0f} |"
        )
    command = re.sub(r"\S*/(?=visionattn )|--out \S+", "", about["command"]).strip()
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("visionattn", "torch", "timm"))
    where = f"{about['device']}, threads: {about['threads']}; {versions}. `{command}`"
    return "\n".join([*lines, "", where])


def recipes() -> str:
    """Tables of the sections of each task, out of the schema that editors complete from."""
    schema = json.loads((resources.files("visionattn.recipe") / "schema.json").read_text())
    lines = [
        "# Recipes",
        "A recipe is a YAML file that says what differs from these defaults; `visionattn new TASK` writes one with "
        "every key. `extends: NAME` starts from another recipe, `${recipe}` is the folder of the file, and any key is "
        "overridden on the command line: `train.epochs=20`. A wrong key is answered with its line and the nearest "
        "right one.",
    ]
    for task, reference in schema["discriminator"]["mapping"].items():
        whole = _resolved(schema, {"$ref": reference})
        lines += [f"## `task: {task}`", whole.get("description", "")]
        for section, value in whole["properties"].items():
            if section != "task":
                lines += _section(schema, section, value)
    return "\n\n".join(filter(None, lines))


def _section(schema: dict, name: str, value: dict) -> Iterator[str]:
    """Of one section of a task, or of each format where there are several."""
    kinds = [_resolved(schema, kind) for kind in _alternatives(schema, value) if kind.get("type") != "null"]
    if not any("properties" in kind for kind in kinds):
        yield f"### `{name}`"
        yield f"{_kind(schema, value)}, {_default(value)}. {value.get('description', '')}"
    for kind in kinds:
        if "properties" in kind:
            known_by = next((f"{key}: {v['const']}" for key, v in kind["properties"].items() if "const" in v), None)
            yield f"### `{name}`" + (f" of `{known_by}`" if known_by and len(kinds) > 1 else "")
            yield kind.get("description", "")
            yield _table(schema, kind)


def _table(schema: dict, kind: dict, prefix: str = "") -> str:
    rows = list(_rows(schema, kind, prefix))
    return "\n".join(["| key | value | default | what it is |", "|---|---|---|---|", *rows]) if rows else ""


def _rows(schema: dict, kind: dict, prefix: str) -> Iterator[str]:
    for key, value in kind["properties"].items():
        default = "**needed**" if key in kind.get("required", []) else _default(value)
        told = _escaped(value.get("description", ""))
        yield f"| `{prefix}{key}` | {_escaped(_kind(schema, value))} | {_escaped(default)} | {told} |"
        for inner in _alternatives(schema, value):
            if "properties" in (inner := _resolved(schema, inner)):
                yield from _rows(schema, inner, f"{prefix}{key}.")


def _alternatives(schema: dict, value: dict) -> list[dict]:
    """A union has several; where it is a reference to one, its own."""
    value = _resolved(schema, value)
    of_union = value.get("anyOf") or value.get("oneOf")
    return [inner for kind in of_union for inner in _alternatives(schema, kind)] if of_union else [value]


def _resolved(schema: dict, value: dict) -> dict:
    if "$ref" not in value:
        return value
    return schema["$defs"][value["$ref"].rpartition("/")[2]] | {k: v for k, v in value.items() if k != "$ref"}


def _kind(schema: dict, value: dict) -> str:
    """What a value may be, in words."""
    kinds = []
    for kind in _alternatives(schema, value):
        if "const" in kind:
            kinds.append(f"`{kind['const']}`")
        elif "enum" in kind:
            kinds += [f"`{one}`" for one in kind["enum"]]
        elif kind.get("type") == "array":
            kinds.append(f"list of {_kind(schema, kind['items'])}" if kind.get("items") else "list")
        elif kind.get("type") == "null":
            kinds.append("null")
        elif kind.get("type") in ("integer", "number"):
            kinds.append(_bounded(kind))
        else:
            kinds.append({"object": "section", "string": "text"}.get(kind.get("type", ""), kind.get("type", "any")))
    return ", ".join(dict.fromkeys(kinds))


def _bounded(kind: dict) -> str:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([kind["type"], *(f"{sign} {kind[key]:g}" for key, sign in bounds.items() if key in kind)])


def _default(value: dict) -> str:
    return f"`{json.dumps(value['default'])}`" if "default" in value else "its own defaults"


def _escaped(text: str) -> str:
    """For a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;").strip()


def commands() -> str:
    """What each command says of itself."""
    listed = re.findall(r"^    (\w+) +\S", _help([]), flags=re.MULTILINE)
    lines = [
        "# Commands",
        "Exit status: 0 done, 1 the answer is no, 2 the request was wrong, with a message why.",
        _help([], True),
    ]
    for name in listed:
        lines += [f"## {name}", _help([name], True)]
        if name == "benchmark":
            lines += [_help([name, kind], True) for kind in ("kernels", "models")]
    return "\n\n".join(lines)


def _help(words: list[str], fenced: bool = False) -> str:
    printed, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # what argparse wraps at
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    return f"```text\n{printed.getvalue().strip()}\n```" if fenced else printed.getvalue()


def models() -> str:
    """The table of `visionattn list`, a family at a time."""
    families: dict[str, list[Any]] = {}
    for model in visionattn.list_models():
        families.setdefault(model.family, []).append(model)
    lines = [
        "# Models",
        "All are made by `timm.create_model(name)` after `import visionattn`, take any number of channels and any size "
        "of image from 32 x 32, and are listed with addresses of weights by `visionattn list NAME --details`. Cost is "
        "of one image of the size given.",
    ]
    for family, members in families.items():
        rows = [
            f"| `{m.name}` | {m.parameters / 1e6:.1f} | {m.gmacs:.2f} | {'x'.join(map(str, m.input_size))} | "
            f"{', '.join(map(str, m.strides))} | {'yes' if m.pretrained else 'no'} | "
            f"{m.licence or 'none'} | {m.paper} |"
            for m in members
        ]
        head = "| name | million parameters | GMAC | input | strides | weights | their licence | paper |"
        lines += [f"## {family}", "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])]
    return "\n\n".join(lines)


def families() -> str:
    """The docstring of each file of the backbones, and of its models' class."""
    lines = ["# Families", "What each family is, where it is from, and the arguments its models take."]
    for name in dict.fromkeys(model.family for model in visionattn.list_models()):
        lines += [f"::: visionattn.backbones.{name}\n    options:\n      heading_level: 2\n      members_order: source"]
    return "\n\n".join(lines)


def kernels() -> str:
    """The public functions of the room, and how their forms are chosen."""
    from visionattn import kernels as room

    lines = [
        "# Kernels",
        "Each pattern of attention is one function. Behind it stand forms of the same function: `reference`, the "
        "definition in a few lines; `plain`, a few large operators, for GPUs and compilers; for some a faster exact "
        "form on CPUs, and one of Triton. `backend=` names one, `auto` is the default. A Triton kernel is used after "
        "it has proved itself on the very GPU and versions of this machine, on small problems against the reference; "
        "`visionattn doctor --kernels` tries all of them at once, and says what is used, and why not.",
    ]
    for name in room.__all__:
        lines += [f"::: visionattn.kernels.{name}\n    options:\n      heading_level: 2"]
    return "\n\n".join(lines)
