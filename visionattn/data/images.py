"""Images in files and arrays: finding them, and decoding any of them or saying why not.

Eight-bit images stay uint8. Deeper ones become float32 in 0..1 by a rule that is the same for every image of a set, so
that brightness stays comparable: 16-bit integers are divided by 65535; other integers have to lie in 0..65535 and are
divided by 65535; floats have to lie in 0..1. What lies outside is refused, never clipped.
Of files with several frames the first is read, but TIFFs with several pages of one size are refused. Of 16-bit colour
files Pillow gives the upper 8 bits only. What Pillow does not read may be a TIFF of many bands or an array, see
`visionattn.data.bands`.
"""

import io
import json
import logging
import os
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unicodedata import normalize

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from visionattn.data.bands import read_bands, shape_of
from visionattn.data.jpeg import decoded_jpeg
from visionattn.data.kept import keep, key_of, recall
from visionattn.data.remarks import names_its_file
from visionattn.data.sample import Sample, Window
from visionattn.data.threads import in_order
from visionattn.data.unpacked import read_part
from visionattn.errors import UserError, listed

__all__ = [
    "SUFFIXES",
    "EncodedImage",
    "Header",
    "ImageArray",
    "ImageFile",
    "Place",
    "array_to_image",
    "decode",
    "existing",
    "files_below",
    "given_files",
    "header",
    "headers",
    "identities",
    "image_samples",
    "is_data",
    "match_channels",
    "named_files",
    "pixels_of",
    "read_image",
    "unused",
    "walk",
]

log = logging.getLogger(__name__)
SUFFIXES = {".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
WHITE_IS_ZERO = 0  # TIFF 6.0, PhotometricInterpretation
SUBFILE, PREVIEW, MASK = 254, 1, 4  # TIFF 6.0, NewSubfileType and two of its bits
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
PNG_START, PNG_TEXTS = 8, {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # bytes; PNG 3, 11.3
TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
Place = tuple[int, int]  # of a folder: device and number
NO_DATA = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"}  # what file servers and systems leave among the files


@dataclass(frozen=True)
class ImageFile(Sample):
    """An image file."""

    path: Path = Path()

    def image(self, window: Window | None = None) -> np.ndarray:
        pixels = read_part(self.path, window, self.size, decode)
        return match_channels(array_to_image(pixels, self.path), self.channels, self.path)

    def kind(self) -> str:
        return _kind(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)


class EncodedImage(Sample):
    """An image file inside another file; a subclass says where."""

    def content(self) -> bytes:
        """The bytes of the file."""
        raise NotImplementedError

    def image(self, window: Window | None = None) -> np.ndarray:
        pixels = array_to_image(decode(self.name, self.content()), self.name)
        image = match_channels(pixels, self.channels, self.name)
        return image if window is None else image[:, window[0], window[1]]


@dataclass(frozen=True)
class ImageArray(Sample):
    """An image (H, W) or (H, W, C) in memory; `native` values are taken as they are, as those of a scene."""

    in_memory: ClassVar[bool] = True

    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))

    native: bool = False

    def image(self, window: Window | None = None) -> np.ndarray:
        if self.native:
            image = np.atleast_3d(self.pixels).transpose(2, 0, 1).astype(np.float32)
            return image if window is None else image[:, window[0], window[1]]
        image = match_channels(array_to_image(self.pixels, self.name), self.channels, self.name)
        return image if window is None else image[:, window[0], window[1]]

    def kind(self) -> str:
        return str(self.pixels.dtype)


def read_image(path: str | Path, channels: int | None = None) -> np.ndarray:
    """Decode an image file, turned upright as its EXIF orientation says.

    Args:
        channels: unset: as in the file (1 grey, 3 colour, one more with transparency); see `match_channels`.

    Returns:
        (channels, H, W), uint8 for 8-bit files, else float32 in 0..1 (see the module).

    Raises:
        UserError: missing, not an image, damaged, pixel values outside the rules, or channels that do not match.
    """
    return match_channels(array_to_image(decode(path), path), channels, path)


