"""Volumes as 2-D slices: NIfTI files and DICOM series, with masks in NIfTI files.

However a file stores them, volumes are turned first so that axes 0, 1 and 2 run to the patient's left, back and head
(feet in sagittal and coronal cuts, so that the head is on top): axis 2 cuts axial slices, shown as radiologists do.
Image and mask are compared after that turn. A .nii is mapped into memory, as is what has to be unpacked as a whole
(`visionattn.data.unpacked`); where that cannot be kept on the disk, up to CACHE_BYTES are in each process.
"""

import gzip
import itertools
import logging
import re
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import nibabel
import numpy as np
import pydicom
from nibabel import orientations
from pydicom.config import IGNORE, disable_value_validation
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID, ImplicitVRLittleEndian

from visionattn.data.formats.nifti import SliceSection, VolumeSection
from visionattn.data.labels import Labels
from visionattn.data.pairs import Pair
from visionattn.data.remarks import names_its_file
from visionattn.data.sample import Sample, Window
from visionattn.data.unpacked import unpacked
from visionattn.errors import UserError, listed

__all__ = ["Slice", "Volume", "Voxels", "is_series", "labelled", "open_volume", "unlabelled"]

log = logging.getLogger(__name__)
Length = TypeVar("Length", int, float)
CACHE_BYTES = 2 * 2**30
PERCENTILES = (0.5, 99.5)
SAMPLES = 2**20  # voxels that percentiles are taken of
SAME_PLACE = 0.1  # voxels
UNEVEN = 0.1  # largest deviation from the usual distance between slices, in distances
TAGS = [
    "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "SOPClassUID",
]  # fmt: skip
STANDARD = "1.2.840.10008."  # how DICOM's own identifiers begin
DATA_SETS = (b"\x02\x00", b"\x08\x00")  # how one without a preamble begins: with group 2 or 8, little endian


@dataclass(frozen=True)
class Voxels:
    """The values of a volume, turned: `stored` (slices, rows, columns, channels), times `slope`, plus `intercept`."""

    stored: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0

    def values(self, index: int, window: Window = (slice(None), slice(None))) -> np.ndarray:
        """(rows, columns, channels) of a slice; stored numbers as they are where nothing scales them, else float64."""
        stored = self.stored[index][window]
        return stored if (self.slope, self.intercept) == (1, 0) else stored * float(self.slope) + self.intercept

    @cached_property
    def percentiles(self) -> np.ndarray:
        """(2, channels) of about a million voxels of the volume; 0 and 1 where all are missing."""
        step = max(1, int(np.cbrt(self.stored[..., 0].size / SAMPLES)))
        sample = self.stored[::step, ::step, ::step].astype(np.float64) * self.slope + self.intercept
        finite = [channel[np.isfinite(channel)] for channel in np.moveaxis(sample, -1, 0)]
        return np.array([np.percentile(c, PERCENTILES) if c.size else (0, 1) for c in finite]).T


