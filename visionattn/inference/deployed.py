"""What the predict.py beside an exported model is made of: images opened and seen as a run does, without torch.

`visionattn.tools._script` takes these definitions, and all of ours that they use, into one file.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.images import decode, read_image
from visionattn.data.sample import unit_range
from visionattn.errors import UserError

__all__ = ["Model", "filled", "framed", "likely", "looks", "opened", "parsed", "resized", "started"]


class Model:
    """An exported model in ONNX Runtime.

    Attributes:
        about: what it is and what it takes, as model.json.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path))
        self.about: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map["visionattn"])

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name for images (B, C, H, W) float32."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"images": np.ascontiguousarray(images)}), strict=True))


def parsed(out: str) -> argparse.Namespace:
    """The command's arguments; `out` says what is written."""
    here = Path(__file__).parent
    models = sorted(here.glob("*.onnx"))
    parser = argparse.ArgumentParser(description="What the exported model says of images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    parser.add_argument("-o", "--out", type=Path, required=True, help=out)
    alone = models[0] if len(models) == 1 else None
    parser.add_argument("--model", type=Path, default=alone, required=alone is None, help="default: the one beside")
    return parser.parse_args()


def started(main: Callable[[], int]) -> int:
    """Run the command; what the user can mend is told in a line."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        return main()
    except UserError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2


def opened(files: Iterable[Path], about: dict[str, Any]) -> Iterator[tuple[Path, np.ndarray | None]]:
    """Each image (C, H, W), uint8 or float32 as the model takes them; None with a warning where it cannot be read."""
    for path in files:
        try:
            yield path, read_image(path, about["channels"]) if about["values"] == "0..1" else _as_stored(path, about)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            yield path, None


def _as_stored(path: Path, about: dict[str, Any]) -> np.ndarray:
    """(C, H, W) float32 with the values of the file, as those of scenes are."""
    image = np.atleast_3d(decode(path)).transpose(2, 0, 1).astype(np.float32)
    if len(image) != about["channels"]:
        raise UserError(f"{path}: {len(image)} bands, but the model was trained on {about['channels']}")
    return image


def filled(image: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """(C, H, W) float32, missing values at the mean."""
    image = unit_range(image)
    mean = np.array(about["mean"], np.float32)[:, None, None]
    return np.where(np.isnan(image), mean, image).astype(np.float32)


def framed(image: np.ndarray, size: Sequence[int], about: dict[str, Any]) -> np.ndarray:
    """(C, h, w) continued at the bottom and on the right by the mean to `size`, where it is smaller."""
    height, width = (max(side, least) for side, least in zip(image.shape[1:], size, strict=True))
    canvas = np.empty((len(image), height, width), np.float32)
    canvas[:] = np.array(about["mean"], np.float32)[:, None, None]
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def looks(model: Model, images: np.ndarray, maps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities (B, K, ...) of images (B, C, H, W), and of each view (views, B, K, ...) before calibration.

    The mean over views is calibrated, as a run does it; of `maps` each is turned back.
    """
    about, seen = model.about, []
    for turns, mirrored in about["views"]:
        outputs = model(np.flip(np.rot90(images, turns, (-2, -1)), mirrored))
        if len(about["views"]) == 1:
            return outputs["probabilities"], outputs["probabilities"][None]
        probabilities = likely(outputs["logits"].astype(np.float32), about["several_labels"])
        seen.append(np.rot90(np.flip(probabilities, mirrored), -turns, (-2, -1)) if maps else probabilities)
    mean = np.mean(seen, axis=0)
    if about["temperature"] != 1:
        chances = np.maximum(mean, 1e-12)
        logits = np.log(chances / np.maximum(1 - mean, 1e-12)) if about["several_labels"] else np.log(chances)
        mean = likely(logits / about["temperature"], about["several_labels"])
    return mean, np.stack(seen)


def likely(logits: np.ndarray, several: bool) -> np.ndarray:
    """Probabilities of logits (B, K, ...): of labels each for itself, or of classes that exclude each other."""
    if several:
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def resized(
    image: np.ndarray, size: Sequence[int], interpolation: str = "bilinear", antialias: bool = True
) -> np.ndarray:
    """(C, h, w) -> (C, *size) as torchvision resizes; uint8 stays uint8."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    sides = list(zip(image.shape[1:], size, strict=True))
    if interpolation == "nearest":
        rows, columns = (
            np.minimum((np.arange(new) * np.float32(old / new)).astype(int), old - 1) for old, new in sides
        )
        return image[:, rows][:, :, columns]
    down, across = (_weights_of(old, new, interpolation, antialias) for old, new in sides)
    if image.dtype != np.uint8:
        return down @ (image @ across.T)
    between = (image.astype(np.float32) @ across.T + 0.5).clip(0, 255).astype(np.uint8)  # as Pillow and torch round
    return (down @ between.astype(np.float32) + 0.5).clip(0, 255).astype(np.uint8)


def _weights_of(old: int, new: int, interpolation: str, antialias: bool) -> np.ndarray:
    """(new, old) float32: what each of the old pixels of a side adds to each of the new ones."""
    scale = old / new
    widened = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * scale
    away = np.abs(np.arange(old) + 0.5 - centres[:, None]) / widened
    if interpolation == "bilinear":
        weights = (1 - away).clip(0)
    else:  # Keys' cubic with a = -0.5, as Pillow has it
        near, far = 1.5 * away**3 - 2.5 * away**2 + 1, -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
        weights = np.where(away < 1, near, np.where(away < 2, far, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
