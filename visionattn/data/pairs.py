"""Finding images and their masks: by folder and stem, never by order.

Every folder called `data.images` below `data.root` has a sibling called `data.masks`. A pair's name is the image's path
from the root without that folder and without suffixes: images/train/a.png and train/images/a.png are both `train/a`.
"""

import unicodedata
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from visionattn.data.images import Place, identities, walk
from visionattn.data.splits import GroupSection, split_named
from visionattn.errors import UserError, listed, nearest
from visionattn.recipe.sections import FilePath

__all__ = ["Pair", "PairSection", "files_by_name", "find_pairs", "folders"]


class PairSection(GroupSection):
    """Folders called `images` anywhere below `root` have siblings called `masks`; a pair has the same stem and the same
    subfolders. A split is what a folder above or below is called (train, val, test), a list file says, or is drawn.
    """

    root: FilePath = Field(description="folder that holds the folders of images and masks")
    images: str = Field("images", description="name of the folders of images")
    masks: str = Field("masks", description="name of the folders of masks")
    image_suffix: str = Field("", description="end of an image's stem that is no part of its name, such as _RGBIR")
    mask_suffix: str = Field("", description="as image_suffix, such as _segmentation")


class Pair(NamedTuple):
    """An image file and its mask file.

    Attributes:
        name: unique in the data set.
        group: what `data.group` finds in the name; unset: the name itself.
        split: train, val or test where a folder is called so, else "".
    """

    name: str
    image: Path
    mask: Path
    group: str
    split: str


def find_pairs(
    section: PairSection,
    image_endings: Collection[str] | None,
    mask_endings: Collection[str] | None = None,
    is_image: Callable[[Path], bool] = Path.is_dir,
) -> tuple[list[Pair], list[str]]:
    """The pairs of a data section, sorted by name, and a line for each file that has no partner.

    Args:
        image_endings: lower-case endings of image files, such as {".nii", ".nii.gz"}; others are no images. None: an
            image is a folder of files.
        mask_endings: of mask files; None: the same.
        is_image: which folders of files are images, where images are folders.

    Raises:
        UserError: no folder of images, one without a folder of masks beside it, or a name without a group.
    """
    pairs, problems = [], []
    places, walked = folders(section)
    image_end, mask_end = section.image_suffix, section.mask_suffix
    not_image, not_mask = (mask_end, image_end) if section.images == section.masks else ("", "")
    for beside, folder, masks in places:
        images = files_by_name(folder, image_endings, image_end, not_image, walked)
        if image_endings is None:
            images = {key: kept for key, paths in images.items() if (kept := [p for p in paths if is_image(p)])}
        partners = files_by_name(masks, mask_endings or image_endings, mask_end, not_mask, walked)
        prefix = beside.relative_to(section.root)
        for key in sorted(images.keys() | partners.keys()):
            of_image, of_mask = images.get(key, []), partners.get(key, [])
            if len(of_image) == len(of_mask) == 1:
                pairs.append(_pair(section, (prefix / key).as_posix(), of_image[0], of_mask[0]))
            elif len(of_image) > 1 or len(of_mask) > 1:
                problems.append(f"of one name are {listed([*of_image, *of_mask])}; expected an image and a mask")
            elif of_image:
                problems.append(f"{of_image[0]}: no mask {masks / key}{mask_end}.*")
            else:
                wanted = f"{folder / key}{image_end}"
                problems.append(f"{of_mask[0]}: no {f'image {wanted}.*' if image_endings else f'folder {wanted}'}")
    if not pairs and not problems:
        kind = f"{listed(sorted(image_endings))} files" if image_endings else "folders with files"
        raise UserError(f"data.root: {section.root}: no {kind} in folders {section.images}")
    return pairs, problems


def _pair(section: PairSection, name: str, image: Path, mask: Path) -> Pair:
    return Pair(name, image, mask, section.group_of(name), split_named(name.split("/")[:-1]))


def folders(section: PairSection) -> tuple[list[tuple[Path, Path, Path]], set[Place]]:
    """Folders that hold one of images and one of masks, with these two; and what `walk` does not go into from others.

    Raises:
        UserError: no folder of images, or one without a folder of masks beside it.
    """
    places = [_beside(section, folder) for folder in _image_folders(section)]
    return places, identities({section.root, *chain(*places)})


def _image_folders(section: PairSection) -> list[Path]:
    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    parts, image_folders, seen = Path(section.images).parts, [], set()
    for here, folders, _ in walk(root):
        seen.update(folders)
        if here.relative_to(root).parts[-len(parts) :] == parts:
            image_folders.append(here)
            folders.clear()
    if not image_folders:
        raise UserError(f"data.images: no folder called {section.images} below {root}{_near(section.images, seen)}")
    return image_folders


def _beside(section: PairSection, images: Path) -> tuple[Path, Path, Path]:
    """The folder that holds a folder of images and one of masks, and these two."""
    beside = images.parents[len(Path(section.images).parts) - 1]
    masks = beside / section.masks
    if not masks.is_dir():
        others = [p.name for p in beside.iterdir() if p.is_dir() and p != images]
        raise UserError(f"data.masks: {masks} is missing{_near(section.masks, others)}")
    return beside, images, masks


def files_by_name(
    folder: Path, endings: Collection[str] | None, suffix: str, others: str, walked: Collection[Place]
) -> dict[str, list[Path]]:
    """Files by their path without ending and suffix; `others` is the suffix of files that are none of these."""
    files: dict[str, list[Path]] = {}
    for path, stem in _stems(folder, endings, walked):
        if stem.endswith(suffix) and not (others and stem.endswith(others)):
            key = (path.parent / stem.removesuffix(suffix)).relative_to(folder).as_posix()
            files.setdefault(unicodedata.normalize("NFC", key), []).append(path)
    return files


def _stems(folder: Path, endings: Collection[str] | None, walked: Collection[Place]) -> Iterator[tuple[Path, str]]:
    """Files with one of the endings, or the folders that hold files, and their names without ending."""
    for here, _, files in walk(folder, walked):
        if endings is None:
            if files and here != folder:
                yield here, here.name
            continue
        for name in files:
            ending = max((e for e in endings if name.lower().endswith(e)), key=len, default=None)
            if ending is not None:
                yield here / name, name[: -len(ending)]


def _near(name: str, others: Collection[str]) -> str:
    there = f"; there are: {listed(sorted(others), most=8)}" if others else ""
    return there + nearest(name, others, cutoff=0.5)
