"""Masks of scenes as cloud-optimised GeoTIFF on the scene's own grid, NAME.tif, and their regions as NAME.gpkg.

Band 1 holds what the recipe's own masks say of the class, such as its number, and the last band the probability of
that class in per cent; where those are colour images, bands 1 to 3 are the colour. Where the scene has no data the mask
says what the recipe reads as unlabelled, or declares a value of its own as nodata. Memory does not grow with the scene.
Maps of what makes a mask doubtful are NAME_MAP.tif, float32.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.labels import MaskCode
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
    suffix = map_suffix = ".tif"

    def __init__(
        self,
        out: Path,
        code: MaskCode,
        colors: Any,
        leave_out: Sequence[str],
        polygons: bool,
        maps: Sequence[str] = (),
    ) -> None:
        super().__init__(out, maps)
        self.code, self.left_out, self.polygons = code, leave_out, polygons

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
            numbers, coded = whole.with_name("numbers.tif"), whole.with_name("coded.tif")
            with (
                _gdal_errors(),
                _raster(numbers, source, MaskCode(self.code.classes, self.code.values)) as sink,
                _maps(self.map_files_of(scene.case), source) as maps,
            ):
                _write_tiles(_mapped(readable(predictions), scene, maps), scene, sink)
            if self.code.is_plain:
                coded = numbers
            else:
                with _gdal_errors(), open_quietly(numbers) as plain, _raster(coded, source, self.code) as sink:
                    _write_coded(plain, sink, self.code)
            with _gdal_errors():
                copied = {"driver": "COG", "blocksize": TILE, "overview_resampling": "nearest", **COMPRESSION}
                rasterio.shutil.copy(coded, whole, **copied)
            for path in layers:
                with new_file(path) as layer:
                    _polygon_writer()(numbers, layer, self.code.classes, self.left_out)


@contextmanager
def _maps(files: Mapping[str, Path], source: Any) -> Iterator[dict[str, Any]]:
    """Rasters of one band in the place of another, by name, which are there once this is left without an error."""
    from visionattn.data.formats._rasters import open_quietly

    profile = {
        "driver": "GTiff",
        "count": 1,
        "dtype": "float32",
        "nodata": np.nan,
        "height": source.height,
        "width": source.width,
    }
    profile |= {"crs": source.crs, "transform": source.transform, "tiled": True, **COMPRESSION}
    profile |= {"blockxsize": TILE, "blockysize": TILE, "zlevel": 1}
    with ExitStack() as stack:
        opened = {}
        for name, file in files.items():
            path = stack.enter_context(new_file(file))
            opened[name] = stack.enter_context(open_quietly(path, "w", **profile))
            opened[name].descriptions = (name,)
            _place(opened[name], source)
        yield opened


def _mapped(predictions: Iterable[Prediction], scene: Any, maps: Mapping[str, Any]) -> Iterator[Prediction]:
    """The predictions, once their doubts are written, NaN where the scene has no data."""
    for prediction in predictions:
        assert prediction.window is not None  # of every band of a scene
        window = tuple((side.start, side.stop) for side in prediction.window)
        missing = np.isnan(scene.image(prediction.window)).all(0) if maps and scene.can_miss else False
        for name, sink in maps.items():
            values = np.where(missing, np.float32(np.nan), prediction.doubts[name])
            sink.write(values[None].astype(np.float32), window=window)
        yield prediction


@contextmanager
def _raster(path: Path, source: Any, code: MaskCode) -> Iterator[Any]:
    """A new raster in the place of another, which says what its values mean."""
    from visionattn.data.formats._rasters import open_quietly

    bands = ["class"] if code.colors is None else ["red", "green", "blue"]
    profile = {"driver": "GTiff", "count": len(bands) + 1, "height": source.height, "width": source.width, "zlevel": 1}
    profile |= {"dtype": code.kind, "nodata": _nodata(code), "crs": source.crs}
    profile |= {"transform": source.transform, "tiled": True, "blockxsize": TILE, "blockysize": TILE, **COMPRESSION}
    profile |= {"photometric": "MINISBLACK" if code.colors is None else "RGB", "alpha": "NO"}
    with open_quietly(path, "w", **profile) as sink:
        sink.descriptions = (*bands, "confidence in percent")
        _place(sink, source)
        said = code.values if code.colors is None else ["#{:02X}{:02X}{:02X}".format(*rgb) for rgb in code.colors]
        sink.update_tags(classes="; ".join(f"{k}: {name}" for k, name in zip(said, code.classes, strict=False)))
        yield sink


def _place(sink: Any, source: Any) -> None:
    """Give a raster the control points and polynomials of another, where that is placed by these."""
    if source.gcps[0]:
        sink.gcps = source.gcps
    if source.rpcs:
        sink.rpcs = source.rpcs


def _nodata(code: MaskCode) -> int | None:
    """What a mask declares as nodata, in all bands; nothing where that would be a percentage, or part of a colour."""
    if code.colors is not None:
        return None if code.known else code.colors[-1][0]
    return None if 1 <= code.unlabelled <= 100 else code.unlabelled


def _write_coded(source: Any, sink: Any, code: MaskCode) -> None:
    """Write class numbers and confidence as what the recipe reads, and confidence."""
    missing = _nodata(code)
    for _, window in source.block_windows(1):
        numbers, confidence = source.read(window=window)
        said = code.written(numbers)[None] if code.colors is None else code.painted(numbers)
        percent = np.where(numbers == IGNORE, IGNORE if missing is None else missing, confidence)
        sink.write(np.concatenate([said, percent[None].astype(said.dtype)]), window=window)


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
