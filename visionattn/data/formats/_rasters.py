"""GeoTIFF scenes of any number of bands with their masks, read by windows.

Missing pixels are NaN in images and IGNORE in masks. A pixel is missing where the file's nodata value, internal mask or
alpha band says so; an alpha band that is itself read counts as data, since writers mark a fourth band so by habit.
The recipe goes before the file: a value that `data` names as a class is that class, though it be a mask's nodata value.
"""

import os
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.transform import from_gcps

from visionattn.data.formats.geotiff import Section
from visionattn.data.labels import Labels
from visionattn.data.pairs import Pair
from visionattn.data.remarks import names_its_file
from visionattn.data.sample import IGNORE, Sample, Window
from visionattn.errors import UserError, listed

__all__ = ["Scene", "can_miss", "labelled", "notes", "open_quietly", "opened", "read_bands", "scenes", "unlabelled"]

Ground = tuple[str, tuple[tuple[float, float], ...]]  # CRS and corners
SAME_RESOLUTION = 1.05
OPENING = threading.Lock()  # filters of warnings belong to all threads
KEPT_OPEN = 8  # files of a thread


@dataclass(frozen=True, kw_only=True)
class Scene(Sample):
    """A raster with its mask, or without.

    Attributes:
        bands: numbers, from 1, of the bands that are read.
        nodata: value of missing pixels that replaces what the file says.
        crs: of its grid, as text, such as EPSG:32633; empty where the file has none.
        resolution: height and width of a pixel in units of the CRS.
        ground: see `Sample`; by ground control points where it has no grid.
    """

    windowed: ClassVar[bool] = True

    path: Path
    mask_path: Path | None = None
    labels: Labels | None = None
    bands: tuple[int, ...] = ()
    nodata: float | None = None
    crs: str = ""
    resolution: tuple[float, float] = (1.0, 1.0)
    ground: Ground | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,) if self.mask_path is None else (self.path, self.mask_path)

    def image(self, window: Window | None = None) -> np.ndarray:
        return read_bands(_kept_open(self.path), self.bands, window, self.nodata)

    def target(self, window: Window | None = None) -> Any:
        return self._target(window)

    def read(self, window: Window | None = None) -> tuple[np.ndarray, Any]:
        image = self.image(window)
        return image, self._target(window, image)

    def _target(self, window: Window | None, image: np.ndarray | None = None) -> Any:
        """`target`, of which the image tells what is missing."""
        if self.mask_path is None or self.labels is None:
            return None
        numbers = _numbers(_kept_open(self.mask_path), self.labels, window)
        if self.can_miss:
            numbers[np.isnan(self.image(window) if image is None else image).all(0)] = IGNORE
        return numbers

    @property
    def can_miss(self) -> bool:
        """Whether pixels can be missing at all."""
        return can_miss(_kept_open(self.path), self.bands, self.nodata)


def _numbers(source: rasterio.DatasetReader, labels: Labels, window: Window | None) -> np.ndarray:
    bands = (1, 2, 3) if source.count >= 3 else (1,)
    values = _read(source, bands, window)
    missing = np.zeros(values.shape[1:], dtype=bool)
    if _marks_missing(source, bands) and not (len(bands) == 1 and source.nodata in labels.numbers):
        missing = (source.read_masks(bands, window=_gdal_window(window)) == 0).all(0)
    if len(bands) == 3:
        known = next(iter(labels.colors or {0: 0}))
        values[:, missing] = np.array([[known >> 16], [known >> 8 & 255], [known & 255]])
        values = np.moveaxis(values, 0, -1)
    else:
        values = values[0]
        values[missing] = min(labels.numbers)
    numbers = labels.of_mask(values, source.name)
    numbers[missing] = IGNORE
    return numbers


def open_quietly(path: str | Path, *mode: str, **profile: Any) -> Any:
    """`rasterio.open` without its warning that a file has no place on Earth."""
    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, *mode, **profile)


@contextmanager
def opened(path: str | Path) -> Iterator[rasterio.DatasetReader]:
    """A raster for reading. Raises UserError with the file and the reason."""
    with _open(path) as source:
        yield source


_OPEN = threading.local()


