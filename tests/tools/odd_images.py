"""Image files of every kind that users have: depths, palettes, transparency, orientations, sizes."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((64, 64), (66, 94), (180, 82), (70, 200), (96, 80))


def write_odd_images(folder: Path, seed: int = 0) -> int:
    """50 files, smooth pictures with some noise; returns how many."""
    rng = np.random.default_rng(seed)
    for n, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(y / rng.uniform(1, 9) + x / rng.uniform(1, 9) + rng.uniform(0, 6)) for _ in range(4)]
        colour = np.stack(waves[:3], -1) * 100 + 128 + rng.normal(0, 8, (height, width, 3))
        pixels = colour.clip(0, 255).astype(np.uint8)
        for name, picture, options in _pictures(pixels, waves[3], n):
            picture.save(folder / f"{n}_{name}", **options)
    return 10 * len(SIZES)


def _pictures(pixels: np.ndarray, wave: np.ndarray, n: int):
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    alpha = Image.fromarray((wave * 127 + 128).astype(np.uint8))
    clear, faint = colour.copy(), grey.copy()
    clear.putalpha(alpha)
    faint.putalpha(alpha)
    deep = pixels[..., 0].astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = (3, 6, 8, 5, 7)[n]
    yield "grey.jpg", grey, {"quality": 95}
    yield "palette.png", colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=40), {}
    yield "clear.png", clear, {}
    yield "faint.png", faint, {}
    yield "deep.png", Image.fromarray(deep), {}
    yield "ink.jpg", colour.convert("CMYK"), {"quality": 95}
    yield "turned.jpg", colour, {"exif": exif, "quality": 95}
    yield "bits.png", grey.convert("1"), {}
    yield "float.tif", Image.fromarray(pixels[..., 1].astype(np.float32) / 255), {}
    yield "seen_through.gif", colour.convert("P"), {"transparency": 3}
