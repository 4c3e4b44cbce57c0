"""What every registered backbone promises: timm's interface, any size of image, checkpoints, compiling and exporting.

A model is tested by being registered from a module of `visionattn.backbones`. By default the smallest model of each
family (file) is tested, and by `-m slow` all others; tests that need no weights run on all models at once.
"""

import copy
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import FeatureInfo, adapt_input_conv, group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.testing import assert_close

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones.encoder_decoder import EncoderDecoder
from visionattn.errors import UserError
from visionattn.models.adapters import adapt, merged

ROUNDS_DOWN = {"biformer_stl_nchw"}  # maps of H // stride, as a golden record shows; all others have ceil(H / stride)
SHORTER = {  # arguments by family: fewer blocks test as much, in less time
    "biformer": {"depth": (1, 1, 2, 1)},
    "crossformer": {"depths": (1, 4, 1, 1)},
    "volo": {"layers": (1, 1, 1, 1), "embed_dims": (64, 128, 128, 128), "num_heads": (2, 4, 4, 4)},
    "halonet": {"blocks": ("c", "c", "ca", "a")},
    "nat": {"depths": (1, 2, 2, 1)},
    "davit": {"depths": (1, 1, 1, 1)},
    "xcit": {"depth": 3},
    "flowformer": {"depths": (1, 1, 2, 1)},
    "lgvit": {"depths": (1, 1, 1, 1)},
    "convit": {"depth": 4, "local_up_to_layer": 2},
    "nat_isotropic": {"depth": 4},
    "patchconvnet": {"depth": 4},
    "rmt": {"depths": (1, 1, 2, 1)},
    "transnext": {"depths": (1, 1, 2, 1)},
    "moh": {"depths": (1, 1, 2, 1)},
    "agent_deit": {"depth": 4},
    "agent_pvt": {"depths": (1, 1, 2, 1)},
    "agent_swin": {"depths": (1, 1, 2, 2)},
    "agent_cswin": {"depth": (1, 1, 2, 1)},
}
NARROWER = {  # the same for widths, of the models that are tested by default
    "biformer": {"embed_dim": (32, 64, 128, 256)},
    "crossformer": {"embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "halonet": {"channels": (32, 64, 128, 256)},
    "nat": {"embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "davit": {"embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16)},
    "flowformer": {"embed_dims": (24, 36, 48, 60)},
    "lgvit": {"embed_dim": 48, "num_heads": (3, 3, 6, 12)},
    "nat_isotropic": {"embed_dim": 96, "num_heads": 3},
    "patchconvnet": {"embed_dim": 96},
    "rmt": {"embed_dims": (16, 32, 48, 64), "num_heads": (2, 2, 3, 4), "projection": 96},
    "transnext": {"embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8)},
    "moh": {
        "embed_dims": (24, 48, 96, 192),
        "num_heads": (2, 4, 4, 8),
        "shared_heads": (2, 4, 1, 2),
        "active_heads": (0, 0, 2, 4),
    },
    "agent_deit": {"embed_dim": 96},
    "agent_pvt": {"embed_dims": (32, 64, 80, 128)},
    "agent_swin": {"embed_dim": 48},
    "agent_cswin": {"embed_dim": 32},
}
STRIDES = {  # by family or model, of the maps that `features_only` gives; all others are pyramids
    "volo": [8, 16, 16, 16],
    "lgvit": [16, 16, 16, 16],
    "nat_isotropic": [16, 16, 16],
    "convit": [16, 16, 16],
    "patchconvnet": [16, 16, 16],
    "agent_deit": [16, 16, 16],
    "xcit": [16, 16, 16],
    **{name: [8, 8, 8] for name in timm.list_models("va_xcit_*_p8_*")},
    "ninformer_tiny_patch4_32": [4, 4, 4],
    "ninformer_small_patch16_224": [16, 16, 16],
}
TOKENS = {
    "volo",
    "xcit",
    "convit",
    "patchconvnet",
    "agent_deit",
}  # families of tokens (B, 1 + H * W, C), a class token first
TOKEN_PER_CLASS = {"patchconvnet_s60_multi"}  # models that have one for each class, and their logits from these
NORM_IN_HEAD = {"davit"}  # families whose head normalises what it pooled, and maps that are not to be pooled
SMALL = 64  # pixels


def is_ours(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith("visionattn.backbones.")


def family(name: str) -> str:
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def strides_of(name: str) -> list[int]:
    return STRIDES.get(name) or STRIDES.get(family(name), [4, 8, 16, 32])


@functools.cache
def weightless(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def parameters_of(name: str) -> int:
    return sum(p.numel() for p in weightless(name).parameters())


def smallest_of_each_family() -> set[str]:
    families: dict[str, list[str]] = {}
    for name in ALL:
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    return {min(names, key=parameters_of) for names in families.values()}


def is_segmenter(name: str) -> bool:
    """Encoder-decoder networks have no classifier and no pyramid of their own; test_emcad.py holds them to theirs."""
    return isinstance(weightless(name), EncoderDecoder)


ALL = [name for name in timm.list_models() if is_ours(name) and not is_segmenter(name)]
FAST = smallest_of_each_family()


def parametrized(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]
    )


every_model = pytest.mark.parametrize("name", ALL)
models = parametrized(ALL)
pyramids = parametrized([name for name in ALL if strides_of(name) == [4, 8, 16, 32]])


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def create(name: str, **kwargs) -> nn.Module:
    narrower = NARROWER.get(family(name), {}) if name in FAST else {}
    return timm.create_model(name, **SHORTER.get(family(name), {}), **narrower, **kwargs)


@functools.lru_cache(maxsize=16)  # all weights of all models would fill the memory
def ready(name: str) -> nn.Module:
    """The model in evaluation mode with 10 classes, shared by the tests that do not change it."""
    torch.manual_seed(0)
    return create(name, num_classes=10).eval()


def first_convs(name: str) -> list[str]:
    """Keys of the weights of the convolutions that read the image; most families have one."""
    convs = weightless(name).default_cfg["first_conv"]
    return [f"{conv}.weight" for conv in ([convs] if isinstance(convs, str) else convs)]


def classifiers(name: str) -> list[str]:
    """Keys of the weights of the classifiers; most families have one."""
    heads = weightless(name).default_cfg["classifier"]
    return [f"{head}.weight" for head in ([heads] if isinstance(heads, str) else heads)]


def images(name: str, height: int = SMALL, width: int | None = None, batch: int = 2) -> Tensor:
    channels = weightless(name).default_cfg["input_size"][0]
    return torch.randn(batch, channels, height, width or height)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


# Configuration


def test_there_are_models():
    assert "biformer_tiny" in ALL


@every_model
def test_default_cfg(name):
    model, cfg = weightless(name), weightless(name).default_cfg
    assert cfg["architecture"] == name
    assert {*first_convs(name), *classifiers(name)} <= set(model.state_dict())
    assert model.get_classifier().weight is dict(model.named_parameters())[classifiers(name)[0]]
    assert model.num_classes == cfg["num_classes"] > 0
    assert model.num_features > 0
    assert model.head_hidden_size > 0
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    assert 0.8 < cfg["crop_pct"] <= 1.15
    assert cfg["license"]
    assert cfg["origin_url"].startswith("https://")
    assert cfg["paper_ids"]
    assert sys.modules[timm.model_entrypoint(name).__module__].__doc__


@every_model
def test_parameter_groups(name):
    """Layer decay reaches every parameter, from the stem upwards."""
    model = weightless(name)
    everything = {key for key, _ in model.named_parameters()}
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(key for keys in layers.values() for key in keys) == sorted(everything)
        assert len(layers) > 3
        assert set(first_convs(name)) <= set(layers[0])
        assert set(classifiers(name)) <= set(layers[max(layers)])
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8).param_groups
    assert sum(len(group["params"]) for group in groups) == len(everything)
    scales = [group["lr_scale"] for group in groups]
    assert max(scales) == 1
    assert min(scales) == pytest.approx(0.8 ** (len(group_parameters(model, model.group_matcher())) - 1))


@every_model
def test_no_weight_decay_names_exist(name):
    model = weightless(name)
    assert set(model.no_weight_decay()) <= {key for key, _ in model.named_parameters()}


@every_model
def test_weights_that_cannot_be_fetched_are_explained(name):
    if timm.get_pretrained_cfg(name).has_weights:
        assert timm.get_pretrained_cfg(name).license
        return
    with pytest.raises(RuntimeError, match=r"pretrained_cfg_overlay=dict\(file="):
        timm.create_model(name, pretrained=True)


@every_model
@torch.no_grad()
def test_device_dtype_mode_and_freezing_last(name):
    """From making the model on, through all that replaces a part of it."""
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16).eval().requires_grad_(False)
    model.reset_classifier(0)
    if hasattr(model, "set_input_size"):
        model.set_input_size((96, 64))
    assert not [key for key, x in model.named_parameters() if x.requires_grad]
    model.reset_classifier(3)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not [key for key, x in tensors.items() if x.device.type != "meta"]
    assert not [key for key, x in tensors.items() if x.is_floating_point() and x.dtype != torch.bfloat16]
    assert not [key for key, module in model.named_modules() if module.training]
    channels = model.default_cfg["input_size"][0]
    logits = model(torch.empty(2, channels, 96, 64, device="meta", dtype=torch.bfloat16))
    assert (logits.shape, logits.dtype) == ((2, 3), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float16", torch.int64])
def test_dtypes_that_weights_cannot_have_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype=.*: expected a floating torch.dtype"):
        timm.create_model("va_convit_tiny", dtype=dtype)


@every_model
@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=["whole", "features_only"])
def test_unknown_arguments_are_refused(name, options):
    """smp passes output_stride for DeepLabV3, DeepLabV3+ and PAN."""
    with torch.device("meta"):
        with pytest.raises(ValueError, match=rf"{name} has no argument output_stride=16; it has .*in_chans, "):
            timm.create_model(name, output_stride=16, **options)
        with pytest.raises(ValueError, match=f"{name} has no argument drop_pth_rate=0.1; did you mean drop_path_rate"):
            timm.create_model(name, drop_pth_rate=0.1, **options)


