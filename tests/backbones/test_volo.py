"""What is VOLO's own: the same function as timm's, token labelling, a position embedding for every size."""

import pytest
import timm
import torch
from twins import assert_same_function, share_weights

import visionattn
from visionattn.backbones.layers import position_embedding

TINY = {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (2, 4, 4, 4), "num_classes": 10}
UP_TO_100M = ["d1_224", "d1_384", "d2_224", "d2_384", "d3_224", "d3_448"]


def create(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("va_volo_d1_224", **{**TINY, **options})


def test_same_function_as_timm_when_small():
    assert_same_function(create(img_size=(96, 128)), timm.models.volo.VOLO(**TINY, img_size=(96, 128)), (96, 128))


@pytest.mark.slow
@pytest.mark.parametrize("size", [*UP_TO_100M, "d4_224"])
def test_same_function_as_timm(size):
    pixels = int(size[-3:])
    names = f"va_volo_{size}", f"volo_{size}"
    assert_same_function(*(timm.create_model(name, num_classes=10) for name in names), (pixels, pixels))


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"use_aux_head": False}], ids=str)
@torch.no_grad()
def test_same_heads_as_timm(options):
    theirs = timm.models.volo.VOLO(**TINY, **options, img_size=64)
    ours, theirs = share_weights(create(**options, img_size=64), theirs)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


# Position embedding


@pytest.mark.parametrize("size", [(225, 224), (224, 223), (225, 225)])
@torch.no_grad()
def test_a_pixel_more_or_less_moves_logits_little(size):
    model = create(img_size=224).eval()
    model.pos_embed *= 50  # as large as the features, so that it matters
    x = torch.nn.functional.interpolate(torch.randn(2, 3, 28, 28), (225, 225), mode="bicubic")
    native, other = model(x[..., :224, :224]), model(x[..., : size[0], : size[1]])
    assert (other - native).norm() < 0.05 * native.norm()


@torch.no_grad()
def test_position_embedding_is_a_picture_of_the_image():
    """A table that rises evenly gives each token, of any image, the fraction of the image at its centre."""
    places = (torch.arange(14, dtype=torch.float64) + 0.5) / 14
    table = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1)[None]
    for height, width in ((224, 224), (320, 180), (225, 500)):
        y, x = ((torch.arange(-(-side // 16), dtype=torch.float64) + 0.5) * 16 / side for side in (height, width))
        expected = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        inner = (expected > 0.15).all(-1) & (expected < 0.85).all(-1)  # the nearest entry is taken over the edge
        actual = position_embedding(table, height, width)[0]
        torch.testing.assert_close(actual[inner], expected[inner], atol=0.004, rtol=0)  # a twentieth of an entry


@torch.no_grad()
def test_set_input_size_resamples_the_embedding():
    model = create(img_size=224).eval()
    x = torch.randn(1, 3, 192, 256)
    before = model(x)
    model.set_input_size((192, 256))
    assert model.pos_embed.shape == (1, 12, 16, 64)
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_checkpoint_of_another_size_is_resampled(tmp_path):
    torch.save(create(img_size=224).state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    model = create(img_size=(96, 160), pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pos_embed.shape == (1, 6, 10, 64)
    assert model.pos_embed.std() > 0.005


# Token labelling


def test_training_returns_all_logits_and_no_box():
    model = create(return_all=True).train()
    logits, tokens, box = model(torch.randn(2, 3, 64, 80))
    assert logits.shape == (2, 10)
    assert tokens.shape == (2, 4 * 5, 10)
    assert box == (0, 0, 0, 0)
    (logits.sum() + tokens.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_evaluation_adds_half_of_the_largest_token_logits():
    model = create(return_all=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 64, 80)
    logits, tokens, _ = model(x)
    torch.testing.assert_close(model.eval()(x), logits + 0.5 * tokens.amax(1))


@torch.no_grad()
def test_tokens_are_mixed_inside_the_box_and_put_back():
    """Without attention between places, mixed tokens put back are those of each image alone."""
    model = create(return_all=True, use_mix_token=True).train()
    model.patch_embed.eval()
    model.pos_embed.zero_()
    for stage in (0, 2, 3, 4):
        model.network[stage] = torch.nn.Identity()
    x = torch.randn(3, 3, 128, 144)
    plain = model.eval().forward_train(x)
    model.train()
    model.patch_embed.eval()
    torch.manual_seed(1)
    boxes = set()
    for _ in range(5):
        logits, tokens, (top, left, bottom, right) = model(x)
        assert 0 <= top <= bottom <= 8
        assert 0 <= left <= right <= 9
        torch.testing.assert_close(tokens, plain[1])
        mixed = 0 < (bottom - top) * (right - left) < 8 * 9
        assert mixed == (not torch.allclose(logits, plain[0], atol=1e-6)) or not mixed
        boxes.add((top, left, bottom, right))
    assert len(boxes) > 1


# Records and refusals


@torch.no_grad()
def test_attention_is_recorded_for_each_layer():
    model = create().eval()
    with visionattn.record_attention(model) as record:
        model(torch.randn(1, 3, 64, 80))
    names = [f"network.{i}.0.attn" for i in (0, 2, 3, 4)] + [f"post_network.{i}.attn" for i in (0, 1)]
    assert list(record) == names
    assert record["network.2.0.attn"][0].weights.shape == (1, 4, 20, 20)
    assert record["post_network.0.attn"][0].weights.shape == (1, 4, 1, 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 24}, r"img_size=24: expected at least 32 x 32"),
        ({"global_pool": "max"}, r"global_pool='max': expected one of"),
        ({"return_all": True, "use_aux_head": False}, r"expected the auxiliary head"),
        ({"use_mix_token": True}, r"needs return_all=True"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_pooling_by_a_pruned_class_token_is_refused():
    model = create()
    model.prune_intermediate_layers([0, 1])
    with pytest.raises(ValueError, match="the class token was pruned"):
        model.reset_classifier(10, "token")