@dataclass(frozen=True)
class Volume:
    """What the headers of a volume say.

    Attributes:
        path: NIfTI file or folder of a DICOM series.
        files: of a series, from one end to the other.
        axis: that is cut across, after turning.
        channels: length of a fourth axis, else 1.
        stored_shape: lengths of the first three axes of the file.
        stored_affine: (4, 4) rows, from the file's voxels to mm in RAS+.
        inverted: high values are dark (MONOCHROME1).
    """

    path: Path
    files: tuple[Path, ...]
    axis: int
    channels: int
    stored_shape: tuple[int, int, int]
    stored_affine: tuple[tuple[float, ...], ...]
    inverted: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""
        slices, rows, columns = (self._turned_lengths(self.stored_shape)[i] for i in self._order)
        return slices, rows, columns

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of slices, rows and columns in mm."""
        sizes = np.linalg.norm(np.array(self.stored_affine)[:3, :3], axis=0)
        slices, rows, columns = (self._turned_lengths(sizes)[i] for i in self._order)
        return slices, rows, columns

    def corners(self) -> np.ndarray:
        """(8, 3) places of the outermost voxels in mm, RAS+, in the order of the turned volume."""
        affine = np.array(self.stored_affine) @ orientations.inv_ornt_aff(self._turn, self.stored_shape)
        ends = np.array(list(itertools.product(*((0, n - 1) for n in self._turned_lengths(self.stored_shape)))))
        return ends @ affine[:3, :3].T + affine[:3, 3]

    @property
    def _orientations(self) -> tuple[np.ndarray, np.ndarray]:
        """As stored, and as turned."""
        turned = orientations.axcodes2ornt("LPS" if self.axis == 2 else "LPI")
        return orientations.io_orientation(np.array(self.stored_affine)), turned

    @cached_property
    def _turn(self) -> np.ndarray:
        return orientations.ornt_transform(*self._orientations)

    def _turned_lengths(self, stored: Sequence[Length]) -> list[Length]:
        return np.array(stored)[np.argsort(self._turn[:, 0])].tolist()

    @property
    def _order(self) -> tuple[int, int, int]:
        column, row = (i for i in range(3) if i != self.axis)
        return self.axis, row, column

    def turned(self, stored: np.ndarray) -> np.ndarray:
        """(X, Y, Z, channels) as stored -> (slices, rows, columns, channels); a view."""
        return orientations.apply_orientation(stored, self._turn).transpose(*self._order, 3)

    def as_stored(self, slices: np.ndarray) -> np.ndarray:
        """(slices, rows, columns) -> (X, Y, Z) as the volume is stored; a view."""
        lying = slices.transpose(np.argsort(self._order))
        return orientations.apply_orientation(lying, orientations.ornt_transform(*self._orientations[::-1]))

    def voxels(self) -> Voxels:
        """The values, from the cache of this process where they are there. Raises UserError where damaged."""
        written = self.path.stat().st_mtime_ns if self.path.exists() else 0
        return _CACHE.get((self.path, self.axis, written), lambda: _load(self))

    def image(
        self, index: int, contrast: tuple[float, float] | None = None, window: Window | None = None
    ) -> np.ndarray:
        """(channels, h, w) float32 in 0..1 of a slice.

        Args:
            contrast: window and level, level - window / 2 becoming 0; unset: percentiles of the volume.
        """
        voxels = self.voxels()
        low, high = _limits(*contrast) if contrast else voxels.percentiles
        values = np.nan_to_num(voxels.values(index, window or (slice(None), slice(None))), nan=-np.inf)
        image = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1).astype(np.float32)
        return np.ascontiguousarray(np.moveaxis(1 - image if self.inverted else image, -1, 0))


def scaled(values: np.ndarray, section: SliceSection) -> np.ndarray:
    """(H, W, channels) -> float32 in 0..1 as `Volume.image` does it."""
    if section.window is not None and section.level is not None:
        low, high = _limits(section.window, section.level)
    else:
        low, high = Voxels(values[None]).percentiles
    return np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1).astype(np.float32)


def _limits(window: float, level: float) -> np.ndarray:
    return np.array([level - window / 2, level + window / 2])


@dataclass(frozen=True, kw_only=True)
class Slice(Sample):
    """A slice of a volume, with that of its mask or without; `contrast` is as in `Volume.image`."""

    volume: Volume
    mask_volume: Volume | None = None
    index: int = 0
    labels: Labels | None = None
    contrast: tuple[float, float] | None = None

    def image(self, window: Window | None = None) -> np.ndarray:
        return self.volume.image(self.index, self.contrast, window)

    def target(self, window: Window | None = None) -> np.ndarray | None:
        if self.mask_volume is None or self.labels is None:
            return None
        values = self.mask_volume.voxels().values(self.index, window or (slice(None), slice(None)))[..., 0]
        name = f"{self.mask_volume.path}, slice {self.index} of axis {self.volume.axis}"
        return self.labels.of_mask(values.round(4) if values.dtype.kind == "f" else values, name)

    @property
    def files(self) -> tuple[Path, ...]:
        volumes = (self.volume,) if self.mask_volume is None else (self.volume, self.mask_volume)
        return tuple(file for volume in volumes for file in volume.files or (volume.path,))

    @property
    def spacing(self) -> tuple[float, ...]:
        return self.volume.spacing

    @property
    def unit(self) -> str:
        return "mm"


def labelled(pairs: Sequence[Pair], section: VolumeSection) -> tuple[list[Sample], list[str]]:
    """The slices of volumes with their masks, called <volume>_slice<number>, and problems: unreadable headers, shapes
    or affines that differ, series with missing slices."""
    labels = Labels.of(section)
    samples: list[Sample] = []
    problems: list[str] = []
    channels: dict[Path, int] = {}
    for pair in pairs:
        try:
            volume, mask = open_volume(pair.image, section.axis), open_volume(pair.mask, section.axis)
        except UserError as error:
            problems.append(str(error))
            continue
        differ = _differences(pair, volume, mask)
        problems += differ
        if not differ:
            channels[pair.image] = volume.channels
            samples += _slices(pair.name, volume, section, group=pair.group, split=pair.split, mask=mask, labels=labels)
    return samples, problems + _channel_problems(channels)


def unlabelled(
    paths: Mapping[str, Path], section: SliceSection, channels: int | None
) -> tuple[list[Sample], list[str]]:
    """The slices of volumes by name, and a line for each volume that cannot be read or has other channels.

    channels: None: those that most volumes have.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    found: dict[Path, int] = {}
    for name, path in paths.items():
        try:
            volume = open_volume(path, section.axis)
        except UserError as error:
            problems.append(str(error))
            continue
        found[path] = volume.channels
        if channels is not None and volume.channels != channels:
            problems.append(f"{path}: {volume.channels} channels, but the network was trained on {channels}")
        else:
            samples += _slices(name, volume, section, group=name)
    return samples, problems + (_channel_problems(found) if channels is None else [])


