"""What a network says of a sample."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from visionattn.data.boxes import Boxes
from visionattn.data.sample import Window

__all__ = ["PackedMask", "Prediction"]


class PackedMask:
    """A mask (h, w) uint8, compressed; numpy reads it as an array."""

    def __init__(self, mask: np.ndarray) -> None:
        self.data, self.shape = zlib.compress(np.ascontiguousarray(mask, np.uint8).data, 1), mask.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.frombuffer(zlib.decompress(self.data), np.uint8).reshape(self.shape).astype(dtype or np.uint8)


class Prediction(NamedTuple):
    """What a network says of a sample, or of a window of it, or why the sample cannot be read.

    Attributes:
        index: position of the sample.
        value: an array, or what numpy reads as one: probabilities (K,), features (D,), a mask (h, w) of class
            numbers; or objects,
            always in the pixels of the whole sample.
        window: that `value` is about; None: the whole sample.
        confidence: (h, w) uint8, the probability of a mask's classes in per cent, where a writer wants it.
        bins: calibration counts where there is a truth.
        missed: (K, 2) int64 where there is a truth: of the pixels of each class, how many are held less probable than a
            promise of recall needs, and how many there are.
        doubts: what makes the value doubtful, by name: numbers, of masks maps (h, w).
        error: why there is no value.
    """

    index: int  # type: ignore[assignment]  # in place of tuple.index, which nobody calls
    value: ArrayLike | Boxes | None = None
    window: Window | None = None
    confidence: np.ndarray | None = None
    bins: np.ndarray | None = None
    missed: np.ndarray | None = None
    doubts: Mapping[str, Any] = {}
    error: str | None = None
