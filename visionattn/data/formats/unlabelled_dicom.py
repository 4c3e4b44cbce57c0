"""`format: dicom` without masks: series, a folder of slices each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from visionattn.data.formats import Found, dicom, nifti, unlabelled_nifti
from visionattn.data.sample import Sample

KIND = unlabelled_nifti.KIND
of_array = nifti.of_array


class Section(unlabelled_nifti.VolumeSection):
    """DICOM series, a folder of slices each, in any subfolders."""

    format: Literal["dicom"]


def find(section: Section) -> Found:
    """The slices of every series; only headers are read."""
    return unlabelled_nifti.slices(dicom.series_folders([section.root]), section)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _volumes

    return _volumes.unlabelled(dicom.series_folders(paths), section, channels)
