"""What is TransNeXt's own: keys near and far, sizes, memory in chunks, and what is refused."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones import transnext
from visionattn.kernels import record_attention

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the authors' networks, counted
    [
        ("transnext_micro", 12_809_304),
        ("transnext_tiny", 28_258_960),
        ("transnext_small", 49_741_564),
        ("transnext_base", 89_721_496),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_weights_for_384_pixels_are_for_the_same_network():
    for name in ("transnext_small", "transnext_base"):
        assert timm.get_pretrained_cfg(f"{name}.in1k_ft_384").input_size == (3, 384, 384)


@torch.no_grad()
def test_keys_are_the_neighbours_inside_the_map_and_the_pooled_map():
    model = timm.create_model("transnext_micro", **SMALL).eval()
    with record_attention(model) as record:
        model(torch.randn(2, 3, 64, 96))
    (attention,) = record["stages.0.blocks.0.attn"]  # 16 x 24 positions, pooled to 2 x 3
    weights, indices = attention.weights, attention.indices
    assert (attention.queries, attention.keys, attention.pooled) == ((16, 24), (16, 24), (2, 3))
    assert weights.shape == (2, 1, 16 * 24, 9 + 6)
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    inner = 3 * 24 + 5
    assert indices[0, inner, :9].tolist() == [inner + 24 * row + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
    assert indices[0, inner, 9:].tolist() == list(range(384, 390))
    assert (weights[:, :, 0, :9] > 0)[0, 0].tolist() == [False] * 4 + [True, True, False, True, True]
    assert record["stages.3.blocks.0.attn"][0].weights.shape == (2, 4, 2 * 3, 2 * 3)


@torch.no_grad()
def test_rows_in_chunks_are_the_same(monkeypatch):
    model = timm.create_model("transnext_micro", **SMALL).eval()
    x = torch.randn(1, 3, 96, 72)
    expected = model(x)
    monkeypatch.setattr(transnext, "CHUNK", 2000)
    monkeypatch.setattr(transnext, "PLACES", 100)
    assert_close(model(x), expected)


@torch.no_grad()
def test_a_fixed_pooled_map_is_clipped_to_the_map():
    model = timm.create_model("transnext_micro", **SMALL, pool_size=7).eval()
    with record_attention(model) as record:
        model(torch.randn(1, 3, 64, 128))
    keys = [record[f"stages.{i}.blocks.0.attn"][0].weights.shape[-1] - 9 for i in range(3)]
    assert keys == [7 * 7, 7 * 7, 4 * 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2, 5, 4)}, r"num_heads: 5 heads cannot share the 24 channels"),
        ({"sr_ratios": (8, 4)}, r"sr_ratios: 2 values were given for 4 stages"),
        ({"window_size": 4}, r"window_size=4: expected an odd number"),
        ({"pretrain_size": 32}, r"pretrain_size=32: expected at least 64 pixels"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("transnext_micro", **{**SMALL, **options})


def test_position_bias_is_not_decayed():
    names = timm.create_model("transnext_micro", **SMALL).no_weight_decay()
    assert "stages.0.blocks.0.attn.cpb_fc1.weight" in names
    assert "stages.3.blocks.0.attn.temperature" in names
    assert not [name for name in names if ".mlp." in name]
