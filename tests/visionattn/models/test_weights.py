"""Starting from weights that were saved at another size of images: what timm would make of them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

import visionattn.backbones  # noqa: F401  registers the models
from visionattn.errors import UserError
from visionattn.models.handover import start_from
from visionattn.models.segmenters import make_segmenter

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}
Rule = Callable[[Tensor, Tensor], Tensor]


def tokens(prefix: int) -> Rule:
    def resampled(table: Tensor, like: Tensor) -> Tensor:
        old, new = (round((t.shape[1] - prefix) ** 0.5) for t in (table, like))
        return resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=prefix)

    return resampled


def maps(axes: tuple[int, ...]) -> Rule:
    """Of tables whose channels are the second axis after `axes` of them have been put there."""

    def resampled(table: Tensor, like: Tensor) -> Tensor:
        size = like.permute(axes).shape[2:]
        resized = F.interpolate(table.permute(axes), size, mode="bicubic", antialias=True)
        return resized.permute(torch.argsort(torch.tensor(axes)).tolist())

    return resampled


def relative(table: Tensor, like: Tensor) -> Tensor:
    side = round((len(like) ** 0.5 + 1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about timm's interpolation
        return resize_rel_pos_bias_table(table, (side, side), like.shape)


MODELS = {  # arguments, part of the tables' names, how they are resampled
    "vit_tiny_patch16_224": (VIT, "pos_embed", tokens(1)),
    "deit_tiny_distilled_patch16_224": (VIT, "pos_embed", tokens(2)),
    "swin_tiny_patch4_window7_224": (
        {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (2, 2, 2, 2)},
        "relative_position_bias_table",
        relative,
    ),
    "cait_xxs24_224": (VIT | {"depth_token_only": 1}, "pos_embed", tokens(0)),
    "visformer_tiny": ({"embed_dim": 32, "depth": 1, "num_heads": 2, "group": 4}, "pos_embed", maps((0, 1, 2, 3))),
    "va_volo_d1_224": (
        {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 1, 1, 1)},
        "pos_embed",
        maps((0, 3, 1, 2)),
    ),
    "va_convit_tiny": (VIT | {"depth": 2, "local_up_to_layer": 1}, "pos_embed", tokens(0)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [96, 256])
def test_weights_of_another_image_size_are_resampled_by_the_rule_of_timm(name, size, tmp_path):
    arguments, part, rule = MODELS[name]
    saved = timm.create_model(name, img_size=160, num_classes=3, **arguments)
    for weight in saved.parameters():
        nn.init.normal_(weight)
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "saved.pth")
    network = timm.create_model(name, img_size=size, num_classes=5, **arguments)
    own = {key: value.clone() for key, value in network.state_dict().items()}
    line = start_from(network, tmp_path / "saved.pth", name)
    assert "resampled for the size of images" in line
    resampled = 0
    for key, weight in network.state_dict().items():
        theirs = saved.state_dict()[key]
        if part in key and theirs.shape != weight.shape:
            torch.testing.assert_close(weight, rule(theirs, weight))
            resampled += 1
        elif "head" not in key:
            assert torch.equal(weight, theirs), key
    assert resampled
    assert all(torch.equal(weight, own[key]) for key, weight in network.state_dict().items() if key == "head.weight")


def test_mixing_weights_are_resized_as_for_published_ones(tmp_path):
    small, large = (timm.create_model("ninformer_tiny_patch4_32", img_size=size, num_classes=3) for size in (32, 48))
    torch.save(small.state_dict(), tmp_path / "saved.pth")
    start_from(large, tmp_path / "saved.pth", "ninformer_tiny_patch4_32")
    small.set_input_size(48)
    for key, weight in small.state_dict().items():
        torch.testing.assert_close(large.state_dict()[key], weight)


def test_the_encoder_of_a_segmenter_is_resampled_too(tmp_path):
    small, large = (
        make_segmenter("vit_tiny_patch16_224", "fpn", 3, encoder_args=VIT | {"depth": 2, "img_size": side})
        for side in (64, 128)
    )
    torch.save(small.state_dict(), tmp_path / "saved.pth")
    start_from(large, tmp_path / "saved.pth", "vit_tiny_patch16_224")
    key = "encoder.model.pos_embed"
    expected = tokens(1)(small.state_dict()[key], large.state_dict()[key])
    torch.testing.assert_close(large.state_dict()[key], expected)


@pytest.mark.parametrize("change", [{"embed_dim": 48}, {"depth": 2}, {"class_token": False, "global_pool": "avg"}])
def test_weights_of_another_network_are_refused_at_any_size(change, tmp_path):
    saved = timm.create_model("vit_tiny_patch16_224", img_size=160, **VIT)
    torch.save(saved.state_dict(), tmp_path / "saved.pth")
    network = timm.create_model("vit_tiny_patch16_224", img_size=96, **VIT | change)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(
        UserError, match=r"saved\.pth: not a checkpoint of vit_tiny_patch16_224: .*(missing|unknown|shape)"
    ):
        start_from(network, Path(tmp_path / "saved.pth"), "vit_tiny_patch16_224")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
