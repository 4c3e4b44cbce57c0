"""JPEG files give the pixels that Pillow gives, whichever library decodes them."""

import io

import numpy as np
import pytest
from PIL import Image

from visionattn.data import images, jpeg
from visionattn.data.images import decode, read_image
from visionattn.errors import UserError

WAYS = {
    "colour": {"quality": 70},
    "fine colour": {"quality": 95, "subsampling": 0},
    "progressive": {"progressive": True, "optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "turned": {"exif": (exif := Image.Exif())},
}
exif[0x0112] = 6


def picture(mode: str = "RGB") -> Image.Image:
    smooth = np.linspace(0, 200, 61 * 47 * 3).reshape(61, 47, 3)
    noise = np.random.default_rng(0).integers(0, 55, smooth.shape)
    return Image.fromarray((smooth + noise).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("way", WAYS)
def test_pixels_are_those_of_pillow(mode, way, tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    picture(mode).save(path, **WAYS[way])
    seen = read_image(path)
    monkeypatch.setattr(images, "decoded_jpeg", lambda *_: None)
    np.testing.assert_array_equal(seen, read_image(path))
    np.testing.assert_array_equal(decode("inside another file", path.read_bytes()), decode(path))


def test_the_fast_decoder_is_used(tmp_path):
    stream = io.BytesIO()
    picture().save(stream, "JPEG")
    assert jpeg.decoded_jpeg(Image.open(stream), tmp_path, stream.getvalue()) is not None


def test_a_file_that_was_cut_is_refused_and_not_filled_with_grey(tmp_path):
    path = tmp_path / "a.jpg"
    picture().save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"a\.jpg: damaged image"):
        read_image(path)
