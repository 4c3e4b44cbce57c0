"""EMCAD: the decoder against its equations and the paper's figures, and what the encoder-decoder networks promise."""

import copy
import functools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv, group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones import emcad
from visionattn.backbones.emcad import EMCAD

B0, B2 = (32, 64, 160, 256), (64, 128, 320, 512)  # channels of PVTv2
NAMES = ["emcad_pvt_v2_b0", "emcad_pvt_v2_b2"]
networks = pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@functools.cache
def ready(name: str = NAMES[0]) -> nn.Module:
    """The network in evaluation mode with 5 classes, shared by the tests that do not change it."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def images(height: int = 64, width: int = 64, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width)


def maps(channels, height: int, width: int, batch: int = 2, **kwargs) -> list[Tensor]:
    """Random maps at strides 4, 8, 16 and 32 of an image of this size."""
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in (2, 3, 4, 5)]
    return [torch.randn(batch, c, *size, **kwargs) for c, size in zip(channels, sizes, strict=True)]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# The decoder


def test_size_of_the_decoder():
    """The abstract: 1.91 M parameters."""
    assert parameters(EMCAD(B2)) == pytest.approx(1.91e6, rel=0.01)


@torch.no_grad()
def test_cost_of_the_decoder():
    """The abstract: 0.381 G, which is at 224 x 224 and with norms and activations; we count multiply-adds alone."""
    with FlopCounterMode(display=False) as counter:
        EMCAD(B2).eval()(maps(B2, 224, 224, batch=1))
    assert counter.get_total_flops() / 2e9 == pytest.approx(0.381, rel=0.05)


@pytest.mark.parametrize(("name", "millions"), [(NAMES[0], 3.92), (NAMES[1], 26.76)])
def test_size_of_the_networks(name, millions):
    """Table 1 of the paper."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=1)
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.01)


def by_the_equations(decoder: EMCAD, x: list[Tensor]) -> list[Tensor]:
    """The decoded maps, spelt out on the decoder's weights in evaluation mode."""

    def cab(m, x):
        largest, mean = (m.fc2(F.relu(m.fc1(pool(x, 1)))) for pool in (F.adaptive_max_pool2d, F.adaptive_avg_pool2d))
        return torch.sigmoid(largest + mean) * x

    def sab(m, x):
        return torch.sigmoid(m.conv(torch.cat([x.max(1, True)[0], x.mean(1, True)], 1))) * x

    def mscb(m, x):
        conv, norm, _ = m.expand
        y = F.relu6(norm(conv(x)))
        branches = [F.relu6(norm(conv(y))) for conv, norm, _ in m.scales]
        conv, norm = m.project
        return x + norm(conv(torch.stack(branches).sum(0)))

    def mscam(m, x):
        return mscb(m[2], sab(m[1], cab(m[0], x)))

    def eucb(m, x):
        conv, norm, _ = m.local
        return m.project(F.relu(norm(conv(F.interpolate(x, scale_factor=2, mode="bilinear")))))

    def lgag(m, gate, skip):
        q = F.relu(m.gate[1](m.gate[0](gate)) + m.skip[1](m.skip[0](skip)))
        return torch.sigmoid(m.weigh[1](m.weigh[0](q))) * skip

    d = mscam(decoder.mix[3], x[3])
    results = [d]
    for i in (2, 1, 0):
        u = eucb(decoder.up[i], d)
        d = mscam(decoder.mix[i], u + lgag(decoder.gates[i], u, x[i]))
        results.insert(0, d)
    return results


@torch.no_grad()
def test_decoder_is_that_of_the_equations():
    decoder, x = EMCAD((8, 16, 24, 32)).double(), maps((8, 16, 24, 32), 64, 96, dtype=torch.float64)
    for _ in range(3):
        decoder.train()(x)  # norms that are not the identity
    assert_close(decoder.eval()(x), by_the_equations(decoder, x))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 130)])
def test_maps_keep_their_shapes(size):
    x = maps((8, 16, 24, 32), *size)
    decoded = EMCAD((8, 16, 24, 32), kernel_sizes=(3, 7), expansion=3)(x)
    assert [y.shape for y in decoded] == [y.shape for y in x]


def test_any_number_of_maps():
    decoder = EMCAD((8, 16))
    assert [y.shape[1] for y in decoder(maps((8, 16, 24, 32), 64, 64)[:2])] == decoder.out_channels == [8, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (8, 15, 32)}, r"channels=\(8, 15, 32\): expected even"),
        ({"channels": (8, 16), "kernel_sizes": (1, 4)}, r"kernel_sizes=\(1, 4\): expected odd"),
    ],
)
def test_impossible_decoders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMCAD(**arguments)


