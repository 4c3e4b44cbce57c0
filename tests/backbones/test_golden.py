"""Our models and layers compute what the references compute: every record in tests/golden, to 1e-9 in float64.

A family adds its records and, below, how the arguments of a reference class become ours: `MODELS` for networks, which
are loaded through `timm.create_model(pretrained=True)`, `LAYERS` for single modules. Both are keyed by class name.
"""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from golden_records import NAMES, assert_same, case_input, filled_state_dict, load_record
from torch import Tensor, nn

import visionattn  # noqa: F401 - registers the models
from visionattn.backbones import biformer
from visionattn.kernels import record_attention

FULL_SIZE = ("biformer_tiny",)  # whole networks that the default run affords, one a family; micro ones all run


def _biformer(kwargs: dict) -> tuple[str, dict]:
    ours = {key: value for key, value in kwargs.items() if key not in ("pe", "auto_pad", "norm_layer", "n_wins")}
    if "n_wins" in kwargs:
        ours["n_win"] = kwargs["n_wins"]
    return "biformer_tiny", ours


def _biformer_stl(name: str) -> Callable[[dict], tuple[str, dict]]:
    return lambda kwargs: (name, _biformer(kwargs)[1])


def _biformer_dense(kwargs: dict) -> tuple[str, dict]:
    return "biformer_tiny", {**_biformer(kwargs)[1], "extra_norms": True, "features_only": True}


MODELS: dict[str, Callable[[dict], tuple[str, dict]]] = {
    "BiFormer": _biformer,
    "BiFormerSTL": _biformer_stl("biformer_stl"),
    "nchwBiFormerSTL": _biformer_stl("biformer_stl_nchw"),
    "BiFormer_mm": _biformer_dense,
}


class ChannelsLast(nn.Module):
    """A layer on maps (B, H, W, C) for a record that has (B, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _bra(kwargs: dict) -> nn.Module:
    return biformer.BiLevelRoutingAttention(**{k: v for k, v in kwargs.items() if k != "auto_pad"})


def _bra_nchw(kwargs: dict) -> nn.Module:
    return ChannelsLast(biformer.RefactoredRoutingAttention(**kwargs))


def _block(kwargs: dict) -> nn.Module:
    attention = {"n_win": kwargs["n_win"], "side_dwconv": kwargs["side_dwconv"]}
    attn = biformer.BiLevelRoutingAttention(kwargs["dim"], kwargs["num_heads"], topk=kwargs["topk"], **attention)
    return biformer.Block(kwargs["dim"], attn, kwargs["mlp_ratio"], before_attn_dwconv=kwargs["before_attn_dwconv"])


LAYERS: dict[str, Callable[[dict], nn.Module]] = {
    "ops.bra_legacy.BiLevelRoutingAttention": _bra,
    "ops.bra_nchw.nchwBRA": _bra_nchw,
    "models._common.Attention": lambda kwargs: biformer.GlobalAttention(**kwargs),
    "models._common.AttentionLePE": lambda kwargs: biformer.GlobalAttention(**kwargs),
    "models._common.nchwAttentionLePE": lambda kwargs: ChannelsLast(
        biformer.GlobalAttention(**kwargs, side_dwconv=5, lepe_of="v")
    ),
    "models.biformer.Block": _block,
}


def reference_class(name: str) -> str:
    return load_record(name)["reference"]["class"]


def network_records() -> Iterator:
    for name in NAMES:
        if reference_class(name) in MODELS:
            fast = "micro" in name or "pico" in name or name in FULL_SIZE
            yield pytest.param(name, marks=[] if fast else pytest.mark.slow)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_record_is_used():
    assert NAMES
    assert {reference_class(name) for name in NAMES} == {*MODELS, *LAYERS}


@pytest.mark.parametrize("name", list(network_records()))
def test_network(name, tmp_path):
    record = load_record(name)
    torch.save({"model": filled_state_dict(record)}, tmp_path / "reference.pth")
    model_name, kwargs = MODELS[reference_class(name)](record["reference"]["kwargs"])
    overlay = {"file": str(tmp_path / "reference.pth"), "num_classes": kwargs.get("num_classes", 1000)}
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    assert sum(p.numel() for p in model.parameters()) == record["num_params"]
    for case in record["cases"]:
        outputs = network_outputs(model, case_input(case))
        for key, expected in case["outputs"].items():
            assert_same(outputs[key], expected, f"{name}, {key} of input {case['input']['shape']}")


@torch.no_grad()
def network_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    if not hasattr(model, "forward_features"):  # features_only
        return {f"feat{i}": feature for i, feature in enumerate(model(image))}
    features, stages = model.forward_intermediates(image)
    outputs = {f"feat{i}": stage for i, stage in enumerate(stages)}
    return {**outputs, "norm": features, "logits": model.forward_head(features)}


@pytest.mark.parametrize("name", [name for name in NAMES if reference_class(name) in LAYERS])
def test_layer(name):
    record = load_record(name)
    layer = LAYERS[reference_class(name)](record["reference"]["kwargs"]).eval()
    inner = layer.layer if isinstance(layer, ChannelsLast) else layer
    inner.load_state_dict(biformer.checkpoint_filter_fn(filled_state_dict(record), inner))
    for case in record["cases"]:
        outputs = layer_outputs(layer, case_input(case))
        for key in case["outputs"]:
            assert_same(outputs[key], case["outputs"][key], f"{name}, {key}")


def layer_outputs(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and, of routing attention, its attention and routing as the records keep them."""
    with torch.no_grad(), record_attention(layer) as record:
        outputs = {"out": layer(x)}
        attention = next((calls[0] for calls in record.values()), None)
        if isinstance(layer, biformer.BiLevelRoutingAttention):
            grid = (layer.n_win, layer.n_win)
            q, k, _ = layer.qkv(biformer.pad_to_multiple(x, *grid))
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
            padded = biformer.pad_to_multiple(qkv, *size).shape[1:3]
            grid = (padded[0] // size[0], padded[1] // size[1])
            outputs["attn"] = attention_by_region(attention, routes, padded, padded, grid).transpose(1, 2)
    return outputs


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
    weights, indices = attention
    if indices is not None:
        dense = weights.new_zeros(*weights.shape[:3], keys[0] * keys[1])
        weights = dense.scatter(-1, indices[:, None].expand_as(weights), weights)
    weights = weights.unflatten(2, (grid[0], queries[0] // grid[0], grid[1], queries[1] // grid[1]))
    weights = weights.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)
    positions = torch.arange(keys[0] * keys[1]).view(grid[0], keys[0] // grid[0], grid[1], keys[1] // grid[1])
    routed = positions.transpose(1, 2).flatten(2, 3).flatten(0, 1)[routes].flatten(2)  # (B, regions, keys)
    return weights.gather(-1, routed[:, :, None, None].expand(*weights.shape[:4], -1))
