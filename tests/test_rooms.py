"""The rules that keep the rooms apart: imports go downwards, no room answers to its bare name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["backbones", "kernels", "recipes", "tools"]

# Of the rooms inside visionattn/, from the bottom; a room imports from those above it in this list, and from itself.
LEVELS = [
    ("errors",),
    ("files", "progress", "versions"),
    ("recipe",),
    ("data",),
    ("models", "inference", "writers"),
    ("report",),
    ("tasks",),
    ("environment", "listing", "acceleration"),
    ("runs",),
    ("api",),
    ("cli",),
]
TORCH_FREE = ["errors.py", "files.py", "progress.py", "versions.py", "recipe", "cli.py", "__init__.py", "__main__.py"]
MAY_IMPORT = {
    "kernels": {"visionattn.kernels"},
    "backbones": {"visionattn.backbones", "visionattn.kernels"},
    "tools": {"visionattn"},
}


def files(room: str) -> list[Path]:
    """Modules of a room, without what symlinks show."""
    return [f for f in (ROOT / room).rglob("*.py") if not any(parent.is_symlink() for parent in f.parents)]


def imported(file: Path, everywhere: bool = True) -> Iterator[str]:
    """Modules that a file imports, in functions too unless only those at its top are asked for."""
    tree = ast.parse(file.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef) or (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test))
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not everywhere and id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: rooms use absolute imports"
            yield node.module
            if node.module.count(".") < 2:  # names may be modules of a package
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_downwards(room):
    for file in files(room):
        ours = {name for name in imported(file) if name.split(".")[0] == "visionattn"}
        wrong = {n for n in ours if not any(n == a or n.startswith(a + ".") for a in MAY_IMPORT[room])}
        assert not wrong, f"{file} imports {wrong}"


def test_imports_inside_visionattn_go_downwards():
    level = {room: n for n, rooms in enumerate(LEVELS) for room in rooms}
    seen = set()
    for file in files("visionattn"):
        room = file.relative_to(ROOT / "visionattn").parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        seen.add(room)
        for name in imported(file):
            other = name.split(".")[1] if name.startswith("visionattn.") else ""
            if other in level and other != room:
                assert level[other] < level[room], f"{file} imports {name}"
            assert other in level or other in ("", "__version__", *ROOMS), (
                f"{file} imports {name}, which is in no level"
            )
    assert seen == set(level)


def test_tasks_import_no_other_task_and_formats_no_task():
    for task in (ROOT / "visionattn" / "tasks").iterdir():
        for file in task.rglob("*.py") if task.is_dir() else ():
            others = [n.split(".")[2] for n in imported(file) if n.startswith("visionattn.tasks.")]
            shared = {f.stem for f in task.parent.glob("*.py")}
            assert set(others) <= {task.name, *shared}, file
    for file in files("visionattn/data"):
        assert not [n for n in imported(file) if n.startswith(("visionattn.tasks", "visionattn.runs"))], file


def test_every_task_has_the_same_files():
    expected = {"recipe", "transforms", "losses", "metrics", "task", "evaluation", "report", "check"}
    for task in [p for p in (ROOT / "visionattn" / "tasks").iterdir() if p.is_dir() and p.name != "__pycache__"]:
        assert expected <= {p.stem for p in task.glob("*.py")}, task


def test_torch_is_imported_where_it_is_needed_only():
    """Recipes and the command line answer without it, data only in their loaders."""
    light = [f for place in TORCH_FREE for f in (files(f"visionattn/{place}") or [ROOT / "visionattn" / place])]
    light += [f for f in files("visionattn/data") if f.name != "loaders.py"]
    light += [f for f in files("visionattn/tasks") if f.name == "recipe.py"]
    heavy = {"torch", "torchvision", "timm", "lightning", "torchmetrics", "sklearn", "nibabel", "pydicom", "rasterio"}
    for file in light:
        private = file.name in (
            "_volumes.py",
            "_rasters.py",
            "_vectors.py",
        )  # what a format imports when it reads its files
        names = {name.split(".")[0] for name in imported(file, everywhere=False)}
        assert not names & (heavy - {"nibabel", "pydicom", "rasterio"} if private else heavy), file


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that something called `task` or `format` is compared with, or that choose from a dict or by `match`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            sides = [node.slice]
        elif isinstance(node, ast.Match):
            patterns = [p for case in node.cases for p in ast.walk(case.pattern)]
            sides = [node.subject, *(p.value for p in patterns if isinstance(p, ast.MatchValue))]
        else:
            continue
        asked = [
            s for side in sides for s in ast.walk(side) if isinstance(s, ast.Attribute) and s.attr in ("task", "format")
        ]
        texts = [
            s.value
            for side in sides
            for s in ast.walk(side)
            if isinstance(s, ast.Constant) and isinstance(s.value, str)
        ]
        if asked and texts:
            yield node.lineno, texts[0]


def test_nothing_asks_which_task_or_format_it_is():
    """Outside the folder of a task or the file of a format."""
    from visionattn.recipe import tasks

    names = {*tasks(), *(f.stem for f in files("visionattn/data/formats") if not f.name.startswith("_")), "csv"}
    for file in [*files("visionattn"), *files("tools")]:
        inside = file.relative_to(ROOT / "visionattn").parts if file.is_relative_to(ROOT / "visionattn") else ()
        if inside[:1] == ("tasks",) and len(inside) > 2:
            continue
        tree = ast.parse(file.read_text())
        assert not list(compared_texts(tree)), f"{file} asks which task or format it is: {list(compared_texts(tree))}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and inside[:2] != ("data", "formats"):
                texts = {s.value for s in ast.walk(node) if isinstance(s, ast.Constant) and isinstance(s.value, str)}
                assert not texts & (names - {"table"}), f"{file}:{node.lineno} compares with {texts & names}"


def test_kernels_need_only_torch():
    others = {"timm", "lightning", "torchvision", "torchmetrics", "pydantic"}
    for file in files("kernels"):
        assert not {name.split(".")[0] for name in imported(file)} & others, file


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "kernels"])
def test_a_room_refuses_its_bare_name(room):
    result = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"import visionattn.{room}" in result.stderr


def test_the_room_of_kernels_is_the_same_under_its_bare_name():
    """transformers asks for a package of the Hub called kernels, and imports what it finds in an editable install."""
    code = "from transformers.integrations import hub_kernels; import kernels, visionattn.kernels as room"
    code += "; assert kernels.window_attention is room.window_attention"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "order", ["import timm, visionattn", "import visionattn, timm", "import visionattn.backbones, timm"]
)
def test_models_are_registered_whichever_is_imported_first(order):
    code = f"{order}; assert timm.is_model('biformer_tiny')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_backbones_need_torch_torchvision_and_timm_only():
    """The package alone imports no torch; with timm, nothing of what training needs, and it works without that."""
    missing = [
        *("lightning", "torchmetrics", "matplotlib", "sklearn", "pandas", "pydantic", "scipy", "mlxtend", "PIL.Image"),
        *("segmentation_models_pytorch", "tqdm.auto", "monai", "nibabel", "rasterio"),
    ]
    code = (
        "import sys; sys.modules |= dict.fromkeys(sys.argv[1:]); import visionattn; assert 'torch' not in sys.modules; "
        "import timm; timm.create_model('biformer_tiny'); visionattn.accelerate(timm.create_model('davit_tiny'))"
    )
    blocked = [name for name in missing if name not in ("PIL.Image", "tqdm.auto")]  # torchvision's and huggingface's
    subprocess.run([sys.executable, "-c", code, *blocked], check=True)
