"""What targets are called: classes of images, and what mask files say, numbers or colours, for class numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from visionattn.data.sample import IGNORE
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import Positive, Section

__all__ = ["ClassSection", "ColouredMaskSection", "Labels", "MaskCode", "MaskSection", "class_order"]

KINDS = (np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64)  # that masks are written with


class ClassSection(Section):
    """What every source of images with one or several labels shares."""

    channels: Positive | None = Field(None, description="unset: 1 where all images are grey, else 3")
    classes: list[str] | None = Field(None, description="class names in order; unset: as found in the data")


def class_order(names: Iterable[str], classes: list[str] | None) -> list[str]:
    """Class names in order: the recipe's if it has them, else sorted, whole numbers by their value."""
    names = set(names)
    if classes is None:
        return sorted(names, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    twice, unknown = {n for n in classes if classes.count(n) > 1}, names - set(classes)
    if twice:
        raise UserError(f"data.classes names twice: {listed(sorted(twice))}")
    if unknown:
        raise UserError(f"not in data.classes ({listed(classes)}) but in the data: {listed(sorted(unknown))}")
    return classes


class MaskSection(Section):
    """What every source of images with masks shares."""

    classes: Annotated[int, Field(ge=2, le=255)] | Annotated[list[str], Field(min_length=2, max_length=255)] = Field(
        description="class names in order, or how many classes there are"
    )

    @property
    def class_names(self) -> list[str]:
        return self.classes if isinstance(self.classes, list) else [str(k) for k in range(self.classes)]

    @property
    def palette(self) -> dict[str, str]:
        """The colour of each class, as #RRGGBB, where the recipe says so."""
        return {}

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        names = self.class_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"classes names twice: {', '.join(twice)}")
        return self


class MaskFileSection(MaskSection):
    """What mask files say, by numbers."""

    values: list[int | list[int]] | None = Field(
        None, description="what masks say for each class, such as [0, 255]; unset: 0, 1, 2, ... without ignore_index"
    )
    ignore_index: int | None = Field(None, description="what masks say where there is no label")

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        names, values = self.class_names, self.values
        if values is not None:
            if len(values) != len(names):
                raise ValueError(f"values has {len(values)} entries for {len(names)} classes")
            flat = [v for entry in values for v in (entry if isinstance(entry, list) else [entry])]
            flat += [] if self.ignore_index is None else [self.ignore_index]
            if twice := sorted({v for v in flat if flat.count(v) > 1}):
                raise ValueError(f"values and ignore_index say twice what {', '.join(map(str, twice))} is")
        return self


class ColouredMaskSection(MaskFileSection):
    """What mask files say, by numbers or colours."""

    colors: dict[str, Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")]] | None = Field(
        None, description="colour of each class in RGB masks, such as '#3C1098'; one called ignore is not labelled"
    )

    @property
    def palette(self) -> dict[str, str]:
        return self.colors or {}

    @model_validator(mode="after")
    def _colors_fit(self) -> Self:
        if self.colors is not None and (wrong := set(self.class_names) ^ (set(self.colors) - {"ignore"})):
            raise ValueError(f"colors and classes differ in {', '.join(sorted(wrong))}")
        return self


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
    def of(cls, section: MaskFileSection) -> Self:
        """The rules of a data section."""
        count, ignored = len(section.class_names), section.ignore_index
        values: list[Any] = section.values or [v for v in range(count + 1) if v != ignored][:count]
        entries = [entry if isinstance(entry, list) else [entry] for entry in values]
        numbers = {value: k for k, entry in enumerate(entries) for value in entry}
        if ignored is not None:
            numbers[ignored] = IGNORE
        if not section.palette:
            return cls(numbers)
        order = {name: k for k, name in enumerate(section.class_names)} | {"ignore": IGNORE}
        return cls(numbers, {int(colour[1:], 16): order[name] for name, colour in section.palette.items()})

    def of_mask(self, mask: np.ndarray, name: str | Path) -> np.ndarray:
        """Class numbers (H, W) int64, IGNORE where unlabelled.

        Args:
            mask: (H, W) whole numbers, or (H, W, 3) uint8 colours; without a table of colours grey ones are numbers.
            name: the file, for messages.

        Raises:
            UserError: values or colours that the recipe does not know; colours without a table.
        """
        if mask.ndim == 3 and self.colors is None and (mask == mask[..., :1]).all():
            mask = mask[..., 0]
        if mask.ndim == 3:
            return self._of_colors(mask, name)
        if self.colors is not None:
            raise UserError(f"{name}: not an RGB mask, but data.colors is given")
        if mask.dtype.kind == "f":
            if not np.isfinite(mask).all():
                raise UserError(f"{name}: the mask has values that are no numbers (NaN or infinite), so no classes")
            if (mask.round() != mask).any():
                raise UserError(f"{name}: the mask has values that are no whole numbers, so no classes")
        numbers = _translated(mask, self.numbers)
        if numbers.min(initial=0) < 0:
            raise UserError(f"{name}: {self._unknown(mask, numbers < 0)}")
        return numbers

    def _unknown(self, mask: np.ndarray, unknown: np.ndarray) -> str:
        values = [int(value) for value in np.unique(mask[unknown])]
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
        numbers = _translated(packed, self.colors)
        if numbers.min(initial=0) < 0:
            unknown = [f"#{value:06X}" for value in np.unique(packed[numbers < 0])]
            raise UserError(
                f"{name}: {len(unknown)} colours of the mask are not in data.colors: {listed(unknown, most=8)}"
                "; see also whether the mask was saved without loss"
            )
        return numbers


