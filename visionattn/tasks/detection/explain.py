"""What of a detector's output is explained: the score of one place of its maps, which is followed by its number."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.errors import UserError
from visionattn.models.dense_heads import DenseHead
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
    network = task.network
    if not isinstance(network, Detector) or not isinstance(network.head, DenseHead):
        raise UserError(
            f"model.detector {spec.model.detector}: objects are explained of fcos and retinanet, whose scores belong "
            "to places of a map"
        )
    head, factor = network.head, factor_of(sample.size, spec.data)
    region = box_of(asked.region)
    if asked.region is not None and region is None:
        raise UserError(f"region is {asked.region}: expected a box X,Y,X2,Y2 of the file, as found objects have it")
    best: tuple[float, int, int, int, Tensor] | None = None
    tiles = tiles_of(sample.size, spec.data)
    shown = []
    for n, (rows, columns) in enumerate(tiles):
        native = sample.image((rows, columns))
        shown.append(network_input(native, spec.data, [max(1, round(side * factor)) for side in native.shape[1:]]))
        with torch.no_grad():
            raw = network.predicted([shown[n].to(task.device)])
            scores = head.scores(raw)[0]
            boxes = head.decode(raw["boxes"][0], head.anchors(raw["shapes"], scores.device)) / factor
        boxes = boxes + boxes.new_tensor([columns.start, rows.start] * 2)
        if region is not None:
            top, left, bottom, right = region
            wanted = boxes.new_tensor([[left, top, right, bottom]])
            scores = scores * (box_iou(boxes, wanted) >= SAME)
        k = class_of(asked, spec.data.classes, int(scores.amax(0).argmax()), None)
        score, place = (value.item() for value in scores[:, k].max(0))
        if best is None or score > best[0]:
            best = score, n, int(place), k, boxes[int(place)]
    assert best is not None  # every image has a tile
    score, n, place, k, box = best
    if score == 0:
        raise UserError(f"{sample.name}: nothing is found in region {asked.region}")
    rows, columns = tiles[n]
    edges = float(rows.start), float(columns.start), float(rows.stop), float(columns.stop)
    inside = _region(box, edges, factor, shown[n])
    words = f"{spec.data.classes[k]} at {', '.join(f'{edge:.0f}' for edge in box.tolist())}"

    def logit(images: Tensor) -> Tensor:
        return network.predicted(images)["logits"][:, place, k]

    def of_place(images: Tensor) -> Tensor:
        return head.scores(network.predicted(images))[:, place, k]

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
