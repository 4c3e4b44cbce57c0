"""What of a detector's output is explained: the score of one place, region or query, which is followed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.models.detectors import Detector
from visionattn.report.evaluation import Evaluation
from visionattn.tasks.detection.recipe import Recipe
from visionattn.tasks.detection.task import DetectorTask
from visionattn.tasks.detection.transforms import factor_of, network_input, tiles_of
from visionattn.tasks.targets import Asked, Seen, box_of, class_of

__all__ = ["chosen", "seen"]

SAME = 0.3  # IoU with the region from which a place speaks of its object


def seen(task: DetectorTask, sample: Sample, spec: Recipe, asked: Asked) -> list[Seen]:
    """The tile with the surest object of the class, or of the region the surest one that is there."""
    network, factor = task.network, factor_of(sample.size, spec.data)
    assert isinstance(network, Detector)
    head: Any = network.head
    region = box_of(asked.region)
    if asked.region is not None and region is None:
        raise UserError(f"region is {asked.region}: expected a box X,Y,X2,Y2 of the file, as found objects have it")
    best: tuple[float, int, int, Tensor, Any] | None = None
    tiles = tiles_of(sample.size, spec.data)
    shown = []
    for n, (rows, columns) in enumerate(tiles):
        native = sample.image((rows, columns))
        shown.append(network_input(native, spec.data, [max(1, round(side * factor)) for side in native.shape[1:]]))
        with torch.no_grad():
            found = head.places(network.predicted([shown[n].to(task.device)]), shown[n].shape[1:])
        if not len(scores := found.scores):
            continue
        boxes = found.boxes / factor + found.boxes.new_tensor([columns.start, rows.start] * 2)
        if region is not None:
            top, left, bottom, right = region
            shared = box_iou(boxes.flatten(0, 1), boxes.new_tensor([[left, top, right, bottom]]))
            scores = scores * (shared.view(boxes.shape[:2]) >= SAME)
        k = class_of(asked, spec.data.classes, int(scores.amax(0).argmax()), None)
        score, place = (value.item() for value in scores[:, k].max(0))
        if best is None or score > best[0]:
            best = score, n, k, boxes[int(place), k % boxes.shape[1]], found.follow(int(place))
    if best is None or best[0] == 0:
        raise UserError(f"{sample.name}: nothing is found" + (f" in region {asked.region}" if asked.region else ""))
    _, n, k, box, followed = best
    rows, columns = tiles[n]
    edges = float(rows.start), float(columns.start), float(rows.stop), float(columns.stop)
    inside = _region(box, edges, factor, shown[n])
    words = f"{spec.data.classes[k]} at {', '.join(f'{edge:.0f}' for edge in box.tolist())}"

    def logit(images: Tensor) -> Tensor:
        return followed(network.predicted(images))[0][:, k]

    def of_place(images: Tensor) -> Tensor:
        return followed(network.predicted(images))[1][:, k]

    return [Seen(shown[n], edges, logit, of_place, words, inside)]


def chosen(
    evaluation: Evaluation, predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> dict[str, list[int]]:
    """Samples for the report: the images with the lowest and the highest F1."""
    index, kinds = {sample.name: i for i, sample in enumerate(samples)}, dict[str, list[int]]()
    for row in evaluation.tables["pictures.csv"]:
        if row["kind"] in ("worst", "best"):
            kinds.setdefault(row["kind"], []).append(index[row["image"]])
    return kinds


def _region(box: Tensor, edges: tuple[float, float, float, float], factor: float, image: Tensor) -> Tensor:
    """(h, w) bool, where the object is."""
    left, top, right, bottom = box.tolist()
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    rows, columns = (
        slice(max(0, int((low - first) * factor)), max(1, int((high - first) * factor) + 1))
        for low, high, first in ((top, bottom, edges[0]), (left, right, edges[1]))
    )
    inside[rows, columns] = True
    return inside
