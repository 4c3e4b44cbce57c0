"""What is Flowformer's own: its size, what flows conserve, precision, the position embedding, what is refused."""

import pytest
import timm
import torch
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.flowformer import conserved
from visionattn.kernels import linear_attention, record_attention

SMALL = {"embed_dims": (12, 24), "depths": (1, 1), "mlp_ratios": (2, 2), "num_heads": 2, "num_classes": 5}


def test_size():
    """Of the authors' network, counted."""
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model("flowformer").parameters()) == 43_311_304


def flow_attention(q, k, v):
    qk = conserved(torch.stack([q, k]).flatten(2, 3).transpose(2, 3))
    return linear_attention(*(x.transpose(1, 2).unflatten(1, v.shape[1:3]) for x in qk), v)


def test_flows_are_the_papers_sums():
    """Of equations 5 to 9, with the lifts of the authors' vision code."""
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 2, 3, 5, 2, 4, dtype=torch.float64)
    output = flow_attention(q, k, v)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, dim)
    lifted_q, lifted_k = q + 1e-6, k + 1e-6
    incoming = (lifted_q * (k.sum(2, keepdim=True) + 1e-6)).sum(-1, keepdim=True) + 1e-6
    outgoing = (lifted_k * (q.sum(2, keepdim=True) + 1e-6)).sum(-1, keepdim=True) + 1e-6
    conserved_in = (lifted_q * ((k / outgoing).sum(2, keepdim=True) + 1e-6)).sum(-1, keepdim=True) + 1e-6
    conserved_out = (lifted_k * ((q / incoming).sum(2, keepdim=True) + 1e-6)).sum(-1, keepdim=True) + 1e-6
    competed = v * conserved_out.clamp(-1, 1).softmax(2) * 15
    expected = conserved_in.sigmoid() * ((q / incoming) @ (k.mT @ competed))
    assert_close(output, expected.transpose(1, 2).view(output.shape), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_large_maps_stay_finite_in_half_precision():
    """The paper's sums over 90 000 positions are larger than float16 has."""
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 1, 300, 300, 2, 4).half()
    half = flow_attention(q, k, v)
    q, k, v = (x.float() for x in (q, k, v))
    assert_close(half.float(), flow_attention(q, k, v), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_recorded_weights_are_of_all_positions():
    model = timm.create_model("flowformer", **SMALL).eval()
    with record_attention(model) as record:
        model(torch.randn(2, 3, 32, 48))
    shapes = {name: calls[0].weights.shape for name, calls in record.items()}
    assert shapes == {"blocks.0.0.attn": (2, 2, 96, 96), "blocks.1.0.attn": (2, 2, 24, 24)}


@torch.no_grad()
def test_the_position_embedding_of_another_size_is_resampled(tmp_path):
    theirs = timm.create_model("flowformer", **SMALL, img_size=64)
    weights = theirs.state_dict() | {"pos_embed": theirs.pos_embed.flatten(1, 2)}  # as the authors have it
    torch.save({"model": weights}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **SMALL}
    same = timm.create_model("flowformer", **options, img_size=64)
    assert torch.equal(same.pos_embed, theirs.pos_embed)
    larger = timm.create_model("flowformer", **options, img_size=(96, 64))
    assert larger.pos_embed.shape == (1, 24, 16, 12)
    same.set_input_size((96, 64))
    assert_close(same.pos_embed, larger.pos_embed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratios": (2,)}, "mlp_ratios: 1 values were given for 2 stages"),
        ({"num_heads": 5}, r"embed_dims=\(12, 24\): expected multiples of num_heads=5"),
        ({"img_size": 16}, "img_size=16: expected at least 32 x 32 pixels"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("flowformer", **{**SMALL, **options})
