"""What is LGViT's own: sizes, what its heads know of positions, checkpoints of whole networks, decoders, refusals."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.lgvit import turns_of_places
from visionattn.kernels import record_attention
from visionattn.models.segmenters import make_segmenter

SMALL = {"embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 4), "num_classes": 5}


@pytest.mark.parametrize(("name", "parameters"), [("lgvit_96", 957_648), ("lgvit_192", 3_629_472)])
def test_sizes(name, parameters):
    """Of the authors' encoders, counted."""
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters()) == parameters


def test_first_channels_turn_with_rows_and_last_ones_with_columns():
    turns = turns_of_places(torch.empty(1, 3, 5, 8))
    assert turns.shape == (3, 5, 4, 2)
    assert_close(turns[:, :, :2], turns[:, :1, :2].expand(3, 5, 2, 2))
    assert_close(turns[:, :, 2:], turns[:1, :, 2:].expand(3, 5, 2, 2))
    angles = torch.tensor([2.0, 2 * 10000**-0.5, 4.0, 4 * 10000**-0.5])
    assert_close(turns[2, 4], torch.stack([angles.cos(), angles.sin()], -1))


@torch.no_grad()
def test_recorded_weights_of_a_layer_without_positions_sum_to_one():
    """But for the 1e-6 that the products of queries and keys are kept above 0 by."""
    model = timm.create_model("lgvit_96", **SMALL).eval()
    with record_attention(model) as record:
        model(torch.randn(2, 3, 32, 16 * 3))
    assert [(name, calls[0].weights.shape) for name, calls in record.items()] == [
        ("stages.1.0.attn", (2, 2, 6, 6)),
        ("stages.2.0.attn", (2, 4, 6, 6)),
        ("stages.2.1.attn", (2, 4, 6, 6)),
    ]
    layer, x = model.stages[1][0].attn, torch.randn(1, 2, 3, 16)
    still = torch.tensor([1.0, 0.0]).expand(2, 3, 8, 2)
    with record_attention(layer) as record:
        layer(x, still)
    assert_close(record[""][0].weights.sum(-1), torch.ones(1, 2, 6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prefix", ["", "image_encoder.", "module.image_encoder."])
def test_the_encoder_of_a_network_is_taken_and_the_classifier_stays(prefix, tmp_path):
    theirs = timm.create_model("lgvit_96", **SMALL)
    weights = {prefix + key: x for key, x in theirs.state_dict().items() if not key.startswith("head")}
    if prefix:
        weights[prefix.replace("image_encoder", "neck") + "0.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    ours = timm.create_model("lgvit_96", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert_close(dict(ours.stages.state_dict()), dict(theirs.stages.state_dict()), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["fpn", "upernet"])
def test_decoders_get_a_pyramid_of_its_map(decoder):
    model = make_segmenter("lgvit_96", decoder, num_classes=3, in_chans=1, encoder_args={**SMALL, "num_classes": 0})
    assert model.eval()(torch.randn(1, 1, 96, 128)).shape == (1, 3, 96, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2)}, "num_heads: 2 values were given for 3 stages"),
        ({"embed_dim": 18}, r"embed_dim=18: expected a multiple of 4 and of num_heads=\(2, 4\)"),
        ({"num_heads": (1, 2, 3)}, r"embed_dim=16: expected a multiple of 4 and of num_heads=\(2, 3\)"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("lgvit_96", **{**SMALL, **options})
