"""From YAML text to plain content, and where each key of it stands.

Numbers and words mean what they look like: `no` is text, `1e-4` is a number, and what YAML 1.1 reads as something that
nobody means (010 as 8, 1:30 as 90) is refused. A text is bounded in size, depth and aliases.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from visionattn.errors import UserError, nearest

__all__ = ["COMMAND_LINE", "Document", "override", "read", "shown"]

COMMAND_LINE = "command line"
CHARACTERS, DEPTH, NODES = 1_000_000, 40, 20_000  # the largest shipped recipe has 1,500 characters and 60 nodes


class Document(NamedTuple):
    """Content of a recipe, and by key path the file and line that gave it."""

    content: dict[str, Any]
    places: dict[tuple, str]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's true/false and numbers, and no dates; a SafeLoader builds plain data only."""


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
    parent = parent if parent.is_file() else shipped.get(str(name), parent)
    if not isinstance(name, str) or not parent.is_file():
        raise UserError(
            f"{where}: extends is {shown(name)}: no such recipe file beside this one, and no shipped recipe of that "
            f"name{nearest(str(name), shipped)}"
        )
    chain = (*below, path.resolve())
    if parent.resolve() in chain:
        raise UserError(f"{where}: extends goes in a circle: {' -> '.join(p.name for p in (*chain, parent))}")
    base = _extended(parent, parent.read_text(encoding="utf-8"), shipped, chain)
    return Document(_joined(base.content, content), base.places | places)


def _joined(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return base | {key: _joined(base.get(key), value) for key, value in change.items()}
    return change


def _parsed(text: str, path: Path) -> Document:
    node = _composed(text, path)
    places: dict[tuple, str] = {}
    _collect_places(node, (), places, path, [NODES])
    try:
        content = _Loader("").construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        expected = "a recipe is a mapping of keys to values (task, model, data, ...)"
        raise UserError(f"{path}: {expected}, found {shown(content)}")
    return Document(_placed(content, path.parent.absolute()), places)


def _composed(text: str, path: Path) -> yaml.Node | None:
    if len(text) > CHARACTERS:
        raise UserError(f"{path}: {len(text):,} characters, expected a recipe of at most {CHARACTERS:,}")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise UserError(f"{path}:{event.start_mark.line + 1}: sections more than {DEPTH} deep")
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return UserError(f"{where}: not readable as YAML: {' '.join(reason.split())}")


def _collect_places(
    node: yaml.Node | None, prefix: tuple, places: dict[tuple, str], path: Path, left: list[int]
) -> None:
    """The place of every key; refuses duplicate keys, unclear numbers, and aliases that unfold without end."""
    left[0] -= 1
    if left[0] < 0 or len(prefix) > DEPTH:
        raise UserError(f"{path}: too many keys and values once its aliases (*name) are unfolded")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            loc, line = (*prefix, key.value if isinstance(key, yaml.ScalarNode) else None), key.start_mark.line + 1
            if loc in places:
                raise UserError(
                    f"{path}:{line}: {'.'.join(map(str, loc))} is given twice (first in {places[loc]}); keep one"
                )
            places[loc] = f"{path}:{line}"
            _collect_places(value, loc, places, path, left)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            places[(*prefix, i)] = f"{path}:{value.start_mark.line + 1}"
            _collect_places(value, (*prefix, i), places, path, left)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and re.match(_UNCLEAR, node.value):
        raise UserError(
            f"{path}:{node.start_mark.line + 1}: {'.'.join(map(str, prefix))} is {node.value}, which YAML may read as "
            f"another number: write it in decimals, or quote it ('{node.value}') where a text is meant"
        )


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
        raise UserError(f"override {text!r}: expected key.path=value, such as train.epochs=10")
    try:
        places: dict[tuple, str] = {}
        node = _composed(value, Path(COMMAND_LINE))
        _collect_places(node, tuple(key.split(".")), places, Path(COMMAND_LINE), [NODES])
        parsed = _Loader("").construct_document(node) if node is not None else None
    except (UserError, yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).removeprefix(f"{COMMAND_LINE}:1: ") or type(error).__name__
        raise UserError(f"override {text!r}: the value is not readable as YAML ({reason})") from None
    put(document, key, parsed, text)


def put(document: Document, key: str, value: Any, text: str | None = None) -> None:
    """Put a value at `key.path` into the content; `text` is what the user wrote, for messages."""
    *parents, last = key.split(".")
    section = document.content
    for name in parents:
        if not isinstance(section.setdefault(name, {}), dict):
            raise UserError(f"override {text or key!r}: {name} is not a section but {shown(section[name])}")
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
