"""`format: unlabelled`: image files in any subfolders, without labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from visionattn.data.formats import Found, Kind, image_mask
from visionattn.data.images import SUFFIXES, ImageFile, files_below, headers
from visionattn.data.sample import Sample
from visionattn.data.splits import GroupSection, split_named
from visionattn.errors import UserError
from visionattn.recipe.sections import FilePath, Positive

KIND = Kind("", endings=("",))


class UnlabelledSection(GroupSection):
    """What is read without labels; a split is what a folder is called (train, val, test), or is drawn."""

    root: FilePath = Field(description="folder that is searched through, with all its subfolders")

    def named(self, endings: Sequence[str]) -> dict[str, Path]:
        """The files below the folder by their paths in it. Raises UserError where there are none."""
        if not self.root.is_dir():
            raise UserError(
                f"data.root: {self.root} is {'a file' if self.root.exists() else 'missing'}, expected a folder"
            )
        files = {path.relative_to(self.root).as_posix(): path for path in files_below(self.root, endings)}
        if not files:
            raise UserError(f"data.root: {self.root}: no files that end with {', '.join(sorted(endings))}")
        return files

    def place_of(self, name: str) -> dict[str, Any]:
        """Group and split of a file by its name."""
        return {"group": self.group_of(name), "split": split_named(name.split("/")[:-1])}


class Section(UnlabelledSection):
    """Image files in any subfolders, numpy arrays (.npy) too."""

    format: Literal["unlabelled"]
    channels: Positive | None = Field(None, description="unset: as many as the images have, without transparency")


def find(section: Section) -> Found:
    """Every image; only headers are read."""
    files = section.named(sorted({*SUFFIXES, ".npy"}))
    known, wrong = headers(files.values())
    channels = section.channels or max((it.channels for it in known.values()), default=1)
    samples: list[Sample] = [
        ImageFile(name=name, case=name, channels=channels, size=known[path].size, path=path, **section.place_of(name))
        for name, path in files.items()
        if path in known
    ]
    return Found(samples, [], list(wrong.values()))


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    return image_mask.mask_samples(paths, channels)
