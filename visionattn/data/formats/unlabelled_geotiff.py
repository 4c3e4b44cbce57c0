"""`format: geotiff` without masks: scenes of any number of bands, read by windows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from visionattn.data.formats import Found, Kind, geotiff
from visionattn.data.formats.unlabelled_images import UnlabelledSection
from visionattn.data.images import named_files
from visionattn.data.sample import Sample
from visionattn.recipe.sections import Positive

KIND = Kind("", "scene", endings=("",), needs=geotiff.KIND.needs, extra="geo", unit_range=False)
notes = geotiff.notes


class Section(UnlabelledSection):
    """Scenes of any number of bands in any subfolders, read by windows."""

    format: Literal["geotiff"]
    bands: list[Positive] | None = Field(None, description="bands to read, from 1; unset: all")
    nodata: float | None = Field(None, description="value of missing pixels; unset: as the file says")
    resize: Literal["none"] = "none"


def find(section: Section) -> Found:
    """Every scene; pixels are not read."""
    from visionattn.data.formats import _rasters

    scenes, problems = _rasters.scenes(section.named(sorted(geotiff.PREDICTED)), section)
    return Found([replace(scene, **section.place_of(scene.name)) for scene in scenes], [], problems)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _rasters

    return _rasters.unlabelled(named_files(paths, geotiff.PREDICTED), section, channels)
