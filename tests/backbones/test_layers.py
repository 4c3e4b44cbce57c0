"""Linear layers in inference on a CPU: PyTorch's own numbers, and whoever looks on or changes layers is heard."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionattn.backbones.layers import Mlp, linear

SHAPES = [(1, 16), (7, 16), (0, 16), (2, 3, 5, 16), (2, 9000, 16)]


def modules(dtype: torch.dtype = torch.float32) -> list:
    torch.manual_seed(0)
    with_bias, without, mlp = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), Mlp(16, 480, drop=0.1)
    return [
        (m.to(dtype).eval(), lambda x, m=m: m(x) if isinstance(m, Mlp) else linear(m, x))
        for m in (with_bias, without, mlp)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_gives_the_numbers_of_training_mode(shape, dtype):
    x = torch.randn(*shape, 2, dtype=torch.float64)[..., 0].to(dtype)  # not contiguous
    for _, call in modules(dtype):
        expected = call(x).detach()
        with torch.no_grad():
            found = call(x)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_hooks_are_called():
    x, seen = torch.randn(4, 16), []
    for module, call in modules():
        for part in module.modules():
            part.register_forward_hook(lambda part, *_: seen.append(part))
        call(x)
        assert seen == [*list(module.children()), module]
        seen.clear()


@torch.no_grad()
def test_changed_layers_are_used():
    x = torch.randn(4, 16)
    (layer, call), _, (mlp, call_mlp) = modules()
    torch.nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(call(x), layer(x))
    mlp.act = nn.ReLU()
    torch.testing.assert_close(call_mlp(x), mlp.fc2(mlp.fc1(x).relu()))
    mlp.act = nn.GELU(approximate="tanh")
    torch.testing.assert_close(call_mlp(x), mlp.fc2(mlp.act(mlp.fc1(x))))
    assert not torch.equal(call_mlp(x), mlp.train()(x))  # dropout


@torch.no_grad()
def test_autocast_computes_in_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert all(call(torch.randn(4, 16)).dtype == torch.bfloat16 for _, call in modules())


def test_operations_are_counted():
    x, counts = torch.randn(5, 16), []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            for _, call in modules():
                call(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 5 * 16 * (24 + 24 + 480 + 480)
