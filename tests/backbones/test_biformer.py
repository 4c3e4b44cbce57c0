"""What is BiFormer's own: its arguments, and what of them is refused."""

import pytest
import timm
import torch

import visionattn  # noqa: F401 - registers the models

SMALL = {"depth": (1, 1, 1, 1), "embed_dim": (32, 64, 128, 256), "n_win": 2, "topks": (1, 2, 4, -2), "num_classes": 10}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_chans": 1, "n_win": (4, 4, 2, 2), "drop_path_rate": 0.1},
        {"topks": (0, 2, -1, -2), "mlp_dwconv": True, "layer_scale_init_value": 0.1, "pre_norm": False},
        {"soft_routing": True, "diff_routing": True, "param_routing": True, "side_dwconv": 3},
        {"kv_downsample_mode": "ada_maxpool", "kv_per_wins": (2, 2, 1, 1), "qk_dims": (32, 32, 64, 64)},
        {"kv_downsample_mode": "avgpool", "kv_downsample_ratios": 2, "param_attention": "qkv"},
        {"overlapping": False, "refactored": True, "topks": (1, 2, 4, -1), "before_attn_dwconv": 0},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_options_train(options):
    model = timm.create_model("biformer_tiny", **{**SMALL, **options})
    model(torch.randn(2, options.get("in_chans", 3), 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topks": (1, 5, 4, -2)}, r"5 regions asked for, but n_win=2 makes only 4"),
        ({"topks": (1, 2, 4, -3)}, r"topks: got -3"),
        ({"topks": (1, 2)}, r"topks: 2 values were given for 4 stages"),
        ({"embed_dim": (32, 64, 128, 252)}, r"embed_dim 252 .* multiples of its number of heads, 8"),
        ({"embed_dim": (24, 64, 128, 256)}, r"embed_dim 24 .* number of heads, 0"),
        ({"kv_downsample_mode": "mean"}, r"kv_downsample_mode='mean': expected 'identity'"),
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratios": 0}, r"pooling size of 0"),
        ({"param_attention": "qk"}, r"param_attention='qk'"),
        ({"param_routing": True}, r"param_routing=True needs diff_routing=True"),
        ({"kv_pooling": 2}, r"biformer_tiny has no argument kv_pooling=2"),
        ({"refactored": True, "soft_routing": True}, r"soft_routing: refactored=True has nothing of that"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("biformer_tiny", **{**SMALL, **options})


def test_extra_norms_are_applied_to_the_maps_alone():
    model = timm.create_model("biformer_tiny", **SMALL, extra_norms=True, features_only=True).eval()
    maps = model(torch.randn(2, 3, 64, 64))
    for feature in maps:
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(feature.std(1, correction=0), torch.ones_like(feature[:, 0]), atol=1e-3, rtol=0)
    assert {key.split(".")[1] for key in model.model.state_dict() if key.startswith("extra_norms")} == set("0123")