class Header(NamedTuple):
    """What an image file says before it is decoded.

    Attributes:
        size: (H, W) of the picture turned upright.
        bands: 1 of grey, 3 of colour, one more with transparency, or any number of others.
        orientation: EXIF's, from 1 (stored upright) to 8.
    """

    size: tuple[int, int]
    bands: int
    orientation: int

    @property
    def channels(self) -> int:
        """Bands without transparency."""
        return {2: 1, 4: 3}.get(self.bands, self.bands)


@names_its_file
def header(path: Path) -> Header:
    """Raises UserError where it is no readable image."""
    try:
        with Image.open(path) as image:
            _refuse_pages(image, path)
            width, height = image.size
            orientation = _exif(image, path).get(ExifTags.Base.Orientation, 1)
            orientation = orientation if orientation in range(2, 9) else 1
            size = (width, height) if orientation in TRANSPOSED else (height, width)
            return Header(size, 3 if image.mode == "P" else len(image.getbands()), orientation)
    except UserError:
        raise
    except Exception as error:  # decoders raise nearly anything
        if isinstance(error, Image.UnidentifiedImageError) and (shape := shape_of(path)):
            return Header(shape[:2], shape[2], 1)
        raise UserError(f"{path}: not a readable image ({str(error) or type(error).__name__})") from None


def _exif(image: Image.Image, path: Path) -> Image.Exif:
    """Pillow decodes PNG files for it, since it may stand behind the pixels: here those that have something there."""
    decoded = isinstance(image, PngImageFile) and _text_behind_pixels(path)
    return image.getexif() if decoded else Image.Image.getexif(image)


def _text_behind_pixels(path: Path) -> bool:
    """Whether a PNG file has what may say EXIF's orientation behind its pixels."""
    with path.open("rb") as file:
        file.seek(PNG_START)
        pixels = False
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            pixels |= kind == b"IDAT"
            if pixels and kind in PNG_TEXTS:
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


def headers(paths: Iterable[Path]) -> tuple[dict[Path, Header], dict[Path, str]]:
    """Of each file its header, or what is wrong with it; a header is kept until its file has changed."""
    keys = {path: key_of([path], "header") for path in paths}
    kept = recall(keys.values(), _header_of_text)
    known = {path: kept[key] for path, key in keys.items() if key in kept}
    wrong: dict[Path, str] = {}
    fresh: dict[bytes, Header] = {}

    def read(path: Path) -> Header | str:
        try:
            return header(path)
        except UserError as error:
            return str(error)

    unknown = [path for path in keys if path not in known]
    for path, found in zip(unknown, in_order(read, unknown), strict=True):
        if isinstance(found, str):
            wrong[path] = found
        else:
            known[path] = found
            fresh |= {key: found} if (key := keys[path]) else {}
    keep(fresh, json.dumps)
    return known, wrong


def _header_of_text(text: str) -> Header:
    size, bands, orientation = json.loads(text)
    return Header((size[0], size[1]), bands, orientation)


@names_its_file
def decode(path: Path, content: bytes | None = None) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) of an image file in its own depth.

    Palettes and CMYK become RGB, one-bit images 0 and 255; white as zero is turned round; transparency is kept as a
    last channel. Raises UserError with the file and the reason.

    Args:
        path: of the file, or where its content was found.
        content: of the file, where it is inside another one.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            _refuse_pages(image, path)
            if (pixels := decoded_jpeg(image, path, content)) is not None:
                return pixels
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _black_is_zero(image, np.array(_without_palette(image)))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        if content is None and (pixels := read_bands(path)) is not None:
            return pixels
        raise UserError(f"{path}: not an image, or of a kind that Pillow cannot read") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large to decode safely; cut it into tiles ({error})") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{path}: damaged image ({str(error) or type(error).__name__})") from None


def _refuse_pages(image: Any, path: Path) -> None:
    """Raises UserError where a TIFF has other images of its first one's size: smaller ones are previews of it."""
    pages = image.n_frames if isinstance(image, TiffImageFile) else 1
    size = image.size
    for page in range(1, pages):
        image.seek(page)
        if image.size == size and not image.tag_v2.get(SUBFILE, 0) & (PREVIEW | MASK):
            raise UserError(
                f"{path}: {pages} pages, of which page {page + 1} is as large as page 1, expected one image a file: "
                "save them as bands of one page, or as a file each"
            )
    if pages > 1:
        image.seek(0)


