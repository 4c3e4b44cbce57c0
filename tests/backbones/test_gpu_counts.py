"""On a GPU no family costs more than timm's twin of it, or, without one, than Swin-T block by block.

Counted on fake CUDA tensors (`visionattn.tools._count`), so that no GPU is needed: launches, bytes, and the dtype of
products. Where the network has a twin its depth is cut, which leaves the ratio.
"""

import functools

import pytest
import timm
import torch

from visionattn.tools._count import Count, count, fake_cuda, to_fake_cuda

LAUNCHES, BYTES = 1.15, 1.1  # at most times the twin's
SWIN, SWIN_BLOCKS = "swin_tiny_patch4_window7_224", 12
TWINS = {
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "xcit_tiny_12_p16_224": {"depth": 2},
    "convit_tiny": {"depth": 3, "local_up_to_layer": 2},
    "volo_d1_224": {},
    "halonet26t": {},
}
BLOCKS = {
    "agent_deit_tiny": 12,
    "agent_pvt_tiny": 8,
    "agent_swin_tiny": 12,
    "agent_cswin_tiny": 25,
    "biformer_tiny": 14,
    "crossformer_tiny": 16,
    "nat_mini": 18,
    "dinat_mini": 18,
    "flowformer": 19,
    "lgvit_192": 12,
    "ninformer_small_patch16_224": 8,
    "patchconvnet_s60": 6,
    "rmt_tiny": 14,
    "transnext_micro": 21,
}
SHORT = {"depths": (1, 1, 2, 1)}
CUT = {**TWINS, "patchconvnet_s60": {"depth": 6}, "moh_transnext_small_75": SHORT, "transnext_small": SHORT}
MORE = {  # times these launches
    "agent_deit_tiny": 1.12,  # two attentions, agents and two biases
    "agent_pvt_tiny": 1.08,
    "flowformer": 1.6,  # means and products, twice, that flows are conserved by
    "lgvit_192": 1.3,  # two gates, a convolution of values and the rotation of q and k, on few channels
    "rmt_tiny": 1.2,  # three convolutions and the rotation of q and k, attention to rows, then to columns
    "transnext_micro": 1.9,  # two projections, a pooled map and an MLP
}
MORE_BYTES = {"flowformer": 1.15}  # in training, where the gradients of all these are added
CALLS = [
    (False, None),
    (True, torch.bfloat16),
    pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(True, None, marks=pytest.mark.slow),
]
each_call = pytest.mark.parametrize(("training", "dtype"), CALLS)


@functools.cache
def counted(name: str, training: bool, dtype: torch.dtype | None) -> Count:
    """Of 16 images, in float32 or under autocast."""
    model = timm.create_model(name, **CUT.get(name.removeprefix("va_"), {})).train(training)
    size = 256 if "halonet" in name else 224
    with fake_cuda():
        to_fake_cuda(model)
        images = torch.empty(16, 3, size, size, device="cuda")
        return count(lambda: model(images), list(model.parameters()) if training else [], dtype)


def check_dtype(ours: Count, dtype: torch.dtype | None) -> None:
    """Nearly all: BiFormer's regions are chosen in float32, and TransNeXt's position bias is made in it."""
    assert ours.flops[dtype or torch.float32] >= 0.99 * ours.flops.total()


@each_call
@pytest.mark.parametrize("name", TWINS)
def test_costs_no_more_than_the_twin(name, training, dtype):
    ours, theirs = (counted(prefix + name, training, dtype) for prefix in ("va_", ""))
    assert ours.launches <= LAUNCHES * theirs.launches
    assert ours.bytes <= BYTES * theirs.bytes
    check_dtype(ours, dtype)


@each_call
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_costs_no_more_than_one_of_swin(name, training, dtype):
    ours, swin = counted(name, training, dtype), counted(SWIN, training, dtype)
    assert ours.launches / BLOCKS[name] <= MORE.get(name, 1) * LAUNCHES * swin.launches / SWIN_BLOCKS
    assert ours.bytes / BLOCKS[name] <= MORE_BYTES.get(name, 1) * BYTES * swin.bytes / SWIN_BLOCKS
    check_dtype(ours, dtype)


@each_call
def test_routers_of_heads_cost_little(training, dtype):
    ours, theirs = (counted(name, training, dtype) for name in ("moh_transnext_small_75", "transnext_small"))
    assert ours.launches <= 1.4 * theirs.launches
    assert ours.bytes <= BYTES * theirs.bytes
    check_dtype(ours, dtype)
