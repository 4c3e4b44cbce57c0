"""The rules that keep the rooms apart: imports go downwards, every folder ships, no room answers to its bare name."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["backbones", "kernels", "recipes", "tools"]
MAY_IMPORT = {
    "kernels": {"visionattn.kernels"},
    "backbones": {"visionattn.backbones", "visionattn.kernels"},
    "visionattn": {"visionattn"},
    "tools": {"visionattn"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: rooms use absolute imports"
            names |= {node.module} | (
                {f"{node.module}.{a.name}" for a in node.names} if node.module == "visionattn" else set()
            )
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_downwards(room):
    for file in (ROOT / room).rglob("*.py"):
        ours = {name for name in imported(file) if name.split(".")[0] == "visionattn"}
        allowed = MAY_IMPORT[room]
        wrong = {n for n in ours if not any(n == a or n.startswith(a + ".") for a in allowed)}
        assert not wrong, f"{file} imports {wrong}"


def test_kernels_need_only_torch():
    others = {"timm", "lightning", "torchvision", "torchmetrics", "pydantic"}
    for file in (ROOT / "kernels").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(file)} & others, file


def test_every_folder_with_code_ships(tmp_path):
    """What `pip install .` builds holds every module, recipe, schema and template of the checkout."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info"))
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    for room in [*ROOMS, "visionattn"]:
        target = tmp_path / "built" / "visionattn" / (room if room != "visionattn" else "")
        files = [file for kind in ("*.py", "*.yaml", "*.html", "*.json") for file in (ROOT / room).rglob(kind)]
        missing = [file for file in files if not (target / file.relative_to(ROOT / room)).is_file()]
        assert not missing, room
    for room in ROOMS:
        assert (ROOT / "visionattn" / room).resolve() == ROOT / room, f"symlink visionattn/{room} for editors"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_its_bare_name(room):
    result = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"import visionattn.{room}" in result.stderr


@pytest.mark.parametrize(
    "order", ["import timm, visionattn", "import visionattn, timm", "import visionattn.backbones, timm"]
)
def test_models_are_registered_whichever_is_imported_first(order):
    code = f"{order}; assert timm.is_model('biformer_tiny')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_costs_nothing_heavy():
    """The package alone imports no torch; with timm, nothing of the training stack."""
    code = (
        "import sys, visionattn; assert 'torch' not in sys.modules; import timm; "
        "heavy = {'lightning', 'torchmetrics', 'matplotlib', 'sklearn', 'pandas'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