def _kept_open(path: Path) -> rasterio.DatasetReader:
    """A raster for reading, which this thread of this process keeps open with the others that it used last."""
    if getattr(_OPEN, "process", None) != os.getpid():  # a fork shares its parent's places in files
        _OPEN.process, _OPEN.files = os.getpid(), OrderedDict()
    files: OrderedDict[Path, tuple[Any, rasterio.DatasetReader]] = _OPEN.files
    now = path.stat() if path.exists() else None
    written = now and (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if path not in files or files[path][0] != written:
        files[path] = written, _open(path)
    files.move_to_end(path)
    while len(files) > KEPT_OPEN:
        files.popitem(last=False)[1][1].close()
    return files[path][1]


@names_its_file
def _open(path: Path) -> rasterio.DatasetReader:
    try:
        source = open_quietly(path)
        for page in source.subdatasets[1:] if source.driver == "GTiff" else ():
            with open_quietly(page) as other:
                if other.shape == source.shape:
                    source.close()
                    raise UserError(
                        f"{path}: several pages of one size, expected one: save them as bands, or as a file each"
                    )
        return source
    except rasterio.errors.RasterioIOError as error:
        raise UserError(f"{path}: not a readable raster ({error})") from None


def read_bands(
    source: rasterio.DatasetReader, bands: Sequence[int], window: Window | None = None, nodata: float | None = None
) -> np.ndarray:
    """(bands, h, w) float32, NaN where a band has no data. Raises UserError where the file is damaged."""
    values = _read(source, bands, window)
    image = values.astype(np.float32)
    if nodata is not None:
        image[values == nodata] = np.nan
    elif _marks_missing(source, bands):
        image[source.read_masks(list(bands), window=_gdal_window(window)) == 0] = np.nan
    if values.dtype.kind == "f":
        image[np.isinf(image)] = np.nan
    return image


def _read(source: rasterio.DatasetReader, bands: Sequence[int], window: Window | None) -> np.ndarray:
    try:
        return source.read(list(bands), window=_gdal_window(window))
    except rasterio.errors.RasterioIOError as error:
        reason = str(error.__cause__ or error)
        raise UserError(f"{source.name}: damaged, cannot be read ({reason})") from None


def _gdal_window(window: Window | None) -> tuple[tuple[int, int], tuple[int, int]] | None:
    return window and ((window[0].start, window[0].stop), (window[1].start, window[1].stop))


def can_miss(source: rasterio.DatasetReader, bands: Sequence[int], nodata: float | None = None) -> bool:
    """Whether pixels can be missing at all, by what the header says."""
    floats = any("float" in source.dtypes[band - 1] for band in bands)
    return floats or nodata is not None or _marks_missing(source, bands)


def _marks_missing(source: rasterio.DatasetReader, bands: Sequence[int]) -> bool:
    alpha = [b for b, kind in zip(source.indexes, source.colorinterp, strict=True) if kind == ColorInterp.alpha]
    flags = [set(source.mask_flag_enums[band - 1]) for band in bands]
    if set(alpha) & set(bands):
        flags = [marks for marks in flags if MaskFlags.alpha not in marks]
    return any(MaskFlags.all_valid not in marks for marks in flags)


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    count: int
    kinds: tuple[str, ...]
    crs: str
    transform: tuple[float, ...]
    ground: Ground | None

    @property
    def resolution(self) -> tuple[float, float]:
        a, b, _, d, e, _ = self.transform[:6]
        return float(np.hypot(b, e)), float(np.hypot(a, d))


def labelled(pairs: Sequence[Pair], section: Section) -> tuple[list[Sample], list[str]]:
    """Scenes with their masks, and problems: unreadable headers, sizes or places that differ, mixed bands."""
    labels = Labels.of(section)
    problems: list[str] = []
    headers: dict[Pair, _Header] = {}
    for pair in pairs:
        try:
            image, mask = _header(pair.image), _header(pair.mask)
        except UserError as error:
            problems.append(str(error))
            continue
        differ = _differences(pair, image, mask)
        problems += differ
        if not differ:
            headers[pair] = image
    problems += _band_problems({pair.image: header.count for pair, header in headers.items()}, section.bands)
    samples: list[Sample] = [
        _scene(
            pair.name, pair.image, header, section, group=pair.group, split=pair.split, mask=pair.mask, labels=labels
        )
        for pair, header in headers.items()
    ]
    return samples, problems


def scenes(paths: Mapping[str, Path], section: Any) -> tuple[list[Scene], list[str]]:
    """Scenes by name, and a line for each that cannot be read or has other bands than most.

    Args:
        section: has `bands` and `nodata`.
    """
    headers: dict[str, _Header] = {}
    problems: list[str] = []
    for name, path in paths.items():
        try:
            headers[name] = _header(path)
        except UserError as error:
            problems.append(str(error))
    problems += _band_problems({paths[name]: header.count for name, header in headers.items()}, section.bands)
    return [_scene(name, paths[name], header, section, group=name) for name, header in headers.items()], problems


def unlabelled(paths: Mapping[str, Path], section: Any, channels: int) -> tuple[list[Sample], list[str]]:
    """Scenes by name, and a line for each that cannot be read or has other bands; the section as in `scenes`."""
    samples: list[Sample] = []
    problems: list[str] = []
    for name, path in paths.items():
        try:
            header = _header(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if len(section.bands or range(header.count)) != channels or max(section.bands or [1]) > header.count:
            asked = f"bands {listed(section.bands)}" if section.bands else f"{channels} bands"
            problems.append(f"{path}: {header.count} bands, but the network was trained on {asked}")
        else:
            samples.append(_scene(name, path, header, section, group=name))
    return samples, problems


def _scene(
    name: str,
    path: Path,
    header: "_Header",
    section: Any,
    group: str,
    split: str = "",
    mask: Path | None = None,
    labels: Labels | None = None,
) -> Scene:
    return Scene(
        name=name,
        case=name,
        group=group,
        channels=len(section.bands or range(header.count)),
        size=header.size,
        split=split,
        path=path,
        mask_path=mask,
        labels=labels,
        bands=tuple(section.bands or range(1, header.count + 1)),
        nodata=section.nodata,
        crs=header.crs,
        resolution=header.resolution,
        ground=header.ground,
    )


def _header(path: Path) -> _Header:
    with opened(path) as source:
        crs = source.crs.to_string() if source.crs else ""
        return _Header(source.shape, source.count, source.dtypes, crs, tuple(source.transform), _ground(source))


def _ground(source: rasterio.DatasetReader) -> Ground | None:
    """By the grid, which may be rotated or have rows that run to the north, else by ground control points."""
    points, crs, transform = source.gcps[0], source.crs, source.transform
    if crs is None and len(points) >= 3:
        crs, transform = source.gcps[1], from_gcps(points)
    if not crs:
        return None
    height, width = source.shape
    corners = [transform @ corner for corner in ((0, 0), (width, 0), (width, height), (0, height))]
    return crs.to_string(), tuple((float(x), float(y)) for x, y in corners)


def _differences(pair: Pair, image: _Header, mask: _Header) -> list[str]:
    if image.size != mask.size:
        sizes = "{}x{}".format(*image.size), "{}x{}".format(*mask.size)
        return [f"{pair.image} is {sizes[0]}, but {pair.mask} is {sizes[1]}"]
    if any("complex" in kind for kind in image.kinds):
        return [f"{pair.image}: complex pixels; expected integers or floats"]
    if image.crs and mask.crs and image.crs != mask.crs:
        return [f"{pair.image} has the CRS {image.crs[:80]}, but {pair.mask} has {mask.crs[:80]}"]
    if image.crs and mask.crs and not np.allclose(image.resolution, mask.resolution, rtol=1e-3):
        return [f"{pair.image} has pixels of {image.resolution}, but {pair.mask} of {mask.resolution} units of the CRS"]
    if image.crs and mask.crs and (moved := _moved(image, mask)) > 0.5:
        return [f"{pair.image} and {pair.mask} do not lie on the same ground: they are {moved:.1f} pixels apart"]
    return []


def _moved(image: _Header, mask: _Header) -> float:
    """Largest distance in pixels between the same corner of both."""
    height, width = image.size
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]]).T
    difference = np.reshape(image.transform, (3, 3))[:2] - np.reshape(mask.transform, (3, 3))[:2]
    return float(np.linalg.norm(difference @ corners, axis=0).max() / min(image.resolution))


