"""`format: dicom`: DICOM series, a folder of slices each, with NIfTI masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from visionattn.data.formats import Found, nifti
from visionattn.data.images import walk
from visionattn.data.pairs import find_pairs
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed

KIND = nifti.KIND
of_array = nifti.of_array


class Section(nifti.VolumeSection):
    """DICOM series, a folder of slices each, with NIfTI masks."""

    format: Literal["dicom"]


def find(section: Section) -> Found:
    """The slices of every series with its mask; only headers are read."""
    from visionattn.data.formats import _volumes

    pairs, problems = find_pairs(section, None, nifti.ENDINGS, _volumes.is_series)
    samples, more = _volumes.labelled(pairs, section)
    return Found(samples, section.class_names, problems + more)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _volumes

    return _volumes.unlabelled(series_folders(paths), section, channels)


def series_folders(paths: Sequence[Path]) -> dict[str, Path]:
    """Folders that hold a series, at or below the given ones, by the name of their result.

    Raises:
        UserError: a given path that is no folder or without any series; two series of one name.
    """
    from visionattn.data.formats import _volumes

    missing = [str(path) for path in paths if not path.is_dir()]
    if missing:
        raise UserError(f"expected folders of DICOM series, but these are none: {listed(missing)}")
    named: dict[str, Path] = {}
    empty = []
    for given in paths:
        folders = [here for here, _, files in walk(given) if files and _volumes.is_series(here)]
        empty += [] if folders else [str(given)]
        for here in folders:
            name = here.relative_to(given).as_posix() if here != given else given.resolve().name
            if name in named:
                raise UserError(f"{named[name]} and {here} would both be written as {name}; predict them apart")
            named[name] = here
    if empty:
        raise UserError(f"no DICOM images in {listed(empty)}")
    return named
