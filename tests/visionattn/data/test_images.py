"""Any image file becomes an array by a stated rule, or an error that names the file and the reason."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from visionattn.data.images import (
    ImageFile,
    array_to_image,
    given_files,
    header,
    headers,
    image_samples,
    match_channels,
    named_files,
    read_image,
)
from visionattn.errors import UserError, listed

RNG = np.random.default_rng(0)
GREY = np.array([[0, 100, 255], [7, 50, 200]], dtype=np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
DEEP = np.array([[0, 1, 257], [4096, 40000, 65535]], dtype=np.uint16)
ALPHA = np.array([[0, 128, 255], [255, 0, 51]], dtype=np.uint8)


def saved(folder: Path, image: Image.Image | np.ndarray, name: str, **options) -> Path:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(folder / name, **options)
    return folder / name


def planes(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]


def equal(image: np.ndarray, expected: np.ndarray) -> bool:
    """Whether values, shape and type are the same."""
    return image.dtype == expected.dtype and np.array_equal(image, expected)


def deep_colour_png(path: Path, pixels: np.ndarray) -> Path:
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def turned_behind_its_pixels(path: Path) -> Path:
    """A PNG with EXIF's orientation 6 after its pixels, as the standard allows."""
    saved(path.parent, COLOUR, path.name)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    end = path.read_bytes().index(b"IEND") - 4
    path.write_bytes(path.read_bytes()[:end] + chunk + path.read_bytes()[end:])
    return path


def test_headers_are_read_without_pixels_and_again_only_of_changed_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decoded, opened, load, open_file = [], [], PngImageFile.load, Image.open
    monkeypatch.setattr(PngImageFile, "load", lambda image: decoded.append(image.filename) or load(image))
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or open_file(path))
    plain = saved(tmp_path, COLOUR, "plain.png")
    turned, broken = turned_behind_its_pixels(tmp_path / "turned.png"), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    wanted = {plain: ((2, 3), 3, 1), turned: ((3, 2), 3, 6)}
    for _ in range(2):
        known, wrong = headers([plain, turned, broken])
        assert (known, list(wrong)) == (wanted, [broken])
    assert (decoded, sorted(opened)) == ([str(turned)], ["broken.png", "broken.png", "plain.png", "turned.png"])
    assert read_image(turned).shape == (3, 3, 2)
    saved(tmp_path, np.zeros((5, 7), np.uint8), "plain.png")
    assert headers([plain])[0] == {plain: ((5, 7), 1, 1)}


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bits_stay_as_they_are(tmp_path, suffix, pixels):
    image = read_image(saved(tmp_path, pixels, f"a.{suffix}"))
    assert image.dtype == np.uint8
    assert equal(image, planes(pixels))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_floats_unclipped(tmp_path, suffix):
    image = read_image(saved(tmp_path, DEEP, f"a.{suffix}"))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, planes(DEEP / 65535), rtol=0, atol=1e-7)


def test_sixteen_bit_colour_gives_its_upper_bits_and_says_so(tmp_path):
    pixels = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], axis=-1)
    path = deep_colour_png(tmp_path / "a.png", pixels)
    assert equal(read_image(path), planes((pixels >> 8).astype(np.uint8)))
    assert ImageFile("a", "a", "a", path=path).kind() == "RGB;16"


def test_big_endian_sixteen_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + DEEP.astype(">u2").tobytes())
    np.testing.assert_allclose(read_image(tmp_path / "a.pgm"), planes(DEEP / 65535), rtol=0, atol=1e-7)


def grey_tiff(path: Path, pixels: np.ndarray, photometric: int) -> Path:
    """A TIFF of one strip, as Pillow writes it, but with any photometric interpretation (0 is white as zero)."""
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: pixels.itemsize * 8, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {279: pixels.nbytes}).items())
    header = b"II*\0" + struct.pack("<I", 8 + pixels.nbytes)
    path.write_bytes(header + pixels.tobytes() + struct.pack("<H", len(tags) + 1) + entries + b"\0" * 4)
    return path