@models
def test_arguments_of_timm_itself(name):
    options = {"scriptable": False, "exportable": True, "no_jit": True, "cache_dir": "nowhere", "device": "meta"}
    features = {"features_only": True, "feature_cls": "getter", "out_indices": (1,)}
    assert timm.create_model(name, **options, drop_rate=0.1, drop_path_rate=0.1, global_pool="avg", img_size=64)
    assert timm.create_model(name, **options, **features).feature_info.out_indices == (1,)


# Classification


@models
def test_maps_at_the_default_size(name):
    cfg = ready(name).default_cfg
    with torch.no_grad():
        features = ready(name).forward_features(images(name, *cfg["input_size"][1:], batch=1))
    channels, (h, w) = ready(name).num_features, cfg["pool_size"]
    tokens = 10 if name in TOKEN_PER_CLASS else 1
    assert features.shape == ((1, tokens + h * w, channels) if family(name) in TOKENS else (1, channels, h, w))


@models
@torch.no_grad()
def test_head(name):
    model, x = ready(name), images(name)
    logits, features = model(x), model.forward_features(x)
    assert logits.shape == (2, 10)
    assert_close(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    if len(classifiers(name)) == 1 and name not in TOKEN_PER_CLASS:
        assert_close(model.get_classifier()(pooled), logits)


@models
@torch.no_grad()
def test_classifier_can_be_changed(name):
    x = images(name)
    model = create(name).eval()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    features = model.forward_features(x)
    assert_close(model(x), model.head.norm(features) if family(name) in NORM_IN_HEAD else features)
    model.reset_classifier(5, "avg" if family(name) in TOKENS else "max")
    assert model(x).shape == (2, 5)


@models
@torch.no_grad()
def test_model_without_classifier_or_pooling(name):
    x = images(name)
    assert create(name, num_classes=0).eval()(x).shape == (2, ready(name).head_hidden_size)
    model = create(name, num_classes=0, global_pool="").eval()
    assert model(x).shape == model.forward_features(x).shape


@models
def test_training_reaches_every_parameter(name):
    model = create(name, num_classes=10, drop_rate=0.1, drop_path_rate=0.1).train()
    model(images(name)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@models
@torch.no_grad()
def test_dropout_and_stochastic_depth(name):
    x = images(name)
    model = create(name, num_classes=10, drop_rate=0.5, drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    model.load_state_dict(ready(name).state_dict())
    assert_close(model.eval()(x), ready(name)(x))
    features = model.eval().forward_features(x)
    assert not torch.equal(model.train().forward_head(features), model.forward_head(features))


# Sizes of images


def expected_size(name: str, size: tuple[int, int], stride: int) -> tuple[int, ...]:
    return tuple(side // stride if name in ROUNDS_DOWN else math.ceil(side / stride) for side in size)


SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ((224, 224), (256, 256), (200, 300), (301, 197))]


@models
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 64), (50, 130), *SLOW_SIZES])
@torch.no_grad()
def test_any_size(name, size):
    model, x = ready(name), images(name, *size, batch=1)
    features, maps = model.forward_intermediates(x)
    assert model.forward_head(features).isfinite().all()
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape == (1, info["num_chs"], *expected_size(name, size, info["reduction"]))


