"""`format: nifti`: NIfTI volumes as 2-D slices, with NIfTI masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from visionattn.data.formats import Found, Kind
from visionattn.data.images import ImageArray, named_files
from visionattn.data.labels import MaskFileSection
from visionattn.data.pairs import PairSection, find_pairs
from visionattn.data.sample import Sample
from visionattn.recipe.sections import AbovePositive
from visionattn.recipe.sections import Section as BaseSection

KIND = Kind("mask", noun="volume", writer="nifti", endings=("",), needs=("nibabel", "pydicom"), extra="medical")
ENDINGS = {".nii", ".nii.gz"}


class SliceSection(BaseSection):
    """How volumes become 2-D slices."""

    axis: Literal[0, 1, 2] = Field(2, description="slices: 0 sagittal, 1 coronal, 2 axial, however files store them")
    window: AbovePositive | None = Field(
        None, description="width of the intensities that become 0..1; unset: the volume's 0.5 to 99.5 percentile"
    )
    level: float | None = Field(None, description="centre of that window, such as 40 HU")

    @model_validator(mode="after")
    def _window_has_level(self) -> Self:
        if (self.window is None) != (self.level is None):
            raise ValueError("window and level go together: give both or none")
        return self


class VolumeSection(PairSection, MaskFileSection, SliceSection):
    """Volumes as 2-D slices; a volume is a case."""


class Section(VolumeSection):
    """NIfTI volumes with NIfTI masks, .nii or .nii.gz."""

    format: Literal["nifti"]


def find(section: Section) -> Found:
    """The slices of every pair; only headers are read."""
    from visionattn.data.formats import _volumes

    pairs, problems = find_pairs(section, ENDINGS)
    samples, more = _volumes.labelled(pairs, section)
    return Found(samples, section.class_names, problems + more)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _volumes

    return _volumes.unlabelled(named_files(paths, ENDINGS), section, channels)


def of_array(name: str, pixels: np.ndarray, section: SliceSection, channels: int) -> Sample:
    """A slice (H, W) in the values of its volume: by window and level, else by its own percentiles."""
    from visionattn.data.formats import _volumes

    image = _volumes.scaled(np.atleast_3d(pixels), section)
    return ImageArray(name, name, name, channels, image.shape[:2], pixels=image, native=True)
