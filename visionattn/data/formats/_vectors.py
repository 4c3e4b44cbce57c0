"""Polygons of vector files, in any coordinate system, as objects of scenes in pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from pyogrio import list_layers, raw, read_info
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform as reprojected
from rasterio.warp import transform_bounds

from visionattn.data.boxes import Boxes
from visionattn.data.formats._rasters import Scene, opened
from visionattn.data.object_masks import Drawn, Polygons
from visionattn.data.outlines import in_one
from visionattn.data.rectangles import largest_rectangles
from visionattn.data.sample import Window
from visionattn.errors import UserError, listed, nearest

__all__ = ["Labelled", "Layer", "OnScene", "VectorScene"]

FINEST, COARSEST, CELLS = 4, 32, 64  # pixels of a side, and how many a side: how finely it is known what is labelled
OWN_SHAPE = 1e-6  # relative difference of area between a polygon and its box
NEAR = 0.05  # of the extent of scenes around them, within which polygons are read
WRITTEN = "objects"  # the layer that our own writer makes


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorScene(Scene):
    """A raster with objects.

    Attributes:
        sources: the files of the objects and of the labelled areas.
        boxes: the objects, in pixels, within the scene.
        areas: where it is labelled, in pixels; None: everywhere.
    """

    sources: tuple[Path, ...] = ()
    boxes: Boxes = field(default_factory=Boxes)
    areas: Polygons | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path, *self.sources

    def _target(self, window: Window | None, image: np.ndarray | None = None) -> Boxes:
        boxes = self.boxes if window is None else self.boxes.within(window)
        if self.areas is None:
            return boxes
        outside = _outside(self.areas, window or (slice(0, self.size[0]), slice(0, self.size[1])))
        count, shapes = len(outside), [Polygons.of_box(box) for box in outside]
        xyxy = np.concatenate([boxes.xyxy, outside])
        masks: Sequence[np.ndarray] | None = None
        if isinstance(boxes.masks, Drawn):
            masks = Drawn([*boxes.masks.shapes, *shapes], xyxy)
        elif boxes.masks is not None:
            masks = [*boxes.masks, *Drawn(shapes, outside)]
        labels, ignore = np.append(boxes.labels, np.full(count, -1)), np.append(boxes.ignore, np.ones(count, bool))
        return Boxes(xyxy, labels, ignore, masks=masks)


def _outside(areas: Polygons, window: Window) -> np.ndarray:
    """(N, 4) float32 rectangles, counted from the window's corner, that cover what of it is in no area."""
    rows, columns = window
    sides = np.array([columns.stop - columns.start, rows.stop - rows.start])
    cell = int(np.clip(sides.max() // CELLS, FINEST, COARSEST))
    across, down = -(-sides // cell)
    cells = Polygons(tuple((part - (columns.start, rows.start)) / cell for part in areas.parts))
    outside = largest_rectangles(~cells.on((slice(0, down), slice(0, across))))
    return np.minimum(outside * cell, [*sides, *sides]).astype(np.float32)


class Layer:
    """The polygons of a layer of a vector file that are near scenes, with what they are called.

    Args:
        path: a file of any kind that GDAL reads.
        around: the scenes, which have a place.
        layer: its name, where the file has several.
        column: that has the name of the class; None: no names are wanted.
        one_class: what all are called where there is no such column.

    Attributes:
        count: of the features of the whole layer.

    Raises:
        UserError: not readable, several layers, no such column, no coordinate system, or what are no polygons.
    """

    def __init__(
        self,
        path: Path,
        around: Sequence[Scene],
        layer: str | None = None,
        column: str | None = None,
        one_class: str = "",
    ) -> None:
        self.path = path
        try:
            layer = self._chosen([name for name, _ in list_layers(path)], layer)
            about = read_info(path, layer=layer, force_feature_count=True)
            self.count, self.crs = about["features"], self._system(about["crs"])
            columns = [name for name in about["fields"] if name == column]
            near = {"columns": columns, "bbox": _around(around, self.crs)}
            _, ids, wkb, values = raw.read(path, layer=layer, return_fids=True, force_2d=True, **near)
            self.shapes = shapely.from_wkb(wkb)
        except (DataSourceError, DataLayerError, shapely.errors.GEOSException) as error:
            raise UserError(f"{path}: not a readable vector file ({' '.join(str(error).split())})") from None
        self.ids = ids.tolist()
        if column is None or columns or one_class or not self.count:
            self.names = self._names(column, values[0]) if columns else [one_class] * len(ids)
        else:
            raise UserError(
                f"{path} has no column {column!r}; it has {listed(about['fields']) or 'none'}"
                f"{nearest(column, about['fields'])}; set data.label_column, or name the one class of all objects in "
                "data.classes"
            )
        self._refuse_others()
        self._trees: dict[str, shapely.STRtree] = {}

    def _system(self, crs: str | None) -> CRS:
        if not crs:
            raise UserError(f"{self.path}: no coordinate reference system; assign one (ogr2ogr -a_srs EPSG:...)")
        try:
            return CRS.from_user_input(crs)
        except CRSError as error:
            raise UserError(f"{self.path}: its coordinate reference system is not known ({error})") from None

    def _chosen(self, layers: Sequence[str], layer: str | None) -> str:
        if layer is None and len(layers) > 1 and WRITTEN not in layers:
            raise UserError(f"{self.path} has the layers {listed(layers)}; choose with data.layer")
        if layer is not None and layer not in layers:
            raise UserError(f"{self.path} has no layer {layer}; it has {listed(layers)}{nearest(layer, layers)}")
        return layer or (WRITTEN if WRITTEN in layers else layers[0])

    def _names(self, column: str | None, values: np.ndarray) -> list[str]:
        names = values.tolist()
        without = [k for k, name in zip(self.ids, names, strict=True) if name is None or name != name or name == ""]
        if without:
            raise UserError(f"{self.path}: {column} is empty in the features {listed(without)}")
        return [str(int(name)) if isinstance(name, float) and name.is_integer() else str(name) for name in names]

    def _refuse_others(self) -> None:
        kinds = shapely.get_type_id(self.shapes)
        wrong = np.flatnonzero(~np.isin(kinds, [3, 6]) | shapely.is_empty(self.shapes))
        if len(wrong):
            kind = getattr(self.shapes[wrong[0]], "geom_type", "nothing")
            raise UserError(
                f"{self.path}: {len(wrong)} of {len(kinds)} features are no polygons, such as {self.ids[wrong[0]]} "
                f"({kind}); give points and lines a width first (QGIS: buffer)"
            )

    def in_system(self, crs: CRS) -> shapely.STRtree:
        """Its polygons in another coordinate system, without those that it cannot show."""
        key = crs.to_wkt()
        if key not in self._trees:
            shapes = self.shapes
            if crs != self.crs:
                shapes = shapely.transform(shapes, lambda xy: np.stack(reprojected(self.crs, crs, *xy.T), axis=1))
                shapes[~np.isfinite(shapely.bounds(shapes)).all(-1)] = None
            self._trees[key] = shapely.STRtree(shapes)
        return self._trees[key]


def _around(scenes: Sequence[Scene], crs: CRS) -> tuple[float, ...] | None:
    """Left, bottom, right and top around scenes; None where the system cannot show them."""
    boxes = []
    for scene in scenes:
        assert scene.ground is not None  # of one with a place
        system, outline = scene.ground
        (left, right), (bottom, top) = ((min(side), max(side)) for side in zip(*outline, strict=True))
        boxes.append(transform_bounds(system, crs, left, bottom, right, top))
    low, high = np.array(boxes)[:, :2].min(0), np.array(boxes)[:, 2:].max(0)
    margin = NEAR * (high - low)
    if not np.isfinite(boxes).all() or not all(box[0] < box[2] for box in boxes):
        return None
    return (*(low - margin).tolist(), *(high + margin).tolist())


class OnScene:
    """Those polygons of a layer that touch a scene, in its pixels.

    Attributes:
        path: of the layer.
        ids, names: of the features.
        polygons: their geometries.
        shapes: one each.
        xyxy: (N, 4) float64 boxes, which may reach over the scene's border.
        areas: (N,) of the polygons.
        own_shape: (N,) whether it has another shape than its box.
    """

    def __init__(self, layer: Layer, scene: Scene) -> None:
        with opened(scene.path) as source:
            crs, to_pixels = source.crs, ~source.transform
        assert scene.ground is not None  # of one with a CRS
        tree = layer.in_system(crs)
        places = np.sort(tree.query(shapely.Polygon(scene.ground[1]), predicate="intersects"))
        polygons = shapely.transform(tree.geometries[places], lambda xy: np.stack(to_pixels @ xy.T, axis=1))
        self.xyxy = shapely.bounds(polygons).reshape(-1, 4)
        self.path, self.polygons = layer.path, polygons
        self.ids, self.names = [layer.ids[k] for k in places], [layer.names[k] for k in places]
        self.shapes = [_shape(polygon) for polygon in polygons]
        self.areas = shapely.area(polygons)
        of_boxes = (self.xyxy[:, 2:] - self.xyxy[:, :2]).prod(1)
        self.own_shape = np.abs(self.areas - of_boxes) > OWN_SHAPE * of_boxes

    def __len__(self) -> int:
        return len(self.ids)

    def called(self, k: int) -> str:
        """An object in messages."""
        return f"{self.path}: feature {self.ids[k]}"


def _shape(polygon: Any) -> Polygons:
    """Holes included; corners without the repeated last one."""
    parts = [[part.exterior, *part.interiors] for part in shapely.get_parts(polygon)]
    return Polygons(tuple(in_one([[shapely.get_coordinates(ring)[:-1] for ring in rings]]) for rings in parts))


@dataclass(frozen=True, eq=False)
class Labelled:
    """A scene with its objects and, where only parts are labelled, its labelled areas."""

    scene: Scene
    objects: OnScene
    areas: OnScene | None = None

    @property
    def faults(self) -> str:
        """Which objects nothing can be learned from; "" without any."""
        flat = [k for k, area in zip(self.objects.ids, self.objects.areas, strict=True) if area <= 0]
        if flat:
            return f"polygons without an area: the features {listed(flat)}"
        own = zip(self.objects.ids, self.objects.shapes, self.objects.own_shape, strict=True)
        if thin := [k for k, shape, has_shape in own if has_shape and shape.bounds is None]:
            return f"polygons that hold no pixel's centre: the features {listed(thin)}"
        return ""

    def sample(self, numbers: Mapping[str, int], masks: bool) -> VectorScene:
        """What the scene shows of the objects, as a crop would.

        Args:
            numbers: class of each name, -1 for what is ignored.
        """
        objects, (height, width) = self.objects, self.scene.size
        labels = np.array([numbers[name] for name in objects.names], np.int64)
        areas, ignore = None, labels < 0
        if self.areas is not None:
            areas = Polygons(tuple(part for shape in self.areas.shapes for part in shape.parts))
            centres = (objects.xyxy[:, :2] + objects.xyxy[:, 2:]) / 2
            ignore |= ~np.logical_or.reduce([shapely.contains_xy(area, centres) for area in self.areas.polygons])
        whole = objects.xyxy.astype(np.float32)
        places = Boxes(whole, np.arange(len(whole)), ignore, masks=Drawn(objects.shapes, whole) if masks else None)
        seen = places.within((slice(0, height), slice(0, width)))
        drawn = Drawn([objects.shapes[k] for k in seen.labels], seen.xyxy) if masks else None
        boxes = Boxes(seen.xyxy, labels[seen.labels], seen.ignore, masks=drawn)
        sources = tuple(one.path for one in (self.objects, self.areas) if one is not None)
        return VectorScene(**vars(self.scene), sources=sources, boxes=boxes, areas=areas)
