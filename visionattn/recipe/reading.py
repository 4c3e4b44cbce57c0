"""From YAML text to plain content, and where each key of it stands.

Numbers and words mean what they look like: `no` is text, `1e-4` is a number, and what YAML 1.1 reads as something that
nobody means (010 as 8, 1:30 as 90) is refused, as are numbers that are infinite or none. A text is bounded in size,
depth and aliases.
"""

import math
import os.path
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor

from visionattn.errors import UserError, nearest

__all__ = ["COMMAND_LINE", "Document", "override", "read", "shown", "text_of"]

COMMAND_LINE = "command line"
CHARACTERS, DEPTH, NODES = 1_000_000, 40, 20_000  # a run's own recipe lists its classes, which may be thousands
BITS = 64


class Document(NamedTuple):
    """Content of a recipe, and by key path the file and line that gave it."""

    content: dict[str, Any]
    places: dict[tuple, str]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's true/false and numbers, and no dates, of bounded depth and size."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self.path, self.depth, self.nodes = path, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        where = f"{self.path}:{self.peek_event().start_mark.line + 1}"
        if self.depth > DEPTH:
            raise UserError(f"{where}: sections more than {DEPTH} deep")
        if self.nodes > NODES:
            raise UserError(f"{where}: more than {NODES:,} keys and values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
_INT = r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F]+)$"
_UNCLEAR = r"^[-+]?(?:0[\d_]+|0[bo][\d_]+|[1-9]\d*(?::[0-5]?\d)+(?:\.\d*)?)$"
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("float", _FLOAT, "-+0123456789."),
    ("int", _INT, "-+0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def text_of(path: Path) -> str:
    """The text of a recipe. Raises UserError where it cannot be read or is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected YAML") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read(path: Path, text: str, shipped: dict[str, Path]) -> Document:
    """The content of a recipe with all that it extends.

    `extends: NAME` starts from another recipe, a shipped name or a path from this one's folder: sections are joined
    key by key, everything else is replaced. In texts `${recipe}` is the folder of the file that they stand in.

    Args:
        path: of the file, for messages and `${recipe}`.
        text: its content.
        shipped: recipes by name.

    Raises:
        UserError: with file and line: not readable, duplicate keys, unclear numbers, an unknown or circular `extends`.
    """
    return _extended(path, text, shipped, ())


def _extended(path: Path, text: str, shipped: dict[str, Path], below: tuple[Path, ...]) -> Document:
    content, places = _parsed(text, path)
    name = content.pop("extends", None)
    if name is None:
        return Document(content, places)
    where = places[("extends",)]
    parent = path.parent / str(name)
    parent = parent if os.path.isfile(parent) else shipped.get(str(name), parent)
    if not isinstance(name, str) or not os.path.isfile(parent):
        raise UserError(
            f"{where}: extends is {shown(name)}: no such recipe file beside this one, and no shipped recipe of that "
            f"name{nearest(str(name), shipped)}"
        )
    chain = (*below, path.resolve())
    if parent.resolve() in chain:
        raise UserError(f"{where}: extends goes in a circle: {' -> '.join(p.name for p in (*chain, parent))}")
    base = _extended(parent, text_of(parent), shipped, chain)
    return Document(_joined(base.content, content), base.places | places)


def _joined(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return base | {key: _joined(base.get(key), value) for key, value in change.items()}
    return change


def _parsed(text: str, path: Path) -> Document:
    places: dict[tuple, str] = {}
    content = _content(text, (), places, path)
    if not isinstance(content, dict):
        expected = "a recipe is a mapping of keys to values (task, model, data, ...)"
        raise UserError(f"{path}: {expected}, found {'nothing' if content is None else shown(content)}")
    return Document(_placed(content, path.parent.absolute()), places)


def _content(text: str, prefix: tuple, places: dict[tuple, str], path: Path) -> Any:
    """The content of a YAML text that stands at a key path, None of an empty one; `places` gets those of its keys."""
    if len(text) > CHARACTERS:
        raise UserError(f"{path}: {len(text):,} characters, expected a recipe of at most {CHARACTERS:,}")
    try:
        node = _Loader(text, path).get_single_node()
        if node is None:
            return None
        _collect_places(node, prefix, places, path, [NODES])
        return SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not readable as YAML: {' '.join(reason.split())}") from None


def _collect_places(node: yaml.Node, prefix: tuple, places: dict[tuple, str], path: Path, left: list[int]) -> None:
    """The place of every key; refuses duplicate keys, unclear values, and aliases that unfold without end."""
    left[0] -= 1
    if left[0] < 0 or len(prefix) > DEPTH:
        raise UserError(f"{path}: too many keys and values once its aliases (*name) are unfolded")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
                raise UserError(f"{where}: {_shown_node(key)} is no name of a key; quote it where a text is meant")
            loc = (*prefix, key.value)
            if loc in places:
                raise UserError(f"{where}: {'.'.join(map(str, loc))} is given twice (first in {places[loc]}); keep one")
            places[loc] = where
            _collect_places(value, loc, places, path, left)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            places[(*prefix, i)] = f"{path}:{value.start_mark.line + 1}"
            _collect_places(value, (*prefix, i), places, path, left)
    elif isinstance(node, yaml.ScalarNode):
        unclear = _unclear(node)
        if unclear:
            key = f"{'.'.join(map(str, prefix))} is " if prefix else ""
            raise UserError(f"{path}:{node.start_mark.line + 1}: {key}{_shown_node(node)}, {unclear}")


def _shown_node(node: yaml.Node) -> str:
    return shown(node.value).strip("'") or "''" if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _unclear(node: yaml.ScalarNode) -> str | None:
    """Why a value does not mean what it looks like, or what its tag says."""
    if node.style is None and re.match(_UNCLEAR, node.value):
        return (
            f"which YAML may read as another number: write it in decimals, or quote it ('{node.value}') "
            "where a text is meant"
        )
    try:
        value = SafeConstructor().construct_object(node)
        str(value).encode()
    except yaml.YAMLError:
        raise
    except Exception:  # PyYAML's constructors raise nearly anything
        return f"which cannot be read as {node.tag.rpartition(':')[2]}"
    if isinstance(value, int) and value.bit_length() > BITS:
        return f"an integer of more than {BITS} bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    return None


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    return value.replace("${recipe}", str(folder)) if isinstance(value, str) else value


def override(document: Document, text: str) -> None:
    """Put `key.path=value`, its value in YAML, into the content."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"override {shown(text)}: expected key.path=value, such as train.epochs=10")
    try:
        parsed = _content(value, tuple(key.split(".")), {}, Path(COMMAND_LINE))
    except UserError as error:
        reason = str(error).removeprefix(f"{COMMAND_LINE}:1: ")
        raise UserError(f"override {shown(text)}: {reason}") from None
    put(document, key, parsed, text)


def put(document: Document, key: str, value: Any, text: str | None = None) -> None:
    """Put a value at `key.path` into the content; `text` is what the user wrote, for messages."""
    *parents, last = key.split(".")
    section = document.content
    for name in parents:
        if not isinstance(section.setdefault(name, {}), dict):
            raise UserError(f"override {shown(text or key)}: {name} is not a section but {shown(section[name])}")
        section = section[name]
    section[last] = value
    loc = tuple(key.split("."))
    for n in range(1, len(loc)):
        document.places.setdefault(loc[:n], COMMAND_LINE)
    for stale in [place for place in document.places if place[: len(loc)] == loc]:
        del document.places[stale]
    document.places[loc] = COMMAND_LINE


def shown(value: Any) -> str:
    """A value for a message, as YAML, at most 60 characters."""
    try:
        text = repr(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000)
    except (yaml.YAMLError, ValueError):
        text = repr(value)[:60]
    text = text.split("\n...")[0].strip()
    return text if len(text) <= 60 else text[:57] + "..."
