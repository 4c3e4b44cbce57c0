"""What Agent Attention's networks have of their own: tables for other sizes, who sees whom, what is refused."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.layers import stretch
from visionattn.kernels import record_attention

SMALL = {
    "agent_deit_tiny": {"embed_dim": 24, "depth": 2},
    "agent_pvt_tiny": {"embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1)},
    "agent_swin_tiny": {"embed_dim": 12, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 2)},
    "agent_cswin_tiny": {"embed_dim": 16, "depth": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)},
}
each_kind = pytest.mark.parametrize("name", SMALL)


def small(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name], "num_classes": 5, **options}).eval()


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the authors' networks, counted
    [
        ("agent_deit_tiny", 6_015_640),
        ("agent_deit_small", 22_647_112),
        ("agent_deit_small_448", 23_070_472),
        ("agent_deit_base", 87_204_904),
        ("agent_pvt_tiny", 11_570_352),
        ("agent_pvt_small", 20_635_066),
        ("agent_pvt_medium", 35_921_746),
        ("agent_pvt_medium_256", 36_083_682),
        ("agent_pvt_large", 48_738_180),
        ("agent_swin_tiny", 28_902_964),
        ("agent_swin_small", 49_666_684),
        ("agent_swin_small_288", 49_707_964),
        ("agent_swin_base", 88_095_096),
        ("agent_swin_base_384", 88_305_016),
        ("agent_cswin_tiny", 20_458_672),
        ("agent_cswin_small", 32_814_100),
        ("agent_cswin_base", 73_249_696),
        ("agent_cswin_base_384", 73_328_416),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


@each_kind
@torch.no_grad()
def test_another_size_is_the_same_through_the_input_the_set_size_and_the_checkpoint(name, tmp_path):
    """In float64: tables that are stretched as they are used, for good, and as weights are loaded."""
    network, x = small(name, img_size=64).double(), torch.randn(2, 3, 96, 96, dtype=torch.float64)
    expected = network(x)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    options = {} if name != "agent_swin_tiny" else {"window_size": 2}  # as it has of the map at 64 pixels
    loaded = small(name, img_size=96, pretrained=True, pretrained_cfg_overlay=overlay, **options).double()
    assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
    network.set_input_size(96)
    assert_close(network(x), expected)
    shapes = {key: value.shape for key, value in loaded.state_dict().items()}
    assert {key: value.shape for key, value in network.state_dict().items()} == shapes


@each_kind
@torch.no_grad()
def test_every_position_sees_the_whole_map_through_agents(name):
    network = small(name)
    with record_attention(network) as record:
        network(torch.randn(1, 3, 64, 96))
    (attention,) = next(iter(record.values()))
    tokens = 1 + 4 * 6 if "deit" in name else 16 * 24
    assert attention.weights.shape[2:] == (tokens, tokens)
    assert attention.indices is None
    assert (attention.weights > 0).all()
    assert_close(attention.weights.sum(-1), torch.ones(attention.weights.shape[:-1]))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("source", "target"), [(7, 7), (7, 3), (7, 13), (1, 4)])
def test_stretching_is_interpolation(source, target, mode):
    x = torch.randn(2, source, 5, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x[:, None], (target, 5), mode=mode)[:, 0]
    assert_close(stretch(x, 1, target, mode), expected)


@torch.no_grad()
def test_windows_of_agents_have_to_divide_the_map():
    network = small("agent_swin_tiny", agent_window=4)
    assert network(torch.randn(1, 3, 128, 128)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"windows of agents, 4 x 4, do not divide a map of 16 x 18"):
        network(torch.randn(1, 3, 64, 72))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agent_deit_tiny", {"agent_num": (9, 9)}, r"agent_num=\(9, 9\): expected 4 numbers"),
        ("agent_deit_tiny", {"agent_num": (10, 9, 9, 9)}, r"agent_num=10: expected square numbers"),
        ("agent_pvt_tiny", {"attn_type": "AAB"}, r"attn_type='AAB': expected A, B or M for each of 4 stages"),
        ("agent_swin_tiny", {"attn_type": "AAMB"}, r"attn_type='AAMB': .*, then a digit for each M"),
        ("agent_cswin_tiny", {"attn_type": "AAXB"}, r"attn_type='AAXB'"),
        ("agent_pvt_tiny", {"img_size": 16}, r"img_size=16: expected at least 32 x 32 pixels"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, **options)