def _slices(
    name: str,
    volume: Volume,
    section: SliceSection,
    group: str,
    split: str = "",
    mask: Volume | None = None,
    labels: Labels | None = None,
) -> list[Sample]:
    contrast = None if section.window is None or section.level is None else (section.window, section.level)
    return [
        Slice(
            name=f"{name}_slice{index:03d}",
            case=name,
            group=group,
            channels=volume.channels,
            size=volume.shape[1:],
            split=split,
            volume=volume,
            mask_volume=mask,
            index=index,
            labels=labels,
            contrast=contrast,
        )
        for index in range(volume.shape[0])
    ]


def _differences(pair: Pair, volume: Volume, mask: Volume) -> list[str]:
    if mask.channels != 1:
        return [f"{pair.mask}: {mask.channels} volumes in one mask file; expected one"]
    if volume.shape != mask.shape:
        shapes = ["x".join(map(str, reversed(v.shape))) for v in (volume, mask)]
        lost = volume.files and volume.stored_shape[2] < mask.stored_shape[2]
        hint = "; are slices of the series missing?" if lost else ""
        return [f"{pair.image} is {shapes[0]}, but {pair.mask} is {shapes[1]}{hint}"]
    apart = np.linalg.norm(volume.corners() - mask.corners(), axis=1).max()
    if apart > SAME_PLACE * min(volume.spacing):
        return [
            f"{pair.image} and {pair.mask} have different affines: voxels are up to {apart:.3g} mm apart; resample the "
            "mask to the image, or, where it is only the header that is wrong, copy the image's"
        ]
    return []


def _channel_problems(channels: Mapping[Path, int]) -> list[str]:
    (usual, times), *others = Counter(channels.values()).most_common() or [(0, 0)]
    return [
        f"{path}: {count} channels, but {times} of {len(channels)} volumes have {usual}"
        for path, count in channels.items()
        if others and count != usual
    ]


