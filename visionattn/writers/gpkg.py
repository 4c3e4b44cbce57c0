"""Objects of scenes as a GeoPackage in the scene's coordinate system, NAME.gpkg, for every GIS.

The layer `objects` has the outline of each, of its mask or else of its box, with class, score and box in pixels. Beside
masks the layer `rectangles` has the smallest rotated rectangle of each, with the length of its sides, in units of the
coordinate system, and the direction of the longer one in degrees, counted from the x axis against the clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import new_file
from visionattn.writers import FilePerCase
from visionattn.writers._objects import grid, objects, polygons, properties, refuse_placeless

__all__ = ["TARGET", "open"]

TARGET = "boxes"


class Layers(FilePerCase):
    suffix = ".gpkg"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out)
        self.classes = classes

    def refuse(self, samples: Sequence[Sample]) -> None:
        super().refuse(samples)
        refuse_placeless(samples)

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        import shapely

        (sample,), boxes = case, objects(predictions)
        refuse_placeless(case)
        placed = grid(sample)
        assert placed is not None  # as has been asked
        crs, transform = placed
        rings = polygons(boxes, transform)
        if boxes.masks is None:
            shapes = np.array([shapely.Polygon(outer) for ((outer,),) in rings], object)
        else:
            shapes = np.array([shapely.MultiPolygon([(outer, holes) for outer, *holes in of]) for of in rings], object)
        fields = properties(boxes, self.classes)
        (out,) = self.made_for(sample.case)
        with new_file(out) as path:
            _layer(path, "objects", shapes, fields, crs)
            if boxes.masks is not None:
                rectangles, sides = _rotated(shapes, transform @ (0, 0))
                _layer(path, "rectangles", rectangles, {"class": fields["class"], **sides}, crs)


def _rotated(shapes: np.ndarray, corner: tuple[float, float]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Found near the scene's corner, since rounding to millions of metres turns small ones."""
    import shapely

    near = shapely.oriented_envelope(shapely.transform(shapes, lambda xy: xy - corner))
    rectangles = shapely.transform(near, lambda xy: xy + corner)
    corners = shapely.get_coordinates(near).reshape(-1, 5, 2)
    edges = corners[:, 1:3] - corners[:, :2]
    lengths = np.linalg.norm(edges, axis=2)
    longer = edges[np.arange(len(edges)), lengths.argmax(1)]
    angle = np.degrees(np.arctan2(longer[:, 1], longer[:, 0])) % 180
    return rectangles, {"length": lengths.max(1), "width": lengths.min(1), "angle": angle}


def _layer(path: Path, name: str, shapes: np.ndarray, fields: Mapping[str, np.ndarray], crs: Any) -> None:
    import shapely
    from pyogrio import raw
    from pyogrio.errors import DataLayerError, DataSourceError

    kind = "MultiPolygon" if any(shape.geom_type == "MultiPolygon" for shape in shapes) else "Polygon"
    wkb = shapely.to_wkb(shapes)
    try:
        raw.write(
            path,
            wkb,
            list(fields.values()),
            list(fields),
            layer=name,
            driver="GPKG",
            geometry_type=kind,
            crs=crs.to_wkt(),
            append=path.exists(),
        )
    except (DataSourceError, DataLayerError) as error:
        raise OSError(str(error)) from None


open = Layers
