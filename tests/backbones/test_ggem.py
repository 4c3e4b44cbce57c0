"""Group generalized mean pooling on every classifier of ours: `global_pool="ggem"`."""

import pytest
import timm
import torch
from test_registry import FAST, create, images
from torch.testing import assert_close

from visionattn.backbones.layers import GGeM


@pytest.mark.parametrize("power", [1.0, 60.0])
def test_it_lies_between_the_mean_and_the_largest(power):
    x = torch.rand(2, 49, 128, dtype=torch.float64) + 0.5
    pool = GGeM(128).double()
    torch.nn.init.constant_(pool.p, power)
    assert_close(pool(x), x.mean(1) if power == 1 else x.amax(1), rtol=0 if power == 1 else 0.08, atol=1e-12)


def test_maps_are_pooled_as_tokens_are():
    x, pool = torch.randn(2, 5, 6, 128), GGeM(128)
    assert_close(pool(x.permute(0, 3, 1, 2)), pool(x.flatten(1, 2)))
    assert len(pool.p) == 2
    assert len(GGeM(96).p) == 1


@pytest.mark.parametrize("name", sorted(FAST))
def test_every_classifier_can_pool_so(name, tmp_path):
    """As it is made, with weights that have no powers yet, and instead of another pooling."""
    torch.manual_seed(0)
    other, x = create(name, num_classes=5), images(name, 32)
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    network = create(name, global_pool="ggem", num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    network.train()(x).square().sum().backward()
    (pool,) = [module for module in network.modules() if isinstance(module, GGeM)]
    assert pool.p.grad.any()
    network.eval()
    features = network.forward_features(x)
    assert network.forward_head(features, pre_logits=True).shape == (2, network.head_hidden_size)
    network.reset_classifier(5, "avg")
    assert not [module for module in network.modules() if isinstance(module, GGeM)]
    network.reset_classifier(3, "ggem")
    assert network(x).shape == (2, 3)
    assert [module for module in network.modules() if isinstance(module, GGeM)]


def test_half_precision_pools_in_float32():
    x, pool = 0.05 * torch.rand(2, 49, 64), GGeM(64)
    assert_close(pool.half()(x.half()).float(), pool.float()(x), rtol=2e-3, atol=0)


def test_no_such_pooling_is_still_refused():
    with pytest.raises(ValueError, match="global_pool='gem'"):
        timm.create_model("va_convit_tiny", global_pool="gem")
