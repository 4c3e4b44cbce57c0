"""record_attention: names, weights, gradients, where they lie, and that nothing stays behind."""

from contextlib import nullcontext

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionattn.backbones import biformer, crossformer, davit, halonet, nat, volo
from visionattn.kernels import record_attention, routing_attention
from visionattn.kernels._record import Attention, attention_in_backward


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
    weights, indices = record["blocks.0"][0][:2]
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


SIZE = (13, 9)  # of a layer's map, which neither windows nor regions divide
LAYERS = {  # and what computes the values
    "window, padded": (lambda: davit.WindowAttention(16, 2, 7), "qkv"),
    "routing, padded": (lambda: biformer.BiLevelRoutingAttention(16, 2, 4, 3, side_dwconv=0), "qkv.qkv"),
    "routing, values padded": (lambda: biformer.RefactoredRoutingAttention(16, 2, 4, 3, side_dwconv=0), "qkv_linear"),
    "neighborhood, padded": (lambda: nat.NeighborhoodAttention(16, 2, 5, 2), "qkv"),
    "short distance": (lambda: crossformer.GroupAttention(64, 2, 4, 1), "qkv"),
    "long distance": (lambda: crossformer.GroupAttention(64, 2, 2, 2), "qkv"),
    "long distance, padded around": (
        lambda: crossformer.GroupAttention(64, 2, 2, 2, pad_type=1, no_mask=True),
        "qkv",
    ),
    "outlook, values padded": (lambda: volo.OutlookAttention(16, 2), "v"),
    "timm's Swin": (lambda: SwinTransformerBlock(16, SIZE, 2, window_size=4, shift_size=2), "attn.qkv"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_lie_on_the_map_of_the_layer(name):
    """The layer's values at the recorded places, mixed by the recorded weights, are what the layer makes of its map."""
    torch.manual_seed(0)
    make, projection = LAYERS[name]
    layer = make().double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    swin = isinstance(layer, SwinTransformerBlock)
    if swin:  # x + attention alone
        layer.norm1, layer.attn.proj, layer.mlp = nn.Identity(), nn.Identity(), Nothing()
    for last in ("proj", "wo", "output_linear"):
        if hasattr(layer, last):
            setattr(layer, last, nn.Identity())
    dim = 64 if "distance" in name else 16  # of CrossFormer, for its position bias
    x = torch.randn(2, *SIZE, dim, dtype=torch.float64)
    with record_attention(layer) as record:
        expected = layer(x) - x if swin else layer(x)

    inside = layer.get_submodule(projection)(x)[..., -dim:].flatten(1, 2)
    outside = layer.get_submodule(projection)(torch.zeros_like(x[:, :1, 0]))[..., -dim:]
    values = torch.cat([inside, 0 * outside if "values padded" in name else outside], 1)  # index -1 is the last
    found = torch.zeros_like(inside)
    (calls,) = record.values()
    for call in calls:
        assert (call.queries, call.keys, call.kind, call.prefix) == (SIZE, SIZE, "space", 0)
        torch.testing.assert_close(call.weights.sum(-1), torch.ones_like(call.weights[..., 0]))
        gathered = torch.stack([values[image][call.indices[image]] for image in range(2)]).unflatten(-1, (2, -1))
        rows = torch.einsum("bhnk,bnkhd->bnhd", call.weights, gathered).flatten(2)
        found.index_add_(1, torch.arange(13 * 9) if call.places is None else call.places, rows)
        torch.testing.assert_close(call.outside, (call.weights * (call.indices < 0)[:, None]).sum(-1))
    torch.testing.assert_close(found.unflatten(1, SIZE), expected)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_zero_padding_of_a_halo_is_outside_of_the_picture():
    torch.manual_seed(0)
    layer = halonet.HaloAttention(16, 16, 2, block_size=4, halo_size=1, stride=2).double()
    layer.reset_parameters()
    x = torch.randn(1, 16, *SIZE, dtype=torch.float64)
    with record_attention(layer) as record:
        expected = layer(x)
    (call,) = record[""]
    assert (call.queries, call.keys) == ((7, 5), SIZE)
    torch.testing.assert_close(call.weights.sum(-1), torch.ones_like(call.weights[..., 0]))
    values = layer.kv(x)[0].unflatten(0, (2, 16))[:, 8:].flatten(2).permute(2, 0, 1)
    inside = call.weights[0] * (call.indices[0] >= 0)
    mixed = torch.einsum("hnk,nkhd->hdn", inside, values[call.indices[0].clamp(min=0)])
    torch.testing.assert_close(mixed.flatten(0, 1).unflatten(-1, (7, 5)), expected[0])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("va_convit_tiny", {"depth": 2, "local_up_to_layer": 1}, [("space", (3, 4), 0), ("space", (3, 4), 1)]),
        ("va_xcit_nano_12_p8_224", {"depth": 1}, [("channel", (), 0), *2 * [("class", (6, 8), 1)]]),
        ("patchconvnet_s60", {"depth": 1}, [("class", (3, 4), 1)]),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": (48, 64)}, [("space", (3, 4), 2)]),
        ("xcit_nano_12_p16_224", {"depth": 1}, [("channel", (), 0), *2 * [("class", (3, 4), 1)]]),
        ("cait_xxs24_224", {"depth": 1, "img_size": (48, 64)}, [("space", (3, 4), 0), *2 * [("class", (3, 4), 1)]]),
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, [*3 * [("space", (1, 2), 0)], ("space", (2, 2), 0)]),
    ],
)
def test_tokens_are_laid_out_by_the_image(name, options, expected):
    """Ours, and timm's own models, which are not changed by it."""
    model = timm.create_model(name, num_classes=3, **options).eval()
    images = torch.randn(2, 3, 48, 64)
    before = model(images)
    with record_attention(model) as record:
        after = model(images)
        after[:, 0].sum().backward()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    calls = [call for calls in record.values() for call in calls]
    assert [(call.kind, call.keys, call.prefix) for call in calls][: len(expected)] == expected
    assert all(call.weights.grad is not None for call in calls)
    assert [getattr(m, "fused_attn", None) for m in model.modules()] == fused(name, options)
    torch.testing.assert_close(model(images), before)