@pytest.mark.parametrize("pixels", [GREY, DEEP], ids=["8 bits", "16 bits"])
def test_white_as_zero_is_turned_round_in_either_depth(tmp_path, pixels):
    black, white = (read_image(grey_tiff(tmp_path / f"{k}.tif", pixels, k)) for k in (1, 0))
    top = 255 if pixels.dtype == np.uint8 else 1
    assert white.dtype == black.dtype
    np.testing.assert_allclose(white, top - black, rtol=0, atol=1e-6)
    scale = 1 if pixels.dtype == np.uint8 else 65535
    np.testing.assert_allclose(black * scale, planes(pixels), rtol=1e-6)


def test_thirty_two_bit_integers_are_on_the_sixteen_bit_scale(tmp_path):
    image = read_image(saved(tmp_path, DEEP.astype(np.int32), "a.tif"))
    np.testing.assert_allclose(image, planes(DEEP / 65535), rtol=0, atol=1e-7)
    for value in (-1, 65536):
        path = saved(tmp_path, np.full((2, 2), value, dtype=np.int32), "b.tif")
        with pytest.raises(UserError, match=rf"b\.tif.*{value}.*expected 0 to 65535"):
            read_image(path)


def test_floats_lie_in_the_unit_range(tmp_path):
    pixels = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    assert equal(read_image(saved(tmp_path, pixels, "a.tif")), planes(pixels))
    for wrong in (-0.1, 1.5, np.nan):
        path = saved(tmp_path, np.full((2, 2), wrong, dtype=np.float32), "b.tif")
        with pytest.raises(UserError, match=r"b\.tif.*expected 0 to 1"):
            read_image(path)


def test_palette_and_one_bit(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putdata([1, 0])
    expected = planes(np.array([[[200, 100, 0], [10, 20, 30]]], dtype=np.uint8))
    assert equal(read_image(saved(tmp_path, picture, "p.png")), expected)
    clear = read_image(saved(tmp_path, picture, "t.png", transparency=0))
    assert equal(clear[:3], expected)
    assert clear[3].tolist() == [[255, 0]]
    assert read_image(tmp_path / "t.png", 3)[:, 0, 1].tolist() == [255, 255, 255]
    bits = read_image(saved(tmp_path, Image.fromarray(GREY > 60), "b.png"))
    assert equal(bits, planes((GREY > 60).astype(np.uint8) * 255))


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "a.tif")
    assert read_image(path)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("base", [GREY, COLOUR], ids=["LA", "RGBA"])
def test_transparency_is_laid_over_white_or_kept(tmp_path, base):
    pixels = np.dstack([base, ALPHA])
    path = saved(tmp_path, pixels, "a.png")
    weight = ALPHA[..., None] / 255
    flat = np.rint(np.atleast_3d(base) * weight + 255 * (1 - weight)).astype(np.uint8)
    assert equal(read_image(path), planes(pixels))
    assert equal(read_image(path, 3), planes(np.broadcast_to(flat, (*flat.shape[:2], 3))))
    kept = read_image(path, 4)
    assert equal(kept, planes(np.dstack([np.broadcast_to(np.atleast_3d(base), (2, 3, 3)), ALPHA])))
    assert read_image(path, 1).shape == (1, 2, 3)


def test_grey_is_repeated_and_colour_weighed(tmp_path):
    assert equal(read_image(saved(tmp_path, GREY, "g.png"), 3), planes(np.dstack([GREY] * 3)))
    path = saved(tmp_path, COLOUR, "c.png")
    luminance = np.rint(COLOUR @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    assert equal(read_image(path, 1), planes(luminance))
    white = match_channels(np.full((3, 1, 1), 255, np.uint8), 1, "white")
    assert white.item() == 255


def test_other_channel_counts_are_refused(tmp_path):
    path = saved(tmp_path, COLOUR, "c.png")
    with pytest.raises(UserError, match=r"c\.png: 3 channels, expected 4"):
        read_image(path, 4)
    with pytest.raises(UserError, match="5 channels, expected 3"):
        match_channels(np.zeros((5, 2, 2), np.float32), 3, "bands")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    def stored(upright: np.ndarray) -> np.ndarray:
        ways = {
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
            6: np.rot90(upright, 1), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
        }  # fmt: skip
        return ways[orientation]

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, np.ascontiguousarray(stored(GREY)), "a.png", exif=exif)
    assert equal(read_image(path), planes(GREY))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_files_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, noise, f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"a\.{suffix}: (damaged image|not an image)"):
        read_image(path)


