"""Any image file becomes a tensor by a stated rule, or an error that names the file and the reason."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.images import array_to_image, decode, image_files, listed, match_channels, read_image
from visionattn.errors import UserError

GREY = np.array([[0, 100, 255], [7, 50, 200]], dtype=np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
DEEP = np.array([[0, 1, 257], [4096, 40000, 65535]], dtype=np.uint16)
ALPHA = np.array([[0, 128, 255], [255, 0, 51]], dtype=np.uint8)


def saved(folder: Path, image: Image.Image | np.ndarray, name: str, **options) -> Path:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(folder / name, **options)
    return folder / name


def planes(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1) if array.ndim == 3 else array[None]))


def deep_colour_png(path: Path, pixels: np.ndarray) -> Path:
    """A 16-bit RGB PNG, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bits_stay_as_they_are(tmp_path, suffix, pixels):
    image = read_image(saved(tmp_path, pixels, f"a.{suffix}"))
    assert image.dtype == torch.uint8
    assert torch.equal(image, planes(pixels))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_floats_unclipped(tmp_path, suffix):
    image = read_image(saved(tmp_path, DEEP, f"a.{suffix}"))
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, planes(DEEP.astype(np.float32) / 65535), rtol=0, atol=1e-7)


def test_sixteen_bit_colour_gives_its_upper_bits_and_says_so(tmp_path):
    pixels = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], axis=-1)
    path = deep_colour_png(tmp_path / "a.png", pixels)
    assert torch.equal(read_image(path), planes((pixels >> 8).astype(np.uint8)))
    assert decode(path)[1] == "RGB;16"


def test_big_endian_sixteen_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + DEEP.astype(">u2").tobytes())
    torch.testing.assert_close(read_image(tmp_path / "a.pgm"), planes(DEEP.astype(np.float32) / 65535))


def test_thirty_two_bit_integers_are_on_the_sixteen_bit_scale(tmp_path):
    image = read_image(saved(tmp_path, DEEP.astype(np.int32), "a.tif"))
    torch.testing.assert_close(image, planes(DEEP.astype(np.float32) / 65535))
    for value in (-1, 65536):
        path = saved(tmp_path, np.full((2, 2), value, dtype=np.int32), "b.tif")
        with pytest.raises(UserError, match=rf"b\.tif.*{value}.*expected 0 to 65535"):
            read_image(path)


def test_floats_lie_in_the_unit_range(tmp_path):
    pixels = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    assert torch.equal(read_image(saved(tmp_path, pixels, "a.tif")), planes(pixels))
    for wrong in (-0.1, 1.5, np.nan):
        path = saved(tmp_path, np.full((2, 2), wrong, dtype=np.float32), "b.tif")
        with pytest.raises(UserError, match=r"b\.tif.*expected 0 to 1"):
            read_image(path)


def test_palette_and_one_bit(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putdata([1, 0])
    expected = planes(np.array([[[200, 100, 0], [10, 20, 30]]], dtype=np.uint8))
    assert torch.equal(read_image(saved(tmp_path, picture, "p.png")), expected)
    clear = read_image(saved(tmp_path, picture, "t.png", transparency=0))
    assert torch.equal(clear[:3], expected)
    assert clear[3].tolist() == [[255, 0]]
    assert torch.equal(read_image(tmp_path / "t.png", 3)[:, 0, 1], torch.tensor([255, 255, 255], dtype=torch.uint8))
    bits = read_image(saved(tmp_path, Image.fromarray(GREY > 60), "b.png"))
    assert torch.equal(bits, planes((GREY > 60).astype(np.uint8) * 255))


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "a.tif")
    assert read_image(path)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("base", [GREY, COLOUR], ids=["LA", "RGBA"])
def test_transparency_is_laid_over_white_or_kept(tmp_path, base):
    pixels = np.dstack([base, ALPHA])
    path = saved(tmp_path, pixels, "a.png")
    weight = ALPHA[..., None] / 255
    flat = np.rint(np.atleast_3d(base) * weight + 255 * (1 - weight)).astype(np.uint8)
    assert torch.equal(read_image(path), planes(pixels))
    assert torch.equal(read_image(path, 3), planes(np.broadcast_to(flat, (*flat.shape[:2], 3))))
    kept = read_image(path, 4)
    assert torch.equal(kept, planes(np.dstack([np.broadcast_to(np.atleast_3d(base), (2, 3, 3)), ALPHA])))
    assert read_image(path, 1).shape == (1, 2, 3)


def test_grey_is_repeated_and_colour_weighed(tmp_path):
    assert torch.equal(read_image(saved(tmp_path, GREY, "g.png"), 3), planes(np.dstack([GREY] * 3)))
    path = saved(tmp_path, COLOUR, "c.png")
    luminance = np.rint(COLOUR @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    assert torch.equal(read_image(path, 1), planes(luminance))
    white = match_channels(torch.full((3, 1, 1), 255, dtype=torch.uint8), 1, "white")
    assert white.item() == 255


def test_other_channel_counts_are_refused(tmp_path):
    path = saved(tmp_path, COLOUR, "c.png")
    with pytest.raises(UserError, match=r"c\.png: 3 channels, expected 4"):
        read_image(path, 4)
    with pytest.raises(UserError, match="5 channels, expected 3"):
        match_channels(torch.zeros(5, 2, 2), 3, "bands")


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
    assert torch.equal(read_image(path), planes(GREY))


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


def test_image_files_walks_folders_in_order_and_keeps_named_files(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "b/c/0.tif", "b/notes.txt", "b/.hidden.png", "b/.git/x.png", "a.png", "odd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / name, format="PNG")
    found = image_files([tmp_path / "odd", tmp_path / "b", tmp_path / "a.png"])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["odd", "b/1.JPG", "b/2.png", "b/c/0.tif", "a.png"]


def test_image_files_refuses_all_wrong_paths_before_the_first_image(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(UserError, match=r"(?s)gone: no such file.*empty: no images.*note\.txt: not an image"):
        image_files([tmp_path / "gone", tmp_path / "empty", tmp_path / "note.txt"])


def test_long_lists_are_cut():
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(25)).endswith("18, 19, and 5 more")