def test_other_maps_are_refused():
    with pytest.raises(ValueError, match=r"maps of \[8, 16\] channels, expected \[16, 8\]"):
        EMCAD((16, 8))(maps((8, 16, 24, 32), 64, 64)[:2])


def test_docstring_names_the_paper_and_independence():
    assert "2405.06880" in emcad.__doc__
    assert "independent implementation" in emcad.__doc__


# The networks


@networks
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 64), (50, 130)])
@torch.no_grad()
def test_logits_have_the_size_of_the_image(name, size):
    x = images(*size)
    heads = ready(name).forward_deep(x)
    assert [y.shape for y in heads] == [(2, 5, *size)] * 4
    assert all(y.isfinite().all() for y in heads)
    assert_close(ready(name)(x), heads[0])


def test_images_too_small_are_refused():
    with pytest.raises(ValueError, match="31 x 64 pixels: expected at least 32 x 32"):
        ready()(images(31, 64))


@pytest.mark.parametrize("channels", [1, 4, 13])
@torch.no_grad()
def test_channels(channels):
    network = timm.create_model(NAMES[0], in_chans=channels).eval()
    assert network(images(channels=channels)).shape == (2, network.num_classes, 64, 64)


@torch.no_grad()
def test_number_of_classes_can_be_changed():
    network = timm.create_model(NAMES[0], num_classes=9, device="meta", dtype=torch.float64).eval()
    assert [head.out_channels for head in network.get_classifier()] == [9] * 4
    network.reset_classifier(2)
    tensors = [x for x in network.state_dict().values() if x.is_floating_point()]
    assert {(x.device.type, x.dtype) for x in tensors} == {("meta", torch.float64)}
    assert not any(module.training for module in network.modules())
    network = timm.create_model(NAMES[0], num_classes=9)
    network.reset_classifier(1)
    assert network.eval()(images()).shape == (2, 1, 64, 64)
    with pytest.raises(ValueError, match="num_classes=0: expected at least 1"):
        network.reset_classifier(0)


def test_maps_are_asked_of_the_encoder():
    with pytest.raises(ValueError, match="use pvt_v2_b0 with features_only"):
        timm.create_model(NAMES[0], features_only=True)


def test_default_cfg():
    network = ready()
    keys = set(network.state_dict())
    assert network.pretrained_cfg["architecture"] == NAMES[0]
    assert f"{network.pretrained_cfg['first_conv']}.weight" in keys
    heads = [network.get_submodule(name) for name in network.pretrained_cfg["classifier"]]
    assert heads == list(network.get_classifier())
    assert network.pretrained_cfg["mean"] == timm.get_pretrained_cfg("pvt_v2_b0").mean


@torch.no_grad()
def test_features():
    network, x = ready(), images(70, 100)
    features, maps = network.forward_intermediates(x)
    assert_close(features, network.forward_features(x))
    assert [y.shape[1] for y in maps] == [info["num_chs"] for info in network.feature_info] == list(B0)
    assert [math.ceil(70 / info["reduction"]) for info in network.feature_info] == [y.shape[2] for y in maps]
    stages = {info["module"] for info in network.feature_info}
    assert stages <= {name for name, _ in network.named_modules()}
    assert_close(network.forward_intermediates(x, [0, -1], intermediates_only=True), [maps[0], maps[3]])
    assert features[0].shape[1] == network.num_features == network.head_hidden_size


@pytest.mark.parametrize(("argument", "message"), [("encoder", "it has"), ("kernel_size", "did you mean kernel_sizes")])
def test_unknown_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=f"{NAMES[0]} has no argument {argument}=3; {message}"):
        timm.create_model(NAMES[0], device="meta", **{argument: 3})


def test_parameter_groups():
    """Layer decay reaches every parameter; the decoder learns at the full rate."""
    network = ready()
    everything = {key for key, _ in network.named_parameters()}
    layers = group_parameters(network, network.group_matcher())
    assert sorted(key for keys in layers.values() for key in keys) == sorted(everything)
    assert "encoder.model.patch_embed.proj.weight" in layers[0]
    assert {key for key in everything if not key.startswith("encoder.")} <= set(layers[max(layers)])
    groups = create_optimizer_v2(network, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5).param_groups
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(len(layers))}


# Weights


