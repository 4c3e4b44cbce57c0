"""Objects as GeoJSON, NAME.geojson: outlines, of the mask or else of the box, with class, score and box in pixels.

Of scenes the coordinates are those of the scene's own coordinate system, which the member `crs` names; of images they
are pixels, x to the right and y down, as pathology viewers (QuPath) want them, who read `classification`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.files import new_file
from visionattn.writers import FilePerCase
from visionattn.writers._objects import grid, number, objects, polygons, properties

__all__ = ["TARGET", "open"]

TARGET = "boxes"


class Features(FilePerCase):
    suffix = ".geojson"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out)
        self.classes = classes

    def refuse(self, samples: Sequence[Sample]) -> None:
        super().refuse(samples)
        for sample in samples:
            _crs(sample)

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), boxes = case, objects(predictions)
        crs, transform = _crs(sample)
        columns = properties(boxes, self.classes)
        features: list[dict[str, Any]] = []
        for rings, *values in zip(polygons(boxes, transform), *columns.values(), strict=True):
            says = {key: v if key == "class" else number(v) for key, v in zip(columns, values, strict=True)}
            if crs is None:
                says |= {"objectType": "annotation", "classification": {"name": says["class"]}}
            features.append({"type": "Feature", "properties": says, "geometry": _geometry(rings)})
        named = {} if crs is None else {"crs": {"type": "name", "properties": {"name": crs}}}
        content = {"type": "FeatureCollection", **named, "features": features}
        (out,) = self.made_for(sample.case)
        with new_file(out) as path:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _crs(sample: Sample) -> tuple[str | None, Any]:
    """The name of a scene's CRS, and the transform from pixels to it; nothing of an image."""
    if (placed := grid(sample)) is None:
        return None, None
    crs, transform = placed
    if (known := crs.to_authority()) is None:
        raise UserError(
            f"{sample.name}: its coordinate system has no number that GeoJSON could name; write a GeoPackage"
        )
    return "urn:ogc:def:crs:{}::{}".format(*known), transform


def _geometry(polygons: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    closed = [[np.concatenate([ring, ring[:1]]).tolist() for ring in rings] for rings in polygons]
    if len(closed) == 1:
        return {"type": "Polygon", "coordinates": closed[0]}
    return {"type": "MultiPolygon", "coordinates": closed}


open = Features
