"""`visionattn.accelerate`: timm's models compute the same, with our attention, and nothing else of them changes."""

import copy
import io
import warnings

import pytest
import timm
import torch
from torch import nn

import visionattn

FAMILIES = {  # family -> model, arguments, size of image, attention layers
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1)}, 64, 8),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2}, 64, 4),
    "convit": ("convit_tiny", {"img_size": 64}, 64, 12),
    "volo": ("volo_d1_224", {"img_size": 64}, 64, 20),
    "halonet": ("halonet26t", {}, 256, 3),
}


def create(family: str, **options) -> nn.Module:
    """With weights that make every layer matter."""
    name, arguments, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def images(family: str) -> torch.Tensor:
    size = FAMILIES[family][2]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def ours(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("visionattn.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_before_and_after(family):
    model, x = create(family), images(family)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(x)
    logits.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in parameters]

    assert visionattn.accelerate(model) is model
    assert len(ours(model)) == FAMILIES[family][3]
    optimizer.zero_grad()
    after = model(x)
    torch.testing.assert_close(after, logits, rtol=1e-4, atol=1e-5)
    after.square().sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item() + 1e-5)
    assert list(model.state_dict()) == keys
    optimized = optimizer.param_groups[0]["params"]
    assert all(a is b is c for a, b, c in zip(model.parameters(), parameters, optimized, strict=True))


@torch.no_grad()
def test_layers_are_recorded_keep_hooks_and_can_be_saved():
    model, x = create("volo"), images("volo")
    seen = []
    model.network[2][0].attn.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    visionattn.accelerate(model)
    logits = model(x)
    assert seen == [(2, 4, 4, 384)]
    with visionattn.record_attention(model) as record:
        model(x)
    assert list(record) == ours(model)
    file = io.BytesIO()
    model.network[2][0].attn._forward_hooks.clear()  # a lambda cannot be saved
    torch.save(model, file)
    file.seek(0)
    for same in (torch.load(file, weights_only=False), copy.deepcopy(model), visionattn.accelerate(model)):
        assert ours(same) == ours(model)
        torch.testing.assert_close(same(x), logits)


@torch.no_grad()
def test_halo_attention_takes_any_size_afterwards():
    model = visionattn.accelerate(create("halonet"))
    assert model(torch.randn(1, 3, 50, 224)).shape == (1, 10)


@torch.no_grad()
def test_attention_map_of_convit_follows_the_size():
    model = create("convit")
    layer, x = model.blocks[0].attn, torch.randn(2, 9, 192)
    layer(x)
    distances = layer.get_attention_map(x)
    layer.rel_indices = torch.zeros(1, 1, 1, 3)
    visionattn.accelerate(model)
    torch.testing.assert_close(layer.get_attention_map(x), distances)


def test_what_is_left_alone_is_named():
    model = timm.create_model("halo2botnet50ts_256", num_classes=10)
    with pytest.warns(
        UserWarning, match=r"left 1 attention layers as they were: stages.3.1.self_attn \(BottleneckAttn\)"
    ):
        visionattn.accelerate(model)
    assert len(ours(model)) == 5
    with pytest.warns(UserWarning, match=r"network.0.0.attn \(OutlookAttention with dropout\)"):
        assert not ours(visionattn.accelerate(create("volo", attn_drop_rate=0.1)))


def test_the_name_of_a_model_is_refused():
    with pytest.raises(TypeError, match=r"model='davit_tiny': .* accelerate\(timm.create_model\('davit_tiny'\)\)"):
        visionattn.accelerate("davit_tiny")


def test_our_own_models_stay_as_they_are():
    model = timm.create_model("va_volo_d1_224", layers=(1, 1, 1, 1))
    kinds = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visionattn.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
