"""A module of ours as a script of its own: what it uses of ours stands in it, so nothing of ours has to be installed.

Definitions are taken as they are, so what the script does is what we do.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path

__all__ = ["script_of"]

START = 'if __name__ == "__main__":\n    sys.exit(started(main))\n'


def script_of(module: str, about: str) -> str:
    """The source of a script that runs `started(main)` of a module; `about` is its docstring."""
    taken = _Taken()
    for name in ("main", "started"):
        taken.add(module if name == "main" else "visionattn.inference.deployed", name)
    plain = "\n".join(f"import {name}" for name in sorted({*taken.imports.pop("", ()), "sys"}))
    others = "\n".join(
        f"from {source} import {', '.join(sorted(names))}" for source, names in sorted(taken.imports.items())
    )
    imports = f"{plain}\n{others}"
    body = "\n\n\n".join(taken.definitions)
    return f'"""{about}"""\n\nfrom __future__ import annotations\n\n{imports}\n\n{body}\n\n\n{START}'


class _Module:
    """The definitions of a module, and where its other names are from."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        self.lines = source.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.ours: dict[str, tuple[str, str]] = {}
        self.others: dict[str, tuple[str, str]] = {}  # the module and what is imported from it; "" and a module
        for statement in ast.parse(source).body:
            self._note(statement)

    def _note(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            self.definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            of_names = [name for target in statement.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            self.definitions |= {name.id: statement for name in of_names}
        elif isinstance(statement, ast.If):  # TYPE_CHECKING
            for inner in statement.body:
                self._note(inner)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            module = getattr(statement, "module", None)
            for alias in statement.names:
                name = alias.asname or alias.name.partition(".")[0]
                if module and module.startswith("visionattn"):
                    self.ours[name] = module, alias.name
                else:
                    self.others[name] = module or "", ast.unparse(alias)

    def source(self, statement: ast.stmt) -> str:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        return "\n".join(self.lines[first - 1 : statement.end_lineno])


_read = cache(_Module)


class _Taken:
    """Definitions in an order in which each stands behind what it needs."""

    def __init__(self) -> None:
        self.definitions: list[str] = []
        self.imports: dict[str, set[str]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._sources: dict[str, str] = {}

    def add(self, module: str, name: str) -> None:
        """Take a name of a module with all that it uses."""
        known = _read(module)
        if name in known.ours:
            source, original = known.ours[name]
            if original != name or name not in {**_read(source).definitions, **_read(source).ours}:
                raise ValueError(
                    f"{module} imports {original} of {source} as {name}: a script can have definitions only"
                )
            self.add(source, original)
        elif name in known.others:
            source, imported = known.others[name]
            self.imports.setdefault(source, set()).add(imported)
        elif name in known.definitions and (module, name) not in self._seen:
            statement = known.definitions[name]
            self._seen |= {(module, other) for other, same in known.definitions.items() if same is statement}
            used = sorted({node.id for node in ast.walk(statement) if isinstance(node, ast.Name)})
            for other in used:
                self.add(module, other)
            source = known.source(statement)
            if self._sources.setdefault(name, source) != source:
                raise ValueError(f"{module} and another module have a {name} each, of which a script can have one")
            if source not in self.definitions:
                self.definitions.append(source)
