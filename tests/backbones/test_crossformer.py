"""What is CrossFormer's own: its groups, its arguments, what of them is refused, and the authors' checkpoints."""

import sys
import types

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.crossformer import GroupAttention, group_sizes

SMALL = {
    "embed_dim": 16,
    "depths": (2, 2, 4, 1),
    "num_heads": (1, 2, 4, 8),
    "group_size": (4, 4, 2, 2),
    "crs_interval": (2, 2, 1, 1),
    "num_classes": 10,
    "img_size": 64,
}


# Groups


def places(length: int, group: int, interval: int) -> tuple[Tensor, Tensor]:
    """Which group each position of an axis is in, and which of its tokens it is."""
    position = torch.arange(length)
    region, inside = position // (group * interval), position % (group * interval)
    return region * interval + inside % interval, inside // interval


def attention_by_definition(attn: GroupAttention, x: Tensor, interval: int) -> Tensor:
    """Dense attention between all tokens, those of other groups masked."""
    height, width = x.shape[1:3]
    group = attn.group_size
    if min(height, width) <= group:
        group, interval = max(height, width), 1
    rows, columns = places(height, group, interval), places(width, group, interval)
    which, place = (
        torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)
        for row, column in zip(rows, columns, strict=True)
    )
    q, k, v = attn.qkv(x).flatten(1, 2).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    offsets = (place[:, None] - place).to(x.dtype)  # (N, N, 2)
    logits = q @ k.mT * q.shape[-1] ** -0.5 + attn.pos(offsets.flatten(0, 1)).T.unflatten(1, offsets.shape[:2])
    same = (which[:, None] == which).all(-1)
    out = logits.masked_fill(~same, -torch.inf).softmax(-1) @ v
    return attn.proj(out.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    group=st.integers(2, 4),
    interval=st.sampled_from([1, 2, 3, "adaptive"]),
)
def test_groups_by_definition(height, width, group, interval):
    torch.manual_seed(0)
    attn = GroupAttention(16, 2, group, interval).double()
    x = torch.randn(2, height, width, 16, dtype=torch.float64, requires_grad=True)
    every = -(-max(height, width) // group) if interval == "adaptive" else interval
    actual, expected = attn(x), attention_by_definition(attn, x, every)
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(x)
    inputs = [x, *attn.parameters()]
    grads = torch.autograd.grad((actual * weights).sum(), inputs)
    assert_close(grads, torch.autograd.grad((expected * weights).sum(), inputs), rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_small_images_leave_no_trace():
    """The authors' dense models stop attending at long distance once they have seen a small map."""
    model = timm.create_model("crossformer_tiny", **SMALL).eval()
    x = torch.randn(1, 3, 96, 128)
    before = model(x)
    model(x[..., :32, :32])
    assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("group_type", "expected"),
    [
        ("constant", [[7, 7], [7, 7], [14] * 6, [7, 7]]),
        ("7_14", [[7, 7], [7, 7], [7, 7, 7, 7, 14, 14], [7, 7]]),
        ("linear", [[4, 9], [7, 9], [6, 7, 8, 9, 10, 11], [6, 7]]),
        ("linear_div", [[4, 9], [7, 9], [6, 7, 7, 7, 7, 14], [7, 7]]),
        ("alter", [[4, 9], [7, 9], [6, 7, 7, 14, 7, 14], [7, 7]]),
    ],
)
def test_group_types(group_type, expected):
    assert group_sizes(group_type, (7, 7, 14, 7), (2, 2, 6, 2), grid=56) == expected


# Arguments


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_chans": 1, "use_acl": True, "drop_path_rate": 0.1},
        {"ape": True, "mlp_ratio": (4, 4, 2, 2)},
        {"use_cpe": True},
        {"group_type": "linear", "adaptive_interval": True},
        {"pad_type": 1, "group_size": (5, 3, 3, 3)},
        {"no_mask": True, "group_size": (5, 3, 3, 3)},
        {"patch_size": (4, 8), "merge_size": ((2,), (2, 4), (2, 4, 8))},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_options_train(options):
    model = timm.create_model("crossformer_tiny", **{**SMALL, **options})
    logits = model(torch.randn(2, options.get("in_chans", 3), 50, 90))
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 20}, r"embed_dim: 20 channels cannot be halved 3 times"),
        ({"embed_dim": 8}, r"embed_dim: a stage has 8 channels, expected at least 16"),
        ({"num_heads": (3, 2, 4, 8)}, r"num_heads: 3 heads cannot share the 16 channels"),
        ({"num_heads": (1, 2)}, r"num_heads: 2 values were given for 4 stages"),
        ({"merge_size": ((2, 4),)}, r"merge_size: 1 values were given for 3 mergings"),
        ({"group_size": (4, 4, 0, 2)}, r"group_size=\(4, 4, 0, 2\): expected positive values"),
        ({"crs_interval": (0, 2, 1, 1)}, r"crs_interval=\(0, 2, 1, 1\): expected positive values"),
        ({"group_type": "square"}, r"group_type='square': expected one of"),
        ({"pad_type": 2}, r"pad_type=2: expected 0"),
        ({"img_size": (64, 16)}, r"img_size=\(64, 16\): expected at least 32"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("crossformer_tiny", **{**SMALL, **options})


# The authors' checkpoints


@pytest.mark.parametrize("name", ["crossformer_tiny", "crossformerpp_small"])
def test_published_files_load(name, tmp_path, monkeypatch):
    """They hold tables of position bias, the optimizer, and settings of a class that need not be installed."""
    source = timm.create_model(name, **SMALL)
    state = dict(source.state_dict())
    for key in [key for key in state if key.endswith("attn.qkv.weight")]:
        state[key.replace("qkv.weight", "biases")] = torch.zeros(49, 2)
        state[key.replace("qkv.weight", "relative_position_index")] = torch.zeros(16, 16, dtype=torch.int64)
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    package.config = module
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="cross-scale"))
    config.__dict__["__immutable__"] = True
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "yacs", package)
        installed.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": state, "epoch": 299, "config": config}, tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth"), "num_classes": 10}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert_close(dict(model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 32}, r"with embed_dim=16, .* expected embed_dim=32"),
        ({"depths": (2, 2, 6, 1)}, r"with .*depths=\(2, 2, 4, 1\).* expected .*depths=\(2, 2, 6, 1\)"),
        ({"use_acl": True}, r"with .*use_acl=False, expected .*use_acl=True"),
    ],
)
@pytest.mark.parametrize("features_only", [False, True])
def test_checkpoints_of_other_networks_are_refused(options, message, features_only, tmp_path):
    torch.save(timm.create_model("crossformer_tiny", **SMALL).state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    with pytest.raises(ValueError, match=message):
        timm.create_model(
            "crossformer_tiny",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            features_only=features_only,
            **{**SMALL, **options},
        )


def test_where_the_weights_are_is_said():
    with pytest.raises(RuntimeError, match=r"drive\.google\.com/file/d/1YSkU9enn-ITyrbxLH13zNcBYvWSEidfq"):
        timm.create_model("crossformer_tiny", pretrained=True)
    with pytest.raises(RuntimeError, match=r"Baidu, linked from https://github\.com/cheerss/CrossFormer"):
        timm.create_model("crossformerpp_huge", pretrained=True)
