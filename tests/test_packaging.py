"""What people install is whole, and typed: the wheel, the source distribution, and the editable install."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import visionattn
from visionattn import kernels

ROOT = Path(__file__).parent.parent
ROOMS = ["backbones", "kernels", "recipes", "tools"]
MADE = {"build", "dist", "runs", "site", "wandb"}  # folders beside the rooms that commands make


def not_source(folder: str, names: list[str]) -> set[str]:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")(folder, names)
    return ignored | (MADE.intersection(names) if Path(folder) == ROOT else set())


def build(kind: str, source: Path, folder: Path) -> Path:
    """The wheel, sdist or editable wheel, as pip has it made, in the folder, with the copy of the source it is of."""
    copy, out = shutil.copytree(source, folder / "source", symlinks=True), folder / "out"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (made,) = out.iterdir()
    return made


def fresh_environment(folder: Path) -> tuple[Path, Path]:
    """One that has the packages that visionattn needs, and its own folder of packages."""
    environment = folder / "environment"
    venv.create(environment)
    packages = next(environment.glob("lib/*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment, packages


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a fresh one holds."""
    copy = tmp_path_factory.mktemp("fresh") / "checkout"
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=not_source)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(checkout, tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", checkout, folder)) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("visionattn-*"))


def files_of(folder: Path) -> set[str]:
    """Without those of folders that are symlinks."""
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_module_recipe_schema_table_and_template(checkout, wheel):
    held = contents(wheel)
    for room in [*ROOMS, "visionattn"]:
        kinds = ("*.py", "*.yaml", "*.html", "*.json", "py.typed")
        wanted = [str(f.relative_to(checkout)) for kind in kinds for f in (checkout / room).rglob(kind)]
        assert {name if room == "visionattn" else f"visionattn/{name}" for name in wanted} <= held.keys()
    assert all(name.startswith(("visionattn/", "visionattn-")) for name in held)


def test_the_source_distribution_holds_every_file_once(checkout, unpacked):
    held = {name for name in files_of(unpacked) if ".egg-info" not in name}
    assert held - {"PKG-INFO", "setup.cfg"} == files_of(checkout) - {"PKG-INFO", "setup.cfg"}


def test_a_wheel_from_the_source_distribution_is_that_of_the_checkout(wheel, unpacked, tmp_path):
    assert contents(build("wheel", unpacked, tmp_path)) == contents(wheel)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_published_is_installed_and_trains(kind, checkout, tmp_path):
    """In a fresh environment, which has the packages that visionattn needs, and from another folder."""
    environment, _ = fresh_environment(tmp_path)
    commands = [
        ["python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", build(kind, checkout, tmp_path)],
        ["python", "-c", f"import visionattn as v; assert v.__file__.startswith({str(environment)!r}), v.__file__"],
        ["python", "-c", "import timm, visionattn; timm.create_model('nat_mini')"],
        ["visionattn", "list", "biformer*"],
        ["visionattn", "fit", "quickstart", "train.epochs=1", "trainer.accelerator=cpu", "--run", "run"],
    ]
    for program, *arguments in commands:
        command = [environment / "bin" / program, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_type_checkers_see_every_public_name(kind, checkout, tmp_path):
    """From another folder, in an environment where visionattn is installed."""
    environment, packages = fresh_environment(tmp_path)
    with zipfile.ZipFile(build(kind, checkout, tmp_path)) as archive:
        archive.extractall(packages)
    names = [f"visionattn.{name}" for name in visionattn.__all__]
    names += [f"visionattn.kernels.{name}" for name in kernels.__all__] + ["biformer.BiFormer"]
    lines = ["import visionattn, visionattn.kernels", "from visionattn.backbones import biformer"]
    (tmp_path / "use.py").write_text("\n".join([*lines, *(f"reveal_type({name})" for name in names)]))
    command = [sys.executable, "-m", "mypy", "--python-executable", environment / "bin" / "python", "--config-file="]
    result = subprocess.run([*command, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    types = re.findall(r'Revealed type is "(.*)"', result.stdout)
    assert len(types) == len(names)
    assert all(type.startswith(("def ", "Overload")) for type in types), result.stdout


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="a source distribution holds no symlinks")
def test_the_rooms_are_seen_below_the_package():
    """By the symlinks of a checkout, which type checkers follow."""
    for room in ROOMS:
        assert (ROOT / "visionattn" / room).resolve() == ROOT / room
