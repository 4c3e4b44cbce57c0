"""Low-rank adapters in networks of all tasks and of timm's own models, and what they are merged to."""

import importlib.metadata

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from visionattn.errors import UserError
from visionattn.models.adapters import adapt, merged, remove, trained_parameters
from visionattn.models.detectors import Detector, make_detector
from visionattn.models.segmenters import make_segmenter

TINY = {"depth": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "head_dim": 16, "n_win": 2, "topks": [1, 2, 4, -2]}
CONVNEXT = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 64}


def adapters_of(network: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in network.named_parameters() if ".lora_" in key}


def filled(network: nn.Module) -> nn.Module:
    """With adapters that change something, in float64."""
    for parameter in adapters_of(network.double()).values():
        nn.init.normal_(parameter, std=0.1)
    return network


def result(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a classifier, a segmenter or a detector."""
    return (
        torch.cat([y.flatten() for y in network.decoder(network.encoder(x))])
        if isinstance(network, Detector)
        else network(x)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=2, num_classes=3),
        lambda: make_segmenter("biformer_tiny", "segformer", 3, encoder_args=TINY),
        lambda: make_segmenter("convnext_tiny", "fpn", 3, encoder_args=CONVNEXT),
        lambda: make_detector("biformer_tiny", "fcos", 3, args=TINY, detector_args={"fpn_channels": 16, "convs": 1}),
        lambda: make_detector("biformer_tiny", "rt_detr", 3, args=TINY, detector_args={"queries": 10, "layers": 1}),
    ],
    ids=["timm's transformer", "segmenter", "segmenter over timm's encoder", "detector", "detector of queries"],
)
def test_only_adapters_and_what_is_above_the_backbone_are_trained(make):
    network, plain = make().eval(), make().eval()
    before = {key for key, p in network.named_parameters() if p.requires_grad}
    adapt(network, 4, "of the test", (3, 64, 64))
    filled(network)
    trained = {key for key, p in network.named_parameters() if p.requires_grad}
    above = {key for key in before if key.startswith(("decoder.", "head"))}
    assert above
    assert trained == above | set(adapters_of(network))
    plain.double().load_state_dict(merged(network.state_dict()))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_close(result(network.eval(), x), result(plain.eval(), x))
    result(network, x).square().sum().backward()
    assert not [key for key, p in adapters_of(network).items() if p.grad is None or not p.grad.any()]


def test_a_layer_whose_weights_are_read_without_a_call_is_left_out_and_named():
    network = timm.create_model("swinv2_tiny_window8_256", **SWIN, num_classes=3)
    adapt(network, 2, "swinv2", (3, 64, 64))
    adapted = {key.partition(".lora_")[0] for key in adapters_of(filled(network))}
    assert any(key.endswith("mlp.fc1") for key in adapted)
    assert not any(key.endswith("attn.qkv") for key in adapted)
    assert "attn.qkv" in trained_parameters(network).splitlines()[-1]
    network(torch.randn(1, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert not [key for key, p in adapters_of(network).items() if p.grad is None]


def test_checkpointed_blocks_train_their_adapters_too():
    network = timm.create_model("biformer_tiny", **TINY, num_classes=3)
    adapt(network, 2, "biformer_tiny", (3, 64, 64))
    network.set_grad_checkpointing()
    filled(network).train()(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert not [key for key, p in adapters_of(network).items() if p.grad is None or not p.grad.any()]


def test_the_table_counts_what_is_trained():
    network = timm.create_model("biformer_tiny", **TINY, num_classes=3)
    assert trained_parameters(network) == ""
    adapt(network, 2, "biformer_tiny", (3, 64, 64))
    rows = [line.split() for line in trained_parameters(network).splitlines()[1:]]
    counts = {name: (int(trained.replace(",", "")), int(of.replace(",", ""))) for name, trained, of, _ in rows}
    adapters = sum(p.numel() for p in adapters_of(network).values())
    assert counts["stages"][0] == adapters > 0
    assert counts["head"] == (3 * 33, 3 * 33)
    assert counts["norm"][0] == 0
    assert counts["all"] == (adapters + 3 * 33, sum(p.numel() for p in network.parameters()))


def test_adapters_are_taken_off():
    network = timm.create_model("biformer_tiny", **TINY, num_classes=3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    adapt(network, 2, "biformer_tiny", (3, 64, 64))
    remove(filled(network).float())
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_model_with_parts_of_peft_s_names_is_not_taken_for_an_adapted_one():
    """timm's DLA calls its stem base_layer."""
    state = timm.create_model("dla46_c", num_classes=3).state_dict()
    assert merged(state) == state


def test_without_peft_it_is_said_how_to_get_it(monkeypatch):
    def found(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(UserError, match=r"^model.adapter needs peft: pip install 'visionattn\[adapt\]'$"):
        adapt(timm.create_model("biformer_tiny", **TINY), 2, "biformer_tiny", (3, 64, 64))
