"""Pydantic's findings in the user's terms: file and line, full key, what was given, what is allowed."""

import re
import typing
from typing import Any

from pydantic import ValidationError

from visionattn.errors import nearest
from visionattn.recipe.reading import Document, shown
from visionattn.recipe.sections import Section

__all__ = ["explain"]


def explain(error: ValidationError, schema: type[Section], document: Document, name: str) -> str:
    """One line for each wrong key; the branches of a union are joined. `name` stands for the whole recipe."""
    return _Explanation(schema, document, name).of(error)


class _Explanation:
    def __init__(self, schema: type[Section], document: Document, name: str) -> None:
        self.schema, self.content, self.places, self.name = schema, document.content, document.places, name

    def of(self, error: ValidationError) -> str:
        by_key: dict[tuple, list[Any]] = {}
        for item in error.errors():
            by_key.setdefault(self._keys(item), []).append(item)
        return "\n".join(f"{self._where(keys)}: {self._line(keys, items)}" for keys, items in by_key.items())

    def _keys(self, item: Any) -> tuple:
        """The location without the names of union members, which are no keys of the file."""
        keys: list[Any] = []
        value: Any = self.content
        for step in item["loc"]:
            if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
                keys.append(step)
                value = value[step]
        if item["type"] == "missing":
            keys.append(item["loc"][-1])
        elif item["type"].startswith("union_tag"):
            keys.append("format")
        return tuple(keys)

    def _where(self, keys: tuple) -> str:
        known = (self.places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.places)
        return next(known, self.name)

    def _line(self, keys: tuple, items: list[Any]) -> str:
        key, item = ".".join(map(str, keys)), items[0]
        expected = list(map(_expected, items))
        if not keys:  # of the whole recipe; it names its keys itself
            return " and ".join(expected)
        given = f"{key} is {shown(item['input'])}"
        match item["type"]:
            case "extra_forbidden":
                return f"{key}: unknown key (given {shown(item['input'])}){self._nearest_key(keys)}"
            case "missing":
                about = self._section(keys).model_fields[keys[-1]].description
                return f"{key} is missing" + (f": {about}" if about else "")
            case "union_tag_not_found" | "union_tag_invalid":
                formats = sorted(self._formats(self._section(keys[:-1]).model_fields[keys[-2]].annotation))
                tag = item.get("ctx", {}).get("tag")
                start = f"{key} is {shown(tag)}" if tag else f"{key} is missing"
                return f"{start}; allowed: {', '.join(formats)}{nearest(str(tag), formats)}"
        if all(i["type"] == "literal_error" for i in items):
            allowed = item["ctx"]["expected"]
            quoted = re.findall("'([^']+)'", allowed)
            return f"{given}; allowed: {allowed}{nearest(str(item['input']), quoted)}"
        return f"{given}; expected: {' or '.join(dict.fromkeys(expected))}"

    def _section(self, keys: tuple) -> type[Section]:
        """The section class that holds the last of these keys."""
        section: Any = self.schema
        value: Any = self.content
        for key in keys[:-1]:
            annotation, value = section.model_fields[key].annotation, value[key]
            sections = _sections(annotation)
            section = sections[0] if len(sections) == 1 else self._formats(annotation)[value["format"]]
        return section

    @staticmethod
    def _formats(union: Any) -> dict[str, type[Section]]:
        return {typing.get_args(m.model_fields["format"].annotation)[0]: m for m in _sections(union)}

    def _nearest_key(self, keys: tuple) -> str:
        """The nearest spelling in the same section, else the same name in another one."""
        fields = self._section(keys).model_fields
        prefix = "".join(f"{key}." for key in keys[:-1])
        if near := nearest(str(keys[-1]), fields):
            return near.replace("mean ", f"mean {prefix}")
        for name, field in self.schema.model_fields.items():
            section: Any = field.annotation
            if typing.get_args(section) and name == "data":
                formats = self._formats(section)
                section = formats.get(self.content.get("data", {}).get("format"), next(iter(formats.values())))
            if isinstance(section, type) and issubclass(section, Section) and keys[-1] in section.model_fields:
                return f"; did you mean {name}.{keys[-1]}?"
        return f"; allowed here: {', '.join(fields)}"


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a key can be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections(part)]


def _expected(item: Any) -> str:
    """What pydantic would have liked, in words for people who do not write Python."""
    context = item.get("ctx", {})
    match item["type"]:
        case "path_type":
            return "a path"
        case "too_short":
            return f"at least {context['min_length']} values"
        case "too_long":
            return f"at most {context['max_length']} values"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "keys and values, {key: value}"
    return item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