@models
@pytest.mark.parametrize("size", [(31, 64), (64, 16)])
def test_images_too_small_are_refused(name, size):
    for call in (ready(name), ready(name).forward_intermediates):
        with pytest.raises(ValueError, match="at least 32 x 32"):
            call(images(name, *size))


@every_model
def test_images_without_channels_are_refused(name):
    with torch.device("meta"), pytest.raises(ValueError, match="in_chans=0: expected at least 1 channel"):
        timm.create_model(name, in_chans=0)


@models
@torch.no_grad()
def test_img_size_does_not_bind(name):
    model = create(name, img_size=96, num_classes=10).eval()
    assert model(images(name, 64, 80)).shape == (2, 10)


@models
@torch.no_grad()
def test_samples_are_independent(name):
    """In float64, where a tie between regions does not depend on the order of a sum."""
    model, x = create(name, num_classes=10).double().eval(), images(name, 48, 72, batch=3).double()
    together = model(x)
    for i in range(3):
        assert_close(model(x[i : i + 1])[0], together[i])
    x[1] = torch.nan
    assert_close(model(x)[[0, 2]], together[[0, 2]])


# Maps for dense prediction


@models
@torch.no_grad()
def test_features_only(name):
    x = images(name, 70, 100)
    model = create(name, features_only=True).eval()
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    maps = model(x)
    assert [feature.shape[1] for feature in maps] == channels
    assert [feature.shape[2:] for feature in maps] == [expected_size(name, (70, 100), stride) for stride in strides]
    assert strides == strides_of(name)


