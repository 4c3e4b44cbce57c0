"""JPEG files by torchvision's decoder, which is faster than Pillow's, where the two give the same pixels."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

__all__ = ["decoded_jpeg"]

AS_STORED = 0  # torchvision's ImageReadMode.UNCHANGED
END = b"\xff\xd9"  # of a whole file; torchvision fills a cut one with grey


def decoded_jpeg(image: Image.Image, path: Path, content: bytes | None = None) -> np.ndarray | None:
    """Pixels (H, W) or (H, W, 3) uint8 of an opened image, or None where Pillow has to decode it.

    Args:
        path: of the file.
        content: of the file, where that has been read.
    """
    if type(image) is not JpegImageFile or image.mode not in ("L", "RGB") or not _same_as_pillow():
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    content = path.read_bytes() if content is None else content
    return _by_torchvision(content) if content.endswith(END) else None


def _by_torchvision(content: bytes) -> np.ndarray | None:
    """None where it fails, or is gone: from 0.29 on torchvision means to leave decoding to another package."""
    try:
        import torch
        import torchvision.io  # noqa: F401  has the operator loaded, around which its own function puts a warning

        decode = torch.ops.image.decode_jpeg
        pixels = decode(torch.frombuffer(bytearray(content), dtype=torch.uint8), AS_STORED, False)
    except (ImportError, RuntimeError, AttributeError, TypeError):
        return None
    image = pixels.permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[2] == 1 else image


@cache
def _same_as_pillow() -> bool:
    """Whether the libraries that both were built with agree, tried on an image of this process."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8))
    for picture in (noise, noise.convert("L")):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=70)
        ours = _by_torchvision(stream.getvalue())
        if ours is None or not np.array_equal(ours, np.asarray(Image.open(stream))):
            return False
    return True
