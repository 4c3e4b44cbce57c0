"""`format: nifti` without masks: volumes as 2-D slices."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from visionattn.data.formats import Found, Kind, nifti
from visionattn.data.formats.unlabelled_images import UnlabelledSection
from visionattn.data.images import named_files
from visionattn.data.sample import Sample

KIND = Kind("", "volume", endings=("",), needs=nifti.KIND.needs, extra="medical")
of_array = nifti.of_array


class VolumeSection(UnlabelledSection, nifti.SliceSection):
    """Volumes as 2-D slices in any subfolders; a volume is never split apart."""


class Section(VolumeSection):
    """NIfTI volumes, .nii or .nii.gz."""

    format: Literal["nifti"]


def find(section: Section) -> Found:
    """The slices of every volume; only headers are read."""
    return slices(section.named(sorted(nifti.ENDINGS)), section)


def slices(paths: Mapping[str, Path], section: VolumeSection) -> Found:
    """Those of the volumes at these paths, by name."""
    from visionattn.data.formats import _volumes

    samples, problems = _volumes.unlabelled(paths, section, None)
    return Found([replace(sample, **section.place_of(sample.case)) for sample in samples], [], problems)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _volumes

    return _volumes.unlabelled(named_files(paths, nifti.ENDINGS), section, channels)
