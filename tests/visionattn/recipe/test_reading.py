"""From YAML to content: what a recipe extends, and hostile or unclear texts, which are one line whatever they are."""

import string
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from visionattn import recipe
from visionattn.errors import UserError

GOOD = """\
task: classification
model: {name: biformer_tiny, args: {n_win: 2}}
data: {format: folder, root: "${recipe}/photos", batch_size: 8}
optim: {lr: 1e-3}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(path, overrides)
    return str(caught.value)


def test_a_recipe_starts_from_another_one_section_by_section(tmp_path):
    write(tmp_path / "base.yaml", GOOD)
    child = write(
        tmp_path / "child.yaml",
        "extends: base.yaml\nmodel: {args: {topks: [1]}}\ntrain: {epochs: 7}\ndata: {batch_size: 4}\n",
    )
    loaded = recipe.load(child, ["optim.lr=2e-3"])
    assert (loaded.optim.lr, loaded.train.epochs, loaded.data.batch_size) == (2e-3, 7, 4)
    assert loaded.model.args == {"n_win": 2, "topks": [1]}
    assert loaded.data.format == "folder"


def test_a_shipped_recipe_can_be_extended_by_name_and_by_one_of_its_own_name(tmp_path):
    child = write(tmp_path / "quickstart.yaml", "extends: quickstart\ntrain: {epochs: 3}\n")
    loaded, shipped = recipe.load(child), recipe.load("quickstart")
    assert loaded.train.epochs == 3 != shipped.train.epochs
    assert loaded.model_copy(update={"train": shipped.train}) == shipped


def test_a_file_beside_the_recipe_comes_before_a_shipped_name(tmp_path):
    write(tmp_path / "quickstart", GOOD)
    child = write(tmp_path / "child.yaml", "extends: quickstart\n")
    assert recipe.load(child).data.batch_size == 8


def test_chains_go_through_folders_and_each_recipe_folder_is_its_own(tmp_path, monkeypatch):
    write(tmp_path / "a/base.yaml", GOOD)
    write(tmp_path / "b/middle.yaml", 'extends: ../a/base.yaml\ndata: {lists: {train: "${recipe}/train.txt"}}\n')
    child = write(tmp_path / "c/child.yaml", "extends: ../b/middle.yaml\ndata: {lists: {val: val.txt}}\n")
    monkeypatch.chdir(tmp_path)
    data = recipe.load(child).data
    assert data.root.resolve() == tmp_path / "a/photos"
    assert data.lists.train.resolve() == tmp_path / "b/train.txt"
    assert data.lists.val == tmp_path / "val.txt"  # relative paths start from the folder in which the command runs


@pytest.mark.parametrize(("first", "second"), [("b.yaml", "a.yaml"), ("a.yaml", "a.yaml"), ("./a.yaml", "")])
def test_circles_are_refused_with_the_files_in_them(tmp_path, first, second):
    start = write(tmp_path / "a.yaml", f"# mine\nextends: {first}\n" + GOOD)
    write(tmp_path / "b.yaml", f"extends: {second}\n")
    text = refusal(start)
    assert "extends goes in a circle" in text
    assert text.startswith((f"{tmp_path}/a.yaml:2: ", f"{tmp_path}/b.yaml:1: "))
    assert text.rstrip().endswith("a.yaml")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", ["quickstrt", "gone.yaml", "''", ".", "[quickstart]", "3", '"a\\0b"', "a" * 5000])
def test_what_cannot_be_extended_is_refused_with_its_line(tmp_path, name):
    text = refusal(write(tmp_path / "mine.yaml", f"# mine\nextends: {name}\n" + GOOD))
    assert text.startswith(f"{tmp_path}/mine.yaml:2: extends is ")
    assert "no such recipe file beside this one, and no shipped recipe of that name" in text
    assert text.endswith("; did you mean quickstart?") == ("quick" in name)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"a: ["])
def test_an_extended_file_that_is_no_recipe_is_named(tmp_path, content):
    (tmp_path / "base.yaml").write_bytes(content)
    text = refusal(write(tmp_path / "mine.yaml", "extends: base.yaml\n"))
    assert text.startswith(f"{tmp_path}/base.yaml")
    assert len(text.splitlines()) == 1


def test_a_mistake_is_told_with_the_file_and_the_line_that_made_it(tmp_path):
    base = write(tmp_path / "base.yaml", GOOD.replace("lr: 1e-3", "lrr: 1e-3"))
    child = write(tmp_path / "child.yaml", "extends: base.yaml\n\ntrain: {epochs: many}\ndata:\n  batch_size: 0\n")
    lines = refusal(child, "train.seed=x").splitlines()
    assert sorted(line.split(": ")[0] for line in lines) == sorted(
        [f"{base}:4", f"{child}:3", f"{child}:5", "command line"]
    )


UNCLEAR = ["010", "-010", "08", "0o17", "0b11", "1:30", "+1:30", "1:30:00", "190:20:30.15"]


@pytest.mark.parametrize("value", UNCLEAR)
@pytest.mark.parametrize("place", ["train: {{epochs: {}}}", "log: {{project: {}}}", "trainer: {{a: [1, {}]}}"])
def test_numbers_that_yaml_reads_as_nobody_means_are_refused(tmp_path, place, value):
    text = refusal(write(tmp_path / "mine.yaml", GOOD + place.format(value)))
    assert text.startswith(f"{tmp_path}/mine.yaml:5: ")
    assert f" is {value}," in text
    assert f"quote it ('{value}')" in text


@pytest.mark.parametrize("value", UNCLEAR)
def test_quoted_they_are_texts(tmp_path, value):
    path = write(tmp_path / "mine.yaml", GOOD + f"log: {{project: '{value}'}}\n")
    assert recipe.load(path).log.project == value
    assert f"quote it ('{value}')" in refusal(path, f"train.epochs={value}")


@pytest.mark.parametrize(
    "value", ["no", "on", "off", "y", "2001-12-14", "1.2.3", "12:61", "1e", "0x", "1 2", "-", "~x"]
)
def test_what_looks_like_a_text_is_one(tmp_path, value):
    assert recipe.load(write(tmp_path / "mine.yaml", GOOD + f"log: {{project: {value}}}\n")).log.project == value


@pytest.mark.parametrize(
    ("value", "number"),
    [("1e-4", 1e-4), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("+2", 2.0), ("0x10", 16.0), ("1_000", 1000.0)],
)
def test_what_looks_like_a_number_is_one(tmp_path, value, number):
    assert recipe.load(write(tmp_path / "mine.yaml", GOOD), [f"optim.lr={value}"]).optim.lr == number


def bomb(first: str, each: str) -> str:
    """Nine levels of aliases, each nine times what the one before is."""
    names = string.ascii_lowercase[:10]
    return f"a: &a {first}\n" + "".join(f"{k}: &{k} {each.replace('@', '*' + j)}\n" for j, k in pairwise(names))


HOSTILE = {
    "alias bomb of lists": bomb("[x]", "[@, @, @, @, @, @, @, @, @]"),
    "alias bomb of mappings": bomb("{x: 1}", "{1a: @, b: @, c: @, d: @, e: @, f: @, g: @, h: @, i: @}"),
    "alias bomb of merges": bomb("{x: 1}", "{<<: [@, @, @, @, @, @, @, @, @]}"),
    "an alias of itself": "log: &a {x: *a}",
    "many keys": "\n".join(f"k{i}: 1" for i in range(30_000)),
    "many items": f"log: [{'1,' * 40_000}]",
    "deep lists": "log: " + "[" * 5000,
    "deep mappings": "log: " + "{a: " * 5000 + "1" + "}" * 5000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(500)),
    "a huge text": "#" * 2_000_000,
    "5000 digits": f"train: {{epochs: {'9' * 5000}}}",
    "5000 digits less": f"train: {{epochs: -{'9' * 5000}}}",
    "5000 hexadecimal digits": f"train: {{epochs: 0x{'f' * 5000}}}",
    "5000 quoted digits": f"train: {{epochs: '{'9' * 5000}'}}",
    "25 digits": f"model2: {{args: {'9' * 25}}}",
    "int of a text": "train: {epochs: !!int abc}",
    "int of nothing": "train: {epochs: !!int ''}",
    "int of a list": "train: {epochs: !!int [1]}",
    "float of a text": "train: {epochs: !!float abc}",
    "float of nothing": "train: {epochs: !!float ''}",
    "bool of a text": "train: {compile: !!bool abc}",
    "binary of a text": "train: {epochs: !!binary abc}",
    "a day that is none": "train: {epochs: !!timestamp 2001-99-99}",
    "a date that is none": "train: {epochs: !!timestamp xyz}",
    "a date": "train: {epochs: 2001-99-99}",
    "a set": "train: !!set {a, b}",
    "a list of pairs": "train: !!omap [a: 1]",
    "a mapping of a list": "train: !!map [a]",
    "a text of a mapping": "train: !!str {a: 1}",
    "an object": "train: !!python/object/apply:os.system [echo]",
    "a name": "train: {epochs: !!python/name:os.system ''}",
    "half a character": 'log: {project: "\\ud800"}',
    "no character": "log: \0",
    "a list as a key": "? [a, b]\n: 1",
    "nothing as a key": "null: 1",
    "a merge of a number": "train: {<<: 3}",
    "an alias of nothing": "train: *x",
    "a tabulator": "\tlog: 1",
    "another document": "---\ntask: classification",
    "another YAML": "%YAML 9.9",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_refused_in_one_short_line(tmp_path, text):
    path = write(tmp_path / "mine.yaml", GOOD + text + "\n")
    message = refusal(path)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 250


@pytest.mark.parametrize("text", [text for text in HOSTILE.values() if "\n" not in text], ids=lambda text: text[:20])
def test_hostile_overrides_are_refused_in_one_short_line(tmp_path, text):
    key, _, value = text.partition(": ")
    message = refusal(write(tmp_path / "mine.yaml", GOOD), f"{key.strip() or 'log'}={value or '['}")
    assert len(message.splitlines()) == 1
    assert len(message) < 400


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"\0" * 100, b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a: ä\n".encode("latin-1")]
)
def test_files_that_are_no_texts_are_refused(tmp_path, content):
    (tmp_path / "mine.yaml").write_bytes(content)
    message = refusal(tmp_path / "mine.yaml")
    assert message.startswith(f"{tmp_path}/mine.yaml: ")
    assert len(message.splitlines()) == 1


def test_a_folder_is_no_recipe(tmp_path):
    assert "no such recipe file" in refusal(tmp_path)


def test_a_recipe_of_a_run_with_thousands_of_classes_is_read(tmp_path):
    content = yaml.safe_load(GOOD) | {
        "data": {"format": "folder", "root": "x", "classes": [f"c{i}" for i in range(9000)]}
    }
    assert len(recipe.load(write(tmp_path / "mine.yaml", yaml.safe_dump(content))).data.classes) == 9000


def test_a_byte_order_mark_is_no_character_of_the_recipe(tmp_path):
    assert recipe.load(write(tmp_path / "mine.yaml", "\ufeff" + GOOD)).optim.lr == 1e-3