def fused(name: str, options: dict) -> list:
    return [getattr(m, "fused_attn", None) for m in timm.create_model(name, num_classes=3, **options).modules()]


SHALLOW = {
    "biformer_tiny": {"depth": (1, 1, 1, 1)},
    "deit_tiny_patch16_224": {"img_size": (48, 64), "depth": 2},
    "va_volo_d1_224": {"layers": (1, 1, 1, 1)},
    "transnext_micro": {"depths": (1, 1, 1, 1)},
    "agent_pvt_tiny": {"depths": (1, 1, 1, 1)},
    "flowformer": {"depths": (1, 1, 1, 1), "embed_dims": (24, 36, 48, 60)},
    "rmt_tiny": {"depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_what_backward_hands_out_is_what_is_recorded(name, monkeypatch):
    """Backward computes the weights again, the last layer first, and hands them out in parts."""
    monkeypatch.setattr("visionattn.kernels._record.CHUNK", 1000)
    monkeypatch.setattr("visionattn.kernels._record.LARGE", 10)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **SHALLOW[name]).double().eval()
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64, requires_grad=True)
    with record_attention(model) as record:
        model(images)[:, 0].sum().backward()
    calls = [(name, call) for name, calls in record.items() for call in calls]
    found: list[torch.Tensor] = []
    ended = True

    def take(name: str, part: Attention, last: bool) -> None:
        nonlocal ended
        expected, call = calls[-1 - len(found) + (not ended)]
        assert name == expected
        if ended:
            found.append(torch.zeros_like(call.weights[:, :1]))
        rows = slice(None) if part.places is None or call.places is not None else part.places
        found[-1][:, :, rows] += part.weights
        ended = last

    with attention_in_backward(model, lambda weights, gradient: (weights * gradient).clamp(min=0), take):
        output = model(images)
        assert not found
        output[:, 0].sum().backward()
    assert len(found) == len(calls)
    for relevance, (_, call) in zip(found, calls[::-1], strict=True):
        expected = (call.weights * call.weights.grad).clamp(min=0).mean(1, keepdim=True)
        torch.testing.assert_close(relevance, expected)


def test_blocks_keep_their_input_for_what_backward_hands_out():
    """Not what they compute, which is much wider."""
    model = timm.create_model("transnext_micro", num_classes=3).eval().requires_grad_(False)
    images = torch.randn(1, 3, 64, 96, requires_grad=True)
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[-1] += x.numel()
        return x

    for recording in (nullcontext(), attention_in_backward(model, lambda weights, gradient: weights, lambda *_: None)):
        kept.append(0)
        with recording, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(images)
    assert kept[1] < kept[0] / 4
    assert not model.grad_checkpointing
