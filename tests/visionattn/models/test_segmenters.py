"""Any encoder under any decoder: sizes, sameness with segmentation_models_pytorch, gradients, and clear refusals."""

import functools
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn
from torch.testing import assert_close

from visionattn.cli import main
from visionattn.errors import UserError
from visionattn.listing import our_models
from visionattn.models.segmenters import DECODERS, GATES, make_segmenter

SMALL = {"depth": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "head_dim": 16, "n_win": 2, "topks": [1, 2, 4, -2]}
LIGHT = {"dpt": {"intermediate_channels": [16, 16, 16, 16], "fusion_channels": 32}, "upernet": {"decoder_channels": 32}}
EMCAD = "visionattn.backbones.emcad"  # whose networks are no encoders
every_decoder = pytest.mark.parametrize("decoder", DECODERS)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def small(decoder: str, **kwargs: Any) -> nn.Module:
    """A segmenter of 5 classes with a tiny encoder of ours."""
    return make_segmenter("biformer_tiny", decoder, 5, encoder_args=SMALL, decoder_args=LIGHT.get(decoder), **kwargs)


@functools.cache
def ready(decoder: str) -> nn.Module:
    """In evaluation mode, shared by the tests that do not change it."""
    torch.manual_seed(0)
    return small(decoder).eval()


def images(height: int = 64, width: int = 96, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width)


# Every decoder


@every_decoder
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (33, 47), (50, 130)])
@torch.no_grad()
def test_logits_have_the_size_of_the_image(decoder, size):
    x = images(*size)
    logits = ready(decoder)(x)
    assert logits.shape == (2, 5, *size)
    assert logits.isfinite().all()
    heads = ready(decoder).forward_deep(x)
    assert len(heads) == (4 if decoder == "emcad" else 1)
    assert all(head.shape == logits.shape for head in heads)
    assert_close(heads[0], logits)


@every_decoder
def test_gradients_reach_every_parameter(decoder):
    network = small(decoder, in_chans=4)
    sum(y.square().mean() for y in network.forward_deep(images(channels=4))).backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None]


@every_decoder
@torch.no_grad()
def test_samples_are_independent(decoder):
    x = images(50, 70, batch=3)
    together = ready(decoder)(x)
    assert_close(ready(decoder)(x[1:2])[0], together[1], rtol=1e-3, atol=1e-4)
    x[1] = torch.nan
    assert_close(ready(decoder)(x)[[0, 2]], together[[0, 2]], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_images_are_continued_to_whole_strides_and_cut_back():
    x = images(50, 70)
    assert_close(ready("fpn")(x), ready("fpn")(F.pad(x, (0, 26, 0, 14), mode="replicate"))[..., :50, :70])


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="31 x 64 pixels"):
        ready("fpn")(images(31, 64))


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("unet", "resnet18"),  # which has a map at stride 2
        ("unetplusplus", "resnet18"),
        ("fpn", "pvt_v2_b0"),
        ("upernet", "pvt_v2_b0"),
        ("segformer", "pvt_v2_b0"),
    ],
)
@torch.no_grad()
def test_decoders_are_those_of_segmentation_models_pytorch(name, encoder):
    """With their weights, ours gives their map."""
    theirs = smp.create_model(name, f"tu-{encoder}", encoder_weights=None, classes=5).eval()
    ours = make_segmenter(encoder, name, 5).eval()
    ours.decoder.decoder.load_state_dict(theirs.decoder.state_dict())
    x = images(64, 64)
    maps = ours.encoder(x)
    blank = [x.new_empty(2, 0, 32, 32)] if len(maps) == 4 else []
    assert_close(ours.decoder(maps)[0], theirs.decoder([x, *blank, *maps]))


# Every encoder


@pytest.mark.parametrize("decoder", ["emcad", pytest.param("unet", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "encoder",
    [
        "xcit_nano_12_p16_224",
        "xcit_nano_12_p8_224",
        "vit_tiny_patch16_224",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "vit_small_patch14_dinov2",  # 14 divides no power of two
                "vit_base_patch32_224",
                "swin_tiny_patch4_window7_224",  # made for one size
                "convnext_atto",  # rounds its maps down
                "hrnet_w18_small",
                "vgg11",
            )
        ),
    ],
)
def test_encoders_of_timm(encoder, decoder):
    network = make_segmenter(encoder, decoder, 2, in_chans=4)
    heads = network.forward_deep(images(100, 75, channels=4))
    assert {head.shape for head in heads} == {(2, 2, 100, 75)}
    sum(head.square().mean() for head in heads).backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None]


@functools.cache
def smallest_of(family: str) -> str:
    def size(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    return min((name for name in our_models() if timm.model_entrypoint(name).__module__ == family), key=size)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["emcad", "fpn"])
@pytest.mark.parametrize("family", sorted({timm.model_entrypoint(name).__module__ for name in our_models()} - {EMCAD}))
@torch.no_grad()
def test_encoders_of_ours(family, decoder):
    network = make_segmenter(smallest_of(family), decoder, 2).eval()
    assert network(images(100, 75)).shape == (2, 2, 100, 75)


@torch.no_grad()
def test_encoders_of_one_size():
    network = make_segmenter("convit_tiny", "fpn", 2, encoder_args={"img_size": 64})
    assert network.eval()(images(64, 64)).shape == (2, 2, 64, 64)


