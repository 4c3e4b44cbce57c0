"""Regions of a class map as polygons in a GeoPackage, by strips of rows, so that the map need not fit into memory."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import rasterio
import shapely
from pyogrio import raw
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.features import shapes

from visionattn.data.formats._rasters import open_quietly

__all__ = ["write_polygons"]

STRIP = 1024  # rows
AT_ONCE = 10_000  # polygons


def write_polygons(raster: Path, out: Path, classes: Sequence[str], leave_out: Collection[str] = ()) -> None:
    """A layer `classes` with a polygon for each connected region of band 1; pixels connect over edges, not corners.

    Args:
        raster: class numbers in band 1, with a CRS.
        out: the .gpkg to write; fields are `class`, its name, and `number`.
        leave_out: names of classes without polygons.

    Raises:
        OSError: it cannot be written.
    """
    wanted = [k for k, name in enumerate(classes) if name not in leave_out]
    with open_quietly(raster) as source:
        regions = _regions(source, wanted)
        later = iter(lambda: list(islice(regions, AT_ONCE)), [])
        for number, part in enumerate(chain([list(islice(regions, AT_ONCE))], later)):
            numbers = np.array([k for k, _ in part], dtype=np.int32)
            outlines = np.array([polygon for _, polygon in part], dtype=object)
            places = shapely.transform(outlines, lambda xy: np.stack(source.transform @ xy.T[:2], axis=1))
            names = np.array([classes[k] for k in numbers], dtype=object)
            try:
                raw.write(
                    out,
                    shapely.to_wkb(places),
                    [names, numbers],
                    ["class", "number"],
                    layer="classes",
                    driver="GPKG",
                    geometry_type="Polygon",
                    crs=source.crs.to_wkt(),
                    append=number > 0,
                )
            except (DataSourceError, DataLayerError) as error:
                raise OSError(str(error)) from None


def _regions(source: rasterio.DatasetReader, wanted: Sequence[int]) -> Iterator[tuple[int, shapely.Polygon]]:
    """Class and outline, in pixels, of each region; one that strips cut comes as a whole once its last part is read."""
    kept: dict[int, list[shapely.Polygon]] = {}
    for top in range(0, source.height, STRIP):
        end = min(top + STRIP, source.height)
        fresh = _outlines(source.read(1, window=((top, end), (0, source.width))), top, wanted)
        for number in sorted({*kept, *fresh}):
            inside = [polygon for polygon in fresh.get(number, []) if polygon.bounds[1] > top]
            touching = [polygon for polygon in fresh.get(number, []) if polygon.bounds[1] == top]
            whole = inside + _joined(kept.pop(number, []), touching)
            for polygon in whole:
                if polygon.bounds[3] == end < source.height:
                    kept.setdefault(number, []).append(polygon)
                else:
                    yield number, polygon


def _outlines(numbers: np.ndarray, top: int, wanted: Sequence[int]) -> dict[int, list[shapely.Polygon]]:
    outlines: dict[int, list[shapely.Polygon]] = {}
    down = rasterio.Affine.translation(0, top)
    for outline, number in shapes(numbers, mask=np.isin(numbers, wanted), transform=down):
        outlines.setdefault(int(number), []).append(shapely.geometry.shape(outline))
    return outlines


def _joined(above: list[shapely.Polygon], below: list[shapely.Polygon]) -> list[shapely.Polygon]:
    """Parts on both sides of a cut, without the vertices that it made."""
    if not above:
        return below
    return list(shapely.simplify(shapely.get_parts(shapely.union_all([*above, *below])), 0))