def test_what_is_no_image_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        with pytest.raises(UserError, match=rf"{name}: not an image"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(UserError, match=r"bomb\.png: too large to decode safely"):
        read_image(saved(tmp_path, COLOUR, "bomb.png"))


@pytest.mark.parametrize("dtype", ["complex64", "U1"])
def test_arrays_of_no_numbers_are_refused(dtype):
    with pytest.raises(UserError, match="expected integers or floats"):
        array_to_image(np.zeros((2, 2), dtype=dtype))


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GREY).save(path, format="PNG")
    return path


def below(root: Path) -> list[str]:
    """What is found in a folder, by the paths below it."""
    return [path.relative_to(root).as_posix() for _, path in given_files([root])]


def test_given_folders_are_walked_in_order_and_given_files_kept(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "b/c/0.tif", "a.png", "odd", "b/odd"):
        picture(tmp_path / name)
    (tmp_path / "b/notes.txt").touch()
    given = [tmp_path / "odd", tmp_path / "b", tmp_path / "a.png"]
    found = [path.relative_to(tmp_path).as_posix() for _, path in given_files(given)]
    assert found == ["odd", "b/1.JPG", "b/2.png", "b/c/0.tif", "a.png"]
    assert list(named_files(given)) == ["odd", "1", "2", "c/0", "a"]


def test_given_paths_that_are_no_images_are_all_refused_before_the_first_one_is_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(UserError, match=r"(?s)gone: no such file.*empty: no images.*note\.txt: expected a file that"):
        given_files([tmp_path / "gone", tmp_path / "empty", tmp_path / "note.txt"])


def test_two_results_of_one_name_are_refused(tmp_path):
    one, other = picture(tmp_path / "x/a.png"), picture(tmp_path / "x/a.tif")
    with pytest.raises(UserError, match=r"a\.png and .*a\.tif would both be written as a"):
        named_files([one, other])


@pytest.mark.parametrize(
    "name",
    [".hidden.png", "._a.png", ".git/x.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/a.png", "#recycle/a.png"],
)
def test_what_systems_leave_among_the_files_is_no_data(tmp_path, name):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in" / name)
    assert below(tmp_path / "in") == ["a.png"]


def test_a_link_to_a_folder_above_does_not_multiply_the_images(tmp_path):
    for name in ("a.png", "b/1.png", "b/2.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in/b/up").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in/again").symlink_to(tmp_path / "in/b", target_is_directory=True)
    assert len(below(tmp_path / "in")) == 3


def test_links_to_each_other_s_parents_end(tmp_path):
    picture(tmp_path / "one/x/a.png")
    picture(tmp_path / "two/y/b.png")
    for k in range(12):
        (tmp_path / f"one/x/to{k}").symlink_to(tmp_path / "two", target_is_directory=True)
        (tmp_path / f"two/y/to{k}").symlink_to(tmp_path / "one", target_is_directory=True)
    assert len(below(tmp_path / "one")) == 2


def test_a_linked_folder_elsewhere_is_data(tmp_path):
    picture(tmp_path / "elsewhere/a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in/broken").symlink_to(tmp_path / "gone", target_is_directory=True)
    assert below(tmp_path / "in") == ["linked/a.png"]


def test_long_lists_are_cut():
    assert listed(list(range(3))) == "0, 1, 2"
    assert listed(list(range(25))).endswith("18, 19, and 5 more")