@torch.no_grad()
def test_whole_segmenters():
    network = make_segmenter("emcad_pvt_v2_b0", None, 3, in_chans=4, decoder_args={"kernel_sizes": [3]}).eval()
    assert network(images(50, 70, channels=4)).shape == (2, 3, 50, 70)


def test_pretrained_encoder(monkeypatch):
    """The weights go to the encoder (their download is replaced here)."""
    weights = timm.create_model("resnet18").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(weights))
    own = make_segmenter("resnet18", "fpn", 2, pretrained=True).encoder.model.state_dict()
    assert_close(own, {key: weights[key] for key in own})


# Training and execution


@pytest.mark.parametrize(
    ("encoder", "groups"),
    [
        ("biformer_tiny", 14),
        ("resnet18", 9),
        ("vit_tiny_patch16_224", 13),
        ("poolformer_s12", 2),
    ],  # the last tells none
)
def test_layer_decay_reaches_the_encoder(encoder, groups):
    network = make_segmenter(encoder, "fpn", 2)
    layers = group_parameters(network, network.group_matcher())
    assert sorted(key for keys in layers.values() for key in keys) == sorted(k for k, _ in network.named_parameters())
    assert len(layers) >= groups
    assert all(key.startswith("encoder.") for key in layers[0])
    above = [key for key, _ in network.named_parameters() if not key.startswith("encoder.")]
    assert set(above) <= set(layers[max(layers)])


@pytest.mark.parametrize(
    "decoder", [pytest.param(name, marks=() if name in ("emcad", "fpn") else pytest.mark.slow) for name in DECODERS]
)
@pytest.mark.parametrize("gates", GATES)
def test_gates_of_the_maps_a_decoder_takes(decoder, gates):
    arguments = {**LIGHT.get(decoder, {}), "gates": gates}
    network = make_segmenter("biformer_tiny", decoder, 5, encoder_args=SMALL, decoder_args=arguments)
    assert network(images(50, 70)).shape == (2, 5, 50, 70)
    sum(y.square().mean() for y in network.forward_deep(images())).backward()
    assert len(network.decoder.gates) == len(DECODERS[decoder].strides[-4:])
    assert not [key for key, p in network.decoder.gates.named_parameters() if not p.grad.any()]


def test_gradient_checkpointing():
    """Reaches the encoder's blocks and changes no gradient."""
    x, network, results = images(), small("fpn").eval(), []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        assert network.encoder.model.grad_checkpointing is enable
        results.append(torch.autograd.grad(network(x).square().sum(), list(network.parameters())))
    assert_close(*results)


@pytest.mark.parametrize(
    "decoder", [pytest.param(name, marks=() if name == "unet" else pytest.mark.slow) for name in DECODERS]
)
@torch.no_grad()
def test_compile_and_export(decoder):
    network, x = ready(decoder), images(50, 70)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), network(x), rtol=1e-3, atol=1e-4)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (x,), dynamic_shapes=sizes).module()
    assert_close(program(x[:1]), network(x[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torchgeo's own imports
def test_ours_as_backbone_in_torchgeo():
    trainers = pytest.importorskip("torchgeo.trainers")
    task = trainers.SemanticSegmentationTask(
        model="upernet", backbone="tu-biformer_tiny", in_channels=4, num_classes=3, loss="ce", ignore_index=255
    )
    masks = torch.randint(3, (2, 64, 64))
    loss = task.criterion(task(images(64, 64, channels=4)), masks)
    loss.backward()
    assert loss.isfinite()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", "unett"), "model.decoder is 'unett': unknown decoder; did you mean unet"),
        (("biformer_tini", "fpn"), "model.name is 'biformer_tini': unknown model; did you mean biformer_tiny"),
        (("emcad_pvt_v2_b0", "fpn"), "is a whole segmenter: leave the decoder out"),
        (("resnet18", None), "model resnet18 is no segmenter: add a decoder, one of emcad"),
        (("levit_128", "fpn"), r"maps at strides \[16, 32, 64\]: expected \[4, 8, 16, 32\]"),
        (("convit_tiny", "fpn"), r"convit_tiny does not take images of any size .* such as img_size: \[256, 256\]"),
    ],
)
def test_impossible_pairs_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_segmenter(*arguments, 2)


def test_unknown_arguments_are_refused():
    with pytest.raises(UserError, match=r"model resnet18 cannot be made with {'depths': 3}: "):
        make_segmenter("resnet18", "fpn", 2, encoder_args={"depths": 3})
    with pytest.raises(UserError, match=r"model resnet18 cannot be made with {'block': 3}: .*expansion"):
        make_segmenter("resnet18", "fpn", 2, encoder_args={"block": 3})  # no error of timm's own
    with pytest.raises(UserError, match=r"decoder fpn on maps of .* channels of resnet18 cannot be made .*'width'"):
        make_segmenter("resnet18", "fpn", 2, decoder_args={"width": 3})
    with pytest.raises(UserError, match=r"model.decoder_args.gates is 'tripplet': .*triplet"):
        make_segmenter("resnet18", "fpn", 2, decoder_args={"gates": "tripplet"})
    narrow = {**SMALL, "embed_dim": [8, 16, 16, 32], "head_dim": 8}
    with pytest.raises(UserError, match=r"cannot be made .*ela: 8 channels: expected a multiple of 16"):
        make_segmenter("biformer_tiny", "fpn", 2, encoder_args=narrow, decoder_args={"gates": "ela"})


def test_list_of_decoders(capsys):
    assert main(["list", "--decoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(DECODERS)
    assert all(DECODERS[line.split()[0]].description in line for line in lines[1:])
