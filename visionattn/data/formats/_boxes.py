"""What formats of images with boxes share: from what files say of an image to a sample, or to what is wrong with it.

Boxes that reach over the border of their image are clipped. Labels may be of the picture as it is stored or as EXIF
turns it upright, which the sizes in them tell; samples are always upright.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np

from visionattn.data.boxes import Boxes, BoxSection
from visionattn.data.formats import Found
from visionattn.data.images import SUFFIXES, TRANSPOSED, Header, ImageFile, headers, is_data
from visionattn.data.labels import class_order
from visionattn.data.object_masks import Drawn, Polygons, Shape, turn_boxes
from visionattn.data.sample import Sample, Window
from visionattn.data.splits import split_named
from visionattn.errors import UserError, listed, nearest, plural

__all__ = ["BoxImage", "Entry", "class_names", "found", "notes", "split_in", "without_entry"]

log = logging.getLogger(__name__)
MOST, SOME = 0.95, 0.1  # shares of boxes: what another reading has to explain, and what this one fails at
APART = 2  # pixels between a box and its mask


@dataclass(frozen=True, eq=False)
class BoxImage(ImageFile):
    """An image file with its objects.

    Attributes:
        source: the file with its labels.
        boxes: of the upright picture, within its borders.
        clipped: how many of them reached over a border.
        turned: "stored" or "upright": what the labels are of, where the file is to be turned; "" where it is not.
    """

    source: Path = Path()
    boxes: Boxes = field(default_factory=Boxes)
    clipped: int = 0
    turned: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path, self.source

    @property
    def present(self) -> np.ndarray:
        return np.unique(self.boxes.labels[~self.boxes.ignore])

    def target(self, window: Window | None = None) -> Boxes:
        return self.boxes if window is None else self.boxes.within(window)


@dataclass(eq=False)
class Entry:
    """What a file says of an image.

    Attributes:
        file: with the labels.
        where: file and image, for messages.
        path: of the image.
        name: unique in the data set.
        split: train, val or test, or "".
        values: (N, 4) float64 boxes as the file has them.
        names: (N,) what its objects are called.
        ignore: (N,) bool.
        shapes: masks, None for objects without one.
        ids: what boxes are called in messages; unset: their numbers, from 1.
        size: (H, W) as the file has them, None where it says nothing.
        form: of the values: corners, or the first corner with width and height.
        group: of the image; unset: as the recipe finds it in the name.
        relative: values and shapes are shares of the image's width and height.
        wrong: something of it has been found wrong; it is known, but not used.
    """

    file: Path
    where: str
    path: Path
    name: str
    split: str
    values: np.ndarray
    names: Sequence[str]
    ignore: np.ndarray
    shapes: Sequence[Shape | None] = ()
    ids: Sequence[object] = ()
    size: tuple[int, int] | None = None
    form: Literal["xywh", "xyxy"] = "xyxy"
    wrong: bool = False
    group: str | None = None
    relative: bool = False
    header: Header = field(default_factory=lambda: Header((0, 0), 0, 1))
    stored: bool = False

    def __post_init__(self) -> None:
        self.values = np.asarray(self.values, np.float64).reshape(-1, 4)
        self.ignore = np.asarray(self.ignore, bool)

    @property
    def xyxy(self) -> np.ndarray:
        return _corners(self.values) if self.form == "xywh" else self.values

    @property
    def labelled_size(self) -> tuple[int, int]:
        """(H, W) of the picture that the labels are of."""
        size = self.header.size
        return size[::-1] if self.stored and self.header.orientation in TRANSPOSED else size

    def called(self, k: int) -> str:
        """A box in messages."""
        values = ", ".join(f"{value:.8g}" for value in self.values[k])
        return f"{self.where}, box {self.ids[k] if len(self.ids) else k + 1} [{values}]"


def found(
    entries: Sequence[Entry], section: BoxSection, problems: Sequence[str] = (), known: Sequence[str] = ()
) -> Found:
    """The samples of what files say; what is wrong is a line each, and leaves its image out.

    Args:
        problems: what has been found before.
        known: class names in the order of the files; unset: sorted.
    """
    entries, problems = [entry for entry in entries if not entry.wrong], list(problems)
    for right_ones in (_with_own_names, _with_headers, _right_sizes, _right_boxes):
        entries, more = right_ones(entries)
        problems += more
    first = {name: (entry, k) for entry in reversed(entries) for k, name in enumerate(entry.names)}
    classes = class_names({name: entry.called(k) for name, (entry, k) in first.items()}, section, known)
    stored = max((entry.header.channels for entry in entries), default=1)
    channels = getattr(section, "channels", None) or stored
    masks = any(shape for entry in entries for shape in entry.shapes)
    if masks and (without := [entry for entry in entries if not _has_masks(entry)]):
        log.warning("objects without masks in %s images, as in %s: boxes only are used", len(without), without[0].where)
        masks = False
    samples: list[Sample] = [_sample(entry, section, classes, channels, masks) for entry in entries]
    return Found(samples, classes, problems)


def class_names(used: Mapping[str, str], section: BoxSection, known: Sequence[str] = ()) -> list[str]:
    """The classes: of the recipe, else what is used, in the files' order or sorted.

    Args:
        used: what objects are called, each with one of them for messages.

    Raises:
        UserError: objects of other classes, a class named twice, or one that means that there is no object.
    """
    if both := sorted(set(section.classes or ()) & set(section.ignored)):
        raise UserError(f"data.classes and data.ignored both name {listed(both)}")
    names = set(used) - set(section.ignored)
    for name in sorted(names | set(section.classes or ())):
        if name.lower().strip("_ ") == "background":
            raise UserError(
                f"{used.get(name, 'data.classes')}: {name} is no class of objects, since what is in no box is "
                "background; remove it, or name it in data.ignored if boxes of it are to be ignored"
            )
    if section.classes is None and known:
        return [name for name in known if name in names]
    if section.classes is not None and (unknown := sorted(names - set(section.classes))):
        raise UserError(
            f"{used[unknown[0]]}: {unknown[0]} is not in data.classes ({listed(section.classes, most=8)})"
            f"{nearest(unknown[0], section.classes)}; the data have {listed(unknown)} besides: name them there, or in "
            "data.ignored"
        )
    return class_order(names, section.classes)


def notes(samples: Sequence[Sample]) -> list[str]:
    """What is worth knowing of a set of images with boxes: clipped boxes, turned pictures."""
    images = [sample for sample in samples if isinstance(sample, BoxImage)]
    lines = []
    if clipped := [image for image in images if image.clipped]:
        count = sum(image.clipped for image in clipped)
        lines.append(
            f"boxes that reach over the border of their image, and are clipped: {count}, as in {clipped[0].name}"
        )
    for turned, count in sorted(Counter(image.turned for image in images if image.turned).items()):
        lines.append(f"{plural(count, 'picture')} turned by EXIF: boxes are taken to be of the {turned} picture")
    return lines


def split_in(parts: Iterable[str]) -> str:
    """The split that a part of a path is called after, as in train2017 or instances_train; "" without one."""
    return split_named(word for part in parts for word in re.findall("[a-z]+", part.lower()))


def without_entry(entries: Sequence[Entry]) -> Iterator[str]:
    """A line for each image beside those of the entries."""
    known = {entry.path.resolve() for entry in entries}
    for folder in sorted({entry.path.parent for entry in entries if entry.path.is_file()}):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and is_data(path.name) and path.resolve() not in known:
                yield f"{path}: no labels have an entry for it; an image without objects needs one too"


def _sample(entry: Entry, section: BoxSection, classes: Sequence[str], channels: int, masks: bool) -> BoxImage:
    (height, width), orientation = entry.header.size, entry.header.orientation
    whole, given = entry.xyxy, entry.shapes if masks else []
    shapes = [shape or Polygons.of_box(box) for shape, box in zip(given, whole, strict=masks)]
    if entry.stored:
        whole = turn_boxes(whole, orientation, entry.labelled_size)
        shapes = [shape.turned(orientation, entry.labelled_size) for shape in shapes]
    xyxy = whole.clip(0, [width, height] * 2).astype(np.float32)
    number = {name: k for k, name in enumerate(classes)} | dict.fromkeys(section.ignored, -1)
    labels = np.array([number[name] for name in entry.names], np.int64)
    boxes = Boxes(xyxy, labels, entry.ignore | (labels < 0), masks=Drawn(shapes, xyxy) if masks else None)
    return BoxImage(
        name=entry.name,
        case=entry.name,
        group=section.group_of(entry.name) if entry.group is None else entry.group,
        channels=channels,
        size=(height, width),
        split=entry.split,
        path=entry.path,
        source=entry.file,
        boxes=boxes,
        clipped=int((np.abs(xyxy - whole) > 1).any(1).sum()),
        turned="" if orientation == 1 else "stored" if entry.stored else "upright",
    )


def _corners(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _has_masks(entry: Entry) -> bool:
    """Whether all objects to be learned have masks."""
    return len(entry.shapes) == len(entry.values) and all(
        shape or ignored for shape, ignored in zip(entry.shapes, entry.ignore, strict=True)
    )


def _with_own_names(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    homes = defaultdict(list)
    for entry in entries:
        homes[normalize("NFC", entry.name)].append(entry)
    alone = [of_name[0] for of_name in homes.values() if len(of_name) == 1]
    others = [[f"{e.where} ({e.path.name})" for e in of_name] for of_name in homes.values() if len(of_name) > 1]
    return alone, [f"of one name are {listed(where)}" for where in others]


def _with_headers(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    known, wrong = headers(entry.path for entry in entries)
    right, problems = [], []
    for entry in entries:
        if not entry.path.is_file():
            problems.append(f"{entry.where}: there is no image {entry.path}")
        elif entry.path in wrong:
            problems.append(wrong[entry.path])
        else:
            read = replace(entry, header=known[entry.path])
            right.append(_in_pixels(read) if read.relative else read)
    return right, problems


def _in_pixels(entry: Entry) -> Entry:
    whole = entry.header.size[::-1]
    shapes = [Polygons(tuple(p * whole for p in s.parts)) if isinstance(s, Polygons) else s for s in entry.shapes]
    return replace(entry, values=entry.values * [*whole, *whole], shapes=shapes, relative=False)


def _right_sizes(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Without those of another size than the image, and which picture the labels are of."""
    problems, right, votes = [], [], defaultdict(list)
    for entry in entries:
        upright, turned = entry.header.size, entry.header.orientation in TRANSPOSED
        stored = upright[::-1] if turned else upright
        if entry.size is not None and entry.size not in (upright, stored):
            problems.append(
                "{}: says that the image is {}x{}, but {} is {}x{}".format(
                    entry.where, *entry.size, entry.path, *upright
                )
            )
            continue
        right.append(entry)
        if entry.size is not None and upright != stored:
            votes[entry.size == stored].append(entry)
    if len(votes) == 2:
        problems.append(
            f"data: {plural(len(votes[True]), 'image')} turned by EXIF have labels of the picture as it is stored "
            f"(such as {votes[True][0].where}), {len(votes[False])} of the upright one (such as "
            f"{votes[False][0].where}); save the images upright and label them alike"
        )
    if votes[True]:
        right = [replace(entry, stored=entry.header.orientation != 1) for entry in right]
    return right, problems


