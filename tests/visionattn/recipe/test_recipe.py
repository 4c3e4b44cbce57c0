"""Reading recipes: what is accepted, and how each mistake is answered."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from visionattn import recipe
from visionattn.errors import UserError
from visionattn.recipe import part_of
from visionattn.recipe.sections import Data, Section
from visionattn.recipe.template import template

ROOT = Path(__file__).parents[3]
GOOD = """\
task: classification
model: {name: biformer_tiny}
data:
  format: folder
  root: photos
optim: {lr: 1e-3}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(write(tmp_path, text), overrides)
    return str(caught.value)


def test_a_recipe_says_only_what_differs(tmp_path):
    loaded = recipe.load(write(tmp_path, GOOD))
    assert loaded.optim.lr == 1e-3
    assert loaded.train.epochs == 100
    assert loaded.data.root == Path("photos").absolute()


def test_overrides_replace_values_in_yaml(tmp_path):
    loaded = recipe.load(write(tmp_path, GOOD), ["train.epochs=3", "data.image_size=[64, 96]", "model.args={n_win: 2}"])
    assert (loaded.train.epochs, loaded.data.image_size, loaded.model.args) == (3, [64, 96], {"n_win": 2})


def test_what_is_saved_reads_back_the_same(tmp_path):
    loaded = recipe.load(write(tmp_path, GOOD), ["data.classes=[no, yes, '1']", "train.ema=0.99"])
    assert recipe.loads(recipe.dump(loaded), "saved") == loaded


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("lr: 1e-3", "lrr: 1e-3", 6, ["optim.lrr", "did you mean optim.lr?"]),
        ("root: photos", "root: photos\n  lr: 3", 6, ["data.lr", "did you mean optim.lr?"]),
        ("root: photos", "image_size: abc", 5, ["data.image_size is 'abc'", "integer", "list"]),
        ("root: photos", "batch_size: 0", 5, ["data.batch_size is 0", "greater than 0"]),
        ("root: photos", "batch_size: true", 5, ["data.batch_size is true", "integer"]),
        ("  root: photos\n", "", 3, ["data.root is missing", "folder"]),
        ("format: folder", "format: foldr", 4, ["data.format is 'foldr'", "csv", "did you mean folder?"]),
        ("format: folder", "classes: [a]", 3, ["data.format is missing", "folder"]),
        ("lr: 1e-3", "schedule: cosin", 6, ["optim.schedule is 'cosin'", "did you mean cosine?"]),
        ("root: photos", "root: photos\n  root: b", 6, ["data.root is given twice", "mine.yaml:5"]),
        ("root: photos", "root: photos\n  fold: 5", 3, ["fold is 5", "0 to 4"]),
        ("lr: 1e-3", "lr: .nan", 6, ["optim.lr is .nan", "finite number"]),
        ("lr: 1e-3", "weight_decay: -.inf", 6, ["optim.weight_decay is -.inf", "finite number"]),
        ("name: biformer_tiny", "args: {a: 1e999}, name: m", 2, ["model.args.a is 1e999", "finite number"]),
        ("lr: 1e-3", "1: 2", 6, ["1 is no name of a key", "quote it"]),
        ("lr: 1e-3", "lr: '1e-3'", 6, ["optim.lr is '1e-3'", "number"]),
        ("{name: biformer_tiny}", "biformer_tiny", 2, ["model is 'biformer_tiny'; expected: keys and values"]),
    ],
)
def test_a_mistake_is_named_with_its_line_and_remedy(tmp_path, old, new, line, words):
    assert old in GOOD
    text = mistake(tmp_path, GOOD.replace(old, new))
    assert any(row.startswith(f"{tmp_path / 'mine.yaml'}:{line}: ") for row in text.splitlines()), text
    for word in words:
        assert word in text


def test_all_mistakes_are_told_at_once(tmp_path):
    text = mistake(tmp_path, GOOD.replace("lr: 1e-3", "lrr: 1").replace("root: photos", "root: 3"))
    assert len(text.splitlines()) == 2


def test_a_warm_up_ends_with_the_training_at_the_latest(tmp_path):
    text = mistake(tmp_path, GOOD, "optim.warmup_epochs=11", "train.epochs=10")
    assert "optim.warmup_epochs is 11, but train.epochs is 10" in text
    assert recipe.load(write(tmp_path, GOOD), ["optim.warmup_epochs=10", "train.epochs=10"]).optim.warmup_epochs == 10


