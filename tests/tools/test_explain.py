"""Rollout, relevance and flow: equal to the records of their authors' code, and row by row to dense matrices."""

import numpy as np
import pytest
import timm
import torch
from golden_records import assert_same, case_input, filled_state_dict, load_record

from visionattn.kernels import record_attention
from visionattn.kernels._record import Attention, attention_in_backward
from visionattn.listing import list_models
from visionattn.tools.explain import Row, Traced, attention_flow, relevance, rollout, trace

VITS = {"explain_vit_micro": "vit_tiny_patch16_224", "explain_deit_tiny_64": "deit_tiny_patch16_224"}
CLASS_ATTENTION = {"explain_cait_micro": "cait_xxs24_224", "explain_xcit_micro": "xcit_nano_12_p16_224"}
NARROW = {"embed_dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)}
FAMILIES = {  # that attend to places or from class tokens, one short and narrow network of each
    "agent_cswin_tiny": {"depth": (1, 1, 2, 1), "embed_dim": 32},
    "agent_deit_tiny": {"depth": 2, "embed_dim": 96},
    "agent_pvt_tiny": {"depths": (1, 1, 2, 1), "embed_dims": (32, 64, 80, 128)},
    "agent_swin_tiny": {"depths": (1, 1, 2, 2), "embed_dim": 48},
    "biformer_tiny": {"depth": (1, 1, 2, 1), "embed_dim": (32, 64, 128, 256)},
    "crossformerpp_small": {"depths": (1, 4, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "dinat_mini": {"depths": (1, 2, 2, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "dinat_isotropic_small": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    "moh_transnext_small_75": NARROW
    | {"num_heads": (2, 4, 4, 8), "shared_heads": (2, 4, 1, 2), "active_heads": (0, 0, 2, 4)},
    "patchconvnet_s60": {"depth": 2, "embed_dim": 96},
    "rmt_tiny": NARROW | {"embed_dims": (16, 32, 48, 64), "num_heads": (2, 2, 3, 4), "projection": 96},
    "transnext_micro": NARROW | {"num_heads": (1, 2, 4, 8)},
    "va_convit_tiny": {"depth": 4, "local_up_to_layer": 2},
    "va_davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16)},
    "va_halonet_h0": {"blocks": ("c", "c", "ca", "a"), "channels": (32, 64, 128, 256)},
    "va_volo_d1_224": {"layers": (1, 1, 1, 1), "embed_dims": (64, 128, 128, 128), "num_heads": (2, 4, 4, 4)},
    "va_xcit_nano_12_p8_224": {"depth": 2},
}
NONE = {"emcad", "flowformer", "lgvit", "ninformer"}  # families without softmax over places


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of_record(name: str, model: str) -> tuple[dict, torch.nn.Module]:
    record = load_record(f"explain/{name}")
    network = timm.create_model(model, **record["reference"]["kwargs"]).eval()
    network.load_state_dict(filled_state_dict(record))
    return record, network


def recorded(network: torch.nn.Module, case: dict, target: int) -> list[Attention]:
    """Every call in order, with gradients of a logit."""
    with record_attention(network) as record:
        network(case_input(case))[0, target].backward()
    return [call for calls in record.values() for call in calls]


@pytest.mark.parametrize("name", ["explain_vit_micro", pytest.param("explain_deit_tiny_64", marks=pytest.mark.slow)])
def test_vision_transformers_equal_the_records(name):
    """From timm's own layers, which the recorder opens, to the maps of the authors' notebooks."""
    record, network = of_record(name, VITS[name])
    for case in record["cases"]:
        outputs = case["outputs"]
        calls = recorded(network, case, case.get("class_index", 0))
        maps = torch.stack([call.weights[0] for call in calls]).detach()
        if "rollout" in outputs:
            assert_same(maps.mean(1), outputs["attn_mean"], "attn_mean")
            assert_same(torch.tensor(rollout(maps)), outputs["rollout"], "rollout")
            assert_same(torch.tensor(rollout(maps)[0]), outputs["rollout_row"], "rollout_row")
            plain = torch.tensor(rollout(maps, residual=False)[0])
            assert_same(plain, outputs["rollout_no_residual_row"], "rollout_no_residual_row")
            row = class_row(network, case_input(case), 0, relevant=False)
            whole = torch.cat([row.tokens[0], row.map.flatten()])
            assert_same(whole, outputs["rollout_row"], "row of rollout")
        if "relevance" in outputs:
            gradients = torch.stack([call.weights.grad[0] for call in calls])
            total = torch.tensor(relevance(maps, gradients))
            assert_same(total, outputs["R"], "R")
            assert_same(total[0, 1:], outputs["relevance"], "relevance")
            row = class_row(network, case_input(case), case["class_index"], relevant=True)
            assert_same(row.map.flatten(), outputs["relevance"], "row of relevance")


def class_row(network: torch.nn.Module, images: torch.Tensor, target: int, relevant: bool) -> Traced:
    """From the class token, in little memory; of networks with class attention through that alone."""
    row = Row(torch.zeros(1, 1, 1), torch.ones(1, 1), relevant)
    kinds = set()

    def take(name: str, part: Attention, last: bool) -> None:
        kinds.add(part.kind)
        if part.kind == "class" or "class" not in kinds:
            row.pass_on(part)
            if last:
                row.leave()

    of = (lambda weights, change: (weights * change).clamp(min=0)) if relevant else (lambda weights, change: weights)
    with attention_in_backward(network, of, take):
        network(images.requires_grad_())[0, target].backward()
    return row.traced


@pytest.mark.parametrize("name", CLASS_ATTENTION)
def test_class_attention_equals_the_records(name):
    record, network = of_record(name, CLASS_ATTENTION[name])
    for case in record["cases"]:
        tolerance = 1e-6 if "xcit" in name else 1e-9  # timm's position features of XCiT are float32
        if case.get("tables") == "float64":
            continue
        calls = [call for call in recorded(network, case, case.get("class_index", 0)) if call.kind == "class"]
        for i, call in enumerate(calls):
            if f"cls_attn{i}" in case["outputs"]:
                assert_same(call.weights[0, :, 0], case["outputs"][f"cls_attn{i}"], "class attention", tolerance)
        if "relevance" in case["outputs"]:
            row = class_row(network, case_input(case), case["class_index"], relevant=True)
            assert_same(row.map.flatten(), case["outputs"]["relevance"], "relevance", tolerance)


def test_attention_flow_equals_the_record():
    for case in load_record("explain/explain_attention_flow")["cases"]:
        logits = np.random.RandomState(case["attention"]["seed"]).standard_normal(case["attention"]["shape"])
        maps = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        flow = attention_flow(maps)
        assert_same(torch.tensor(flow), case["outputs"]["flow_raw"], "flow_raw")
        assert_same(torch.tensor(flow / flow.sum(-1, keepdims=True)), case["outputs"]["flow"], "flow")
        assert_same(torch.tensor(rollout(maps)), case["outputs"]["rollout"], "rollout")


def test_every_family_is_here():
    assert {model.family for model in list_models() if model.name in FAMILIES} | NONE == {
        model.family for model in list_models()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_that_of_dense_matrices(name):
    """Routes, windows, halos and neighbourhoods of padded maps of several sizes, against matrices of all tokens."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **FAMILIES[name]).eval()
    images = torch.randn(1, 3, 36, 52, requires_grad=True)
    with record_attention(network) as record:
        network(images)[0, 1].backward()
    calls = [call for calls in record.values() for call in calls if call.kind != "channel"][::-1]
    by_token = calls[0].kind == "class" or calls[0].prefix > 0
    size = (1, 1) if by_token else calls[0].queries
    start, tokens = torch.full((1, *size), 0.0 if by_token else 1 / np.prod(size)), torch.ones(1, int(by_token))
    for relevant in (False, True):
        maps = [c.weights.detach() * c.weights.grad if relevant else c.weights.detach() for c in calls]
        means = [c._replace(weights=m.clamp(min=0).mean(1, keepdim=True)) for c, m in zip(calls, maps, strict=True)]
        row = trace(start, tokens, means, relevant)

        expected, shape, lost = (np.concatenate([tokens[0], start.flatten()]), tokens.shape[1]), size, 0.0
        for mean in means:
            expected, shape, missing = dense_step(*expected, shape, mean, relevant)
            lost += missing
        whole, prefix = expected
        assert shape == row.map.shape[1:]
        np.testing.assert_allclose(row.map.flatten(), whole[prefix:], rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(row.tokens.flatten(), whole[:prefix], rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(row.outside.item(), lost / (lost + whole.sum()), rtol=1e-9, atol=1e-12)
        if not relevant:
            assert whole.sum() + lost == pytest.approx(1)


def dense_step(row: np.ndarray, prefix: int, size: tuple, call: Attention, relevant: bool) -> tuple:
    """One layer by its matrix of all tokens by all tokens of its finer map."""
    queries = call.keys if call.kind == "class" else call.queries
    finest = max(queries, call.keys, key=np.prod)
    row = row @ resized(size, queries, prefix, prefix)
    if call.prefix > prefix:
        row, prefix = np.concatenate([row[:prefix], np.zeros(call.prefix - prefix), row[prefix:]]), call.prefix
    kept = np.eye(len(row)) @ resized(queries, finest, prefix, prefix)
    passed = np.zeros_like(kept)
    lost = np.zeros(len(row))
    weights = call.weights[0, 0].numpy()
    rows = np.arange(len(weights)) if call.places is None else call.places.numpy()
    several = np.bincount(rows, minlength=len(row))
    to_finest = resized(call.keys, finest, 0, 0)
    for n, p in enumerate(rows):
        query = p if p < call.prefix or call.kind == "class" else prefix + p - call.prefix
        share = 1 / several[p] if not relevant else 1
        for k, weight in enumerate(weights[n] * share):
            key = k if call.indices is None else call.indices[0, n, k].item()
            if key < 0:
                lost[query] += weight
            elif key < call.prefix:
                passed[query, key] += weight
            elif key - call.prefix < np.prod(call.keys):
                passed[query, prefix:] += weight * to_finest[key - call.prefix]
            else:
                pooled = resized(call.pooled, finest, 0, 0)
                passed[query, prefix:] += weight * pooled[key - call.prefix - np.prod(call.keys)]
    moves = (passed.sum(1) + lost > 0)[:, None]
    matrix = kept + passed if relevant else np.where(moves, (kept + passed) / 2, kept)
    return (row @ matrix, prefix), finest, float(row @ lost) / (1 if relevant else 2)


def resized(size: tuple, wanted: tuple, prefix: int, same: int) -> np.ndarray:
    """Places of a map shared out over those of a finer one, tokens before it unchanged."""
    matrix = np.zeros((prefix + np.prod(size), same + np.prod(wanted)))
    matrix[:prefix, :same] = np.eye(prefix, same)
    factors = [-(-long // short) for long, short in zip(wanted, size, strict=True)]
    for y in range(wanted[0]):
        for x in range(wanted[1]):
            parent = min(y // factors[0], size[0] - 1) * size[1] + min(x // factors[1], size[1] - 1)
            matrix[prefix + parent, same + y * wanted[1] + x] = 1
    return matrix / matrix.sum(1, keepdims=True).clip(1)


def test_maps_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"maps of \(3, 4\): expected"):
        rollout(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"gradients of \(1, 2, 3, 3\)"):
        relevance(np.ones((2, 2, 3, 3)), np.ones((1, 2, 3, 3)))
