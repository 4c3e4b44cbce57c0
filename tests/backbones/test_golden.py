"""Our models and layers compute what the references compute: every record in tests/golden, to 1e-9 in float64.

A family adds its records and, below, how the arguments of a reference class become ours: `MODELS` for networks, which
are loaded through `timm.create_model(pretrained=True)`, `LAYERS` for single modules. Both are keyed by class name.
"""

import math
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from golden_records import NAMES, assert_same, case_input, filled_state_dict, load_record
from torch import Tensor, nn

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones import (
    agent,
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    crossformer,
    flowformer,
    gates,
    layers,
    lgvit,
    moh,
    nat,
    nat_isotropic,
    ninformer,
    patchconvnet,
    rmt,
    transnext,
)
from visionattn.backbones.layers import DepthwiseConv
from visionattn.kernels import _record, record_attention, set_backend, window_attention

# Whole networks that the default run affords, one a family; micro ones all run
FULL_SIZE = ("biformer_tiny", "crossformer_tiny", "nat_mini", "ninformer_cifar10", "ninformer_mnist")


AGENT = "agent_transformer/models/"  # the folder of its files


def _biformer(kwargs: dict) -> tuple[str, dict]:
    ours = {key: value for key, value in kwargs.items() if key not in ("pe", "auto_pad", "norm_layer", "n_wins")}
    if "n_wins" in kwargs:
        ours["n_win"] = kwargs["n_wins"]
    return "biformer_tiny", ours


def _biformer_stl(name: str) -> Callable[[dict], tuple[str, dict]]:
    return lambda kwargs: (name, _biformer(kwargs)[1])


def _biformer_dense(kwargs: dict) -> tuple[str, dict]:
    return "biformer_tiny", {**_biformer(kwargs)[1], "extra_norms": True, "features_only": True}


def _crossformer(kwargs: dict) -> tuple[str, dict]:
    without_effect = ("qkv_bias", "qk_scale", "patch_norm", "use_checkpoint")  # always at their defaults
    return "crossformer_tiny", {key: value for key, value in kwargs.items() if key not in without_effect}


def _crossformer_dense(kwargs: dict) -> tuple[str, dict]:
    return "crossformer_tiny", {**_crossformer(kwargs)[1], "features_only": True}


def _flowformer(kwargs: dict) -> tuple[str, dict]:
    ours = {"embed_dim": "embed_dims", "depth": "depths", "mlp_ratio": "mlp_ratios", "init_values": "layer_scale"}
    return "flowformer", {ours.get(key, key): kwargs[key] for key in kwargs if key != "patch_size"}


def _lgvit(kwargs: dict) -> tuple[str, dict]:
    return "lgvit_96", {**{key: kwargs[key] for key in kwargs if key != "img_size"}, "num_classes": 0}


def _nat(name: str) -> Callable[[dict], tuple[str, dict]]:
    return lambda kwargs: (name, {key: value for key, value in kwargs.items() if key != "qkv_bias"})


def _nat_isotropic(kwargs: dict) -> tuple[str, dict]:
    ours = {key: value for key, value in kwargs.items() if key not in ("img_size", "patch_size", "layer")}
    if kwargs["layer"] == "VisionTransformerLayer":
        ours["kernel_size"] = kwargs["img_size"] // kwargs["patch_size"]
    return "nat_isotropic_small", ours


def _ninformer(kwargs: dict) -> tuple[str, dict]:
    ours = {"image_size": "img_size", "in_channels": "in_chans"}
    return "ninformer_tiny_patch4_32", {ours.get(key, key): kwargs[key] for key in kwargs if key != "seq_len"}


def _patchconvnet(kwargs: dict) -> tuple[str, dict]:
    always = ("patch_size", "dpr_constant", "norm_layer", "Attention_block_token_only")
    return "patchconvnet_s60", {key: value for key, value in kwargs.items() if key not in always}


def _rmt(kwargs: dict) -> tuple[str, dict]:
    scale, stages = kwargs.get("layer_init_values", 1e-6), kwargs["layerscales"]
    ours = {"heads_ranges": "decay_ranges"}
    always = ("init_values", "chunkwise_recurrents", "layerscales", "layer_init_values")
    arguments = {ours.get(key, key): value for key, value in kwargs.items() if key not in always}
    by_axis = sum(kwargs["chunkwise_recurrents"])
    layer_scales = [scale if scaled else None for scaled in stages]
    return "rmt_tiny", {**arguments, "by_axis": by_axis, "layer_scales": layer_scales}


