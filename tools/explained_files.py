"""Explanations as files: pictures with a colour bar, one page for all, a table, GeoTIFF, NIfTI."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionattn.errors import UserError
from visionattn.files import make_folder, new_file

if TYPE_CHECKING:
    from visionattn.tools.explanations import Explanation

__all__ = ["FORMATS", "coloured", "page", "picture", "row_of", "save"]

FOR, AGAINST = (213, 94, 0), (0, 114, 178)  # orange and blue, which the colour blind can tell apart
LEAST = 224  # pixels of the longer side of a picture
BAR, MARGIN, TEXT = 12, 8, 13


def coloured(image: np.ndarray, values: np.ndarray) -> Image.Image:
    """An image (H, W, 3) uint8 in grey under a map (H, W): the largest value of either sign as full colour."""
    grey = image.mean(-1, keepdims=True) * 0.7 + 76
    top = float(np.abs(values).max()) or 1.0
    share = np.abs(values)[..., None] / top
    colour = np.where(values[..., None] >= 0, np.array(FOR), np.array(AGAINST))
    return Image.fromarray((grey * (1 - share) + colour * share).round().astype(np.uint8))


def picture(explanation: "Explanation") -> Image.Image:
    """The overlay, enlarged where it is small, with a colour bar and what it is of."""
    shown = explanation.overlay()
    factor = max(1, -(-LEAST // max(shown.size)))
    shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    font = ImageFont.load_default(TEXT)
    lines = words(explanation)
    width = max(shown.width + 2 * MARGIN, max(int(font.getlength(line)) for line in lines) + 2 * MARGIN, LEAST)
    sheet = Image.new("RGB", (width, shown.height + 4 * MARGIN + BAR + (TEXT + 4) * (len(lines) + 1)), "white")
    sheet.paste(shown, (MARGIN, MARGIN))
    pen, top = ImageDraw.Draw(sheet), shown.height + 2 * MARGIN
    signed = bool((explanation.map < 0).any())
    ramp = np.linspace(-1 if signed else 0, 1, width - 2 * MARGIN)[None].repeat(BAR, 0)
    sheet.paste(coloured(np.full((*ramp.shape, 3), 128, np.uint8), ramp), (MARGIN, top))
    largest = float(np.abs(explanation.map).max())
    low, high = f"{-largest if signed else 0:.3g}", f"{largest:.3g}"
    top += BAR + 3
    pen.text((MARGIN, top), low, fill="black", font=font)
    pen.text((width - MARGIN - font.getlength(high), top), high, fill="black", font=font)
    for line in lines:
        top += TEXT + 4
        pen.text((MARGIN, top), line, fill="black", font=font)
    return sheet


def words(explanation: "Explanation") -> list[str]:
    """Target and score, method, and what else there is to know."""
    place = f" of {explanation.layer}" if explanation.layer else ""
    lines = [f"{explanation.target}: {explanation.score:.3f}", f"{explanation.method}{place}"]
    if explanation.outside is not None:
        lines.append(f"{explanation.outside:.1%} of the attention leaves the picture")
    lines += [explanation.note] if explanation.note else []
    return lines + ([f"check: {explanation.checks['verdict']}"] if explanation.checks else [])


def row_of(explanation: "Explanation") -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"image": explanation.name, "method": explanation.method, "layer": explanation.layer}
    row |= {"target": explanation.target, "score": f"{explanation.score:.6f}"}
    row |= {"outside": "" if explanation.outside is None else f"{explanation.outside:.6f}", "note": explanation.note}
    return row | {name: f"{x:.4f}" if isinstance(x, float) else x for name, x in explanation.checks.items()}


def page(explanations: Iterable["Explanation"], title: str) -> str:
    """One page that needs nothing else: a row of pictures for each image."""
    rows: dict[str, list[Explanation]] = {}
    for explanation in explanations:
        rows.setdefault(explanation.name, []).append(explanation)
    body = "".join(
        f"<h2>{escape(name)}</h2><div>{''.join(_figure(one) for one in members)}</div>"
        for name, members in rows.items()
    )
    style = "body{font:15px system-ui;margin:2em}div{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<h1>{escape(title)}</h1><p>Orange speaks for the target, blue against it; the largest value of a map is full "
        f"colour. A map shows what the network uses, not why, and not whether it is right.</p>{body}</html>\n"
    )


def _figure(explanation: "Explanation") -> str:
    stream = io.BytesIO()
    picture(explanation).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    text = escape("; ".join(words(explanation)))
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"></figure>'


def _png(explanations: Sequence["Explanation"], path: Path) -> None:
    picture(explanations[0]).save(path, format="PNG")


def _npy(explanations: Sequence["Explanation"], path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, explanations[0].map)


def _geotiff(explanations: Sequence["Explanation"], path: Path) -> None:
    from rasterio import Affine

    from visionattn.data.formats._rasters import open_quietly, opened

    (one,) = explanations
    scene: Any = one.sample
    with opened(scene.path) as source:
        grid, profile = source.transform, {"crs": source.crs, "driver": "GTiff", "count": 1, "dtype": "float32"}
    if one.window is not None:
        y, x = one.window[0].start, one.window[1].start
        a, b, c, d, e, f = grid[:6]
        grid = Affine(a, b, c + x * a + y * b, d, e, f + x * d + y * e)
    height, width = one.map.shape
    profile |= {"height": height, "width": width, "transform": grid, "compress": "deflate"}
    with open_quietly(path, "w", **profile) as sink:
        sink.write(one.map.astype(np.float32), 1)
        sink.update_tags(**{name: str(value) for name, value in row_of(one).items()})


def _nifti(explanations: Sequence["Explanation"], path: Path) -> None:
    import nibabel

    first: Any = explanations[0].sample
    volume = first.volume
    slices = np.zeros(volume.shape, np.float32)
    for one in explanations:
        sample: Any = one.sample
        slices[sample.index] = one.map
    affine = np.array(volume.stored_affine) if volume.files else nibabel.load(volume.path).affine
    nibabel.save(nibabel.Nifti1Image(volume.as_stored(slices), affine), path)


FORMATS: dict[str, tuple[str, str, Callable[[Sequence["Explanation"], Path], None]]] = {
    "png": (".png", "", _png),
    "npy": (".npy", "", _npy),
    "geotiff": (".tif", "crs", _geotiff),
    "nifti": (".nii.gz", "volume", _nifti),
}  # ending, what a sample must have, and what writes it


def save(explanations: Sequence["Explanation"], path: Path) -> None:
    """Write one explanation, or those of a volume's slices, by the ending of the path.

    Raises:
        UserError: another ending, a file that exists, or an image that is no scene or volume.
    """
    for ending, needed, write in FORMATS.values():
        if path.name.lower().endswith(ending):
            if needed and not hasattr(explanations[0].sample, needed):
                raise UserError(
                    f"{path}: the image is no {'volume' if needed == 'volume' else 'scene'}: take .png or .npy"
                )
            make_folder(path.parent)
            with new_file(path) as unfinished:
                write(explanations, unfinished)
            return
    raise UserError(f"{path}: expected a name that ends with {', '.join(ending for ending, *_ in FORMATS.values())}")
