"""Hidden pixels on every kind of backbone, at any size and number of bands."""

import pytest
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from visionattn.errors import UserError
from visionattn.models.pretrainers import make_pretrainer
from visionattn.recipe.sections import Model
from visionattn.tasks.pretraining.losses import masked_error

FOUR = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
FAMILIES = {  # the narrowest that each allows
    "biformer_tiny": {"depth": [1] * 4, "embed_dim": [8, 8, 16, 16], "head_dim": 8, "n_win": 2, "topks": [1, 2, 4, -2]},
    "crossformer_tiny": {**FOUR, "embed_dim": 16},
    "nat_mini": {**FOUR, "embed_dim": 16},
    "dinat_isotropic_small": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "flowformer": {"depths": [1] * 4, "embed_dims": [12, 12, 24, 24], "num_heads": 2},
    "agent_deit_tiny": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "agent_pvt_tiny": {**FOUR, "embed_dims": [16, 16, 32, 32]},
    "agent_swin_tiny": {**FOUR, "embed_dim": 16},
    "agent_cswin_tiny": {"depth": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [2, 2, 2, 2]},
    "moh_transnext_small_75": {
        "depths": [1, 1, 1, 1],
        "embed_dims": [24, 24, 48, 48],
        "num_heads": [2, 2, 2, 2],
        "shared_heads": [2, 2, 1, 1],
        "active_heads": [0, 0, 1, 1],
    },
    "lgvit_96": {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16},
    "rmt_tiny": {**FOUR, "embed_dims": [16, 16, 32, 32], "projection": 16},
    "transnext_micro": {**FOUR, "embed_dims": [24, 24, 48, 48]},
    "patchconvnet_s60": {"depth": 2, "embed_dim": 32},
    "va_davit_tiny": {**FOUR, "embed_dims": [16, 16, 32, 32]},
    "va_xcit_nano_12_p16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "va_halonet26t": {},
    "va_convit_tiny": {"depth": 2, "embed_dim": 32, "num_heads": 2, "local_up_to_layer": 1},
    "va_volo_d1_224": {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 1, 1, 1]},
    "ninformer_tiny_patch4_32": {},
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {**FOUR, "embed_dim": 16},
    "test_resnet": {},
    "test_convnext": {},
}
SIZES = [(64, 64), (75, 107)]
CASES = [(name, size, (1, 3, 13)[(k + i) % 3]) for k, name in enumerate(FAMILIES) for i, size in enumerate(SIZES)]


def made(name: str, bands: int, side: tuple[int, int]):
    torch.manual_seed(0)
    return make_pretrainer(Model(name=name, args=FAMILIES[name]), bands, side, "mim")


def hidden_half(size: tuple[int, int]) -> torch.Tensor:
    cells = torch.zeros(2, 1, *size, dtype=torch.bool)
    cells[..., : size[1] // 2] = True
    return cells


def module_of(name: str) -> str:
    return timm.model_entrypoint(name).__module__


def test_every_family_is_there():
    ours = {module_of(name) for name in timm.list_models() if module_of(name).startswith("visionattn.backbones")}
    assert ours - {module_of(name) for name in FAMILIES} == {"visionattn.backbones.emcad"}  # segmenters


@pytest.mark.parametrize(("name", "size", "bands"), CASES)
def test_hidden_pixels_are_predicted_by_every_backbone(name, size, bands):
    network, images, hidden = made(name, bands, size), torch.randn(2, bands, *size), hidden_half(size)
    predicted = network(images, hidden=hidden)
    assert predicted.shape == images.shape
    error, of_mean, count = masked_error(predicted, images, hidden, torch.ones_like(hidden))
    (error / count).mean().backward()
    assert (of_mean > 0).all()
    idle = [n for n, p in network.named_parameters() if p.grad is None]
    assert len(idle) < 0.5 * len(list(network.parameters()))
    assert not [n for n in idle if n.startswith("objective.")]
    assert network.objective.fill.grad.abs().sum() > 0


def test_what_is_hidden_has_no_influence_and_what_is_seen_no_loss():
    network, images, hidden = (
        made("biformer_tiny", 3, (64, 64)).eval(),
        torch.randn(2, 3, 64, 64),
        hidden_half((64, 64)),
    )
    with torch.no_grad():
        predicted = network(images, hidden=hidden)
        assert torch.equal(predicted, network(torch.where(hidden, images + 5, images), hidden=hidden))
    valid = torch.ones_like(hidden)
    error, of_mean, count = masked_error(predicted, images, hidden, valid)
    torch.testing.assert_close(error, ((predicted - images).abs() * hidden).sum((1, 2, 3)))
    torch.testing.assert_close(of_mean, (images.abs() * hidden).sum((1, 2, 3)))
    assert count.tolist() == [3 * 64 * 32] * 2
    changed = masked_error(torch.where(hidden, predicted, 7.0), images, hidden, valid)
    assert torch.equal(changed[0], error)
    assert masked_error(predicted, images, hidden, ~hidden)[2].tolist() == [0, 0]  # hidden where nothing is known


def test_clean_statistics_are_those_of_whole_images_and_leave_training_alone():
    network = made("test_resnet", 3, (64, 64)).train()
    before = {key: value.clone() for key, value in network.state_dict().items() if not key.startswith("clean.")}
    images = torch.randn(8, 3, 64, 64) * 3 + 1
    network.clean_up([images[:4], images[4:]])
    assert all(torch.equal(before[key], network.state_dict()[key]) for key in before)
    assert network.training
    assert all(module.training for module in network.modules())
    first = next(module for module in network.encoder.modules() if isinstance(module, _BatchNorm))
    seen = []
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with network.cleaned(), torch.no_grad():
        network.eval().encoder(images)
        torch.testing.assert_close(first.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    handle.remove()
    assert torch.equal(first.running_mean, torch.zeros_like(first.running_mean))


def test_a_network_without_maps_is_refused():
    with pytest.raises(UserError, match="is a whole segmenter"):
        make_pretrainer(Model(name="emcad_pvt_v2_b0"), 3, (64, 64), "mim")