def _rmt_dense(kwargs: dict) -> tuple[str, dict]:
    return "rmt_tiny", {**_rmt(kwargs)[1], "extra_norms": True, "features_only": True}


def _transnext(kwargs: dict) -> tuple[str, dict]:
    ours = {"fixed_pool_size": "pool_size"}
    always = ("patch_size", "norm_layer", "is_extrapolation", "img_size")
    arguments = {ours.get(key, key): value for key, value in kwargs.items() if key not in always}
    return "transnext_micro", {"pretrain_size": kwargs.get("img_size", 224), **arguments}


def _transnext_dense(kwargs: dict) -> tuple[str, dict]:
    return "transnext_micro", {**_transnext(kwargs)[1], "features_only": True}


def _moh(kwargs: dict) -> tuple[str, dict]:
    ours = {"shared_head": "shared_heads", "routed_head": "active_heads"}
    arguments = _transnext({"img_size": 224, **kwargs})[1]
    size = {"pretrain_size": kwargs.get("pretrain_size", kwargs["img_size"])}
    return "moh_transnext_small_75", {ours.get(key, key): value for key, value in arguments.items()} | size


def _agent(name: str) -> Callable[[dict], tuple[str, dict]]:
    def ours(kwargs: dict) -> tuple[str, dict]:
        always = () if "deit" in name else ("patch_size", "qkv_bias")
        arguments = {key: value for key, value in kwargs.items() if key not in always}
        for key in ("agent_num", "agent_sr_ratios"):
            if key in arguments:
                arguments[key] = [int(n) for n in arguments[key]]
        if "la_split_size" in arguments:
            arguments["la_split_size"] = [int(n) for n in arguments["la_split_size"].split("-")]
        if "window_size" in arguments:
            arguments |= {"agent_window": kwargs["window_size"], "window_size": max(7, kwargs["window_size"] // 8)}
        return name, arguments

    return ours


MODELS: dict[str, Callable[[dict], tuple[str, dict]]] = {
    "BiFormer": _biformer,
    "BiFormerSTL": _biformer_stl("biformer_stl"),
    "nchwBiFormerSTL": _biformer_stl("biformer_stl_nchw"),
    "BiFormer_mm": _biformer_dense,
    "CrossFormer": _crossformer,
    "models.crossformer_backbone_seg.CrossFormer": _crossformer_dense,
    "Flowformer_CV/flowformer.py Flowformer": _flowformer,
    "SAM/LGViT.py LGViT": _lgvit,
    "NAT": _nat("nat_mini"),
    "DiNAT": _nat("dinat_mini"),
    "DiNAT_s": _nat("dinat_s_tiny"),
    "NATIsotropic": _nat_isotropic,
    "train.NiNformerImageClassification": _ninformer,
    "PatchConvnet": _patchconvnet,
    "classfication_release/RMT.py VisRetNet": _rmt,
    "classfication_release/RMT.py VisRetNet (RMT_T3)": _rmt,
    "classification_token_label_release/RMT.py VisRetNet": _rmt,
    "segmentation/mmseg/models/backbones/RMT.py RMT": _rmt_dense,
    "TransNeXt": _transnext,
    "segmentation TransNeXt": _transnext_dense,
    "MoH-ViT/transnext.py TransNeXt": _moh,
    f"{AGENT}agent_deit.py VisionTransformer": _agent("agent_deit_tiny"),
    f"{AGENT}agent_deit.py VisionTransformer (agent_deit_tiny: patch 16, dim 192, depth 12, heads 3)": _agent(
        "agent_deit_tiny"
    ),
    f"{AGENT}agent_pvt.py PyramidVisionTransformer": _agent("agent_pvt_tiny"),
    f"{AGENT}agent_pvt.py agent_pvt_tiny": _agent("agent_pvt_tiny"),
    f"{AGENT}agent_swin.py AgentSwinTransformer": _agent("agent_swin_tiny"),
    f"{AGENT}agent_cswin.py CSWinTransformer": _agent("agent_cswin_tiny"),
}


class ChannelsLast(nn.Module):
    """A layer on maps (B, H, W, C) for a record that has (B, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A layer on maps (B, H, W, C), of `size` or made from images, for a record that has tokens (B, L, C)."""

    def __init__(self, layer: nn.Module, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.size is None else x.unflatten(1, self.size)).flatten(1, 2)


def _bra(kwargs: dict) -> nn.Module:
    return biformer.BiLevelRoutingAttention(**{k: v for k, v in kwargs.items() if k != "auto_pad"})


def _bra_nchw(kwargs: dict) -> nn.Module:
    return ChannelsLast(biformer.RefactoredRoutingAttention(**kwargs))


def _block(kwargs: dict) -> nn.Module:
    attention = {"n_win": kwargs["n_win"], "side_dwconv": kwargs["side_dwconv"]}
    attn = biformer.BiLevelRoutingAttention(kwargs["dim"], kwargs["num_heads"], topk=kwargs["topk"], **attention)
    return biformer.Block(kwargs["dim"], attn, kwargs["mlp_ratio"], before_attn_dwconv=kwargs["before_attn_dwconv"])


def _cross_block(kwargs: dict) -> nn.Module:
    dim, interval = kwargs["dim"], kwargs["interval"] if kwargs["lsda_flag"] else 1
    attn = crossformer.GroupAttention(dim, kwargs["num_heads"], kwargs["group_size"], interval)
    block = crossformer.Block(dim, attn, kwargs["mlp_ratio"], kwargs["use_extra_conv"])
    return Tokens(block, kwargs["input_resolution"])


class ClassToken(nn.Module):
    """A layer of class tokens and the keys they attend to, for a record that has tokens (B, 1 + N, C), theirs first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :1], x)


class Turned(nn.Module):
    """A layer that is given the turns of its positions, which `turns` makes for a map; tokens are of a square one."""

    def __init__(self, layer: nn.Module, turns: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.turns = layer, turns

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self(x.unflatten(1, [math.isqrt(x.shape[1])] * 2)).flatten(1, 2)
        return self.layer(x, self.turns(x))


def _retention(by_axis: bool) -> Callable[[dict], nn.Module]:
    def make(kwargs: dict) -> nn.Module:
        dim, heads = kwargs["embed_dim"], kwargs["num_heads"]
        layer = rmt.Retention(dim, heads, kwargs["heads_range"], by_axis)
        return Turned(layer, lambda x: rmt.turns_of_places(x, dim // heads))

    return make


def _retention_block(kwargs: dict) -> nn.Module:
    dim = kwargs["embed_dim"]
    attn = _retention(kwargs["retention"] == "chunk")(kwargs)
    return Turned(rmt.Block(dim, attn.layer, kwargs["ffn_dim"] / dim, 1e-6), attn.turns)


def _aggregated(kwargs: dict) -> nn.Module:
    """The map at the size of training is the layer's, but for one record."""
    size = tuple(kwargs["input_resolution"])
    options = {"sr_ratio": kwargs["sr_ratio"], "window_size": kwargs["window_size"], "qkv_bias": kwargs["qkv_bias"]}
    side = (8, 8) if size == (12, 20) else size
    pool_size = kwargs.get("fixed_pool_size")
    return Tokens(
        transnext.AggregatedAttention(kwargs["dim"], kwargs["num_heads"], side, **options, pool_size=pool_size), size
    )


class Sized(nn.Module):
    """A layer of tokens (B, 1 + H * W, C) of a map, and its size, for a record that has the tokens alone."""

    def __init__(self, layer: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, *self.size)


class Projected(nn.Module):
    """A layer of projections (B, H, W, 3, heads, head_dim), for a record that has them as tokens (B, L, 3 C)."""

    def __init__(self, layer: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unflatten(-1, (3, self.layer.num_heads, -1)).unflatten(1, self.size)).flatten(1, 2)


def _agent_deit_layer(kwargs: dict) -> nn.Module:
    size = (kwargs["window"],) * 2
    return Sized(agent_deit.TokenAttention(kwargs["dim"], kwargs["num_heads"], kwargs["agent_num"], size), size)


def _agent_pvt_layer(kwargs: dict) -> nn.Module:
    size, heads = (8, 8), kwargs["num_heads"]
    layer = agent_pvt.ReducedAgentAttention(kwargs["dim"], heads, kwargs["agent_num"], size, kwargs["sr_ratio"])
    return Tokens(layer, size)


def _agent_swin_layer(kwargs: dict) -> nn.Module:
    size = tuple(kwargs["window_size"])
    return Tokens(agent.MapAttention(kwargs["dim"], kwargs["num_heads"], kwargs["agent_num"], size), size)


def _agent_cswin_layer(kwargs: dict) -> nn.Module:
    size, agents = (kwargs["resolution"],) * 2, kwargs["agent_num"]
    level = bool(kwargs["idx"])
    return Projected(
        agent_cswin.AgentStripes(kwargs["dim"], kwargs["num_heads"], agents, size, kwargs["split_size"], level), size
    )


class RoutedAttention(nn.Module):
    """Attention whose heads a router weighs, on tokens (B, L, C) of maps of `size`; keeps the loss of balance."""

    def __init__(self, attn: nn.Module, router: moh.Router, size: tuple[int, int]) -> None:
        super().__init__()
        self.attn, self.router, self.size = attn, router, size

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        gates, self.loss = self.router(x)
        return self.attn(x, gates).flatten(1, 2)


def _moh_layer(kwargs: dict) -> nn.Module:
    dim, heads, size = kwargs["dim"], kwargs["num_heads"], tuple(kwargs["input_resolution"])
    attn = (
        transnext.AggregatedAttention(dim, heads, size, kwargs["sr_ratio"], kwargs["window_size"])
        if "sr_ratio" in kwargs
        else transnext.GlobalAttention(dim, heads, size)
    )
    return RoutedAttention(attn, moh.Router(dim, heads, kwargs["shared_head"], kwargs["routed_head"]), size)


def _moh_names(state_dict: dict) -> dict:
    layers = {key: key.split(".")[0] for key in state_dict}
    ours = {key: f"router.{moh.ROUTERS[layer]}.weight" for key, layer in layers.items() if layer in moh.ROUTERS}
    return {ours.get(key, f"attn.{key}"): value for key, value in state_dict.items()}


LAYERS: dict[str, Callable[[dict], nn.Module]] = {
    "ops.bra_legacy.BiLevelRoutingAttention": _bra,
    "ops.bra_nchw.nchwBRA": _bra_nchw,
    "models._common.Attention": lambda kwargs: biformer.GlobalAttention(**kwargs),
    "models._common.AttentionLePE": lambda kwargs: biformer.GlobalAttention(**kwargs),
    "models._common.nchwAttentionLePE": lambda kwargs: ChannelsLast(
        biformer.GlobalAttention(**kwargs, side_dwconv=5, lepe_of="v")
    ),
    "models.biformer.Block": _block,
    "models.crossformer.Attention": lambda kwargs: Tokens(
        crossformer.GroupAttention(kwargs["dim"], kwargs["num_heads"], kwargs["group_size"][0]), kwargs["group_size"]
    ),
    "models.crossformer.DynamicPosBias": lambda kwargs: crossformer.DynamicPosBias(**kwargs),
    "models.crossformer.CrossFormerBlock": _cross_block,
    "models.crossformer.PatchEmbed": lambda kwargs: Tokens(
        crossformer.PatchEmbed(kwargs["in_chans"], kwargs["embed_dim"], kwargs["patch_size"]), None
    ),
    "models.crossformer.PatchMerging": lambda kwargs: Tokens(
        crossformer.PatchMerging(kwargs["dim"], kwargs["patch_size"]), kwargs["input_resolution"]
    ),
    "ninformer.MixerBlock": lambda kwargs: Tokens(
        ninformer.Mixer(kwargs["dim"], (7, 7), kwargs["token_dim"], kwargs["channel_dim"]), (7, 7)
    ),
    "ninformer.MixerGatingUnit": lambda kwargs: Tokens(
        ninformer.MixerGatingUnit(kwargs["dim"], (7, 7), kwargs["token_dim"], kwargs["channel_dim"]), (7, 7)
    ),
    "ninformer.NiNBlock": lambda kwargs: Tokens(ninformer.Block(kwargs["d_model"], kwargs["d_ffn"], (7, 7)), (7, 7)),
    "NeighborhoodAttention2D": lambda kwargs: nat.NeighborhoodAttention(**kwargs),
    "Conv_blocks_se": lambda kwargs: Tokens(patchconvnet.ConvBranch(**kwargs), (6, 6)),
    "classification/attention_native.py AggregatedAttention": _aggregated,
    "classification/transnext.py Attention": lambda kwargs: Tokens(
        transnext.GlobalAttention(kwargs["dim"], kwargs["num_heads"], 7), tuple(kwargs["input_resolution"])
    ),
    "MoH-ViT/attention_native.py AggregatedAttention": _moh_layer,
    f"{AGENT}agent_deit.py AgentAttention": _agent_deit_layer,
    f"{AGENT}agent_pvt.py AgentAttention": _agent_pvt_layer,
    f"{AGENT}agent_swin.py AgentAttention": _agent_swin_layer,
    f"{AGENT}agent_cswin.py AgentAttention": _agent_cswin_layer,
    "MoH-ViT/attention.py Attention": _moh_layer,
    "ConvolutionalGLU": lambda kwargs: Tokens(
        transnext.ConvGLU(kwargs["in_features"], kwargs["hidden_features"]), (9, 6)
    ),
    "classfication_release/RMT.py VisionRetentionChunk with RetNetRelPos2d": _retention(True),
    "classfication_release/RMT.py VisionRetentionAll with RetNetRelPos2d": _retention(False),
    "classfication_release/RMT.py RetBlock": _retention_block,
    "classfication_release/RMT.py FeedForwardNetwork": lambda kwargs: rmt.ConvMlp(
        kwargs["embed_dim"], kwargs["ffn_dim"]
    ),
    "classfication_release/RMT.py DWConv2d": lambda kwargs: DepthwiseConv(kwargs["dim"], kwargs["kernel_size"]),
    "Flowformer_CV/flowformer.py Flow_Attention": lambda kwargs: Tokens(
        flowformer.FlowAttention(kwargs["dim"], kwargs["num_heads"]), (5, 10)
    ),
    "SAM/LGViT.py LinearAttention": lambda kwargs: Turned(
        lgvit.LinearAttention(kwargs["dim"], kwargs["num_heads"]), lgvit.turns_of_places
    ),
    "SAM/LGViT.py LGViTBlock": lambda kwargs: Turned(
        lgvit.Block(kwargs["dim"], kwargs["num_heads"], kwargs["mlp_ratio"]), lgvit.turns_of_places
    ),
    "SAM/LGViT.py MBConv": lambda kwargs: ChannelsLast(lgvit.ConvBlock(kwargs["in_chans"], kwargs["expand_ratio"])),
    "triplet_attention.py TripletAttention": lambda kwargs: gates.TripletAttention(not kwargs.get("no_spatial")),
    **{
        f"ELA-{size}": lambda kwargs: gates.ELA(
            kwargs["channels"], kwargs["kernel_size"], kwargs["groups"], kwargs["gn_groups"]
        )
        for size in "TBSL"
    },
    "grouped generalized mean": lambda kwargs: layers.GGeM(kwargs["dim"], kwargs["groups"]),
    "Learned_Aggregation_Layer": lambda kwargs: ClassToken(patchconvnet.Aggregation(**kwargs)),
}
RENAMED: dict[str, Callable[[dict, nn.Module], dict]] = {  # how others than BiFormer's layers get our key names
    ninformer.__name__: ninformer.checkpoint_filter_fn,
    agent.__name__: lambda state_dict, layer: state_dict,
    gates.__name__: lambda state_dict, layer: state_dict,
    agent_deit.__name__: lambda state_dict, layer: state_dict,
    agent_pvt.__name__: lambda state_dict, layer: state_dict,
    agent_cswin.__name__: lambda state_dict, layer: {agent_cswin.our_name(key): x for key, x in state_dict.items()},
    __name__: lambda state_dict, layer: _moh_names(state_dict),
    patchconvnet.__name__: lambda state_dict, layer: patchconvnet.in_our_names(state_dict),
    flowformer.__name__: lambda state_dict, layer: state_dict,
    lgvit.__name__: lambda state_dict, layer: lgvit.in_our_names(state_dict),
    rmt.__name__: lambda state_dict, layer: rmt.in_our_names(state_dict),
    layers.__name__: lambda state_dict, layer: rmt.in_our_names(state_dict),
    transnext.__name__: lambda state_dict, layer: transnext.in_our_names(state_dict),
}


ELSEWHERE = {  # records of other tests
    "definition (the released kernel is Triton, GPU only)",
    "classfication_release/RMT.py RetNetRelPos2d",
}


def make_layer(record: dict) -> nn.Module:
    layer = LAYERS[record["reference"]["class"]](record["reference"]["kwargs"]).eval()
    inner = layer.layer if isinstance(layer, ChannelsLast | Tokens | ClassToken | Turned | Sized | Projected) else layer
    rename = RENAMED.get(type(inner).__module__, biformer.checkpoint_filter_fn)
    state_dict = rename(filled_state_dict(record), inner)
    if isinstance(layer, layers.GGeM):  # whose powers are not filled
        state_dict = {"p": torch.tensor(record["kept_buffers"][0]["values"])}
    inner.load_state_dict(state_dict)
    return layer


def tolerance(case: dict, key: str = "") -> float:
    """Some references have tables in float32; ours are as they would be in float64."""
    if case.get("tables") != "official":
        return 1e-9
    return 1e-5 if key.startswith("grad_") else 1e-6


def reference_class(name: str) -> str:
    return load_record(name)["reference"]["class"]


def network_records() -> Iterator:
    for name in NAMES:
        if reference_class(name) in MODELS:
            fast = "micro" in name or "pico" in name or name in FULL_SIZE
            yield pytest.param(name, marks=[] if fast else pytest.mark.slow)


def has_gradients(name: str) -> bool:
    return reference_class(name) in LAYERS and any(
        key.startswith("grad_") for key in load_record(name)["cases"][0]["outputs"]
    )


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_record_is_used():
    assert NAMES
    assert {reference_class(name) for name in NAMES} == {*MODELS, *LAYERS, *ELSEWHERE}


@pytest.mark.parametrize("name", list(network_records()))
def test_network(name, tmp_path):
    record = load_record(name)
    torch.save({"model": filled_state_dict(record)}, tmp_path / "reference.pth")
    model_name, kwargs = MODELS[reference_class(name)](record["reference"]["kwargs"])
    overlay = {"file": str(tmp_path / "reference.pth"), "num_classes": kwargs.get("num_classes", 1000)}
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    if "kwargs_source" not in record:  # else the checkpoint is of a network for another size
        assert sum(p.numel() for p in model.parameters()) == record["num_params"]
    for case in record["cases"]:
        outputs = network_outputs(model, case_input(case))
        for key, expected in case["outputs"].items():
            tokens = len(expected["shape"]) == 3  # (B, L, C) of a map
            actual = outputs[key].flatten(2).mT if tokens and outputs[key].ndim == 4 else outputs[key]
            assert_same(actual, expected, f"{name}, {key} of input {case['input']['shape']}", tolerance(case))


@torch.no_grad()
def network_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    if not hasattr(model, "forward_features"):  # features_only
        return {f"{name}{i}": feature for i, feature in enumerate(model(image)) for name in ("feat", "out")}
    features, stages = model.forward_intermediates(image)
    outputs = {f"{name}{i}": stage for i, stage in enumerate(stages) for name in ("feat", "block", "stage")}
    outputs |= {"norm": features, "out": features, "logits": model.forward_head(features)}
    if isinstance(model, nat.NAT):
        outputs["stem"] = model.patch_embed(image).permute(0, 3, 1, 2)
        outputs["pooled"] = model.forward_head(features, pre_logits=True)
        if not isinstance(model, nat_isotropic.NATIsotropic):
            outputs["norm"] = features.permute(0, 2, 3, 1)
    elif isinstance(model, ninformer.NiNformer):
        outputs["patches"] = model.patch_embed(image).permute(0, 3, 1, 2)
    elif isinstance(model, moh.MoHTransNeXt):
        outputs |= moh_losses(model, image)
    elif isinstance(model, transnext.TransNeXt):
        outputs["stem"] = model.stages[0].patch_embed(image).permute(0, 3, 1, 2)
        outputs["pooled"] = model.forward_head(features, pre_logits=True)
    elif isinstance(model, rmt.RMT):
        outputs = {key: x.permute(0, 2, 3, 1) if key.startswith("feat") else x for key, x in outputs.items()}
        outputs["norm"] = model.projection.norm(model.projection.fc(stages[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        outputs["logits"] = model(image)
    elif type(model).__module__.startswith(agent.__name__):
        outputs |= agent_outputs(model, image)
    elif isinstance(model, patchconvnet.PatchConvNet):
        outputs |= patchconvnet_outputs(model, image)
    return outputs


def moh_losses(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    losses: list[Tensor] = []
    for router in model.modules():
        if isinstance(router, moh.Router) and router.active:
            router.register_forward_hook(lambda _, __, output: losses.append(output[1]))
    _, loss = model.train()(image, auxiliary=True)
    model.eval()
    return {"aux_losses": torch.stack(losses), "moh_loss": 0.01 * loss[None]}


def agent_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Tokens or maps after blocks, and tables of a checkpoint of another size, by the authors' names."""
    outputs = {f"resized:{key}": table for key, table in model.state_dict().items()}
    for i in range(4):
        for ours, theirs in ((f"stages.{i}.blocks", f"block{i + 1}"), (f"stages.{i}.pos_embed", f"pos_embed{i + 1}")):
            outputs |= {key.replace(ours, theirs): table for key, table in outputs.items() if f":{ours}" in key}
    if isinstance(model, agent_deit.AgentDeiT):
        blocks = {f"block{i}": block for i, block in enumerate(model.blocks)}
    elif isinstance(model, agent_swin.AgentSwin) and len(model.layers) == 2:
        blocks = {"feat0": model.layers[0].blocks[0], "feat0b": model.layers[0].blocks[1]}
    else:
        return outputs
    for key, block in blocks.items():
        block.register_forward_hook(lambda _, __, output, key=key: outputs.update({key: output}))
    model(image)
    return {key: x.permute(0, 3, 1, 2) if key.startswith("feat") else x for key, x in outputs.items()}


def patchconvnet_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What the records have of layers: the stem, the branch of the first block, and class tokens with their maps."""
    outputs: dict[str, Tensor] = {}
    handles = []
    layers = {"stem": model.patch_embed, "block0_conv": model.blocks[0].attn}
    for i, block in enumerate(model.blocks_token_only):
        layers |= {f"token{i}": block, f"token{i}_attn_out": block.attn}
    for key, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda _, __, output, key=key: outputs.update({key: output})))
    with record_attention(model) as record:
        model(image)
    for handle in handles:
        handle.remove()
    for i in range(len(model.blocks_token_only)):
        outputs[f"token{i}_attn_map"] = record[f"blocks_token_only.{i}.attn"][0].weights
    return {key: x.permute(0, 3, 1, 2) if key in ("stem", "block0_conv") else x for key, x in outputs.items()}


@pytest.mark.parametrize("name", [name for name in NAMES if reference_class(name) in LAYERS])
def test_layer(name):
    record = load_record(name)
    layer = make_layer(record)
    for case in record["cases"]:
        outputs = layer_outputs(layer, case_input(case))
        for key in case["outputs"]:
            if not key.startswith(("grad_", "aux_grad_", "l_aux")):
                assert_same(outputs[key], case["outputs"][key], f"{name}, {key}", tolerance(case))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", [name for name in NAMES if has_gradients(name)])
def test_layer_with_gradients(name, backend):
    """Gradients of sum(out * w) for the record's w, with every backend that runs on a CPU."""
    record = load_record(name)
    layer = make_layer(record)
    inner = layer.layer if isinstance(layer, ChannelsLast | Tokens | Turned | Sized | Projected) else layer
    for case in record["cases"]:
        layer.zero_grad()
        x = case_input(case).requires_grad_()
        with set_backend(backend):
            out = layer(x)
            out.backward(torch.from_numpy(np.random.RandomState(22).standard_normal(out.shape)))
        actual = {f"grad_{key.replace('.', '_')}": p.grad for key, p in inner.named_parameters()}
        actual |= {"grad_x": x.grad, "out": out}
        expected = {key.replace(".", "_"): value for key, value in case["outputs"].items()}
        for key in actual.keys() & expected.keys():
            assert_same(actual[key], expected[key], f"{name}, {key}", tolerance(case, key))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("moh_attn", "moh_aggattn"))])
def test_router_and_its_loss_with_gradients(name):
    record = load_record(name)
    layer = make_layer(record).train()
    routers = {layer: key for key, layer in moh.ROUTERS.items()}
    for case in record["cases"]:
        x = case_input(case).requires_grad_()
        out = layer(x)
        weights = torch.from_numpy(np.random.RandomState(22).standard_normal(out.shape))
        sums, actual = {"grad": (out * weights).sum()}, {"out": out}
        if isinstance(layer.loss, Tensor):
            sums["aux_grad"], actual["l_aux"] = layer.loss, layer.loss[None]
        parameters = {f"{routers[key.split('.')[0]]}.weight": p for key, p in layer.router.named_parameters()}
        for kind, total in sums.items():
            inputs = {"x": x, **parameters}
            gradients = torch.autograd.grad(total, inputs.values(), retain_graph=True, allow_unused=True)
            actual |= {f"{kind}_{key}": grad for key, grad in zip(inputs, gradients, strict=True)}
        for key, expected in case["outputs"].items():
            assert_same(actual[key], expected, f"{name}, {key}", tolerance(case, key.removeprefix("aux_")))


def layer_outputs(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and, of routing attention, its attention and routing as the records keep them: padded."""
    with torch.no_grad(), record_attention(layer) as record, mock.patch.object(_record, "place"):
        outputs = {"out": layer(x)}
        attention = next((calls[0] for calls in record.values()), None)
        if isinstance(layer, biformer.BiLevelRoutingAttention):
            grid = (layer.n_win, layer.n_win)
            q, k, _ = layer.qkv(biformer.pad_map_to_multiple(x, *grid))
            router = layer.router or biformer.TopkRouting(layer.n_win, 0, layer.topk, layer.scale)
            routes, outputs["r_weight"] = router(q, k)
            outputs["route_sorted"] = routes.sort(-1).values
            keys = layer.kv_down(k) if layer.kv_down else k
            attn = attention_by_region(attention, routes, q.shape[1:3], keys.shape[1:3], grid)
            outputs["attn"] = attn.flatten(0, 1)
        elif isinstance(layer, ChannelsLast) and isinstance(layer.layer, biformer.RefactoredRoutingAttention):
            size = tuple(side // layer.layer.n_win for side in x.shape[2:])
            qkv = layer.layer.qkv_linear(x.permute(0, 2, 3, 1))
            routes = layer.layer.routes(qkv, size, layer.layer.topk)
            padded = biformer.pad_map_to_multiple(qkv, *size).shape[1:3]
            grid = (padded[0] // size[0], padded[1] // size[1])
            outputs["attn"] = attention_by_region(attention, routes, padded, padded, grid).transpose(1, 2)
        elif isinstance(layer, Tokens) and isinstance(layer.layer, crossformer.GroupAttention):
            outputs["pos"] = layer.layer.pos(torch.cartesian_prod(*[torch.arange(-6.0, 7.0)] * 2))
        elif isinstance(layer, Tokens) and isinstance(layer.layer, crossformer.Block):
            outputs |= cross_groups(layer.layer.attn, layer.layer.norm1(x.unflatten(1, layer.size)))
        elif isinstance(layer, ClassToken):
            outputs["map"] = attention.weights
        elif isinstance(layer, nat.NeighborhoodAttention):
            height, width = (max(side, layer.kernel_size * layer.dilation) for side in x.shape[1:3])
            attn = attention.weights.unflatten(2, (height, width))
            outputs["attn"] = attn[:, :, : x.shape[1], : x.shape[2]]
    return outputs


def cross_groups(attn: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A map (B, H, W, C) and attention on it as the reference has them: padded, and cut into groups that fill up.

    Padded queries have results there, which we compute from the groups; those of the others are ours on the map.
    """
    size, interval = attn.group_size, attn.interval

    def cut(x: Tensor) -> Tensor:
        side = size * interval
        x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
        x = x.unflatten(2, (-1, size, interval)).unflatten(1, (-1, size, interval))
        return x.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(0, 4)  # (groups, size, size, C)

    groups, real = cut(x), cut(torch.ones_like(x[..., :1]))
    q, k, v = attn.qkv(groups).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    out = window_attention(q, k, v, size, bias=attn.bias((size, size), q), mask=real[..., 0].bool())
    out = attn.proj(out.flatten(3))
    torch.testing.assert_close(cut(attn(x)), out * real, rtol=1e-9, atol=1e-9)
    return {"groups_in": groups.flatten(1, 2), "groups_out": out.flatten(1, 2)}


def attention_by_region(
    attention: tuple[Tensor, Tensor | None],
    routes: Tensor,
    queries: tuple[int, int],
    keys: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Attention as the references order it: (B, regions, heads, queries of a region, keys of its routes, in order).

    attention: as recorded; queries, keys: sizes of their maps.
    """
    weights, indices = attention[:2]
    if indices is not None:
        dense = weights.new_zeros(*weights.shape[:3], keys[0] * keys[1])
        weights = dense.scatter(-1, indices[:, None].expand_as(weights), weights)
    weights = weights.unflatten(2, (grid[0], queries[0] // grid[0], grid[1], queries[1] // grid[1]))
    weights = weights.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)
    positions = torch.arange(keys[0] * keys[1]).view(grid[0], keys[0] // grid[0], grid[1], keys[1] // grid[1])
    routed = positions.transpose(1, 2).flatten(2, 3).flatten(0, 1)[routes].flatten(2)  # (B, regions, keys)
    return weights.gather(-1, routed[:, :, None, None].expand(*weights.shape[:4], -1))