@models
@pytest.mark.parametrize("indices", [(0, 2), (1,), 2, (-1, -3)])
@torch.no_grad()
def test_out_indices(name, indices):
    x, full = images(name), ready(name)
    model = create(name, num_classes=10, features_only=True, out_indices=indices).eval()
    wanted = FeatureInfo(full.feature_info, indices)
    assert model.feature_info.channels() == wanted.channels()
    weights = full.state_dict()
    model.model.load_state_dict({key: weights[key] for key in model.model.state_dict()})
    numbers = sorted(i % len(full.feature_info) for i in wanted.out_indices)
    assert sorted(model.out_indices) == numbers
    for actual, expected in zip(model(x), full.forward_intermediates(x, numbers, intermediates_only=True), strict=True):
        assert_close(actual, expected)


@models
@torch.no_grad()
def test_intermediates(name):
    model, x = ready(name), images(name)
    features, maps = model.forward_intermediates(x)
    assert_close(features, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    normalised = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert normalised[0].shape == maps[-1].shape
    early, first = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert_close(first, maps[:2])
    assert early.shape == maps[1].shape
    with pytest.raises((ValueError, AssertionError), match="CHWN"):
        model.forward_intermediates(x, output_fmt="CHWN")


@models
@torch.no_grad()
def test_the_modules_of_the_maps_give_them(name):
    """What is hooked by `feature_info`, such as Grad-CAM, sees the channels and places of each map."""
    model, seen, handles = ready(name), {}, []
    for info in model.feature_info:
        see = functools.partial(seen.__setitem__, info["module"])
        handles.append(model.get_submodule(info["module"]).register_forward_hook(lambda _, __, x, see=see: see(x)))
    maps = model.forward_intermediates(images(name), intermediates_only=True)
    for handle in handles:
        handle.remove()
    for info, expected in zip(model.feature_info, maps, strict=True):
        assert info["module"] in seen, "a layer that is never called"
        assert seen[info["module"]].shape.numel() >= expected.shape.numel()  # class tokens are no places


@models
@torch.no_grad()
def test_pruning(name):
    x = images(name)
    model = create(name, num_classes=10)
    model.load_state_dict(ready(name).state_dict())
    model.eval()
    maps = model.forward_intermediates(x, intermediates_only=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert sum(p.numel() for p in model.parameters()) < parameters
    assert_close(model.forward_intermediates(x, [0, 2], intermediates_only=True), [maps[0], maps[2]])
    assert_close(model.forward_intermediates(x, [-1], intermediates_only=True), [maps[2]])
    assert model(x).shape[-1 if family(name) in TOKENS else 1] == model.num_features == maps[2].shape[1]


@pyramids
@torch.no_grad()
def test_as_encoder_of_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.FPN(f"tu-{name}", encoder_weights=None, in_channels=4, classes=3).eval()
    assert model(torch.randn(1, 4, 64, 96)).shape == (1, 3, 64, 96)


# Checkpoints


def same_weights(actual: nn.Module, expected: nn.Module) -> None:
    assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@models
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema"])
def test_checkpoints_load_strictly(name, wrapper, tmp_path):
    file = tmp_path / "weights.pth"
    weights = ready(name).state_dict()
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, file)
    overlay = {"file": str(file), "num_classes": 10}
    same_weights(create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10), ready(name))


