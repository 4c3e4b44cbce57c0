"""Families that timm has too: the same function as timm's model of the same name, keys and published weights."""

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from twins import assert_same_function

import visionattn

NO_TWIN = {f"va_halonet_h{i}" for i in range(8)}  # the paper's; timm's own h1 is another network
TWINS = [
    name
    for name in timm.list_models("va_*")
    if name not in NO_TWIN and timm.model_entrypoint(name).__module__.startswith("visionattn.backbones.")
]
SMALLEST = {"va_davit_tiny", "va_xcit_nano_12_p16_224", "va_convit_tiny", "va_volo_d1_224", "va_sehalonet33ts"}

# Small networks that have everything, at sizes that patches and windows divide, or where timm's pads, do not.
SMALL = {
    "davit": ("davit_tiny", {"depths": (1, 2), "embed_dims": (32, 64), "num_heads": (1, 2)}, [(56, 56), (45, 61)]),
    "xcit": ("xcit_tiny_12_p16_224", {"depth": 2, "embed_dim": 64, "eta": 0.5}, [(64, 48), (45, 61)]),
    "xcit without tokens_norm": ("xcit_nano_12_p8_224", {"depth": 2, "embed_dim": 32}, [(64, 48)]),
    "convit": (
        "convit_tiny",
        {"depth": 4, "embed_dim": 16, "num_heads": 4, "local_up_to_layer": 2, "img_size": 80},
        [(80, 80)],
    ),
}

# Every size up to 100 M parameters, and one larger, at its own size. VOLO and HaloNet: in their own test files.
SIZES = {
    "davit": ["tiny", "small", "base", "large"],
    "xcit": [
        *(f"{size}_p{patch}_224" for size in ("nano_12", "tiny_12", "tiny_24", "small_12") for patch in (16, 8)),
        *("small_24_p16_224", "small_24_p8_224", "medium_24_p16_224", "medium_24_p8_224", "large_24_p16_224"),
    ],
    "convit": ["tiny", "small", "base"],
}


def twins(name: str, **options) -> list[torch.nn.Module]:
    return [timm.create_model(f"{prefix}{name}", num_classes=10, **options) for prefix in ("va_", "")]


@pytest.mark.parametrize("network", SMALL)
def test_same_function_as_timm_when_small(network):
    name, options, sizes = SMALL[network]
    for size in sizes:
        assert_same_function(*twins(name, **options), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{family}_{size}" for family, sizes in SIZES.items() for size in sizes])
def test_same_function_as_timm(name):
    assert_same_function(*twins(name), (224, 224))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALLEST else pytest.mark.slow) for name in TWINS]
)
def test_same_parameters_as_timm(name):
    """Keys in timm's order, so that the state of an optimizer can move too."""
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), timm.create_model(name.removeprefix("va_"))
    shapes = [[(key, value.shape) for key, value in model.state_dict().items()] for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", TWINS)
def test_same_published_weights_as_timm(name):
    """Tags, addresses, licences and how to prepare images."""
    ours, theirs = (get_arch_pretrained_cfgs(arch) for arch in (name, name.removeprefix("va_")))
    assert {key.removeprefix("va_") for key in ours} == set(theirs)
    for key, cfg in theirs.items():
        for field in ("hf_hub_id", "url", "license", "input_size", "crop_pct", "interpolation", "mean", "std"):
            assert getattr(ours[f"va_{key}"], field) == getattr(cfg, field), (key, field)
    if any(cfg.has_weights for cfg in theirs.values()):
        assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(name.removeprefix("va_")).tag


@pytest.mark.parametrize("network", SMALL)
@torch.no_grad()
def test_attention_is_recorded_for_each_layer(network):
    name, options, sizes = SMALL[network]
    model, x = twins(name, **options)[0].eval(), torch.randn(2, 3, *sizes[-1])
    with visionattn.record_attention(model) as record:
        recorded = model(x)
    torch.testing.assert_close(recorded, model(x), rtol=1e-4, atol=1e-5)
    assert set(record) == {layer for layer, _ in model.named_modules() if layer.endswith(".attn")}
    for attention in record.values():
        weights = attention[0].weights
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("va_davit_tiny", {"embed_dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)}),
        ("va_davit_tiny", {"depths": (1, 1, 2, 1)}),
        ("va_xcit_nano_12_p16_224", {"embed_dim": 64}),
        ("va_xcit_nano_12_p16_224", {"depth": 2}),
        ("va_convit_tiny", {"num_heads": 2}),
        ("va_convit_tiny", {"depth": 11}),
        ("va_volo_d1_224", {"embed_dims": (96, 192, 192, 192)}),
        ("va_volo_d1_224", {"layers": (4, 4, 7, 2)}),
        ("va_halonet26t", {"channels": (256, 512, 1024, 1536)}),
        ("va_halonet26t", {"blocks": ("cc", "cc", "ca", "aaa")}),
    ],
)
def test_checkpoints_of_another_configuration_are_refused(name, other):
    weights = timm.create_model(name, **other).state_dict()
    with pytest.raises(ValueError, match=r"of the checkpoint is of|the checkpoint has .* blocks"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