def _right_boxes(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Without those that have a box or a mask that cannot be."""
    problems, wrong, of_file = [], set(), defaultdict(list)
    for entry in entries:
        of_file[entry.file].append(entry)
    for file, members in of_file.items():
        owner = np.repeat(np.arange(len(members)), [len(entry.values) for entry in members])
        first = np.cumsum([0, *(len(entry.values) for entry in members)])
        values = np.concatenate([np.zeros((0, 4)), *(entry.values for entry in members)])
        sizes = np.array([entry.labelled_size[::-1] for entry in members]).reshape(-1, 2)[owner]
        if misread := _misread(values, sizes, members[0].form):
            problems.append(f"{file}: {misread}, such as {members[owner[0]].called(0)}")
            wrong.update(members)
            continue
        for places, reason in _faults(values, sizes, members[0].form):
            for i in places:
                entry = members[owner[i]]
                problems.append(f"{entry.called(i - first[owner[i]])}: {reason(i)}")
                wrong.add(entry)
    for entry in entries:
        if entry not in wrong and (faults := list(_mask_faults(entry))):
            problems += faults
            wrong.add(entry)
    return [entry for entry in entries if entry not in wrong], problems


def _misread(values: np.ndarray, sizes: np.ndarray, form: str) -> str:
    """What another reading of all these boxes would explain."""
    if not len(values) or not np.isfinite(values).all():
        return ""
    if ((values <= 1).all(1) & (values >= 0).all(1) & (sizes > 2).all(1)).mean() >= MOST:
        return "boxes are fractions of the image from 0 to 1; expected pixels"
    as_corners = _inside(values, sizes)
    as_sides = _inside(_corners(values), sizes)
    if form == "xywh" and as_corners.mean() >= MOST and (~as_sides).mean() >= SOME:
        return "boxes have two corners (x, y, x, y) where x, y, width, height are expected"
    if form == "xyxy" and as_sides.mean() >= MOST and (~as_corners).mean() >= SOME:
        return "boxes have x, y, width, height where two corners (x, y, x, y) are expected"
    return ""


def _inside(xyxy: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes are not the wrong way round, and reach over their image by no more than a tenth of it."""
    margin = sizes / 10
    low, high = xyxy[:, :2], xyxy[:, 2:]
    return np.all((high >= low) & (low >= -margin) & (high <= sizes + margin), axis=1)


def _faults(values: np.ndarray, sizes: np.ndarray, form: str) -> Iterator[tuple[np.ndarray, Callable[[int], str]]]:
    finite = np.isfinite(values).all(1)
    values = np.where(finite[:, None], values, 0)
    xyxy = _corners(values) if form == "xywh" else values
    sides = xyxy[:, 2:] - xyxy[:, :2]
    positive = (sides > 0).all(1)
    clipped = np.clip(xyxy, 0, np.tile(sizes, 2)).astype(np.float32)
    touching = (clipped[:, 2:] > clipped[:, :2]).all(1)
    yield np.flatnonzero(~finite), lambda i: "not all of it are finite numbers"
    yield (
        np.flatnonzero(finite & ~positive),
        lambda i: "is {:g} wide and {:g} high, expected more than 0".format(*sides[i]),
    )
    yield (
        np.flatnonzero(finite & positive & ~touching),
        lambda i: "lies outside of the image, which is {}x{} (height x width)".format(*sizes[i][::-1]),
    )


def _mask_faults(entry: Entry) -> Iterator[str]:
    for k, (shape, box) in enumerate(zip(entry.shapes, entry.xyxy, strict=False)):
        if shape is None:
            continue
        bounds = shape.bounds
        if bounds is None:
            yield f"{entry.called(k)}: its mask has no pixels"
        elif np.abs(bounds - box).max() > APART:
            yield f"{entry.called(k)}: its mask has the box {bounds.round(1).tolist()} (x, y, x, y), another one"
