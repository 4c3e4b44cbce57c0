"""What the docs tell people to run, run; what they show, printed; the keys that they name, known."""

import importlib.util
import json
import re
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
QUICK = {"engineer.md"}  # walks that train nothing
pytest.importorskip("rasterio")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load("run")
WALKS = sorted((DOCS / "walks").glob("*.md"))


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=() if p.name in QUICK else pytest.mark.slow) for p in WALKS]
)
def test_a_walk_does_what_its_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = list(runner.run(page))
    assert shown
    for block, printed in shown:
        assert block.content.strip()
        assert runner.differences(block.content, printed) == []


def test_words_that_differ_are_told_and_numbers_are_not():
    assert runner.differences("loss 0.31, 12 s\n", "loss 0.29,  7 s\n") == []
    assert runner.differences("loss 0.31\nreport: a\n", "loss 0.29\nreport: b\n") == ["- report: a", "+ report: b"]
    assert runner.differences("", "something\n") == ["+ something"]


def test_the_pictures_that_pages_show_are_those_that_the_script_makes():
    shown = {name for page in DOCS.rglob("*.md") for name in re.findall(r"pictures/(\w+)\.png", page.read_text())}
    assert shown == load("pictures").PICTURES.keys() == {file.stem for file in (DOCS / "pictures").iterdir()}


def keys_of(schema: dict, kind: dict, depth: int = 4) -> set[str]:
    """All keys below a part of the schema, sections joined by dots."""
    kind = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
    found: set[str] = set()
    for inner in kind.get("anyOf", []) + kind.get("oneOf", []):
        found |= keys_of(schema, inner, depth)
    for key, value in kind.get("properties", {}).items():
        found.add(key)
        if depth:
            found |= {f"{key}.{below}" for below in keys_of(schema, value, depth - 1)}
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem)
def test_the_keys_that_a_page_names_exist(page):
    schema = json.loads((resources.files("visionattn.recipe") / "schema.json").read_text())
    known = keys_of(schema, schema)
    free = r"(?:model\.args|model\.decoder_args|model\.detector_args|optim\.args|trainer|run)\."
    named = re.findall(r"\b((?:data|model|optim|loss|train|evaluate|objective|probe)(?:\.\w+)+)\b", page.read_text())
    others = {"model.json", "model.onnx", "train.py", "model.parameters"}  # files and Python
    assert [key for key in named if key not in known | others and not re.match(free, f"{key}.")] == []
