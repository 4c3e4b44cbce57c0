"""From what mask files say, numbers or colours, to class numbers; the rules are the recipe's `data` section."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionattn.data.images import listed
from visionattn.data.sample import IGNORE
from visionattn.errors import UserError
from visionattn.recipe import MaskFolderData

__all__ = ["Labels"]

VALUES = 2**16 + 1  # mask files have at most 16 bits; the last one stands for all others


@dataclass(frozen=True)
class Labels:
    """What each value of a mask means.

    Attributes:
        numbers: class number, or IGNORE, of each known value.
        colors: the same of each known colour, as 0xRRGGBB; None where masks are no colour images.
    """

    numbers: dict[int, int]
    colors: dict[int, int] | None = None

    @classmethod
    def of(cls, data: MaskFolderData) -> "Labels":
        """The rules of a data section."""
        count, ignored = len(data.class_names), data.ignore_index
        values = data.values or [v for v in range(count + 1) if v != ignored][:count]
        entries = [entry if isinstance(entry, list) else [entry] for entry in values]
        numbers = {value: k for k, entry in enumerate(entries) for value in entry}
        if ignored is not None:
            numbers[ignored] = IGNORE
        colors = getattr(data, "colors", None)
        if colors is not None:
            order = {name: k for k, name in enumerate(data.class_names)} | {"ignore": IGNORE}
            colors = {int(colour[1:], 16): order[name] for name, colour in colors.items()}
        return cls(numbers, colors)

    def of_mask(self, mask: np.ndarray, name: str | Path) -> np.ndarray:
        """Class numbers (H, W) int64, IGNORE where unlabelled.

        Args:
            mask: (H, W) whole numbers, or (H, W, 3) uint8 colours.
            name: the file, for messages.

        Raises:
            UserError: values or colours that the recipe does not know; colours without a table.
        """
        if mask.ndim == 3:
            return self._of_colors(mask, name)
        if self.colors is not None:
            raise UserError(f"{name}: not an RGB mask, but data.colors is given")
        if mask.dtype.kind == "f":
            rounded = np.nan_to_num(mask, nan=-1).round()
            if (rounded != mask).any():
                raise UserError(f"{name}: the mask has values that are no whole numbers, so no classes")
            mask = rounded.astype(np.int64)
        known = np.full(VALUES, -1, dtype=np.int64)
        known[list(self.numbers)] = list(self.numbers.values())
        places = mask.astype(np.int64)
        places[(places < 0) | (places >= VALUES)] = VALUES - 1
        numbers = known[places]
        if numbers.min(initial=0) < 0:
            raise UserError(f"{name}: {self._unknown(np.unique(mask[numbers < 0]).tolist(), mask)}")
        return numbers

    def _unknown(self, values: list[int], mask: np.ndarray) -> str:
        text = f"the mask has {listed(values, most=8)}, but classes are {listed(sorted(self.numbers), most=8)}"
        top, ignored = int(mask.max()), IGNORE in self.numbers.values()
        if len(self.numbers) == 2 and not ignored and set(np.unique(mask).tolist()) <= {0, top}:
            return f"{text}; if {top} is the second class: data.values=[0, {top}]"
        if len(values) == 1 and not ignored:
            return f"{text}; if {values[0]} means no label: data.ignore_index={values[0]}"
        return f"{text}; see data.values and data.ignore_index, and whether the mask was saved without loss"

    def _of_colors(self, mask: np.ndarray, name: str | Path) -> np.ndarray:
        if self.colors is None:
            raise UserError(
                f"{name}: an RGB mask; give the colour of each class in data.colors, such as {{road: '#6EC1E4'}}"
            )
        red, green, blue = np.moveaxis(mask[..., :3].astype(np.int64), -1, 0)
        packed = (red << 16) | (green << 8) | blue
        numbers = np.full(packed.shape, -1, dtype=np.int64)
        for colour, number in self.colors.items():
            numbers[packed == colour] = number
        if numbers.min(initial=0) < 0:
            unknown = [f"#{value:06X}" for value in np.unique(packed[numbers < 0])]
            raise UserError(
                f"{name}: {len(unknown)} colours of the mask are not in data.colors: {listed(unknown, most=8)}"
                "; see also whether the mask was saved without loss"
            )
        return numbers
