"""Objects as COCO's annotation file (.json), with a `score` of each; masks as run lengths.

What is to be ignored is written as a crowd.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from visionattn.data.boxes import Boxes, pixels_of
from visionattn.data.object_masks import Runs
from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import new_file
from visionattn.writers import OneFile, in_turn
from visionattn.writers._objects import file_name, number, objects

__all__ = ["TARGET", "open"]

TARGET = "boxes"

Written = tuple[dict[str, Any], list[dict[str, Any]]]  # an image and its annotations, without numbers


class Annotations(OneFile):
    endings = (".json",)

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out)
        self.classes, self.written = classes, list[Written]()

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), boxes = case, objects(predictions, ignored=True)
        image = {"file_name": file_name(sample), "height": sample.size[0], "width": sample.size[1]}
        self.written.append((image, list(_annotations(boxes, sample.size))))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            _save(self.out, self.written, self.classes)

    def join(self, parts: Sequence[Path], whole: Path) -> None:
        _save(whole, list(in_turn([_load(part) for part in parts])), self.classes)


def _annotations(boxes: Boxes, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for k, (box, label, ignore) in enumerate(zip(boxes.xyxy, boxes.labels, boxes.ignore, strict=True)):
        left, top, right, bottom = box.astype(float)
        annotation = {
            "category_id": int(label) + 1,
            "bbox": [number(value) for value in (left, top, right - left, bottom - top)],
            "area": number((right - left) * (bottom - top)),
            "iscrowd": int(ignore),
        }
        if boxes.scores is not None:
            annotation["score"] = round(float(boxes.scores[k]), 6)
        if boxes.masks is not None:
            mask = boxes.masks[k]
            runs = Runs.of(mask, pixels_of(box), size)
            annotation |= {"area": int(mask.sum()), "segmentation": {"size": list(size), "counts": runs.text}}
        yield annotation


def _save(out: Path, written: Sequence[Written], classes: Sequence[str]) -> None:
    images = [{"id": n + 1, **image} for n, (image, _) in enumerate(written)]
    owned = [(n + 1, annotation) for n, (_, annotations) in enumerate(written) for annotation in annotations]
    annotations = [{"id": k + 1, "image_id": n, **annotation} for k, (n, annotation) in enumerate(owned)]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    with new_file(out) as path:
        path.write_text(json.dumps(content), encoding="utf-8")  # in ASCII, since names of files may be no text


def _load(part: Path) -> list[Written]:
    content = json.loads(part.read_text(encoding="utf-8"))
    annotations: Mapping[int, list[dict[str, Any]]] = {image.pop("id"): [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation.pop("image_id")].append(annotation)
        del annotation["id"]
    return list(zip(content["images"], annotations.values(), strict=True))


open = Annotations