def test_an_override_is_blamed_on_the_command_line(tmp_path):
    assert mistake(tmp_path, GOOD, "train.epoch=3").startswith("command line: train.epoch: unknown key")
    assert "expected key.path=value" in mistake(tmp_path, GOOD, "epochs")
    assert "is not a section" in mistake(tmp_path, GOOD, "task.name=1")


@pytest.mark.parametrize("text", ["", "- a", "a: [", "task: claassification\n", "model: {name: x}\n"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    assert mistake(tmp_path, text).startswith(str(tmp_path / "mine.yaml"))


def test_yaml_cannot_make_objects(tmp_path):
    text = mistake(tmp_path, GOOD + "log: !!python/object/apply:os.system ['touch hacked']\n")
    assert "not readable as YAML" in text
    assert not Path("hacked").exists()


def test_a_shipped_recipe_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe.load("quickstart").task == "classification"
    with pytest.raises(UserError, match="did you mean quickstart"):
        recipe.load("quickstrt")


def test_a_name_that_no_file_can_have_is_no_recipe():
    with pytest.raises(UserError, match="no such recipe file"):
        recipe.load("a" * 5000)


def test_a_home_that_does_not_exist_is_a_folder_that_is_missing(tmp_path):
    loaded = recipe.load(write(tmp_path, GOOD), ["data.root=~nobody_of_this_name/x"])
    assert not loaded.data.root.exists()


@pytest.mark.parametrize("task", recipe.tasks())
def test_the_template_is_valid_and_names_every_key(task):
    text = template(task)
    loaded = recipe.loads(text, "template")
    assert loaded.task == task
    names = set(keys_of(type(loaded), type(loaded.data)))
    assert {"lr", "epochs", "lists", "hflip", "trainer"} < names
    assert names == names & set(re.findall(r"^ *(?:# )?(\w+):", text, re.MULTILINE))


@pytest.mark.parametrize("task", recipe.tasks())
def test_what_the_template_says_in_comments_are_the_defaults(task):
    text = template(task)
    names = "|".join(keys_of(part_of(task, "recipe").Recipe, type(recipe.loads(text, "template").data)))
    said = re.sub(rf"^( *)# (?=(?:{names}): )", r"\1", text, flags=re.MULTILINE)
    assert said.count("\n#") < text.count("\n#")
    assert recipe.loads(said, "template") == recipe.loads(text, "template")


def keys_of(section: type[Section], data: type[Section]) -> Iterator[str]:
    """The names of the keys of a section and of those in it; `data` is that of the format."""
    for name, field in section.model_fields.items():
        yield name
        inner = data if name == "data" else field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from keys_of(inner, data)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_and_short(path):
    recipe.load(path)
    body = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(body) <= 30
    assert path.read_text().startswith("#"), "a recipe starts with its lab book"


def test_reading_a_recipe_imports_no_torch(tmp_path):
    code = "import sys; from visionattn import recipe; recipe.load(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, write(tmp_path, GOOD)], check=True)


def test_the_shipped_schema_is_the_code_s(tmp_path):
    shipped = json.loads((ROOT / "visionattn" / "recipe/schema.json").read_text())
    assert shipped == recipe.json_schema(), "run: python -m visionattn.recipe > visionattn/recipe/schema.json"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.augment.scale=[2, 1]", r"scale is \[2.0, 1.0\], expected \[smallest, largest\]"),
        ("data.augment.scale=[0.001, 0.001]", "data.augment.scale.0 is 0.001; expected: greater than or equal to 0.1"),
        ("evaluate.leave_out=[bakground]", "leave_out names bakground, which is no class; did you mean background"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        recipe.load("segmentation/quickstart", [override])


def kinds_of(schema: dict, value: dict) -> set[str]:
    """The JSON types that a key takes."""
    value = schema["$defs"][value["$ref"].rpartition("/")[2]] | value if "$ref" in value else value
    inner = [kinds_of(schema, kind) for kind in value.get("anyOf", [])]
    typed = {value["type"]} if "type" in value else {type(one).__name__ for one in value.get("enum", [])}
    return typed.union(*inner)


def test_no_format_gives_a_key_of_all_formats_another_meaning():
    shared, schema = Data.model_json_schema(), recipe.json_schema()
    of_formats = [kind for kind in schema["$defs"].values() if "format" in kind.get("properties", {})]
    assert len(of_formats) > 20
    for kind in of_formats:
        for key, value in shared["properties"].items():
            own = kinds_of(schema, kind["properties"].get(key, {})) - {"null"}
            assert own <= kinds_of(shared, value), f"{kind['title']}.{key}: {own}"
