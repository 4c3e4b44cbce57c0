"""What is NAT's, DiNAT's and DiNAT_s's own: windows, their spread, published weights, and what is refused."""

import pytest
import timm
import torch
from golden_records import NAMES, load_record
from torch import Tensor, nn
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.kernels import record_attention

SMALL = {"depths": (1, 2, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "num_classes": 10, "kernel_size": 3}
RECORDED = [name for name in NAMES if name in timm.list_models()]  # the records of whole published networks


def blocks(model: nn.Module) -> list[list[nn.Module]]:
    return [list(level.blocks) for level in model.levels]


def meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", [name for name in RECORDED if "nat" in name])
def test_entry_points_are_the_recorded_networks(name):
    theirs = load_record(name)["reference"]["kwargs"]
    ours = blocks(meta(name))
    flat = [block for level in ours for block in level]
    assert [len(level) for level in ours] == theirs["depths"]
    assert [level[0].attn.num_heads for level in ours] == theirs["num_heads"]
    assert {block.attn.kernel_size for block in flat} == {theirs["kernel_size"]}
    ones = [[1] * depth for depth in theirs["depths"]]
    assert [[block.attn.dilation for block in level] for level in ours] == theirs.get("dilations", ones)
    assert hasattr(flat[0].gamma1, "gamma") == ("layer_scale" in theirs)


@pytest.mark.parametrize(
    ("name", "depths", "heads", "scaled"),
    [
        ("nat_small", (3, 4, 18, 5), (3, 6, 12, 24), True),
        ("dinat_base", (3, 4, 18, 5), (4, 8, 16, 32), True),
        ("dinat_large", (3, 4, 18, 5), (6, 12, 24, 48), False),
        ("dinat_s_small", (2, 2, 18, 2), (3, 6, 12, 24), False),
    ],
)
def test_entry_points_without_a_record(name, depths, heads, scaled):
    ours = blocks(meta(name))
    assert tuple(map(len, ours)) == depths
    assert tuple(level[0].attn.num_heads for level in ours) == heads
    assert hasattr(ours[0][0].gamma1, "gamma") == scaled
    assert {block.attn.dilation for block in ours[1]} == ({1} if name == "nat_small" else {1, 4})


def test_weights_for_384_pixels_spread_windows_wider():
    for name in ("dinat_large", "dinat_s_large"):
        spread = [level[1].attn.dilation for level in blocks(meta(f"{name}.in22k_ft_in1k_384"))]
        assert spread == [13, 6, 3, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_chans": 1, "dilations": (4, 2, 1, 1), "drop_path_rate": 0.1},
        {"dilations": ([1], [2, 3], [1], [1]), "layer_scale": 0.1, "mlp_ratio": 2.5},
        {"layout": "swin", "patch_norm": False},
        {"layout": "isotropic", "num_heads": (1, 1, 1, 1), "kernel_size": 4},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_options_train(options):
    model = timm.create_model("nat_mini", **{**SMALL, **options})
    model(torch.randn(2, options.get("in_chans", 3), 48, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2, 4, 7)}, r"num_heads: 7 heads cannot share the 256 channels"),
        ({"num_heads": (1, 2)}, r"num_heads: 2 values were given for 4 levels"),
        ({"dilations": (8, 4, 2)}, r"dilations: 3 values were given for 4 levels"),
        ({"dilations": (1, (1, 2, 3), 1, 1)}, r"dilations: \(1, 2, 3\) has 3 values, for a level of 2 blocks"),
        ({"dilations": (1, 0, 1, 1)}, r"dilations: got 0"),
        ({"kernel_size": 1}, r"kernel_size=1: expected at least 2"),
        ({"layout": "patches"}, r"layout='patches': expected 'conv'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", **{**SMALL, **options})


@torch.no_grad()
def test_every_query_has_as_many_keys_inside_the_map():
    """No padding on a map that windows fit in, and dilated keys are of one class."""
    model = timm.create_model("dinat_mini", **{**SMALL, "dilations": ([2], [1, 3], [1], [1])}).eval()
    with record_attention(model) as record:
        model(torch.randn(1, 3, 96, 96))
    indices = record["levels.1.blocks.1.attn"][0].indices  # of 12 x 12 positions
    assert indices.shape == (1, 144, 9)
    rows, columns = indices // 12, indices % 12
    query = torch.arange(144)[None, :, None]
    assert (rows % 3 == query // 12 % 3).all()
    assert (columns % 3 == query % 12 % 3).all()


def in_transformers_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights of NAT, under the names that the transformers library gives them."""
    theirs = {}
    for key, value in state_dict.items():
        key = key.replace("patch_embed.proj.", "nat.embeddings.patch_embeddings.projection.")
        key = key.replace("patch_embed.norm.", "nat.embeddings.norm.").replace("blocks.", "layers.")
        for ours, name in {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.rpb": "attention.self.rpb",
            "attn.qkv": "attention.self.qkv",
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }.items():
            key = key.replace(ours, name)
        if key.startswith("levels."):
            key = f"nat.encoder.{key}"
        theirs[key.replace("head.", "classifier.") if key.startswith("head.") else key] = value
    theirs = {f"nat.layer{key}" if key.startswith("norm.") else key: value for key, value in theirs.items()}
    for key in [key for key in theirs if ".qkv." in key]:
        parts = dict(zip(("query", "key", "value"), theirs.pop(key).chunk(3), strict=True))
        theirs |= {key.replace("qkv", name): part for name, part in parts.items()}
    for key in [key for key in theirs if key.endswith("gamma1.gamma")]:
        scales = [theirs.pop(key), theirs.pop(key.replace("gamma1", "gamma2"))]
        theirs[key.replace("gamma1.gamma", "layer_scale_parameters")] = torch.stack(scales)
    return theirs


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_weights_of_the_transformers_library_load(layer_scale, tmp_path):
    """The hub has them; no other test reaches it."""
    ours = timm.create_model("nat_mini", **SMALL, layer_scale=layer_scale)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = in_transformers_names(ours.state_dict())
    assert not theirs.keys() & set(ours.state_dict())
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    overlay = {"file": str(tmp_path / "pytorch_model.bin"), "num_classes": 10}
    options = {**SMALL, "layer_scale": layer_scale, "pretrained_cfg_overlay": overlay}
    loaded = timm.create_model("nat_mini", pretrained=True, **options)
    assert_close(dict(loaded.state_dict()), dict(ours.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"depths": (1, 1, 1, 1)},
            r"depths=\(1, 2, 1, 1\), kernel_size=3.*expected embed_dim=32, depths=\(1, 1, 1, 1\)",
        ),
        ({"kernel_size": 5}, r"kernel_size=3.*expected.*kernel_size=5"),
        ({"embed_dim": 64}, r"embed_dim=32.*expected embed_dim=64"),
        ({"layer_scale": 1e-5}, r"layer scale: False, expected.*layer scale: True"),
    ],
)
def test_checkpoints_of_another_network_are_refused(options, message, tmp_path):
    torch.save(timm.create_model("nat_mini", **SMALL).state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **options})


def test_position_bias_is_not_decayed():
    model = meta("nat_mini")
    assert len(model.no_weight_decay()) == 18
    assert all(key.endswith(".attn.rpb") for key in model.no_weight_decay())


@torch.no_grad()
def test_a_window_as_large_as_the_map_is_global_attention():
    """ViT with relative position bias: each position attends to all others at the size that its window is made for."""
    model = timm.create_model("vitrpb_small", depth=1, embed_dim=32, num_heads=1, kernel_size=6, num_classes=0).eval()
    with record_attention(model) as record:
        model(torch.randn(1, 3, 96, 96))
    (attention,) = record["levels.0.blocks.0.attn"]
    assert (attention.indices[0] == torch.arange(36)).all()
