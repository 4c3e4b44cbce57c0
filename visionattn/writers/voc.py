"""Objects as PASCAL VOC's annotations, NAME.xml, with a `score`: corners of boxes, pixels counted from 0.

What is to be ignored is written as difficult; masks are not written.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from visionattn.data.prediction import Prediction
from visionattn.data.sample import Sample
from visionattn.files import new_file
from visionattn.writers import FilePerCase
from visionattn.writers._objects import file_name, number, objects

__all__ = ["TARGET", "open"]

TARGET = "boxes"


class Annotations(FilePerCase):
    suffix = ".xml"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out)
        self.classes = classes

    def write(self, case: Sequence[Sample], predictions: Iterable[Prediction]) -> None:
        (sample,), boxes = case, objects(predictions, ignored=True)
        tree = ElementTree.Element("annotation")
        ElementTree.SubElement(tree, "filename").text = Path(file_name(sample)).name
        size = ElementTree.SubElement(tree, "size")
        for key, value in {"width": sample.size[1], "height": sample.size[0], "depth": sample.channels}.items():
            ElementTree.SubElement(size, key).text = str(value)
        for k, (box, label, ignore) in enumerate(zip(boxes.xyxy, boxes.labels, boxes.ignore, strict=True)):
            item = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(item, "name").text = self.classes[label]
            ElementTree.SubElement(item, "difficult").text = str(int(ignore))
            if boxes.scores is not None:
                ElementTree.SubElement(item, "score").text = f"{boxes.scores[k]:.6f}"
            corners = ElementTree.SubElement(item, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                ElementTree.SubElement(corners, key).text = str(number(value))
        ElementTree.indent(tree)
        (out,) = self.made_for(sample.case)
        with new_file(out) as path:
            ElementTree.ElementTree(tree).write(path, encoding="utf-8", xml_declaration=True)


open = Annotations
