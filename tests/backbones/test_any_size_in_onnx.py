"""One ONNX file for all sizes: of the smallest model of each family, right at sizes of windows, odd ones and long ones.

A family that is registered is tested by that. Traced at a size of several windows each way, tried in ONNX Runtime.
"""

import pytest
import torch
from test_registry import FAST, create, family, images

from visionattn.tasks.graph import Graph
from visionattn.tools import export
from visionattn.tools._exporters import EXPORTERS

UNFIT = {
    "crossformer"
}  # its graph depends on the map: whether a group covers it, and what is left beside whole regions
SIZES = [(64, 64), (160, 224), (101, 75), (49, 33)]


class Classifier(Graph):
    def forward(self, images):
        logits = self.network(self.normalised(images))
        return logits.softmax(1), logits


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in FAST if family(name) not in UNFIT))
def test_one_file_is_right_at_any_size(name, tmp_path):
    torch.manual_seed(0)
    model = create(name, num_classes=10).eval()
    channels = model.default_cfg["input_size"][0]
    graph = Classifier(model, [0.5] * channels, [0.25] * channels).eval()
    tried = [images(name, *size, batch=3) for size in SIZES]
    check = export.written(EXPORTERS["onnx"], graph, tried, tmp_path / "model.onnx", {})
    assert check["largest_relative_error"] < 1e-3
    assert check["sizes"] == [list(size) for size in SIZES]
