"""What is MoH's own: heads that count at a position, their balance and how it is trained, and what is refused."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.moh import Router

SMALL = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 4, 3, 4),
    "shared_heads": (2, 1, 1, 0),
    "active_heads": (0, 2, 1, 2),
    "num_classes": 5,
}


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the authors' networks, counted
    [
        ("moh_transnext_small_75", 49_910_548),
        ("moh_transnext_small_80", 49_910_548),
        ("moh_transnext_base_75", 90_020_632),
        ("moh_transnext_base_50", 90_023_512),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


@torch.no_grad()
def test_a_position_takes_the_shared_heads_and_its_likeliest_others():
    router = Router(16, num_heads=6, shared=2, active=1).eval()
    x = torch.randn(2, 3, 5, 16)
    gates, _ = router(x)
    assert (gates > 0).sum(-1).unique().tolist() == [3]
    assert torch.equal(gates[..., 2:].argmax(-1), router.of_routed(x).argmax(-1))
    assert_close((gates[..., :2].sum(-1) / 2 + gates[..., 2:].sum(-1)), torch.full((2, 3, 5), 2.0))


def test_the_loss_tells_heads_in_balance_from_others():
    """As many positions choose each head: as many as are active; the same head always: nearly their number."""
    router = Router(4, num_heads=4, shared=0, active=1).train()
    x = 50 * torch.eye(4).view(1, 2, 2, 4)
    torch.nn.init.eye_(router.of_routed.weight)
    assert router(x)[1].item() == pytest.approx(1)
    assert router(x[:, :1, :1])[1].item() == pytest.approx(4)


def losses(network, x) -> tuple:
    logits, loss = network(x, auxiliary=True)
    (logits.square().mean() + loss).backward()
    return logits.detach(), loss.detach(), {key: p.grad for key, p in network.named_parameters()}


def test_the_loss_is_the_mean_over_routed_blocks_and_the_same_where_blocks_are_computed_again():
    torch.manual_seed(0)
    network, x = timm.create_model("moh_transnext_small_75", **SMALL).train(), torch.randn(2, 3, 64, 48)
    seen = []
    routers = [module for module in network.modules() if isinstance(module, Router) and module.active]
    handles = [router.register_forward_hook(lambda _, __, output: seen.append(output[1])) for router in routers]
    expected = losses(network, x)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    assert_close(expected[1], torch.stack(seen).mean())
    assert all(grad.any() for key, grad in expected[2].items() if "router.of_routed" in key)
    network.zero_grad()
    network.set_grad_checkpointing()
    assert_close(losses(network, x), expected)


def test_the_loss_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    network, x = timm.create_model("moh_transnext_small_75", **SMALL).train(), torch.randn(2, 3, 64, 64)
    _, expected = network(x, auxiliary=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = network(x, auxiliary=True)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert_close(loss, expected, rtol=0.1, atol=0)


def test_the_loss_compiles_in_one_graph():
    torch.manual_seed(0)
    torch.compiler.reset()
    network, x = timm.create_model("moh_transnext_small_75", **SMALL).train(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, auxiliary=True), network(x, auxiliary=True), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_without_training_there_is_no_loss():
    network, x = timm.create_model("moh_transnext_small_75", **SMALL).eval(), torch.randn(1, 3, 64, 64)
    logits, loss = network(x, auxiliary=True)
    assert loss == 0
    assert_close(logits, network(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_heads": (2, 2)}, r"shared_heads: 2 values were given for 4 stages"),
        ({"shared_heads": (1, 1, 1, 0)}, r"shared_heads, active_heads: 1 and 0 of the 2 heads"),
        ({"active_heads": (0, 2, 3, 2)}, r"shared_heads, active_heads: 1 and 3 of the 3 heads"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("moh_transnext_small_75", **{**SMALL, **options})
