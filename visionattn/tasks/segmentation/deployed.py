"""predict.py of an exported segmenter: the masks that `visionattn predict` writes, of image files."""

from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.images import named_files
from visionattn.errors import UserError
from visionattn.files import make_folder, new_file
from visionattn.inference.deployed import Model, filled, framed, looks, opened, parsed, resized
from visionattn.inference.sliding import _weights

__all__ = ["main", "probabilities_of"]


def main() -> int:
    arguments = parsed("folder to make for the masks")
    model, unread = Model(arguments.model), 0
    names = {path: name for name, path in named_files(arguments.images).items()}
    ending = ".png" if max(model.about["mask_values"]) < 2**16 else ".tif"
    outs = {path: arguments.out / f"{name}{ending}" for path, name in names.items()}
    if there := [str(out) for out in outs.values() if out.exists()]:
        raise UserError(f"{there[0]} exists; predictions are never overwritten: give another --out")
    for path, image in opened(names, model.about):
        if image is None:
            unread += 1
            continue
        mask = probabilities_of(model, image).argmax(0)
        make_folder(outs[path].parent)
        with new_file(outs[path]) as unfinished:
            _picture(mask, model.about).save(unfinished, format="PNG" if ending == ".png" else "TIFF")
    print(f"{len(names) - unread} predicted, {unread} unreadable: {arguments.out}")
    return 1 if unread else 0


def _picture(mask: np.ndarray, about: dict[str, Any]) -> Image.Image:
    """(H, W) class numbers with the values of the recipe's own masks, and its colours where there is room for them."""
    values = np.array(about["mask_values"])[mask]
    if values.max() > 255 or min(about["mask_values"]) < 0:
        return Image.fromarray(values.astype(np.uint16 if min(about["mask_values"]) >= 0 else np.int32))
    palette = np.zeros((256, 3), np.uint8)
    palette[about["mask_values"]] = about["palette"][: len(about["mask_values"])]
    picture = Image.fromarray(values.astype(np.uint8))
    picture.putpalette(palette.tobytes())
    return picture


def probabilities_of(model: Model, image: np.ndarray) -> np.ndarray:
    """(classes, H, W) of an image (C, H, W) of any size, in its own pixels."""
    about, native = model.about, image.shape[1:]
    tile = about["size"] or about["trained_at"]
    factors = [side / own for side, own in zip(tile, native, strict=True)]
    if about["resize"] != "squash":
        factors = [min(tile) / min(native) if about["resize"] == "shorter" else 1.0] * 2
    size = [max(1, round(own * factor)) for own, factor in zip(native, factors, strict=True)]
    image = resized(filled(image, about), size)
    if about["size"]:
        image = framed(image, tile, about)
    maps = _tiled(model, image, tile) if (image.shape[1:] > np.array(tile)).any() else _whole(model, image)
    return resized(maps[:, : size[0], : size[1]], native, antialias=False)


def _whole(model: Model, image: np.ndarray) -> np.ndarray:
    return looks(model, image[None], maps=True)[0][0]


def _tiled(model: Model, image: np.ndarray, tile: list[int]) -> np.ndarray:
    """Tiles, blended by weights that sum to 1 at every pixel."""
    axes = [
        _weights(own, min(side, own), model.about["overlap"]) for own, side in zip(image.shape[1:], tile, strict=True)
    ]
    total = np.zeros((len(model.about["classes"]), *image.shape[1:]), np.float32)
    for top, down in zip(*axes[0], strict=True):
        for left, across in zip(*axes[1], strict=True):
            window = slice(top, top + len(down)), slice(left, left + len(across))
            total[:, *window] += _whole(model, image[:, *window]) * down[:, None] * across
    return total
