"""What is NiNformer's own: mixing weights that are resized with the image, and what is refused."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models

SMALL = {"d_model": 16, "d_ffn": 24, "num_layers": 2, "patch_size": 8, "img_size": 64, "num_classes": 10}


def create(**options) -> torch.nn.Module:
    return timm.create_model("ninformer_tiny_patch4_32", **{**SMALL, **options})


def smooth(size: int) -> torch.Tensor:
    """An image (1, 3, size, size) that is the same picture at every size."""
    line = (torch.arange(size) + 0.5) / size
    return torch.stack([line[:, None] + 0 * line, 0 * line[:, None] + line, (line[:, None] * line).sin()])[None]


@torch.no_grad()
def test_resized_mixing_weights_do_the_same_at_twice_the_size():
    """What mixes places is a function of the map: a smooth one is mixed alike on a finer grid of places."""
    mixer = create(img_size=64).double().blocks[0].mgu.mixer.token_mlp
    for parameter in mixer.parameters():
        parameter.fill_(0)
    grid, fine = (smooth(side).double() for side in (8, 16))
    mixer.fc1.weight.copy_(grid.flatten(2)[0].repeat(8, 1) / 64)
    mixer.fc2.weight.copy_(grid.flatten(2)[0].repeat(8, 1).T)
    maps = [x.permute(0, 2, 3, 1).repeat(1, 1, 1, 5) for x in (grid, fine)]
    small, large = (mixer(x) for x in maps)
    again = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert ((again - small).norm() / small.norm()).item() < 0.02


@torch.no_grad()
def test_set_input_size_changes_weights_and_not_the_function():
    model = create().eval()
    x = torch.randn(2, 3, 96, 40)
    expected = model(x)
    model.set_input_size((96, 40))
    assert model.blocks[0].mgu.mixer.token_mlp.fc1.weight.shape == (24, 12 * 5)
    assert_close(model(x), expected)


@torch.no_grad()
def test_checkpoints_of_another_image_size_are_resized(tmp_path):
    source = create().eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    model = create(img_size=96, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 3, 96, 96)
    assert_close(model(x), source(x))


def test_checkpoints_for_maps_that_are_not_square_are_refused(tmp_path):
    torch.save(create(img_size=(64, 80)).state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    assert create(img_size=(64, 80), pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match="80 positions, which are no square map"):
        create(pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("options", [{"d_model": 32}, {"d_ffn": 32}, {"num_layers": 3}], ids=str)
def test_checkpoints_of_another_network_are_refused(options, tmp_path):
    torch.save(create().state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    with pytest.raises(ValueError, match=r"a network with d_model=16, d_ffn=24, num_layers=2, expected d_model="):
        create(pretrained=True, pretrained_cfg_overlay=overlay, **options)


@torch.no_grad()
def test_places_are_told_apart():
    """There is no position encoding: the mixing weights alone know where a patch lies."""
    model = create().eval()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x), model(x.flip(-1)), rtol=1e-3)


def test_dropout_is_in_every_mlp():
    model = create(dropout=0.5).train()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} >= {0.5}
    assert create().train()(x).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 4}, r"img_size=4: expected at least a patch, 8 pixels"),
        ({"img_size": (64, 7)}, r"img_size=\(64, 7\): expected at least a patch"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_smaller_images_than_32_pixels_need_img_size():
    assert create(img_size=28, patch_size=4)(torch.randn(1, 3, 28, 28)).shape == (1, 10)
    with pytest.raises(ValueError, match="at least 28 x 28"):
        create(img_size=28)(torch.randn(1, 3, 28, 24))
    with pytest.raises(ValueError, match="at least 32 x 32"):
        create()(torch.randn(1, 3, 28, 28))
