"""Linear layers in inference on a CPU: PyTorch's own numbers, and whoever looks on or changes layers is heard."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from visionattn.backbones.layers import Mlp, conv_norm, linear

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
            actual = call(x)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_compiled_layers_are_kept_whole_and_exported_ones_are_not():
    torch.compiler.reset()
    _, _, mlp = modules()
    images = [torch.randn(2, tokens, 16) for tokens in (700, 9000, 2000)]
    for module, call in (modules()[0], modules()[1], mlp):
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for x in images:
            torch.testing.assert_close(compiled(x), call(x))
        assert "visionattn.linears" in str(backend.graphs[-1].code)
        assert len(backend.graphs) <= 3
        assert "visionattn" not in str(torch.export.export(module, (images[1],)).graph)


def watched(module: nn.Module, called: list) -> None:
    """Appends the module to called whenever it is called, by a forward of its own, as accelerate does."""
    original = module.forward

    def forward(*args):
        called.append(module)
        return original(*args)

    module.forward = forward


WATCHES = {
    "forward hook": lambda module, called: module.register_forward_hook(lambda m, *_: called.append(m)),
    "forward pre-hook": lambda module, called: module.register_forward_pre_hook(lambda m, *_: called.append(m)),
    "forward": watched,
}


@pytest.mark.parametrize("tokens", [4, 9000])
@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
@torch.no_grad()
def test_whatever_watches_a_layer_is_called_once(watch, tokens):
    for module, call in modules():
        called = []
        for layer in module.modules():
            watch(layer, called)
        call(torch.randn(2, tokens, 16))
        layers = list(module.modules())
        assert sorted(map(layers.index, called)) == list(range(len(layers)))


@torch.no_grad()
def test_hooks_of_all_modules_are_called_once():
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        for module, call in modules():
            call(torch.randn(2, 9000, 16))
            assert called == [*module.children(), module]
            called.clear()
    finally:
        handle.remove()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


@torch.no_grad()
def test_changed_layers_are_used(monkeypatch):
    x = torch.randn(4, 16)
    (layer, call), _, (mlp, call_mlp) = modules()
    expected = 2 * call(x)
    for changed, attribute, value in ((layer, "__class__", Doubled), (nn.Linear, "forward", Doubled.forward)):
        with monkeypatch.context() as patch:
            patch.setattr(changed, attribute, value)
            torch.testing.assert_close(call(x), expected)
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.func's own code
@torch.no_grad()
def test_forward_derivatives_and_vmap():
    """They do not need gradients to be enabled."""
    x, direction, step = torch.randn(3, 5, 16), torch.randn(3, 5, 16), 1e-3
    for _, call in modules():
        tangent = torch.func.jvp(call, (x,), (direction,))[1]
        difference = (call(x + step * direction) - call(x - step * direction)) / (2 * step)
        torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-2)
        with torch.autograd.forward_ad.dual_level():
            y = call(torch.autograd.forward_ad.make_dual(x, direction))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, tangent)
        torch.testing.assert_close(torch.func.vmap(call)(x), call(x))


def test_operations_are_counted():
    x, counts = torch.randn(5, 16), []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            for _, call in modules():
                call(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 5 * 16 * (24 + 24 + 480 + 480)


def normalised(**options) -> nn.BatchNorm2d:
    """A norm that is not the identity."""
    norm = nn.BatchNorm2d(8, **options)
    norm(torch.randn(16, 8, 4, 4) * 3 + 1)
    return norm.eval()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_convolution_with_its_norm(bias, padding_mode, options):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 8, 3, 2, padding=1, bias=bias, padding_mode=padding_mode), normalised(**options)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(conv_norm(x, conv, norm), norm(conv(x)), rtol=1e-4, atol=1e-5)
    for watch in WATCHES.values():
        called = []
        watch(conv, called)
        watch(norm, called)
        conv_norm(x, conv, norm)
        assert called == [conv, norm]
        for layer in (conv, norm):
            layer.__dict__.pop("forward", None)
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
    assert torch.equal(conv_norm(x, conv, nn.Identity()), conv(x))
