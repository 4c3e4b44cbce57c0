"""`visionattn predict` with a segmenter: masks in the format that the images came in.

Image files give NAME.png, class numbers with a palette, and overlays/NAME.png; scenes NAME.tif (and NAME.gpkg where
polygons are asked); volumes NAME.nii.gz. Each file appears whole or not at all.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from visionattn.data.formats.image_mask import unlabelled
from visionattn.data.images import image_files, listed
from visionattn.data.loaders import default_workers
from visionattn.data.sample import Item
from visionattn.data.survey import SECONDS_BEFORE_PROGRESS
from visionattn.errors import UserError
from visionattn.recipe import SegmentationRecipe
from visionattn.report.gallery import class_colors
from visionattn.tasks.segmentation.evaluation import counted
from visionattn.tasks.segmentation.task import Segmenter
from visionattn.tasks.segmentation.transforms import WholeImages, collate, factors, network_input, side_of
from visionattn.writers import geotiff as outputs

__all__ = ["predict_masks"]


def predict_masks(
    task: Segmenter, spec: SegmentationRecipe, paths: list[Path], out: Path, polygons: bool = False
) -> int:
    """Segment images, scenes or volumes, as the model was trained on, into a new folder.

    Args:
        paths: files, and folders (searched for files of the kind); of DICOM the folders of the series.
        polygons: write a GeoPackage beside each scene.

    Returns:
        the number of images that could not be read; they are named on stderr.

    Raises:
        UserError: nothing to segment, two results of one name, something that would only fail later.
    """
    kind = "image_mask" if spec.data.format == "builtin" else spec.data.format
    ending = ".tif" if kind == "geotiff" else ".nii.gz"
    found = dict(_named(kind, paths))
    if not found:
        raise UserError(f"nothing of the format {kind} in {listed(paths)}")
    if polygons and kind != "geotiff":
        raise UserError(f"--polygons is for scenes, but the model was trained on {kind}")
    if polygons:
        _check_places(list(found.values()))
    for name in found:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    network = _Network(task, spec)
    if kind == "image_mask":
        unread = _images(network, spec, found, out)
    else:
        one, unread = _scene if kind == "geotiff" else _volume, 0
        for name, path in tqdm(found.items(), "predicting", leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None):
            try:
                one(network, spec, path, out / f"{name}{ending}", polygons)
            except outputs.Unwritable:
                raise
            except UserError as error:
                unread += 1
                print(f"visionattn: {error}", file=sys.stderr)
    print(f"{len(found) - unread} predicted, {unread} unreadable: {out}")
    return unread


def _named(kind: str, paths: list[Path]) -> Iterator[tuple[str, Path]]:
    """Files with the name of their result: the path below the given folder, without ending."""
    taken: dict[str, Path] = {}
    for given in paths:
        for path in _files(kind, given):
            relative = path.relative_to(given) if given.is_dir() and path != given else Path(path.name)
            name = relative.as_posix()
            endings = (".nii.gz", ".nii") if kind == "nifti" else ("",) if kind == "dicom" else (path.suffix,)
            name = next(name[: len(name) - len(e)] for e in endings if name.lower().endswith(e.lower()))
            if name in taken:
                raise UserError(f"{taken[name]} and {path} would both be written as {name}; predict them apart")
            taken[name] = path
            yield name, path


def _files(kind: str, given: Path) -> Iterator[Path]:
    if not given.exists():
        raise UserError(f"{given}: no such file or folder")
    if kind == "dicom":
        folders = [given, *sorted(p for p in given.rglob("*") if p.is_dir())]
        return iter([folder for folder in folders if any(p.is_file() for p in folder.iterdir())])
    if kind == "image_mask":
        return image_files([given])
    endings = (".nii", ".nii.gz") if kind == "nifti" else (".tif", ".tiff", ".vrt", ".jp2")
    files = sorted(given.rglob("*")) if given.is_dir() else [given]
    return iter([path for path in files if path.name.lower().endswith(endings)])


def _check_places(paths: list[Path]) -> None:
    from visionattn.data.formats.geotiff import opened

    placeless = []
    for path in paths:
        with suppress(UserError), opened(path) as scene:  # what cannot be read is told when its turn comes
            placeless += [] if scene.crs else [str(path)]
    if placeless:
        raise UserError(
            f"no coordinate reference system, so no polygons: {listed(placeless)}; assign one (rio edit-info --crs "
            "EPSG:... FILE, or gdal_edit.py -a_srs), or leave --polygons out"
        )


class _Network:
    """The trained network on the best device there is, in the precision it was trained in.

    Called with normalised images (B, C, h, w) it gives probabilities (B, classes, h, w), views averaged.
    """

    def __init__(self, task: Segmenter, spec: SegmentationRecipe) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.task, self.spec = task.eval().to(self.device), spec

    def _precision(self) -> AbstractContextManager:
        kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        kind = kinds.get(self.spec.train.precision)
        return nullcontext() if kind is None else torch.autocast(self.device.type, kind)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        with self._precision():
            return self.task.averaged(images.to(self.device))

    @torch.inference_mode()
    def numbers(self, batch: dict[str, Any]) -> list[np.ndarray]:
        """Class numbers (H, W) of each part of a batch (see `visionattn.crops.WholeImages`)."""
        batch = batch | {"image": [image.to(self.device) for image in batch["image"]]}
        with self._precision():
            found = self.task.probabilities(batch)
        return [probabilities.argmax(0).cpu().numpy() for probabilities in found]


class _Readable(Dataset):
    """Parts of images, or the reason why one cannot be read."""

    def __init__(self, whole: WholeImages) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            return self.whole[index]
        except UserError as error:
            return str(error)


def _images(network: _Network, spec: SegmentationRecipe, found: dict[str, Path], out: Path) -> int:
    items, problems = unlabelled(found, len(spec.data.mean))
    colors = class_colors(spec.data, counted(spec))
    workers = default_workers(items) if spec.data.workers is None else spec.data.workers
    whole = WholeImages(items, spec.data, parts=False)
    loader = DataLoader(_Readable(whole), spec.data.batch_size, num_workers=workers, collate_fn=list)
    for parts in tqdm(loader, "predicting", leave=False, delay=SECONDS_BEFORE_PROGRESS, disable=None):
        problems += [part for part in parts if isinstance(part, str)]
        readable = [part for part in parts if not isinstance(part, str)]
        if readable:
            for part, mask in zip(readable, network.numbers(collate(readable)), strict=True):
                _write_image(items[part["index"]], mask, colors, out)
    for problem in problems:
        print(f"visionattn: {problem}", file=sys.stderr)
    return len(problems)


def _write_image(item: Item, mask: np.ndarray, colors: list, out: Path) -> None:
    outputs.write_mask(mask, colors, out / f"{item.name}.png")
    picture = out / "overlays" / f"{item.name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_overlay(item.image(), mask, colors, picture)


def _scene(network: _Network, spec: SegmentationRecipe, path: Path, out: Path, polygons: bool) -> None:
    data = spec.data
    outputs.predict_scene(
        network,
        path,
        out,
        classes=data.class_names,
        mean=data.mean,
        std=data.std,
        window=side_of(data),
        overlap=spec.evaluate.overlap,
        batch_size=data.batch_size,
        bands=data.bands,
        nodata=data.nodata,
        polygons=out.with_suffix(".gpkg") if polygons else None,
        leave_out=spec.evaluate.leave_out,
        device=network.device,
    )


def _volume(network: _Network, spec: SegmentationRecipe, path: Path, out: Path, polygons: bool) -> None:
    data = spec.data
    outputs.predict_volume(
        _slice_segmenter(network, spec),
        path,
        out,
        channels=len(data.mean),
        axis=data.axis,
        contrast=None if data.window is None else (data.window, data.level),
        batch_size=data.batch_size,
    )


def _slice_segmenter(network: _Network, spec: SegmentationRecipe) -> Callable[[np.ndarray], np.ndarray]:
    """Slices (B, C, H, W) -> class numbers (B, H, W)."""

    def segment(slices: np.ndarray) -> np.ndarray:
        size = slices.shape[2:]
        images = [network_input(image, spec.data, factors(size, spec.data)) for image in slices]
        whole = {"extent": [size] * len(images), "inner": [(0, size[0], 0, size[1])] * len(images)}
        return np.stack(network.numbers({"image": images, **whole}))

    return segment
