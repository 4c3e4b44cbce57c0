"""What is PatchConvNet's own: where class tokens look, a token for each class, published weights, what is refused."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.kernels import record_attention

SMALL = {"embed_dim": 32, "depth": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "parameters", "scale"),  # of the authors' networks, counted
    [
        ("patchconvnet_s60", 25_231_096, 1e-4),
        ("patchconvnet_s120", 47_723_896, 1e-6),
        ("patchconvnet_b60", 99_388_936, 1e-6),
        ("patchconvnet_b120", 188_611_336, 1e-6),
        ("patchconvnet_l60", 176_009_576, 1e-6),
        ("patchconvnet_s60_multi", 25_614_712, 1e-4),
    ],
)
def test_sizes(name, parameters, scale):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters
    assert timm.create_model(name, embed_dim=32, depth=1).blocks[0].gamma_1.unique().item() == pytest.approx(scale)


@torch.no_grad()
def test_rows_and_columns_are_not_confused():
    """The authors' code takes 8 x 32 positions, of 128 x 512 pixels, for 16 x 16."""
    model = timm.create_model("patchconvnet_s60", **SMALL, init_scale=1.0).eval()
    x = torch.randn(1, 3, 128, 512)
    for block in model.blocks:
        torch.nn.init.constant_(block.attn.se.fc2.weight, 0)  # the gate, which sees the whole map
    changed = x.clone()
    changed[..., 256:272] += 1  # columns that no position reaches from 8 positions away
    maps, others = (model.forward_intermediates(y, intermediates_only=True)[-1] for y in (x, changed))
    differs = (maps - others).abs().amax((0, 1, 2)) > 1e-6
    assert differs[16]
    assert not differs[:10].any()
    assert not differs[24:].any()


@torch.no_grad()
@pytest.mark.parametrize(("name", "tokens", "keys"), [("patchconvnet_s60", 1, 25), ("patchconvnet_s60_multi", 5, 24)])
def test_class_tokens_show_where_they_look(name, tokens, keys):
    """At themselves and the 4 x 6 patches, or, where there is one of each class, at the patches alone."""
    model = timm.create_model(name, **SMALL).eval()
    with record_attention(model) as record:
        model(torch.randn(2, 3, 64, 96))
    (attention,) = record["blocks_token_only.0.attn"]
    assert attention.weights.shape == (2, 1, tokens, keys)
    assert attention.indices is None
    assert_close(attention.weights.sum(-1), torch.ones(2, 1, tokens))


@torch.no_grad()
def test_the_logit_of_a_class_comes_from_its_own_token():
    model = timm.create_model("patchconvnet_s60_multi", **SMALL, init_scale=1.0).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    model.cls_token[:, 3] = torch.randn(32)
    changed = (model(x) - before).abs()[0] > 1e-6
    assert changed.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("classes", [5, 3])
def test_weights_with_a_token_for_each_class_load_for_other_classes(classes, tmp_path):
    """Tokens and classifiers of other classes start anew; all else is taken."""
    theirs = timm.create_model("patchconvnet_s60_multi", **SMALL)
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pth")
    options = {**SMALL, "num_classes": classes}
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    ours = timm.create_model("patchconvnet_s60_multi", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    same = classes == 5
    assert ours.cls_token.shape == (1, classes, 32)
    assert torch.equal(ours.cls_token, theirs.cls_token) == same
    assert torch.equal(ours.head.weight, theirs.head.weight) == same
    assert_close(dict(ours.blocks.state_dict()), dict(theirs.blocks.state_dict()), rtol=0, atol=0)


@torch.no_grad()
def test_a_token_for_each_class_follows_the_classifier():
    model = timm.create_model("patchconvnet_s60_multi", **SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    model.reset_classifier(7)
    assert model.forward_features(x).shape == (2, 7 + 16, 32)
    assert model(x).shape == (2, 7)
    model.reset_classifier(4, "avg")
    assert_close(
        model.forward_head(model.forward_features(x), pre_logits=True), model.forward_features(x)[:, 4:].mean(1)
    )
    assert model(x).shape == (2, 4)
    model.reset_classifier(0, "token")
    assert_close(model(x), model.forward_features(x)[:, :4].mean(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 36}, r"embed_dim=36: expected a multiple of 8"),
        ({"num_heads": 3}, r"embed_dim=32: .* and of num_heads=3"),
        ({"global_pool": "max"}, r"global_pool='max'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("patchconvnet_s60", **{**SMALL, **options})


def test_checkpoints_of_another_network_are_refused(tmp_path):
    torch.save(timm.create_model("patchconvnet_s60", **SMALL).state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    with pytest.raises(ValueError, match="the checkpoint has 3 blocks, and the model 4"):
        timm.create_model("patchconvnet_s60", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "depth": 4})