@models
def test_checkpoints_load_by_path(name, tmp_path):
    torch.save({"state_dict": ready(name).state_dict()}, tmp_path / "weights.pth")
    same_weights(create(name, checkpoint_path=str(tmp_path / "weights.pth"), num_classes=10), ready(name))


@models
def test_incomplete_checkpoints_are_refused(name, tmp_path):
    weights = ready(name).state_dict()
    weights.pop(first_convs(name)[0])
    torch.save(weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    with pytest.raises(RuntimeError, match="Missing key"):
        create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)


@models
@pytest.mark.parametrize("channels", [1, 4, 13])
@torch.no_grad()
def test_pretrained_stem_adapts_to_channels(name, channels, tmp_path):
    source = ready(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    model = create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=channels).eval()
    for first in first_convs(name):
        assert_close(model.state_dict()[first], adapt_input_conv(channels, source.state_dict()[first]))
    assert model(torch.randn(1, channels, SMALL, SMALL)).shape == (1, 4)


# Changed and watched layers


@models
def test_low_rank_adapters_are_trained_and_act_like_merged_weights(name):
    network, x = copy.deepcopy(ready(name)), images(name, SMALL, 48).double()
    if family(name) == "halonet":
        with pytest.raises(UserError, match="no linear layer below its head"):
            adapt(network, 2, name, x.shape[1:])
        return
    adapt(network, 2, name, x.shape[1:])
    adapters = {key: p for key, p in network.double().named_parameters() if ".lora_" in key}
    for parameter in adapters.values():  # the second of the two is 0 at first
        nn.init.normal_(parameter, std=0.1)
    plain = create(name, num_classes=10).double()
    plain.load_state_dict(merged(network.state_dict()))
    logits = network(x)
    assert_close(logits, plain(x))
    logits.square().sum().backward()
    assert not [key for key, p in adapters.items() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        assert_close(network.eval()(x), plain.eval()(x))


@models
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao itself
@torch.no_grad()
def test_dynamic_quantization(name):
    quantization = pytest.importorskip("torch.ao.quantization")  # deprecated
    x = images(name)
    quantized = quantization.quantize_dynamic(copy.deepcopy(ready(name)), {nn.Linear}, dtype=torch.qint8)
    assert not [key for key, layer in quantized.named_modules() if type(layer) is nn.Linear]
    assert relative_error(quantized(x), ready(name)(x)) < 0.1


@models
@torch.no_grad()
def test_weights_of_8_bits(name):
    torchao = pytest.importorskip("torchao.quantization")
    x, quantized = images(name), copy.deepcopy(ready(name))
    torchao.quantize_(quantized, torchao.Int8WeightOnlyConfig())
    assert relative_error(quantized(x), ready(name)(x)) < 0.1


def forward_hook(layer: nn.Module, called: Callable) -> None:
    layer.register_forward_hook(lambda layer, *_: called(layer))


def forward_pre_hook(layer: nn.Module, called: Callable) -> None:
    layer.register_forward_pre_hook(lambda layer, *_: called(layer))


def own_forward(layer: nn.Module, called: Callable) -> None:
    """As accelerate has it."""
    original = layer.forward

    def forward(*args, **kwargs):
        called(layer)
        return original(*args, **kwargs)

    layer.forward = forward


@models
@pytest.mark.parametrize("watch", [forward_hook, forward_pre_hook, own_forward])
def test_whatever_watches_a_layer_is_called_without_gradients_too(name, watch):
    model, x, called = copy.deepcopy(ready(name)), images(name), []
    leaves = {layer: key for key, layer in model.named_modules() if not list(layer.children())}
    for layer in leaves:
        watch(layer, lambda layer: called.append(leaves[layer]))
    model(x)
    expected = Counter(called)
    assert set(expected) == set(leaves.values())
    called.clear()
    with torch.no_grad():
        model(x)
    assert Counter(called) == expected


@models
def test_hooks_of_all_modules_are_called_without_gradients_too(name):
    model, x, called = ready(name), images(name), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: called.append(layer))
    try:
        model(x)
        expected = Counter(called)
        called.clear()
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert {layer for layer in model.modules() if not list(layer.children())} <= set(expected)
    assert Counter(called) == expected