def open_volume(path: Path, axis: int = 2) -> Volume:
    """A NIfTI file, or a folder with a DICOM series, by its headers.

    Raises:
        UserError: unreadable, not of three or four axes, several series, missing or uneven slices, colours.
    """
    return _open_series(path, axis) if path.is_dir() else _open_nifti(path, axis)


@names_its_file
def _open_nifti(path: Path, axis: int) -> Volume:
    try:
        file = nibabel.load(path)
        shape, affine = file.shape, np.asarray(file.affine, dtype=np.float64)
    except Exception as error:  # readers raise nearly anything on damaged files
        raise UserError(f"{path}: not a readable NIfTI file ({error})") from None
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(f"{path}: its shape is {shape}, expected three axes, or a fourth for channels")
    if file.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path}: voxels are {file.get_data_dtype()}, expected integers or floats")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{path}: its affine {affine[:3].tolist()} says nothing about places in the patient")
    return Volume(path, (), axis, shape[3] if len(shape) == 4 else 1, shape[:3], tuple(map(tuple, affine.tolist())))


def _open_series(folder: Path, axis: int) -> Volume:
    headers = _series_headers(folder)
    first = next(iter(headers.values()))
    across, down = np.reshape(np.array(first.ImageOrientationPatient, dtype=np.float64), (2, 3))
    normal = np.cross(across, down)
    files = sorted(headers, key=lambda file: np.dot(normal, _position(headers[file])))
    places = np.array([np.dot(normal, _position(headers[file])) for file in files])
    step = normal * _even_distance(folder, files, places, first)
    if len(files) > 1:  # as measured: slices may be shifted against each other
        step = (_position(headers[files[-1]]) - _position(headers[files[0]])) / (len(files) - 1)
    between_rows, between_columns = map(float, first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([across * between_columns, down * between_rows, step, _position(headers[files[0]])], axis=1)
    affine[:2] *= -1  # DICOM's axes run to the left and the back, NIfTI's to the right and the front
    return Volume(
        path=folder,
        files=tuple(files),
        axis=axis,
        channels=1,
        stored_shape=(int(first.Columns), int(first.Rows), len(files)),
        stored_affine=tuple(map(tuple, affine.tolist())),
        inverted=first.PhotometricInterpretation == "MONOCHROME1",
    )


def _position(header: pydicom.Dataset) -> np.ndarray:
    return np.array(header.ImagePositionPatient, dtype=np.float64)


def is_series(folder: Path) -> bool:
    """Whether a folder holds a DICOM image, be it a damaged one."""
    for file in _candidates(folder):
        try:
            header = _header(file)
        except UserError:
            return True
        if header is not None and _is_image(header):
            return True
    return False


def _candidates(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _series_headers(folder: Path) -> dict[Path, pydicom.Dataset]:
    """Headers of the DICOM images in a folder, which make one series of equal geometry."""
    read = {file: _header(file) for file in _candidates(folder)}
    headers = {file: _sound(header, file) for file, header in read.items() if header is not None and _is_image(header)}
    if not headers:
        raise UserError(f"{folder}: no DICOM images in this folder")
    series = Counter(header.SeriesInstanceUID for header in headers.values())
    if len(series) > 1:
        counts = [f"{count} files of {uid}" for uid, count in series.items()]
        raise UserError(f"{folder}: {len(series)} series in one folder ({listed(counts, most=4)}); expected one")
    called = {_without_digits(file) for file in headers}
    for file in read.keys() - headers.keys():
        header = read[file]
        if header is None and _without_digits(file) in called:
            raise UserError(f"{file}: called as the slices beside it, but not a DICOM file; copy the series anew")
        if header is not None and header.get("SeriesInstanceUID") in series:
            raise UserError(f"{file}: of the series beside it, but not an image")
    return _alike(headers)


def _header(file: Path) -> pydicom.Dataset | None:
    """Of a DICOM file, one without a preamble too; None where it is something else.

    Raises:
        UserError: called .dcm but something else, or damaged.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
        marked, header = start[128:] == b"DICM", pydicom.Dataset()
        if marked or start[:2] in DATA_SETS:
            with warnings.catch_warnings(), disable_value_validation():
                warnings.simplefilter("ignore")  # which would not name the file; what is wrong is told below
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS, force=True)
                list(header), list(header.file_meta)  # values are made when they are asked for
    except Exception as error:  # readers raise nearly anything on damaged files
        raise UserError(f"{file}: damaged DICOM file ({str(error) or type(error).__name__})") from None
    if marked or header:
        return header
    if file.suffix.lower() == ".dcm":
        raise UserError(f"{file}: not a DICOM file")
    return None


def _is_image(header: pydicom.Dataset) -> bool:
    """Whether a DICOM file holds pixels, as a DICOMDIR or a report does not, or is cut too short to tell."""
    kind = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    name = UID(kind, IGNORE).name
    cut = name == kind and (kind.startswith(STANDARD) or STANDARD.startswith(kind))  # no such class is known
    return cut or header.get("Rows") is not None or "Image Storage" in name


def _without_digits(file: Path) -> str:
    return re.sub(r"\d+", "0", file.name)


def _sound(header: pydicom.Dataset, file: Path) -> pydicom.Dataset:
    lengths = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    needed = ("SeriesInstanceUID", *lengths, "Rows", "Columns")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise UserError(f"{file}: several frames in one file; turn it into NIfTI, for example by dcm2niix")
    if missing := [tag for tag in needed if not header.get(tag)]:
        raise UserError(f"{file}: without {listed(missing)}, so it is no slice of a volume, or cut short")
    for tag, length in lengths.items():
        if len(_numbers(header[tag].value)) != length:
            raise UserError(f"{file}: {tag} is {header[tag].value}, expected {length} numbers")
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{file}: pixels are {header.get('PhotometricInterpretation')}, expected MONOCHROME1 or 2")
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed and not get_decoder(syntax).is_available:
        raise UserError(f"{file}: compressed as {syntax.name}; pip install pylibjpeg[all] reads that")
    return header


def _numbers(values: Sequence[str | float]) -> np.ndarray:
    """The finite ones; none where something else is among them."""
    with suppress(TypeError, ValueError):
        numbers = np.array(values, dtype=np.float64)
        return numbers[np.isfinite(numbers)]
    return np.zeros(0)


def _alike(headers: dict[Path, pydicom.Dataset]) -> dict[Path, pydicom.Dataset]:
    (path, first), *others = headers.items()
    for tag in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "PhotometricInterpretation"):
        for file, header in others:
            a, b = first[tag].value, header[tag].value
            if a != b and (isinstance(a, str) or not np.allclose(np.array(a, float), np.array(b, float), atol=1e-3)):
                raise UserError(f"{file}: {tag} is {b}, but {a} in {path.name} of the same series")
    return headers


def _even_distance(folder: Path, files: Sequence[Path], places: np.ndarray, first: pydicom.Dataset) -> float:
    """Distance between slices in mm; refuses gaps, slices at one place and uneven distances."""
    if len(files) == 1:
        return float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1)
    gaps = np.diff(places)
    usual = float(np.percentile(gaps, 50, method="lower"))
    near, widest = int(gaps.argmin()), int(gaps.argmax())
    if gaps[near] < 1e-3:
        raise UserError(f"{folder}: {files[near].name} and {files[near + 1].name} are at the same place")
    if gaps[widest] > 1.5 * usual:
        raise UserError(
            f"{folder}: slices are missing between {files[widest].name} and {files[widest + 1].name}, which are "
            f"{gaps[widest]:.4g} mm apart; the others are {usual:.4g} mm apart"
        )
    if np.abs(gaps - usual).max() > UNEVEN * usual:
        raise UserError(f"{folder}: slices are unevenly spaced, {gaps.min():.4g} to {gaps.max():.4g} mm")
    return usual


def _load(volume: Volume) -> Voxels:
    if volume.files:
        return Voxels(volume.turned(unpacked(volume.files, lambda: _read_series(volume))[..., None]))
    stored, slope, intercept = _read_nifti(volume.path)
    voxels = Voxels(volume.turned(stored[..., None] if stored.ndim == 3 else stored), slope, intercept)
    _tell_missing(volume.path, voxels)
    return voxels


@names_its_file
def _read_nifti(path: Path) -> tuple[np.ndarray, float, float]:
    """The numbers as stored, slope and intercept."""
    try:
        proxy = nibabel.load(path).dataobj
        stored = unpacked([path], lambda: _decompressed(path)) if path.suffix.lower() == ".gz" else proxy.get_unscaled()
        stored[..., -1:, -1:].max()  # a map of a file that is too short fails here, not later
    except Exception as error:
        raise UserError(f"{path}: damaged, cannot be read ({str(error) or type(error).__name__})") from None
    return stored, float(proxy.slope), float(proxy.inter)


def _decompressed(path: Path) -> np.ndarray:
    """The numbers in a compressed file, which is read to its end, where its check sum is."""
    with gzip.open(path) as stream:
        holder = nibabel.FileHolder(str(path), stream)
        stored = type(nibabel.load(path)).from_file_map({"image": holder}).dataobj.get_unscaled()
        while stream.read(2**20):
            pass
    return stored


def _tell_missing(path: Path, voxels: Voxels) -> None:
    """Warn, once in a process, of voxels without a value, which are shown as the darkest ones."""
    if voxels.stored.dtype.kind != "f" or path in _TOLD:
        return
    _TOLD.add(path)
    missing = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels.stored)
    if missing:
        log.warning("%s: %s of %s voxels are NaN or infinite", path, f"{missing:,}", f"{voxels.stored.size:,}")


def _read_series(volume: Volume) -> np.ndarray:
    """(X, Y, Z), int16 where rescaling keeps whole numbers, else float32."""
    planes = []
    for plane in map(_read_slice, volume.files):
        whole = np.abs(plane).max() < 2**15 and (plane == np.round(plane)).all()
        planes.append(plane.astype(np.int16 if whole else np.float32))
    return np.stack(planes, axis=-1)


@names_its_file
def _read_slice(file: Path) -> np.ndarray:
    """(columns, rows)."""
    try:
        return _values(pydicom.dcmread(file, force=True)).T
    except Exception as error:
        raise UserError(f"{file}: damaged, cannot be read ({str(error) or type(error).__name__})") from None


def _values(source: pydicom.Dataset) -> np.ndarray:
    """(rows, columns) in the unit of the modality: by its table, else by slope and intercept, which may be empty."""
    if "TransferSyntaxUID" not in source.file_meta:  # of files without a preamble: DICOM's default
        source.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    if source.get("ModalityLUTSequence"):
        return apply_modality_lut(source.pixel_array, source)
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    return source.pixel_array * float(1 if slope is None else slope) + float(intercept or 0)


class _Cache:
    """The volumes used last; threads that want the same one wait for it to be read once."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Path, int, int], Voxels] = OrderedDict()
        self.lock = threading.Lock()
        self.loading: dict[tuple[Path, int, int], threading.Lock] = {}

    def get(self, key: tuple[Path, int, int], load: Callable[[], Voxels]) -> Voxels:
        with self.lock:
            one_by_one = self.loading.setdefault(key, threading.Lock())
        with one_by_one:
            voxels = self.kept.get(key) or load()
            with self.lock:
                self.kept[key] = voxels
                self.kept.move_to_end(key)
                while len(self.kept) > 1 and sum(map(_bytes, self.kept.values())) > CACHE_BYTES:
                    self.kept.popitem(last=False)
            return voxels


def _bytes(voxels: Voxels) -> int:
    """Memory of a volume; none where its file is mapped."""
    base: np.ndarray | None = voxels.stored
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return 0
        base = base.base
    return voxels.stored.nbytes


_CACHE = _Cache()
_TOLD: set[Path] = set()