def _black_is_zero(image: Image.Image, pixels: np.ndarray) -> np.ndarray:
    """Deep TIFFs with white as zero turned round, as Pillow does it of 8-bit ones only."""
    tags = getattr(image, "tag_v2", {})
    if not image.mode.startswith("I;16") or tags.get(PHOTOMETRIC_INTERPRETATION) != WHITE_IS_ZERO:
        return pixels
    return 2 ** tags[BITSPERSAMPLE][0] - 1 - pixels


def pixels_of(image: Image.Image | np.ndarray, name: str) -> np.ndarray:
    """(H, W) or (H, W, C) of a PIL image or an array. Raises UserError for anything else."""
    if isinstance(image, Image.Image):
        return np.array(_without_palette(ImageOps.exif_transpose(image)))
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or 0 in image.shape:
        shape = f"an array of shape {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise UserError(f"{name} is {shape}: expected a path, a PIL image, or an array (H, W) or (H, W, C)")
    return image


@names_its_file
def _kind(path: Path) -> str:
    """The mode; that of 16-bit colour, which Pillow reduces, is marked as in RGB;16; the type of many bands."""
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError:
        return str(decode(path).dtype)
    with image:
        stored = (image.tile[0][3] if image.tile else "") or ""
        stored = stored if isinstance(stored, str) else str(stored[0])
        return f"{image.mode};16" if ";16" in stored and not image.mode.startswith("I") else image.mode


def _without_palette(image: Image.Image) -> Image.Image:
    """One of the modes L, LA, RGB, RGBA, or a deep grey one as it is."""
    if image.mode.startswith(("I", "F")):
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB")


def array_to_image(array: np.ndarray, name: str | Path = "image") -> np.ndarray:
    """(H, W) or (H, W, C) -> (C, H, W), uint8 or float32 in 0..1 by the module's rules; `name` is for messages.

    Channels stay next to each other in memory, where images are resized fastest.
    """
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return _scaled(array, name)


def _scaled(array: np.ndarray, name: str | Path) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise UserError(f"{name}: pixels are {array.dtype}, expected integers or floats")
    top = 1 if array.dtype.kind == "f" else 65535
    if array.dtype != np.uint16 and array.size and not (array.min() >= 0 and array.max() <= top):
        raise UserError(
            f"{name}: {array.dtype} pixels from {array.min()} to {array.max()}, expected 0 to {top}; "
            "rescale all images of the set alike"
        )
    return (array / np.float32(top)).astype(np.float32)


def match_channels(image: np.ndarray, channels: int | None, name: str | Path) -> np.ndarray:
    """(C, H, W) -> (channels, H, W): transparency is laid over white, grey repeated, colour weighed to luminance.

    To 4 channels grey is repeated and transparency kept. Raises UserError for any other mismatch.
    """
    stored = len(image)
    if channels is None or stored == channels:
        return image
    if stored in (2, 4) and channels in (1, 3):
        image, stored = _over_white(image), stored - 1
    if stored == channels:
        return image
    if (stored, channels) == (1, 3):
        return np.repeat(image, 3, axis=0)
    if (stored, channels) == (2, 4):
        return image[[0, 0, 0, 1]]
    if (stored, channels) == (3, 1):
        grey = (image * np.array(LUMINANCE, np.float32)[:, None, None]).sum(0, keepdims=True, dtype=np.float32)
        return grey if image.dtype == np.float32 else grey.round().astype(np.uint8)
    raise UserError(
        f"{name}: {stored} channels, expected {channels} (data.channels); "
        "only 1 and 3 channels, with or without transparency, are turned into each other"
    )


def _over_white(image: np.ndarray) -> np.ndarray:
    white = np.float32(1 if image.dtype == np.float32 else 255)
    colour, alpha = image[:-1].astype(np.float32), image[-1:].astype(np.float32) / white
    mixed = colour * alpha + white * (1 - alpha)
    return mixed if image.dtype == np.float32 else mixed.round().astype(np.uint8)