@dataclass(frozen=True)
class MaskCode:
    """What masks are written with: what the recipe reads as these classes.

    Attributes:
        classes: their names.
        values: of each class.
        unlabelled: where there is none.
        colors: RGB of each class and, last, of what has none, where the recipe's masks are colour images.
        known: the recipe reads as unlabelled what is written there; else files have to declare it.
    """

    classes: list[str]
    values: list[int]
    unlabelled: int = IGNORE
    colors: list[tuple[int, int, int]] | None = None
    known: bool = False

    @classmethod
    def of(cls, section: MaskSection, class_numbers: bool = False) -> Self:
        """The rules of a data section, or 0, 1, 2, ... whatever it says."""
        names = section.class_names
        if class_numbers or not isinstance(section, MaskFileSection):
            return cls(names, list(range(len(names))))
        if section.palette:
            colors = [_rgb(section.palette[name]) for name in names]
            taken = {part for color in colors for part in color}
            grey = next((v for v in range(255, -1, -1) if v not in taken), 0)  # no part of a class's colour
            ignored = _rgb(section.palette["ignore"]) if "ignore" in section.palette else (grey,) * 3
            return cls(names, list(range(len(names))), IGNORE, [*colors, ignored], "ignore" in section.palette)
        meant = {k: value for value, k in reversed(Labels.of(section).numbers.items())}  # the first of several
        values = [meant[k] for k in range(len(names))]
        free = next(v for v in range(255, -1, -1) if v not in values)
        return cls(names, values, meant.get(IGNORE, free), known=IGNORE in meant)

    @property
    def is_plain(self) -> bool:
        """Masks say the class numbers themselves."""
        return self.colors is None and [*self.values, self.unlabelled] == [*range(len(self.values)), IGNORE]

    @property
    def kind(self) -> np.dtype:
        """The smallest type that holds all values."""
        low, high = (end(*self.values, self.unlabelled) for end in (min, max))
        return np.dtype(next(kind for kind in KINDS if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))

    def written(self, numbers: np.ndarray) -> np.ndarray:
        """(..., H, W) of class numbers and IGNORE as the values of the file."""
        unlabelled = [self.unlabelled] * (IGNORE + 1 - len(self.values))
        return np.array([*self.values, *unlabelled], self.kind)[numbers]

    def painted(self, numbers: np.ndarray) -> np.ndarray:
        """(H, W) of class numbers and IGNORE as (3, H, W) uint8, where there are colours."""
        assert self.colors is not None
        table = np.array([*self.colors, *[self.colors[-1]] * (IGNORE - len(self.values))], np.uint8)
        return np.moveaxis(table[numbers], -1, 0)


def _rgb(text: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(text.lstrip("#"))
    return red, green, blue


def _translated(values: np.ndarray, table: dict[int, int]) -> np.ndarray:
    """int64 of the same shape, what the table says of each value, any integer or whole float; -1 for unknown ones."""
    if values.dtype == np.uint8:  # of most masks
        meaning = np.full(256, -1, np.int64)
        for value in table.keys() & set(range(256)):
            meaning[value] = table[value]
        return meaning[values]
    if values.dtype.kind not in "iu":
        values = values.astype(np.uint8 if values.dtype == bool else np.float64)
    limits = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
    known = sorted(value for value in table if limits is None or limits.min <= value <= limits.max)
    if not known:
        return np.full(values.shape, -1, np.int64)
    keys = np.array(known, dtype=values.dtype)
    meant = np.array([table[value] for value in known], np.int64)
    places = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    return np.where(keys[places] == values, meant[places], -1)
