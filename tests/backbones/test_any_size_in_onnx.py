"""One ONNX file for all sizes: of the smallest model of each family, right at sizes of windows, odd ones and long ones.

A family that is registered is tested by that. Traced at a size of several windows each way, tried in ONNX Runtime.
"""

import pytest
import torch
from test_registry import FAST, create, family, images

from visionattn.errors import UserError
from visionattn.tasks.graph import Graph
from visionattn.tools import export
from visionattn.tools._exporters import EXPORTERS

UNFIT = {  # and why
    "crossformer": "maps of at most 4 places a side are one group, larger ones are cut",
    "agent_swin": "maps of at most 7 places a side have windows that are not shifted, larger ones are",
}
SIZES = [(64, 64), (160, 224), (101, 75), (49, 33)]


class Classifier(Graph):
    def forward(self, images):
        logits = self.network(self.normalised(images))
        return logits.softmax(1), logits


def graph_of(name):
    torch.manual_seed(0)
    model = create(name, num_classes=10).eval()
    channels = model.default_cfg["input_size"][0]
    return Classifier(model, [0.5] * channels, [0.25] * channels).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in FAST if family(name) not in UNFIT))
def test_one_file_is_right_at_any_size(name, tmp_path):
    tried = [images(name, *size, batch=3) for size in SIZES]
    check = export.written(EXPORTERS["onnx"], graph_of(name), tried, tmp_path / "model.onnx", {})
    assert check["largest_relative_error"] < 1e-3
    assert check["sizes"] == [list(size) for size in SIZES]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if family(name) == "crossformer" else pytest.mark.slow)
        for name in sorted(FAST)
        if family(name) in UNFIT
    ],
)
def test_what_no_graph_is_for_is_refused_with_what_depends_on_the_size(name, tmp_path):
    tried = [images(name, *size, batch=1) for size in SIZES[:2]]
    with pytest.raises(UserError, match=UNFIT[family(name)] + ", so that no graph is for all sizes"):
        export.written(EXPORTERS["pt2"], graph_of(name), tried, tmp_path / "model.pt2", {})
