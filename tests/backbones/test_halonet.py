"""What is HaloNet's own: the same function as timm's, the paper's table, maps that blocks do not divide."""

import pytest
import timm
import torch
from timm.models.byobnet import ByoBlockCfg
from twins import assert_same_function

import visionattn

SHORT = {"blocks": ("c", "c", "ca", "a"), "num_classes": 10}
PAPER = {  # millions of parameters, table of the paper
    "h0": 5.5,
    "h1": 8.1,
    "h2": 9.4,
    "h3": 11.8,
    "h4": 19.1,
    "h5": 30.7,
    "h6": 43.4,
    "h7": 67.4,
}


def test_same_function_as_timm_when_small():
    stages = zip(SHORT["blocks"], (256, 512, 1024, 1536), strict=True)
    kinds = {"c": "bottle", "a": "self_attn"}
    theirs = {
        "blocks": [
            [ByoBlockCfg(kinds[kind], d=1, c=dim, s=2 if dim > 256 else 1, gs=0, br=dim_in / dim) for kind in block]
            for (block, dim), dim_in in zip(stages, (64, 128, 256, 512), strict=True)
        ],
        "self_attn_kwargs": {"block_size": 4, "halo_size": 3},
    }
    ours = timm.create_model("va_sehalonet33ts", **SHORT, block_size=4)
    assert_same_function(ours, timm.create_model("sehalonet33ts", num_classes=10, **theirs), (128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halonet26t", "halonet50ts", "sehalonet33ts"])
def test_same_function_as_timm(name):
    assert_same_function(*(timm.create_model(n, num_classes=10) for n in (f"va_{name}", name)), (256, 256))


@pytest.mark.parametrize("size", PAPER)
def test_parameters_of_the_paper(size):
    with torch.device("meta"):
        model = timm.create_model(f"va_halonet_{size}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PAPER[size], abs=0.05)


def test_heads_of_the_paper_are_16_wide():
    with torch.device("meta"):
        model = timm.create_model("va_halonet_h5")
    attention = [stage[0].self_attn for stage in model.stages]
    assert [layer.num_heads for layer in attention] == [4, 8, 16, 32]
    assert {layer.dim_head_qk for layer in attention} == {16}
    assert {layer.dim_head_v for layer in attention} == {40}  # rv = 2.5


@torch.no_grad()
def test_what_is_outside_of_the_map_is_zero():
    """A block that reaches over the edge of a map sees there what its halo sees: keys and values of zero."""
    model = timm.create_model("va_halonet26t", **SHORT).eval()
    layer = model.stages[3][0].self_attn
    x = torch.randn(2, 512, 13, 6)
    padded = torch.nn.functional.pad(x, (0, 10, 0, 3))
    torch.testing.assert_close(layer(x), layer(padded)[..., :7, :3])


@torch.no_grad()
def test_attention_is_recorded_for_each_layer():
    model = timm.create_model("va_halonet26t", **SHORT).eval()
    with visionattn.record_attention(model) as record:
        model(torch.randn(1, 3, 96, 64))
    assert set(record) == {"stages.2.1.self_attn", "stages.3.0.self_attn"}
    call = record["stages.2.1.self_attn"][0]
    assert call.weights.shape == (1, 8, 6 * 4, 12 * 12)
    assert call.indices.shape == (1, 6 * 4, 12 * 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ("c", "x", "c", "a")}, r"expected only the letters c \(convolution\) and a \(attention\)"),
        ({"block_size": 7}, r"block_size=7: expected an even number"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("va_halonet26t", **{**SHORT, **options})
