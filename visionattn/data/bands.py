"""Images that Pillow does not read: TIFFs of many bands, by rasterio, and arrays of numpy (.npy)."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import UserError

__all__ = ["read_bands", "shape_of"]

TIFF = (".tif", ".tiff")
logging.getLogger("PIL.TiffImagePlugin").addFilter(lambda record: "More samples" not in str(record.msg))  # read here


def shape_of(path: Path) -> tuple[int, int, int] | None:
    """(H, W, bands) by the header; None where it is neither.

    Raises:
        UserError: a TIFF that rasterio would read if it were installed, or a damaged file.
    """
    if path.suffix.lower() == ".npy":
        height, width, *bands = _array(path).shape
        return height, width, bands[0] if bands else 1
    if path.suffix.lower() not in TIFF:
        return None
    with _opened(path) as source:
        return source.height, source.width, source.count


def read_bands(path: Path) -> np.ndarray | None:
    """(H, W) or (H, W, bands), as in the file; as `shape_of`."""
    if path.suffix.lower() == ".npy":
        return np.array(_array(path))
    if path.suffix.lower() not in TIFF:
        return None
    with _opened(path) as source:
        try:
            return np.moveaxis(source.read(), 0, -1)
        except Exception as error:  # GDAL's, by whichever class
            raise UserError(f"{path}: damaged image ({error.__cause__ or error})") from None


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable array ({error})") from None
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(f"{path}: an array of shape {array.shape}, expected (H, W) or (H, W, bands)")
    return array


def _opened(path: Path) -> Any:
    """A raster, for a with-block."""
    try:
        from visionattn.data.formats._rasters import opened
    except ImportError:
        raise UserError(
            f"{path}: a TIFF that Pillow cannot read, such as one of many bands: pip install 'visionattn[geo]'"
        ) from None
    return opened(path)
