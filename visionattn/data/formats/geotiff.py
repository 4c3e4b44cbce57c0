"""`format: geotiff`: scenes of any number of bands with their masks, read by windows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from visionattn.data.formats import Found, Kind
from visionattn.data.images import named_files
from visionattn.data.labels import ColouredMaskSection
from visionattn.data.pairs import PairSection, find_pairs
from visionattn.data.sample import Sample
from visionattn.recipe.sections import Positive

KIND = Kind("mask", "scene", "geotiff", endings=("",), needs=("rasterio", "shapely"), extra="geo", unit_range=False)
IMAGES, MASKS = {".tif", ".tiff"}, {".tif", ".tiff", ".png"}
PREDICTED = {".tif", ".tiff", ".vrt", ".jp2"}


class Section(PairSection, ColouredMaskSection):
    """Scenes of any number of bands, read by windows."""

    format: Literal["geotiff"]
    bands: list[Positive] | None = Field(None, description="bands to read, from 1; unset: all")
    nodata: float | None = Field(None, description="value of missing pixels; unset: as the file says")
    resize: Literal["none"] = "none"


def find(section: Section) -> Found:
    """Every scene with its mask; pixels are not read."""
    from visionattn.data.formats import _rasters

    pairs, problems = find_pairs(section, IMAGES, MASKS)
    samples, more = _rasters.labelled(pairs, section)
    return Found(samples, section.class_names, problems + more)


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _rasters

    return _rasters.unlabelled(named_files(paths, PREDICTED), section, channels)


def notes(samples: Sequence[Sample]) -> list[str]:
    """Several coordinate systems or resolutions, scenes without a place."""
    from visionattn.data.formats import _rasters

    return _rasters.notes(samples)
