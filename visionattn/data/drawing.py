"""Objects as pictures for people: images with the boxes of their objects, in the colours of their classes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionattn.data.boxes import Boxes
from visionattn.data.colors import PALETTE, UNLABELLED, displayed
from visionattn.data.sample import unit_range

__all__ = ["box_colors", "draw_boxes"]

TEXT = 11  # pixels
Color = tuple[int, int, int]


def box_colors(classes: int) -> list[Color]:
    """RGB of each class."""
    shades = [bytes.fromhex(text) for text in PALETTE]
    return [(red, green, blue) for red, green, blue in (shades[k % len(shades)] for k in range(classes))]


def draw_boxes(
    image: np.ndarray, boxes: Boxes, colors: Sequence[Color], scale: float = 1.0, names: Sequence[str] = ()
) -> Image.Image:
    """An image (C, H, W) as a sample gives it, enlarged or reduced, with its boxes; what is ignored is grey.

    Args:
        names: of the classes, written beside the boxes, with scores where there are any.
    """
    picture = Image.fromarray(displayed(unit_range(image)))
    size = [max(1, round(side * scale)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    for i in np.argsort(boxes.areas)[::-1]:
        left, top, right, bottom = (boxes.xyxy[i] * scale).tolist()
        label = int(boxes.labels[i])
        color = UNLABELLED if boxes.ignore[i] or label < 0 else colors[label]
        pen.rectangle([left, top, max(right - 1, left), max(bottom - 1, top)], outline=color, width=2)
        if names and label >= 0:
            score = "" if boxes.scores is None else f" {boxes.scores[i]:.2f}"
            place = left, max(0.0, top - TEXT - 3)
            pen.rectangle(pen.textbbox(place, names[label] + score, font=font), fill=color)
            pen.text(place, names[label] + score, fill="white", font=font)
    return picture
