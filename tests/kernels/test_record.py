"""record_attention: names, weights, gradients, and that nothing stays behind."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionattn.kernels import record_attention, routing_attention


class Layer(nn.Module):
    def __init__(self, regions: int, topk: int):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.regions, self.topk = regions, topk

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(3)
        return x + routing_attention(q, k, v, self.regions, self.topk).flatten(3)


class Model(nn.Module):
    """Two layers, routed and global; the first is called twice. Checkpoints as timm's models do, or always."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Layer(3, 2), Layer(1, 1)])
        self.grad_checkpointing = False
        self.always_checkpoint = None  # use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], *self.blocks):
            if self.grad_checkpointing or self.always_checkpoint is not None:
                x = checkpoint(block, x, use_reentrant=bool(self.always_checkpoint))
            else:
                x = block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


@pytest.fixture
def images():
    return torch.randn(2, 6, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def clean(model: nn.Module) -> bool:
    return not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_weights_by_layer(model, images):
    expected = model(images)
    with record_attention(model) as record:
        torch.testing.assert_close(model(images), expected)
    assert {name: len(calls) for name, calls in record.items()} == {"blocks.0": 2, "blocks.1": 1}
    routed, whole = record["blocks.0"][0], record["blocks.1"][0]
    assert routed.weights.shape == (2, 2, 36, 8)  # two regions of 2 x 2 tokens
    assert routed.indices.shape == (2, 36, 8)
    assert whole.weights.shape == (2, 2, 36, 36)
    assert whole.indices is None
    for weights in (routed.weights, whole.weights):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_weights_and_indices_give_the_output(model, images):
    with record_attention(model) as record:
        layer = model.blocks[0]
        output = model.blocks[0](images) - images
    weights, indices = record["blocks.0"][0]
    values = layer.qkv(images).unflatten(-1, (3, 2, 4))[:, :, :, 2].flatten(1, 2)  # (B, N, heads, dim)
    selected = torch.stack([values[image][indices[image]] for image in range(2)])  # (B, N, keys, heads, dim)
    rebuilt = torch.einsum("bhnk,bnkhd->bnhd", weights, selected)
    torch.testing.assert_close(rebuilt.reshape(output.shape), output)


def test_gradients_of_the_weights(model, images):
    with record_attention(model) as record:
        model(images).square().sum().backward()
    weights = record["blocks.1"][0].weights
    # Independently: the derivative along a small change of the recorded weights of the last, global layer.
    with record_attention(model):
        x = model.blocks[0](model.blocks[0](images))
    v = model.blocks[1].qkv(x).unflatten(-1, (3, 2, 4))[:, :, :, 2]
    fresh = weights.detach().clone().requires_grad_()
    output = x + torch.einsum("bhnk,bkhd->bnhd", fresh, v.flatten(1, 2)).reshape(x.shape)
    (expected,) = torch.autograd.grad(output.square().sum(), fresh)
    torch.testing.assert_close(weights.grad, expected)
    assert all(call.weights.grad is not None for calls in record.values() for call in calls)


def test_nothing_stays_after_the_block_or_an_exception(model, images):
    with record_attention(model) as record:
        model(images)
    kept = len(record["blocks.0"])
    model(images)
    assert len(record["blocks.0"]) == kept
    assert clean(model)

    with pytest.raises(RuntimeError), record_attention(model) as record:
        model(images[..., :4])  # a wrong width: fails inside the first layer
    assert clean(model)
    assert record == {}
    with record_attention(model) as record:
        model(images)
    assert set(record) == {"blocks.0", "blocks.1"}


def test_calls_outside_the_model_are_not_recorded(model, images):
    with record_attention(model) as record:
        Layer(3, 2).double()(images)
    assert record == {}


def test_blocks_do_not_nest(model):
    with record_attention(model), pytest.raises(RuntimeError, match="active already"):
        record_attention(model).__enter__()


def test_without_gradients(model, images):
    with torch.no_grad(), record_attention(model) as record:
        model(images)
    assert not record["blocks.0"][0].weights.requires_grad


def test_a_checkpointing_model_is_recorded_without_checkpoints(model, images):
    model.grad_checkpointing = True
    with record_attention(model) as record:
        output = model(images)
    output.sum().backward()  # outside the block
    assert model.grad_checkpointing
    assert [len(calls) for calls in record.values()] == [2, 1]
    assert record["blocks.0"][1].weights.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_other_checkpoints_do_not_record_twice(model, images, reentrant):
    model.always_checkpoint = reentrant
    with record_attention(model) as record:
        model(images.requires_grad_()).sum().backward()
    assert [len(calls) for calls in record.values()] == [2, 1]
    if not reentrant:  # reentrant checkpoints run the recorded forward without gradient
        assert record["blocks.0"][1].weights.grad is not None


def test_a_compiled_model_runs_uncompiled_while_recorded(model, images):
    compiled = torch.compile(model, backend="eager")
    expected = compiled(images)
    with record_attention(compiled) as record:
        torch.testing.assert_close(compiled(images), expected)
    assert {name.removeprefix("_orig_mod.") for name in record} == {"blocks.0", "blocks.1"}
    torch.testing.assert_close(compiled(images), expected)
