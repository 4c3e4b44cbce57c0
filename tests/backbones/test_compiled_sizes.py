"""A compiled network is compiled for its first size, once more for all sizes, and never again; its maps stay in place.

Counted without generating code (backend "eager"), in evaluation, of few and narrow blocks of each kind. CrossFormer is
not here: the groups of its attention, and with them its position bias, grow with the map.
"""

import re

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.backbone import LAYOUTS_KEPT

SIZES = [(64, 96), (224, 192), (256, 320)]
FAST = {"va_davit_tiny", "patchconvnet_s60"}
MODELS = {
    "agent_deit_tiny": {"depth": 1},
    "agent_pvt_tiny": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "attn_type": "AA"},
    "agent_swin_tiny": {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "attn_type": "AA"},
    "agent_cswin_tiny": {"depth": (1, 1, 1), "embed_dim": 24, "num_heads": (2, 2, 4), "attn_type": "AAB"},
    "biformer_tiny": {"depth": (1, 1, 1, 1), "embed_dim": (32, 64, 128, 256)},
    "moh_transnext_small_75": {
        "depths": (1, 1),
        "embed_dims": (24, 48),
        "num_heads": (2, 4),
        "mlp_ratios": (4, 4),
        "sr_ratios": (4, 1),
        "shared_heads": (2, 2),
        "active_heads": (0, 1),
    },
    "nat_mini": {"depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2), "dilations": (1, 1)},
    "dinat_mini": {"depths": (2, 1), "embed_dim": 32, "num_heads": (1, 2), "dilations": (4, 1)},
    "ninformer_tiny_patch4_32": {},
    "patchconvnet_s60": {"depth": 1, "embed_dim": 96},
    "flowformer": {"depths": (1, 1), "embed_dims": (12, 24), "mlp_ratios": (4, 4), "num_heads": 2},
    "lgvit_96": {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16},
    "rmt_tiny": {
        "depths": (1, 1),
        "embed_dims": (16, 32),
        "num_heads": (2, 2),
        "mlp_ratios": (3, 3),
        "decay_ranges": (4, 4),
        "layer_scales": (None, None),
        "by_axis": 1,
    },
    "transnext_micro": {
        "depths": (1, 1),
        "embed_dims": (24, 48),
        "num_heads": (1, 2),
        "mlp_ratios": (4, 4),
        "sr_ratios": (4, 1),
    },
    "va_convit_tiny": {"depth": 2, "local_up_to_layer": 1},
    "va_davit_tiny": {"depths": (1, 1), "embed_dims": (48, 96), "num_heads": (2, 4)},
    "va_halonet_h0": {"blocks": ("c", "c", "ca", "a"), "channels": (32, 64, 128, 256)},
    "va_volo_d1_224": {"layers": (1, 1, 1, 1), "embed_dims": (64, 128, 128, 128), "num_heads": (2, 4, 4, 4)},
    "va_xcit_nano_12_p16_224": {"depth": 1},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MODELS]
)
@torch.no_grad()
def test_any_size_takes_two_compilations(name):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=3, **MODELS[name]).eval()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in SIZES:
        images = torch.randn(1, 3, *size)
        assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-5)
    assert backend.frame_count == 2


@pytest.mark.slow
@torch.no_grad()
def test_compile_transposes_no_map():
    torch.compiler.reset()
    model = timm.create_model("va_xcit_nano_12_p16_224", depth=2).eval()
    model.compile()
    _, (code,) = run_and_get_code(model, torch.randn(2, 3, 224, 224))
    strides = set(re.findall(r"empty_strided_cpu\(\(2, 14, 14, 128\), \(([^)]*)\)", code))
    assert strides == {"25088, 1792, 128, 1"}


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({}, {"options": LAYOUTS_KEPT}),
        ({"dynamic": True}, {"dynamic": True, "options": LAYOUTS_KEPT}),
        ({"options": {"max_autotune": True}}, {"options": {"max_autotune": True} | LAYOUTS_KEPT}),
        ({"mode": "reduce-overhead"}, {"mode": "reduce-overhead"}),
        ({"backend": "eager"}, {"backend": "eager"}),
    ],
)
def test_compile_keeps_layouts_beside_what_is_asked_for(monkeypatch, given, passed):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options))
    timm.create_model("va_xcit_nano_12_p16_224", depth=1).compile(**given)
    assert asked == passed
