"""Masks in the format that the images came in: GeoTIFF scenes, NIfTI volumes, PNG masks and overlays.

Every file appears whole under its name or not at all, and nothing is overwritten. Masks hold class numbers, from 0 in
the order of the classes, and IGNORE where there is no data.
"""

import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from visionattn.data.images import listed
from visionattn.data.sample import IGNORE, Window
from visionattn.data.survey import SECONDS_BEFORE_PROGRESS
from visionattn.errors import UserError
from visionattn.inference.sliding import Predict, slide
from visionattn.report.gallery import UNLABELLED, overlay

if TYPE_CHECKING:
    import nibabel
    import rasterio

    from visionattn.data.formats._volumes import Volume

__all__ = ["Unwritable", "new_file", "predict_scene", "predict_volume", "write_mask", "write_overlay"]

TILE = 512
FULL = 2**20  # bytes; writers give up before the last ones
BAND_BYTES = 2**28  # of the band that is being blended; wider scenes are done in strips of columns
GDAL_CACHE = 128  # MiB; by default a share of the machine's memory
COMPRESSION = {"compress": "deflate", "bigtiff": "if_safer"}

Colors = Sequence[tuple[int, int, int] | None]


class Unwritable(UserError):
    """A result cannot be written, whatever is wrong with it; the next one could not be either."""


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` at the end; on an error, whichever, nothing is left of it.

    Raises:
        Unwritable: `out` exists, its folder does not, or it could not be written, such as on a full disk.
    """
    if out.exists():
        raise Unwritable(f"{out} exists; predictions are never overwritten: give another name")
    if not out.parent.is_dir():
        raise Unwritable(f"{out}: the folder {out.parent} does not exist; make it first")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            unfinished = Path(folder, out.name)
            try:
                yield unfinished
            except OSError as error:
                full = shutil.disk_usage(folder).free < FULL
                raise OSError("the disk is full" if full else error.strerror or str(error)) from None
            unfinished.rename(out)
    except OSError as error:
        reason = error.strerror or error
        raise Unwritable(
            f"{out}: could not be written ({reason}); what there was of it has been removed, other files are whole"
        ) from None


def predict_scene(
    predict: Predict,
    scene: Path,
    out: Path,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    window: tuple[int, int],
    overlap: float = 0.5,
    batch_size: int = 4,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    polygons: Path | None = None,
    leave_out: Collection[str] = ("background",),
    device: torch.device | str = "cpu",
) -> None:
    """Segment a raster of any size by windows, into a cloud-optimised GeoTIFF on the same grid.

    Band 1 holds class numbers, band 2 the probability of that class in percent; both are 255 where the scene has no
    data. Memory does not grow with the scene.

    Args:
        predict: normalised windows (B, C, h, w) on `device` -> probabilities (B, classes, h, w).
        out: the .tif to write.
        classes: names, at most 255.
        mean, std: of each band, in the scene's own values; missing values become the mean.
        window: (h, w) of what the network sees; `overlap` and `batch_size` are as in `visionattn.sliding.slide`.
        bands: numbers, from 1, of the bands to read; unset: all.
        nodata: value of missing pixels that replaces what the file says.
        polygons: the .gpkg to write as well, see `visionattn.polygons.write_polygons`.
        leave_out: classes without polygons.

    Raises:
        UserError: unreadable scene, other bands, no CRS where polygons are asked, existing outputs, a full disk.
    """
    import rasterio

    from visionattn.data.formats.geotiff import can_miss, open_quietly, opened, read_bands

    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE), opened(scene) as source, new_file(out) as whole:
        _check_scene(source, out, bands, len(mean), polygons)
        bands = tuple(bands or source.indexes)
        pixels = _Pixels(partial(read_bands, source, bands, nodata=nodata), can_miss(source, bands, nodata), mean, std)
        profile = {"driver": "GTiff", "count": 2, "dtype": "uint8", "nodata": IGNORE, "height": source.height}
        profile |= {"width": source.width, "crs": source.crs, "transform": source.transform, "zlevel": 1}
        profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE, **COMPRESSION}
        plain = whole.with_name("plain.tif")
        with _gdal_errors(), open_quietly(plain, "w", **profile) as sink:
            sink.descriptions = ("class", "confidence in percent")
            sink.update_tags(classes="; ".join(f"{k}: {name}" for k, name in enumerate(classes)))
            for strip in _strips(source.width, 4 * len(classes) * window[0]):
                read = predict, pixels.read, source.shape, len(classes), window, overlap, batch_size, strip, device
                with closing(slide(*read)) as found:  # whose reading ends before an error closes what it reads
                    _write_tiles(_labelled(found), pixels, strip, sink)
        _optimise(plain, whole)
        if polygons is not None:
            with new_file(polygons) as layer:
                _polygon_writer()(plain, layer, classes, leave_out)


def _check_scene(
    source: "rasterio.DatasetReader", out: Path, bands: Sequence[int] | None, count: int, polygons: Path | None
) -> None:
    chosen = list(bands or source.indexes)
    if len(chosen) != count or max(chosen) > source.count:
        asked = f"bands {listed(chosen)}" if bands else f"{count} bands"
        raise UserError(f"{source.name}: {source.count} bands, but the network was trained on {asked}")
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise UserError(f"{out}: expected a name that ends with .tif")
    if polygons is None:
        return
    if not source.crs:
        raise UserError(f"{source.name}: no coordinate reference system, so no polygons; assign one, or leave them out")
    _polygon_writer()
    if polygons.exists() or not polygons.parent.is_dir():
        raise Unwritable(f"{polygons}: {'exists' if polygons.exists() else 'its folder does not exist'}")


def _polygon_writer() -> Callable[..., None]:
    try:
        from visionattn.writers.polygons import write_polygons
    except ModuleNotFoundError as error:
        raise UserError(f"polygons need {error.name}: pip install 'visionattn[geo]'") from None
    return write_polygons


class _Pixels:
    """The normalised pixels of an open raster, for the thread that reads ahead and for the one that writes.

    Args:
        bands_of: reads a window: (C, h, w) float32, NaN where missing.
        can_miss: whether there are such places at all.
    """

    def __init__(
        self, bands_of: Callable[[Window], np.ndarray], can_miss: bool, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.bands_of, self.can_miss = bands_of, can_miss
        self.mean, self.std = (np.array(values, dtype=np.float32)[:, None, None] for values in (mean, std))
        self.lock = threading.Lock()  # GDAL's data sets are not for several threads at once

    def read(self, window: Window) -> np.ndarray | None:
        """(C, h, w) of a window, missing values at the mean; None where all are missing."""
        with self.lock:
            image = self.bands_of(window)
        image = (image - self.mean) / self.std
        if not self.can_miss:
            return image
        return None if np.isnan(image).all() else np.nan_to_num(image, copy=False, nan=0.0)

    def mark_missing(self, tile: np.ndarray, window: Window) -> None:
        """Make a tile (2, h, w) IGNORE where no band has data."""
        if self.can_miss:
            with self.lock:
                tile[:, np.isnan(self.bands_of(window)).all(0)] = IGNORE


def _labelled(bands: Iterable[tuple[slice, torch.Tensor]]) -> Iterator[np.ndarray]:
    """(2, rows, columns) uint8 of each band of probabilities: class number and percent."""
    for _, probabilities in bands:
        confidence, numbers = probabilities.max(0)
        yield torch.stack([numbers.to(torch.uint8), (100 * confidence).round_().to(torch.uint8)]).cpu().numpy()


def _write_tiles(
    found: Iterable[np.ndarray], pixels: _Pixels, columns: slice, sink: "rasterio.io.DatasetWriter"
) -> None:
    """Write bands of rows as whole tiles, so that each tile is compressed once."""
    top, pending = 0, np.empty((2, 0, columns.stop - columns.start), dtype=np.uint8)
    for values in tqdm(found, sink.name, leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None):
        pending = np.concatenate([pending, values], axis=1)
        while pending.shape[1] >= TILE or 0 < pending.shape[1] == sink.height - top:
            rows = slice(top, min(top + TILE, sink.height))
            for left in range(columns.start, columns.stop, TILE):
                window = rows, slice(left, min(left + TILE, columns.stop))
                tile = pending[:, : rows.stop - top, left - columns.start : window[1].stop - columns.start]
                pixels.mark_missing(tile, window)
                sink.write(tile, window=tuple((part.start, part.stop) for part in window))
            pending, top = pending[:, rows.stop - top :], rows.stop


def _strips(width: int, column_bytes: int) -> Iterator[slice]:
    """Columns of a scene that are done at once: whole tiles, of about equal width, within BAND_BYTES."""
    tiles = math.ceil(width / TILE)
    parts = math.ceil(tiles / max(BAND_BYTES // (column_bytes * TILE), 2))
    step = math.ceil(tiles / parts) * TILE
    return (slice(left, min(left + step, width)) for left in range(0, width, step))


def _optimise(plain: Path, whole: Path) -> None:
    import rasterio.shutil

    with _gdal_errors():
        rasterio.shutil.copy(plain, whole, driver="COG", blocksize=TILE, overview_resampling="nearest", **COMPRESSION)


@contextmanager
def _gdal_errors() -> Iterator[None]:
    """GDAL's errors as the OSError that they are when a file is written."""
    from rasterio._err import CPLE_BaseError

    try:
        yield
    except CPLE_BaseError as error:
        raise OSError(str(error)) from None


def predict_volume(
    segment: Callable[[np.ndarray], np.ndarray],
    volume: Path,
    out: Path,
    *,
    channels: int = 1,
    axis: int = 2,
    contrast: tuple[float, float] | None = None,
    batch_size: int = 8,
) -> None:
    """Segment a volume slice by slice, into a NIfTI file with its affine and header.

    Args:
        segment: slices (B, channels, H, W) float32 in 0..1 -> class numbers (B, H, W), at most 255.
        volume: NIfTI file, or folder of a DICOM series.
        out: the .nii or .nii.gz to write, in the orientation of the volume.
        axis, contrast: as in `visionattn.volumes`.

    Raises:
        UserError: unreadable volume, other channels, existing output, a full disk.
    """
    import nibabel

    from visionattn.data.formats._volumes import open_volume

    if not out.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{out}: expected a name that ends with .nii or .nii.gz")
    header = open_volume(volume, axis)
    if header.channels != channels:
        raise UserError(f"{volume}: {header.channels} channels, but the network was trained on {channels}")
    with new_file(out) as path:
        labels = np.empty(header.shape, dtype=np.uint8)
        starts = range(0, len(labels), batch_size)
        for start in tqdm(starts, str(volume), leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None):
            part = range(start, min(start + batch_size, len(labels)))
            labels[part.start : part.stop] = segment(np.stack([header.image(i, contrast) for i in part]))
        nibabel.save(_nifti(header, labels), path)


def _nifti(volume: "Volume", labels: np.ndarray) -> "nibabel.Nifti1Image":
    import nibabel

    stored, affine = volume.as_stored(labels), np.array(volume.stored_affine)
    if volume.files:
        return nibabel.Nifti1Image(stored, affine)
    source = nibabel.load(volume.path)
    header = source.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the range that viewers show
    return type(source)(stored, source.affine, header)


def write_mask(mask: np.ndarray, colors: Colors, out: Path) -> None:
    """A mask (H, W) of class numbers as PNG: the pixels are the numbers, a palette shows them in colours."""
    palette = np.zeros((IGNORE + 1, 3), dtype=np.uint8)
    palette[IGNORE] = UNLABELLED
    for number, color in enumerate(colors):
        palette[number] = color or 0
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette.tobytes())
    with new_file(out) as path:
        image.save(path, format="PNG")


def write_overlay(image: np.ndarray, mask: np.ndarray, colors: Colors, out: Path) -> None:
    """An image (C, H, W) with its classes as tints, as PNG; see `visionattn.pictures.overlay`."""
    with new_file(out) as path:
        overlay(image, mask, colors).save(path, format="PNG")