def test_what_a_library_remarks_of_a_file_names_it(tmp_path):
    """In a process of its own: here every warning is an error."""
    path = tmp_path / "100% odd.jpg"
    Image.new("L", (40, 40)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\xff\x01\0\x06\0\0")
    code = (
        "import logging, sys; from visionattn.data.images import decode; from visionattn.data.remarks import *;"
        "read = names_its_file(lambda path: logging.getLogger('nibabel').warning('odd %s of %d', 'axis', 3));"
        "decode(sys.argv[1]); read(sys.argv[1]); logging.getLogger('a').warning('none');"
        "import warnings; warnings.warn('of no file')"
    )
    words = [sys.executable, "-c", code, str(path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stderr.splitlines()
    assert f"{path}: Corrupt EXIF data.  Expecting to read 12 bytes but only got 0. " in said[1]
    assert said[2:4] == [f"{path}: odd axis of 3", "none"]
    assert "UserWarning: of no file" in said[4]


# What Pillow does not read


def many_bands(folder: Path) -> dict[str, np.ndarray]:
    """13 bands of 16 bits and 5 of 8 as TIFF, and arrays; (H, W, bands) of each file."""
    rasterio = pytest.importorskip("rasterio")
    from visionattn.data.formats._rasters import open_quietly

    assert rasterio
    rng, stored = np.random.default_rng(0), {}
    for name, count, dtype in (("a.tif", 13, "uint16"), ("b.tiff", 5, "uint8")):
        pixels = rng.integers(0, np.iinfo(dtype).max, (20, 30, count)).astype(dtype)
        with open_quietly(folder / name, "w", driver="GTiff", count=count, height=20, width=30, dtype=dtype) as sink:
            sink.write(np.moveaxis(pixels, -1, 0))
        stored[name] = pixels
    stored |= {"c.npy": rng.random((20, 30, 7)).astype(np.float32), "d.npy": rng.integers(0, 255, (20, 30), np.uint8)}
    for name in ("c.npy", "d.npy"):
        np.save(folder / name, stored[name])
    return stored


def test_many_bands_and_arrays_are_images_like_others(tmp_path, caplog):
    for name, pixels in many_bands(tmp_path).items():
        bands = pixels.shape[2] if pixels.ndim == 3 else 1
        assert header(tmp_path / name) == ((20, 30), bands, 1)
        assert header(tmp_path / name).channels == bands
        expected = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
        assert np.allclose(read_image(tmp_path / name), expected / (65535 if name == "a.tif" else 1))
        assert ImageFile(name, name, name, path=tmp_path / name).kind()
        (sample,), _ = image_samples([tmp_path / name], bands)
        assert sample.image((slice(2, 9), slice(3, 5))).shape == (bands, 7, 2)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.npy", "not a readable array"),
        ("row.npy", r"an array of shape \(7,\), expected \(H, W\) or \(H, W, bands\)"),
        ("text.tif", "not a readable raster"),
        ("pickle.npy", "not a readable array"),
    ],
)
def test_what_is_no_image_of_bands_is_refused(tmp_path, name, message):
    path = tmp_path / name
    if name == "row.npy":
        np.save(path, np.zeros(7))
    elif name == "pickle.npy":
        np.save(path, np.array([{}, "a"], object), allow_pickle=True)
    else:
        path.write_text("not an image at all")
    for read in (header, read_image):
        with pytest.raises(UserError, match=message):
            read(path)


@pytest.mark.parametrize("read", [header, read_image])
def test_pages_of_one_size_are_not_dropped_and_previews_are_passed_over(read, tmp_path):
    first, preview, other = (Image.fromarray(RNG.integers(0, 256, size, np.uint8)) for size in ((8, 9), (4, 4), (8, 9)))
    first.save(tmp_path / "preview.tif", save_all=True, append_images=[preview])
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[preview, other])
    read(tmp_path / "preview.tif")
    with pytest.raises(
        UserError, match=r"stack\.tif: 3 pages, of which page 3 is as large as page 1, expected one image"
    ):
        read(tmp_path / "stack.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "preview.tif")[0], np.array(first))
