"""`format: geotiff` with boxes: scenes of any number of bands, with vector files of their objects, read by windows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from visionattn.data.boxes import BoxSection
from visionattn.data.formats import Found, Kind
from visionattn.data.formats._boxes import class_names, split_in
from visionattn.data.formats.geotiff import IMAGES, PREDICTED
from visionattn.data.images import files_below, named_files
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.recipe.sections import FilePath, Positive

if TYPE_CHECKING:
    from visionattn.data.formats._rasters import Scene
    from visionattn.data.formats._vectors import Labelled

NEEDS = ("rasterio", "pyogrio", "shapely")
KIND = Kind("boxes", "scene", "gpkg", endings=("",), needs=NEEDS, extra="geo", unit_range=False)
VECTORS = (".gpkg", ".geojson", ".json", ".shp", ".fgb", ".gml", ".kml")


class Section(BoxSection):
    """Scenes of any number of bands with vector files of objects, in any coordinate system.

    Each scene has a file of its name beside it, or in a folder called labels instead of images; or one file is for all.
    """

    format: Literal["geotiff"]
    root: FilePath = Field(description="folder with the scenes")
    labels: FilePath | None = Field(
        None, description="a vector file for all scenes, or a folder with one for each; unset: beside the scenes"
    )
    areas: FilePath | None = Field(
        None, description="vector file of the areas that are labelled; what is outside is ignored; unset: everything is"
    )
    label_column: str = Field("class", description="column of the class names; not needed where there is one class")
    layer: str | None = Field(None, description="of the vector files; unset: the only one, or `objects`")
    bands: list[Positive] | None = Field(None, description="bands to read, from 1; unset: all")
    nodata: float | None = Field(None, description="value of missing pixels; unset: as the file says")
    resize: Literal["none"] = "none"

    def at(self, root: Path) -> Self:
        other = super().at(root)  # type: ignore[misc]  # of the task's section, which is the next base
        return other.model_copy(update={"labels": None, "areas": None})


def find(section: Section) -> Found:
    """The scenes by name; pixels are not read.

    Raises:
        UserError: vector files that are not readable or without coordinate system, or that miss every scene; a class
            that the recipe does not know.
    """
    from visionattn.data.formats import _rasters

    root = section.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is {'a file' if root.exists() else 'missing'}, expected a folder")
    paths = {path.relative_to(root).with_suffix("").as_posix(): path for path in files_below(root, IMAGES)}
    scenes, problems = _rasters.scenes(paths, section)
    placeless = [scene for scene in scenes if not scene.crs]
    problems += [f"{scene.path}: no coordinate reference system, so its labels have no place" for scene in placeless]
    placed = [scene for scene in scenes if scene.crs]
    pairs = _objects(section, placed, problems)
    if section.areas is not None and pairs:
        pairs = _with_areas(section.areas, pairs, problems)
    first = {name: (one.objects, k) for one in pairs for k, name in enumerate(one.objects.names)}
    classes = class_names({name: objects.called(k) for name, (objects, k) in first.items()}, section)
    masks = any(scene.objects.own_shape.any() for scene in pairs)
    samples: list[Sample] = [_sample(section, scene, classes, masks) for scene in pairs]
    return Found(samples, classes, problems)


def _objects(section: Section, scenes: Sequence["Scene"], problems: list[str]) -> list["Labelled"]:
    """Scenes with what their vector files have of them."""
    from visionattn.data.formats._vectors import Labelled, Layer, OnScene

    layers: dict[Path, Layer] = {}
    labelled: list[Labelled] = []
    one_class = section.classes[0] if section.classes and len(section.classes) == 1 else ""
    for scene in scenes:
        file = section.labels if section.labels and section.labels.is_file() else _file(section, scene.path, problems)
        if file is None:
            continue
        if file not in layers:
            around = scenes if file == section.labels else [scene]
            layers[file] = Layer(file, around, section.layer, section.label_column, one_class)
        one = Labelled(scene, OnScene(layers[file], scene))
        if layers[file].count and not len(one.objects) and file != section.labels:
            problems.append(f"{file}: none of its {layers[file].count} polygons lie on {scene.path}")
        elif faults := one.faults:
            problems.append(f"{scene.path}: of {file} {faults}")
        else:
            labelled.append(one)
    if labelled and section.labels in layers and not any(len(scene.objects) for scene in labelled):
        raise UserError(f"data.labels: {section.labels}: none of its polygons lie on any of the {len(labelled)} scenes")
    if section.labels not in layers:
        problems += _without_scene(set(layers), section.areas)
    return labelled


def _file(section: Section, scene: Path, problems: list[str]) -> Path | None:
    """The vector file of a scene; None, and a problem, without one or with several."""
    name = scene.relative_to(section.root)
    if section.labels is not None:
        folders = [(section.labels / name).parent]
    else:
        parts = ["labels" if part == "images" else part for part in name.parts[:-1]]
        folders = list(dict.fromkeys([scene.parent, section.root.joinpath(*parts)]))
    there = [file for folder in folders for end in VECTORS if (file := folder / f"{scene.stem}{end}").is_file()]
    if len(there) != 1:
        places = " or ".join(map(str, folders))
        found = f"any of {listed(there)} could have its labels" if there else f"no vector file of its name in {places}"
        problems.append(f"{scene}: {found}; see data.labels")
        return None
    return there[0]


def _without_scene(used: set[Path], areas: Path | None) -> Iterator[str]:
    for folder in sorted({path.parent for path in used}):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in VECTORS and path not in used and path != areas:
                yield f"{path}: there is no scene of this name; see data.labels"


def _with_areas(file: Path, labelled: Sequence["Labelled"], problems: list[str]) -> list["Labelled"]:
    from visionattn.data.formats._vectors import Layer, OnScene

    layer, with_areas = Layer(file, [one.scene for one in labelled]), []
    for one in labelled:
        if len(areas := OnScene(layer, one.scene)):
            with_areas.append(replace(one, areas=areas))
        else:
            problems.append(f"{one.scene.path}: no area of {file} lies on it, so nothing of it is labelled")
    return with_areas


def _sample(section: Section, labelled: "Labelled", classes: Sequence[str], masks: bool) -> Sample:
    numbers = {name: k for k, name in enumerate(classes)} | dict.fromkeys(section.ignored, -1)
    sample = labelled.sample(numbers, masks)
    parts = sample.name.split("/")[:-1]
    return replace(sample, group=section.group_of(sample.name), split=split_in(parts))


def unlabelled(paths: Sequence[Path], section: Section, channels: int) -> tuple[list[Sample], list[str]]:
    from visionattn.data.formats import _rasters

    return _rasters.unlabelled(named_files(paths, PREDICTED), section, channels)


def notes(samples: Sequence[Sample]) -> list[str]:
    """Several coordinate systems or resolutions, scenes without a place."""
    from visionattn.data.formats import _rasters

    return _rasters.notes(samples)
