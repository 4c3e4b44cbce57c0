"""What is RMT's own: sizes, tables of decay and turns, the head with a label for each position, what is refused."""

import pytest
import timm
import torch
from golden_records import assert_same, load_record
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones import rmt
from visionattn.kernels import record_attention

SMALL = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (2, 2, 3, 4),
    "projection": 24,
    "num_classes": 5,
}


@pytest.mark.parametrize(
    ("name", "parameters", "with_token_label"),  # of the authors' networks, counted
    [
        ("rmt_tiny", 14_334_216, None),
        ("rmt_small", 26_967_240, None),
        ("rmt_base", 54_154_896, 54_667_896),
        ("rmt_large", 95_464_864, 96_105_864),
    ],
)
def test_sizes(name, parameters, with_token_label):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters
        labelled = timm.create_model(name, token_label=True)
    if with_token_label:
        assert sum(p.numel() for p in labelled.parameters()) == with_token_label


def test_decay_and_turns_are_those_of_the_record():
    for case in load_record("rmt_relpos")["cases"]:
        if case["tables"] != "float64":
            continue
        size, heads = case["kwargs"], case["kwargs"]["num_heads"]
        layer = rmt.Retention(size["embed_dim"], heads, size["heads_range"], by_axis=False)
        turns = rmt.turns_of_places(torch.empty(1, *case["hw"], 1).double(), size["embed_dim"] // heads)
        cos, sin = (x.repeat_interleave(2, -1) for x in turns.unbind(-1))
        rows, columns = (torch.arange(n).double() for n in case["hw"])
        rows, columns = ((x[:, None] - x).abs() for x in (rows, columns))
        whole = (rows[:, None, :, None] + columns[:, None]).flatten(2).flatten(0, 1)
        decay = torch.tensor(layer.decay, dtype=torch.float64)[:, None, None]
        tables = {
            "cos": cos,
            "sin": sin,
            "mask_h": decay * rows,
            "mask_w": decay * columns,
            "mask_whole": decay * whole,
        }
        for key, expected in case["outputs"].items():
            assert_same(tables[key], expected, key)


@torch.no_grad()
def test_layers_by_axis_keep_weights_of_rows_and_of_columns():
    model = timm.create_model("rmt_tiny", **SMALL).eval()
    with record_attention(model) as record:
        model(torch.randn(2, 3, 64, 96))
    rows, columns = record["stages.0.blocks.0.attn"]
    assert (rows.weights.shape, columns.weights.shape) == ((2, 2, 16 * 24, 24), (2, 2, 16 * 24, 16))
    (whole,) = record["stages.2.blocks.0.attn"]
    assert (whole.weights.shape, whole.indices) == ((2, 3, 24, 24), None)


@torch.no_grad()
def test_labels_of_positions_add_half_their_largest_logit():
    model = timm.create_model("rmt_tiny", **SMALL, token_label=True).eval()
    x = torch.randn(2, 3, 64, 96)
    features, maps = model.forward_intermediates(x)
    places = torch.stack([model.aux_head(maps[-1][:, :, y, x]) for y in range(2) for x in range(3)])
    assert_close(model(x), model.forward_head(features) + places.amax(0) / 2)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert_close(model(x), model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize("classes", [5, 3])
def test_weights_with_labels_of_positions_load_for_other_classes(classes, tmp_path):
    theirs = timm.create_model("rmt_tiny", **SMALL, token_label=True)
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pth")
    options = {**SMALL, "num_classes": classes, "token_label": True}
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    ours = timm.create_model("rmt_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert torch.equal(ours.aux_head.weight, theirs.aux_head.weight) == (classes == 5)
    assert_close(dict(ours.stages.state_dict()), dict(theirs.stages.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2, 2, 3)}, "num_heads: 3 values were given for 4 stages"),
        ({"num_heads": (16, 2, 3, 4)}, "16 heads cannot share pairs of the 16 channels"),
        ({"layer_scales": (None,)}, "layer_scales: 1 values were given for 4 stages"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("rmt_tiny", **{**SMALL, **options})
