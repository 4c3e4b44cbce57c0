"""How data lie on the disk: a file for each format, found by being here.

A format module has

- `Section`: what a recipe's `data` says about it, its name as `format: Literal[...]`; the task adds what it wants of
  the images itself (their size, augmentation ...);
- `KIND`: what its samples are, see `Kind`;
- `find(section) -> Found`: the samples of a section, labelled if the format is, from names and headers only;
- `unlabelled(paths, section, channels) -> (samples, problems)`: images to predict, files or folders of this format;
- optionally `notes(samples)`, what `visionattn check` should say of them, and `of_array(name, pixels, section,
  channels)`, a sample of pixels in memory.

Modules import what reads their files (`KIND.needs`) inside functions, so that a recipe is read without it.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, Union, get_args

import numpy as np
from pydantic import Field, create_model

from visionattn.data.images import ImageArray
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import Data

__all__ = ["Found", "Kind", "elsewhere", "find", "module_of", "of_array", "sections", "union", "unlabelled"]


class Kind(NamedTuple):
    """What the samples of a format are.

    Attributes:
        target: what they are labelled with: "class" (one or several), "mask" or "boxes"; "" without labels.
        noun: what a case is called.
        writer: the output format of what is predicted, a module of `visionattn.writers`.
        endings: of the paths that a section's `root` can be; "" is a folder.
        needs: packages that read its files, of the extra `extra`.
        unit_range: values are scaled to 0..1, so that statistics of published weights fit them.
    """

    target: str
    noun: str = "image"
    writer: str = "png"
    endings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    extra: str = ""
    unit_range: bool = True


class Found(NamedTuple):
    """Samples, the names of their classes in order (none without labels), and a line for each thing that is wrong."""

    samples: list[Sample]
    classes: list[str]
    problems: list[str]


def _modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def _name(module: ModuleType) -> str:
    """What recipes call a format."""
    return get_args(module.Section.model_fields["format"].annotation)[0]


@cache
def _section_of(module: ModuleType, data: type[Data]) -> type[Data]:
    task = data.__module__.split(".")[-2]
    title = f"{_name(module)}_{task}".title().replace("_", "")
    about = {"__doc__": module.Section.__doc__, "__module__": module.__name__}
    setattr(module, title, create_model(title, __base__=(module.Section, data), **about))  # where processes find it
    return getattr(module, title)


def sections(target: str, data: type[Data]) -> dict[str, type[Data]]:
    """By name the `data` sections of all formats with this target: what the format says and what the task wants."""
    return {_name(m): _section_of(m, data) for m in _modules() if m.KIND.target == target}


def union(known: dict[str, type[Data]]) -> Any:
    """The annotation of a recipe's `data`: one of these sections, told by `format`."""
    return Annotated[Union[tuple(known.values())], Field(discriminator="format")]  # noqa: UP007 - made at run time


def module_of(section: Data) -> ModuleType:
    """The format module that a section belongs to."""
    return sys.modules[type(section).__module__]


def _readable(section: Data) -> ModuleType:
    """The format module, once the packages that it reads files with are known to be there."""
    module = module_of(section)
    missing = [name for name in module.KIND.needs if importlib.util.find_spec(name) is None]
    if missing:
        name = get_args(module.Section.model_fields["format"].annotation)[0]
        raise UserError(f"data.format {name} needs {listed(missing)}: pip install 'visionattn[{module.KIND.extra}]'")
    return module


def find(section: Data) -> Found:
    """The samples of a section, from names and headers only.

    Raises:
        UserError: a package that reads the format is missing, or there is nothing that can be used.
    """
    module = _readable(section)
    found = module.find(section)
    if not found.samples:
        noun = "labelled image" if module.KIND.target else "image"
        raise UserError("\n".join([f"data: no {noun} that can be used", *found.problems[:20]]))
    return found


def unlabelled(paths: Sequence[Path], section: Data, channels: int) -> tuple[list[Sample], list[str]]:
    """Samples to predict among files and folders, and a line for each that cannot be read or has other channels.

    Raises:
        UserError: a path is missing or a given file is not of the format; two results would have one name.
    """
    return _readable(section).unlabelled(paths, section, channels)


def of_array(name: str, pixels: np.ndarray, section: Data, channels: int) -> Sample:
    """A sample of pixels (H, W) or (H, W, C), which have the values of the files of the section's format.

    Raises:
        UserError: other channels than the network takes.
    """
    module, size = module_of(section), (pixels.shape[0], pixels.shape[1])
    if make := getattr(module, "of_array", None):
        return make(name, pixels, section, channels)
    if not module.KIND.unit_range and np.atleast_3d(pixels).shape[2] != channels:
        raise UserError(f"{name}: {np.atleast_3d(pixels).shape[2]} bands, but the network was trained on {channels}")
    return ImageArray(name, name, name, channels, size, pixels=pixels, native=not module.KIND.unit_range)


def elsewhere(section: Data, root: Path) -> Data:
    """The section for other labelled data: of its own format, else of the one whose paths end as this one does.

    Raises:
        UserError: no such format.
    """
    ending, own = "" if root.is_dir() else root.suffix.lower(), module_of(section)
    if ending in own.KIND.endings:
        return section.at(root)
    others = [m for m in _modules() if m.KIND.target == own.KIND.target and ending in m.KIND.endings]
    if len(others) != 1:
        known = {e for m in _modules() if m.KIND.target == own.KIND.target for e in m.KIND.endings}
        expected = listed(sorted(e or "a folder" for e in (own.KIND.endings or known)))
        raise UserError(f"{root}: expected {expected} of the format that the model was trained on")
    other = _section_of(others[0], type(section).__bases__[1])
    shared = {name: getattr(section, name) for name in other.model_fields if name in type(section).model_fields}
    return other(**shared | {"format": _name(others[0]), "root": root}).at(root)