# Execution


@models
def test_gradient_checkpointing_changes_nothing(name):
    x = images(name)
    results = []
    for enable in (False, True):
        model = create(name, num_classes=10)
        model.load_state_dict(ready(name).state_dict())
        model.set_grad_checkpointing(enable)
        logits = model.train()(x)
        logits.square().sum().backward()
        results.append((logits.detach(), {key: p.grad for key, p in model.named_parameters()}))
    assert_close(results[0], results[1])


@models
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the pooling of one position
def test_per_sample_gradients_equal_a_loop_over_samples(name):
    model, x = copy.deepcopy(ready(name)).double(), images(name, 32).double()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict, image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        assert_close([gradients[i] for gradients in together.values()], list(expected))


@models
@torch.no_grad()
def test_channels_last(name):
    model, x = ready(name), images(name)
    assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-3, atol=1e-5)


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(name, dtype):
    model, x = create(name, num_classes=10), images(name, 32)
    model.load_state_dict(ready(name).state_dict())
    with torch.autocast("cpu", dtype):
        logits = model.eval()(x)
    assert logits.dtype == dtype
    assert relative_error(logits, ready(name)(x)) < 0.05
    with torch.autocast("cpu", dtype):
        loss = model.train()(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@models
def test_compile_in_one_graph(name):
    model, x = ready(name), images(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-5)


def batch_of_any_size() -> tuple:
    return ({0: torch.export.Dim("batch", min=1, max=64)},)


@models
@torch.no_grad()
def test_export_with_dynamic_batch(name):
    model, x = ready(name), images(name, 64, 80)
    program = torch.export.export(model, (x,), dynamic_shapes=batch_of_any_size()).module()
    for batch in (1, 5):
        x = images(name, 64, 80, batch)
        assert_close(program(x), model(x), rtol=1e-3, atol=1e-5)


@models
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_tracing_by_torchscript(name, tmp_path):
    model, x = ready(name), images(name)
    torch.jit.trace(model, x, check_trace=False).save(tmp_path / "model.pt")
    x = images(name, batch=3)
    assert_close(torch.jit.load(tmp_path / "model.pt")(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", [*sorted(FAST), "emcad_pvt_v2_b0"])
def test_torchscript_of_source_code_is_refused_with_a_way_out(name):
    network = timm.create_model(name)
    for module in (network, nn.Sequential(network)):
        with pytest.raises(RuntimeError, match=rf"{type(network).__name__}: torch\.jit\.script.*torch\.jit\.trace"):
            torch.jit.script(module)


@models
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own code
@torch.no_grad()
def test_onnx_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = ready(name), images(name, 64, 80)
    torch.onnx.export(
        model, (x,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=batch_of_any_size(), verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3):
        x = images(name, 64, 80, batch)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-4)


@models
@torch.no_grad()
def test_tracing_by_fx(name):
    """timm's and torchvision's feature extraction by graph."""
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model, x = ready(name), images(name)
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    _, nodes = get_graph_node_names(model, tracer_kwargs=options)
    traced = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=options)
    assert_close(traced(x)[nodes[-1]], model(x))
