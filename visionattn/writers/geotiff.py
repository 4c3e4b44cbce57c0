"""Masks of scenes as cloud-optimised GeoTIFF on the scene's own grid, NAME.tif, and their regions as NAME.gpkg.

Band 1 holds class numbers, band 2 the probability of that class in per cent; both are 255 where the scene has no data.
Memory does not grow with the scene.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import IGNORE
from visionattn.errors import UserError, listed
from visionattn.files import new_file
from visionattn.writers import FilePerCase, readable

__all__ = ["open"]

TILE = 512
GDAL_CACHE = 128  # MiB; by default a share of the machine's memory
COMPRESSION = {"compress": "deflate", "bigtiff": "if_safer"}


class Scenes(FilePerCase):
    suffix = ".tif"

    def __init__(
        self, out: Path, classes: Sequence[str], colors: Any, leave_out: Sequence[str], polygons: bool
    ) -> None:
        super().__init__(out)
        self.classes, self.left_out, self.polygons = classes, leave_out, polygons

    def files_of(self, case: str) -> list[Path]:
        return super().files_of(case) + ([self.out / f"{case}.gpkg"] if self.polygons else [])

    def refuse(self, samples: Sequence[Any]) -> None:
        super().refuse(samples)
        if not self.polygons:
            return
        placeless = [str(scene.path) for scene in samples if not scene.crs]
        if placeless:
            raise UserError(
                f"no coordinate reference system, so no polygons: {listed(placeless)}; assign one (rio edit-info --crs "
                "EPSG:... FILE, or gdal_edit.py -a_srs), or leave --polygons out"
            )
        _polygon_writer()

    def write(self, case: Sequence[Any], predictions: Iterable[Prediction]) -> None:
        import rasterio
        import rasterio.shutil

        from visionattn.data.formats._rasters import open_quietly, opened

        (scene,) = case
        mask, *layers = self.made_for(scene.case)
        with (
            rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE),
            opened(scene.path) as source,
            new_file(mask) as whole,
        ):
            profile = {"driver": "GTiff", "count": 2, "dtype": "uint8", "nodata": IGNORE, "height": source.height}
            profile |= {"width": source.width, "crs": source.crs, "transform": source.transform, "zlevel": 1}
            profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE, **COMPRESSION}
            plain = whole.with_name("plain.tif")
            with _gdal_errors(), open_quietly(plain, "w", **profile) as sink:
                sink.descriptions = ("class", "confidence in percent")
                if source.gcps[0]:
                    sink.gcps = source.gcps
                if source.rpcs:
                    sink.rpcs = source.rpcs
                sink.update_tags(classes="; ".join(f"{k}: {name}" for k, name in enumerate(self.classes)))
                _write_tiles(readable(predictions), scene, sink)
            with _gdal_errors():
                copied = {"driver": "COG", "blocksize": TILE, "overview_resampling": "nearest", **COMPRESSION}
                rasterio.shutil.copy(plain, whole, **copied)
            for path in layers:
                with new_file(path) as layer:
                    _polygon_writer()(plain, layer, self.classes, self.left_out)


def _polygon_writer() -> Any:
    try:
        from visionattn.writers.polygons import write_polygons
    except ModuleNotFoundError as error:
        raise UserError(f"polygons need {error.name}: pip install 'visionattn[geo]'") from None
    return write_polygons


def _write_tiles(bands: Iterable[Prediction], scene: Any, sink: Any) -> None:
    """Write bands of rows, which come from top to bottom in one strip of columns after the other, as whole tiles."""
    top, pending = 0, np.empty((2, 0, 0), dtype=np.uint8)
    for band in bands:
        assert band.window is not None  # of every band of a scene
        columns = band.window[1]
        values = np.stack([np.asarray(band.value), np.asarray(band.confidence)])
        pending = np.concatenate([pending, values], axis=1) if pending.shape[1] else values
        while pending.shape[1] >= TILE or 0 < pending.shape[1] == sink.height - top:
            rows = slice(top, min(top + TILE, sink.height))
            for left in range(columns.start, columns.stop, TILE):
                window = rows, slice(left, min(left + TILE, columns.stop))
                tile = pending[:, : rows.stop - top, left - columns.start : window[1].stop - columns.start]
                if scene.can_miss:
                    tile[:, np.isnan(scene.image(window)).all(0)] = IGNORE
                sink.write(tile, window=tuple((side.start, side.stop) for side in window))
            pending, top = pending[:, rows.stop - top :], rows.stop
        if top == sink.height:
            top = 0


@contextmanager
def _gdal_errors() -> Iterator[None]:
    """GDAL's errors as the OSError that they are when a file is written."""
    from rasterio._err import CPLE_BaseError

    try:
        yield
    except CPLE_BaseError as error:
        raise OSError(str(error)) from None


open = Scenes