def walk(folder: Path, others: Collection[Place] = ()) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each real folder below and including this one, once, with the sorted names of its folders and files.

    Links are followed, but not to `others`, which are walked by themselves. Hidden names, and what file servers leave
    among the files, are passed over. A caller may clear the list of folders to go no deeper.

    Args:
        others: see `identities`.
    """
    seen: set[Place] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        (place,) = identities([here])
        if place in seen or (seen and place in others):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if is_data(name))
        yield Path(here), folders, sorted(name for name in files if is_data(name))


def identities(folders: Iterable[str | Path]) -> set[Place]:
    """What tells real folders apart, by whatever links they are reached."""
    return {(place.st_dev, place.st_ino) for place in map(os.stat, folders)}


def is_data(name: str) -> bool:
    """Whether a name is neither hidden nor of what file servers and systems leave among the files."""
    return not name.startswith(".") and name not in NO_DATA


def files_below(folder: Path, endings: Collection[str] = SUFFIXES, others: Collection[Place] = ()) -> Iterator[Path]:
    """Files below a folder whose names have one of these lower-case endings, in a fixed order; see `walk`."""
    for here, _, files in walk(folder, others):
        for name in files:
            if name.lower().endswith(tuple(endings)):
                yield here / name


def unused(folder: Path, used: Iterable[Path]) -> str:
    """How many other files are below a folder, by ending, such as "40 .heic, 1 .txt"; "" without any."""
    known = set(used)
    others = (here / name for here, _, files in walk(folder) for name in files)
    endings = Counter(path.suffix.lower() or "without ending" for path in others if path not in known)
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common())


def existing(base: Path, name: str) -> Path:
    """The file of this name, or of the same characters composed or decomposed, as other systems write them."""
    spelt = [base / name, *(base / normalize(form, name) for form in ("NFC", "NFD"))]
    return next((path for path in spelt if path.is_file()), spelt[0])


def given_files(paths: Sequence[Path], endings: Collection[str] = SUFFIXES) -> list[tuple[Path, Path]]:
    """Files to predict, each with the folder that its name starts from: the given one, or that of the given file.

    Raises:
        UserError: a given path that is missing or has another ending (and is no image, if images are wanted), a folder
            without any such file.
    """
    wrong: list[str] = []
    files: list[tuple[Path, Path]] = []
    for given in paths:
        if given.is_dir():
            inside = list(files_below(given, endings))
            wrong += [] if inside else [f"{given}: no images ({listed(sorted(endings))}) in this folder"]
            files += [(given, path) for path in inside]
            if others := unused(given, inside):
                log.info("%s: left out, as no images: %s", given, others)
        elif not given.exists():
            wrong.append(f"{given}: no such file or folder")
        elif given.name.lower().endswith(tuple(endings)) or (endings is SUFFIXES and _is_image(given)):
            files.append((given.parent, given))
        else:
            wrong.append(f"{given}: expected a file that ends with {listed(sorted(endings))}")
    if wrong:
        raise UserError(listed(wrong, "\n"))
    return files


def _is_image(path: Path) -> bool:
    try:
        return header(path).size > (0, 0)
    except UserError:
        return False


def named_files(paths: Sequence[Path], endings: Collection[str] = SUFFIXES) -> dict[str, Path]:
    """Files to predict by the name of their result: the path below the given folder, without ending.

    Raises:
        UserError: as `given_files`; two files of one name.
    """
    named: dict[str, Path] = {}
    for base, path in given_files(paths, endings):
        ending = max((e for e in endings if path.name.lower().endswith(e)), key=len, default="")
        name = path.relative_to(base).as_posix()
        name = name[: len(name) - len(ending)]
        if name in named:
            raise UserError(f"{named[name]} and {path} would both be written as {name}; predict them apart")
        named[name] = path
    return named


def image_samples(paths: Sequence[Path], channels: int) -> tuple[list[Sample], list[str]]:
    """Unlabelled image files, called by their paths."""
    files = [(str(path), path) for _, path in given_files(paths)]
    return [ImageFile(name, name, name, channels, path=path) for name, path in files], []
