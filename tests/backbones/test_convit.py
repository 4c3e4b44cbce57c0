"""What is ConViT's own: heads that start as a convolution, gates, a position for every size of image."""

import pytest
import timm
import torch

import visionattn

TINY = {"depth": 3, "embed_dim": 16, "num_heads": 9, "local_up_to_layer": 2, "num_classes": 10}


def create(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("va_convit_tiny", **{**TINY, **options}).eval()


# Heads that start as a convolution


@torch.no_grad()
def test_each_head_attends_to_its_neighbour_before_training():
    """Head 0 above and to the left, then down each column of a 3 x 3 kernel."""
    model = create()
    with visionattn.record_attention(model) as record:
        model(torch.randn(2, 3, 160, 192))
    for block in (0, 1):
        weights = record[f"blocks.{block}.attn"][0].weights.unflatten(2, (10, 12))[:, :, 1:-1, 1:-1]
        favourite = weights.argmax(-1)  # (B, heads, rows, columns), of inner queries
        down, right = torch.arange(9) % 3 - 1, torch.arange(9) // 3 - 1
        rows, columns = torch.arange(1, 9)[:, None], torch.arange(1, 11)
        expected = (rows + down[:, None, None]) * 12 + columns + right[:, None, None]
        torch.testing.assert_close(favourite, expected.expand_as(favourite))


@pytest.mark.parametrize(("heads", "strength"), [(4, 1.0), (9, 2.0), (16, 0.5)])
@torch.no_grad()
def test_heads_are_centred_on_the_places_of_a_kernel(heads, strength):
    attn = create(num_heads=heads, locality_strength=strength).blocks[0].attn
    rows, columns = (logits.softmax(-1) for logits in attn.position_logits(15, 13))
    weights = rows[:, 7, :, None] * columns[:, 6, None]  # of the query in the middle
    down = weights.sum(2) @ (torch.arange(15.0) - 7)
    right = weights.sum(1) @ (torch.arange(13.0) - 6)
    side = int(heads**0.5)
    places = torch.arange(side) - (side - 1) / 2
    torch.testing.assert_close(down, places.repeat(side), atol=2e-3, rtol=0)
    torch.testing.assert_close(right, places.repeat_interleave(side), atol=2e-3, rtol=0)
    spread = weights.amax((1, 2))
    torch.testing.assert_close(spread, spread[:1].expand(heads), rtol=1e-3, atol=0)


@torch.no_grad()
def test_a_gate_mixes_position_and_content():
    """An open gate leaves the position alone, whatever the image; a closed one content alone, wherever it is."""
    model, x = create(), torch.randn(2, 3, 96, 96)
    recorded = {}
    for gate in (-50.0, 50.0):
        model.blocks[0].attn.gating_param.fill_(gate)
        with visionattn.record_attention(model) as record:
            model(x)
        recorded[gate] = record["blocks.0.attn"][0].weights
    position = model.blocks[0].attn.position_logits(6, 6).softmax(-1)
    torch.testing.assert_close(recorded[50.0], position.expand(2, -1, -1, -1))
    assert (recorded[-50.0][0] - recorded[-50.0][1]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(5, 7), (9, 7)])
@torch.no_grad()
def test_small_and_large_maps_have_the_same_positions(size):
    attn = create().blocks[0].attn
    torch.nn.init.normal_(attn.pos_proj.weight)
    logits = attn.position_logits(*size)
    if isinstance(logits, tuple):
        rows, columns = logits
        logits = (rows[:, :, None, :, None] + columns[:, None, :, None]).flatten(3).flatten(1, 2)
    place = torch.cartesian_prod(*(torch.arange(float(length)) for length in size))
    down, right = (place - place[:, None]).unbind(-1)
    expected = attn.pos_proj(torch.stack([right, down, right**2 + down**2], -1)).movedim(-1, 0)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("local_up_to_layer", [0, 1, 2])
@torch.no_grad()
def test_the_class_token_joins_after_the_local_blocks(local_up_to_layer):
    model = create(local_up_to_layer=local_up_to_layer)
    with visionattn.record_attention(model) as record:
        model(torch.randn(1, 3, 64, 80))
    tokens = [record[f"blocks.{i}.attn"][0].weights.shape[-1] for i in range(3)]
    assert tokens == [20] * local_up_to_layer + [21] * (3 - local_up_to_layer)
    assert sum("gating_param" in key for key in model.state_dict()) == local_up_to_layer


# Sizes of images


@pytest.mark.parametrize("size", [(225, 224), (224, 223), (225, 225)])
@torch.no_grad()
def test_a_pixel_more_or_less_moves_logits_little(size):
    model = create()
    model.pos_embed *= 50  # as large as the patches, so that it matters
    x = torch.nn.functional.interpolate(torch.randn(2, 3, 28, 28), (225, 225), mode="bicubic")
    native, other = model(x[..., :224, :224]), model(x[..., : size[0], : size[1]])
    assert (other - native).norm() < 0.1 * native.norm()


@torch.no_grad()
def test_set_input_size_resamples_the_table():
    model, x = create(), torch.randn(1, 3, 192, 256)
    before = model(x)
    model.set_input_size((192, 256))
    assert model.pos_embed.shape == (1, 12 * 16, 144)
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_checkpoint_of_another_size_is_resampled():
    overlay = {"state_dict": create().state_dict(), "num_classes": 10}
    model = create(img_size=(96, 160), pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pos_embed.shape == (1, 6 * 10, 144)
    assert model.pos_embed.std() > 0.005


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 24}, r"img_size=24: expected at least 32 x 32"),
        ({"global_pool": "max"}, r"global_pool='max': expected one of"),
        ({"local_up_to_layer": 3}, r"local_up_to_layer=3 of 3 blocks: expected 0 to 2"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_pooling_by_a_pruned_class_token_is_refused():
    model = create()
    model.prune_intermediate_layers([0, 1])
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 16, 144)
    with pytest.raises(ValueError, match="the class token was pruned"):
        model.reset_classifier(10, "token")