@torch.no_grad()
def test_pretrained_encoder(monkeypatch):
    """With timm's weights of the encoder, whose download is replaced here."""
    weights = timm.create_model("pvt_v2_b0").state_dict()
    asked = []

    def download(source, *args, **kwargs):
        asked.append(source)
        return dict(weights)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    network = timm.create_model(NAMES[0], pretrained=True, in_chans=4)
    assert len(asked) == 1
    assert "pvt_v2_b0" in asked[0]
    own = network.encoder.model.state_dict()
    first = "patch_embed.proj.weight"
    assert_close(own.pop(first), adapt_input_conv(4, weights[first]))
    assert_close(own, {key: weights[key] for key in own})


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema"])
def test_checkpoints_of_ours_load(wrapper, tmp_path):
    file, weights = tmp_path / "weights.pth", ready().state_dict()
    torch.save(weights if wrapper is None else {wrapper: weights}, file)
    overlay = {"file": str(file), "num_classes": 5}
    again = timm.create_model(NAMES[0], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert_close(again.state_dict(), weights, rtol=0, atol=0)
    other = timm.create_model(NAMES[0], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    kept = {key: value for key, value in other.state_dict().items() if not key.startswith("heads.")}
    assert_close(kept, {key: weights[key] for key in kept}, rtol=0, atol=0)


def test_incomplete_checkpoints_are_refused(tmp_path):
    weights = ready().state_dict()
    weights.pop("decoder.up.0.project.weight")
    torch.save(weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(NAMES[0], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)


def test_saved_for_the_hub(tmp_path):
    """timm's own way: a folder of weights and configuration."""
    network = timm.create_model(NAMES[0], num_classes=5).eval()
    timm.models.save_for_hf(network, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_close(again.state_dict(), network.state_dict(), rtol=0, atol=0)
    fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    x = images()
    assert fewer(x).shape == (2, 3, 64, 64)
    assert_close(fewer.forward_features(x), network.forward_features(x))


def test_heads_can_be_trained_as_copies():
    """As peft's modules_to_save does: a copy stands in the place of each classifier that the configuration names."""
    network, x = timm.create_model(NAMES[0], num_classes=5), images()
    network.requires_grad_(False)
    for name in network.pretrained_cfg["classifier"]:
        network.set_submodule(name, copy.deepcopy(network.get_submodule(name)).requires_grad_(True))
    sum(y.square().mean() for y in network.forward_deep(x)).backward()
    trained = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"heads.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}


# Execution


@networks
def test_gradients_reach_every_parameter(name):
    network = timm.create_model(name)
    sum(y.square().mean() for y in network.forward_deep(images())).backward()
    idle = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@torch.no_grad()
def test_samples_are_independent():
    network, x = timm.create_model(NAMES[0]).double().eval(), images(33, 40, batch=3).double()
    together = network(x)
    for i in range(3):
        assert_close(network(x[i : i + 1])[0], together[i])
    x[1] = torch.nan
    assert_close(network(x)[[0, 2]], together[[0, 2]])


def test_gradient_checkpointing_changes_nothing():
    x, results = images(), []
    for enable in (False, True):
        network = timm.create_model(NAMES[0], num_classes=5)
        network.load_state_dict(ready().state_dict())
        network.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in network.encoder.model.stages)
        logits = network.train()(x)
        logits.square().sum().backward()
        results.append((logits.detach(), {k: p.grad for k, p in network.named_parameters()}, network.state_dict()))
    assert_close(results[0], results[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the encoder's attention
def test_per_sample_gradients_equal_a_loop_over_samples():
    network, x = copy.deepcopy(ready()).double(), images().double()
    parameters = dict(network.named_parameters())

    def loss(parameters: dict, image: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, parameters, (image[None],), {"deep": True})
        return sum(y.square().mean() for y in logits)

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        assert_close([gradients[i] for gradients in together.values()], list(expected))


@torch.no_grad()
def test_channels_last():
    x = images()
    assert_close(ready()(x.contiguous(memory_format=torch.channels_last)), ready()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_mixed_precision(dtype):
    network, x = timm.create_model(NAMES[0], num_classes=5), images(32, 32)
    network.load_state_dict(ready().state_dict())
    expected = ready()(x)
    with torch.autocast("cpu", dtype):
        logits = network.eval()(x)
        assert logits.dtype == dtype
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()
        loss = sum(y.float().square().mean() for y in network.train().forward_deep(x))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@networks
@torch.no_grad()
def test_compile_in_one_graph(name):
    x = images(50, 70)
    torch._dynamo.reset()
    compiled = torch.compile(ready(name), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), ready(name)(x), rtol=1e-3, atol=1e-4)


def batch_of_any_size() -> tuple:
    return ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_export_with_dynamic_batch(name):
    program = torch.export.export(ready(name), (images(50, 70),), dynamic_shapes=batch_of_any_size()).module()
    for batch in (1, 3):
        x = images(50, 70, batch)
        assert_close(program(x), ready(name)(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own code
@torch.no_grad()
def test_onnx_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        ready(name), (images(50, 70),), file, dynamo=True, dynamic_shapes=batch_of_any_size(), verbose=False
    )
    session = onnxruntime.InferenceSession(file)
    for batch in (1, 3):
        x = images(50, 70, batch)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(logits), ready(name)(x), rtol=1e-3, atol=1e-4)