def _band_problems(counts: dict[Path, int], bands: Sequence[int] | None) -> list[str]:
    if bands:
        return [
            f"{path}: {count} bands, but data.bands asks for band {max(bands)}"
            for path, count in counts.items()
            if count < max(bands)
        ]
    if len(set(counts.values())) <= 1:
        return []
    (usual, times), *_ = Counter(counts.values()).most_common()
    return [
        f"{path}: {count} bands, but {times} of {len(counts)} scenes have {usual}; choose with data.bands"
        for path, count in counts.items()
        if count != usual
    ]


def notes(samples: Sequence[Sample]) -> list[str]:
    """What is worth knowing of a set of scenes: several CRS or resolutions, scenes without a CRS."""
    scenes = [sample for sample in samples if isinstance(sample, Scene)]
    lines = []
    systems = Counter(scene.crs or "none" for scene in scenes)
    if len(systems) > 1:
        shares = [f"{n} {crs[:60]}" for crs, n in systems.most_common()]
        lines.append(f"scenes have different coordinate systems: {listed(shares, most=8)}")
    for crs in systems:
        there = sorted((s for s in scenes if (s.crs or "none") == crs), key=lambda scene: scene.resolution)
        fine, coarse = there[0], there[-1]
        if coarse.resolution[0] > SAME_RESOLUTION * fine.resolution[0]:
            lines.append(
                f"scenes have different resolutions: pixels from {fine.resolution[0]:g} ({fine.name}) "
                f"to {coarse.resolution[0]:g} ({coarse.name}) units of the CRS"
            )
    return lines
