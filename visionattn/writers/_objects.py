"""What writers of objects share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.data.outlines import outlines
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError, listed
from visionattn.writers import readable

__all__ = ["file_name", "grid", "number", "objects", "polygons", "properties", "refuse_placeless"]


def objects(predictions: Iterable[Prediction], ignored: bool = False) -> Boxes:
    """All that is predicted of a sample; what is to be ignored only if asked for."""
    boxes = Boxes.joined([p.value for p in readable(predictions) if isinstance(p.value, Boxes)])
    return boxes if ignored else boxes[~boxes.ignore]


def file_name(sample: Sample) -> str:
    """The name of a sample with the ending of its image file."""
    return sample.name + "".join(path.suffix for path in sample.files[:1])


def number(value: float | np.floating) -> float | int:
    """Without decimals where it is whole."""
    return int(value) if float(value).is_integer() else float(value)


def polygons(boxes: Boxes, transform: Any = None) -> list[list[list[np.ndarray]]]:
    """Of each object its polygons, of the mask or else of the box: the outer ring and holes, (n, 2) x and y.

    Args:
        transform: from pixels to other coordinates, an affine.Affine.
    """
    if boxes.masks is None:
        rings = [[[box]] for box in boxes.xyxy.astype(np.float64)[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]]
    else:
        rings = []
        for box, mask in zip(boxes.xyxy, boxes.masks, strict=True):
            rows, columns = pixels_of(box)
            corner = columns.start, rows.start
            rings.append([[ring + corner for ring in polygon] for polygon in outlines(mask)])
    if transform is None:
        return rings
    return [[[np.stack(transform @ ring.T, axis=1) for ring in polygon] for polygon in parts] for parts in rings]


def properties(boxes: Boxes, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns: class, score where there is one, box in pixels."""
    columns = {"class": np.array([classes[label] for label in boxes.labels], object)}
    if boxes.scores is not None:
        columns["score"] = boxes.scores.astype(np.float64).round(6)
    return columns | dict(zip(("xmin", "ymin", "xmax", "ymax"), boxes.xyxy.T.astype(np.float64), strict=True))


def grid(sample: Sample) -> tuple[Any, Any] | None:
    """Of a scene its CRS and the transform from pixels to it; None of an image."""
    if sample.ground is None:
        return None
    from visionattn.data.formats._rasters import opened

    with opened(sample.files[0]) as source:
        return (source.crs, source.transform) if source.crs else None


def refuse_placeless(samples: Sequence[Sample]) -> None:
    """Raises UserError for samples without a CRS."""
    placeless = [str(sample.files[0]) if sample.files else sample.name for sample in samples if not grid(sample)]
    if placeless:
        raise UserError(
            f"no coordinate reference system, so no polygons: {listed(placeless)}; assign one (rio edit-info --crs "
            "EPSG:... FILE, or gdal_edit.py -a_srs), or choose another format"
        )
