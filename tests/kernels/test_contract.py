"""What holds for every attention pattern: its torch form against its reference, and how it behaves in a model.

A new pattern is tested by one entry in PATTERNS, with a function that makes the arguments of a call. What its reference
computes is tested, against loops written from the definition, in the pattern's own file.
"""

import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from visionattn import kernels
from visionattn.kernels import record_attention
from visionattn.kernels._record import Attention

SETTINGS = settings(  # the same calls everywhere
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `form`, which all calls of a test share
)


@pytest.fixture(params=["on_cpu", "plain"])
def form(request, monkeypatch):
    """The two bodies of backend="torch": that of a CPU, and that of GPUs and compilers."""
    if request.param == "plain":
        for module in ("_dispatch", "routing"):
            monkeypatch.setattr(f"visionattn.kernels.{module}.takes_plain", lambda x: True)


both_forms = pytest.mark.usefixtures("form")


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def packed(dtype, batch=2, size=(7, 9), heads=2, dim=16) -> dict[str, Any]:
    """q, k and v as a model makes them: slices of one projection. None is near 0, the norm of which is rounding."""
    torch.manual_seed(sum(size) * 10 + heads)
    qkv = draw(batch, *size, 3 * heads * dim, dtype=dtype)
    qkv = (qkv + qkv.sign() / 8).unflatten(-1, (3, heads, dim))
    return dict(zip("qkv", qkv.unbind(-3), strict=True))


def agent(dtype, batch=2, size=(7, 9), heads=2, dim=16, agents=3, keys=None, biased=True) -> dict[str, Any]:
    """keys: tokens of the map of keys, if it has another size than that of queries."""
    arguments = packed(dtype, batch, size, heads, dim)
    if keys is not None:
        other = packed(dtype, batch, keys, heads, dim)
        arguments |= {"k": other["k"], "v": other["v"]}
    arguments["agents"] = draw(batch, agents, heads, dim, dtype=dtype)
    if biased:
        arguments["agent_bias"] = draw(heads, agents, math.prod(keys or size), dtype=dtype)
        arguments["query_bias"] = draw(heads, math.prod(size), agents, dtype=dtype)
    return arguments


def channel(dtype, batch=2, size=(7, 9), heads=2, dim=16) -> dict[str, Any]:
    return {**packed(dtype, batch, size, heads, dim), "groups": heads}


def cross_covariance(dtype, batch=2, size=(7, 9), heads=2, dim=16) -> dict[str, Any]:
    return {**packed(dtype, batch, size, heads, dim), "temperature": draw(heads, 1, 1, dtype=dtype)}


def decayed(dtype, batch=2, size=(5, 7), heads=2, dim=16, along="map") -> dict[str, Any]:
    return {
        **packed(dtype, batch, size, heads, dim),
        "decay": [-0.3 / (head + 1) for head in range(heads)],
        "along": along,
    }


def gated(dtype, batch=2, size=(5, 7), heads=2, dim=16) -> dict[str, Any]:
    maps, tokens = packed(dtype, batch, size, heads, dim), math.prod(size)
    return {**maps, "position_logits": draw(heads, tokens, tokens, dtype=dtype), "gate": draw(heads, dtype=dtype)}


def halo(dtype, batch=2, size=(7, 9), heads=2, dim=16, block=4, halo=1, step=1, tables=True) -> dict[str, Any]:
    arguments = packed(dtype, batch, size, heads, dim) | {"block_size": block, "halo_size": halo}
    arguments["q"] = arguments["q"][:, ::step, ::step]
    if tables:
        shape = 2 * (block + 2 * halo) - 1, dim
        arguments |= {name: draw(*shape, dtype=dtype) * dim**-0.5 for name in ("rel_height", "rel_width")}
    return arguments


def neighborhood(
    dtype, batch=2, size=(7, 9), heads=2, dim=16, kernel=(3, 3), dilation=1, stride=1, biased=True
) -> dict[str, Any]:
    maps = packed(dtype, batch, size, heads, dim)
    bias = draw(heads, *(2 * n - 1 for n in kernel), dtype=dtype) if biased else None
    return {**maps, "kernel_size": kernel, "dilation": dilation, "stride": stride, "bias": bias}


def outlook(dtype, batch=2, size=(7, 9), heads=2, dim=16, kernel=3, stride=2, padding=1) -> dict[str, Any]:
    v = packed(dtype, batch, size, heads, dim)["v"]
    windows = [(n + 2 * padding - kernel) // stride + 1 for n in size]
    logits = draw(batch, *windows, heads, kernel**2, kernel**2, dtype=dtype)
    return {"logits": logits, "v": v, "kernel_size": kernel, "stride": stride, "padding": padding}


def routing(
    dtype, batch=2, size=(6, 6), heads=2, dim=16, grid=(3, 3), topk=3, keys=None, routed=False, weighted=False
) -> dict[str, Any]:
    """keys: tokens of a region of the map of keys, if it has another size than that of queries."""
    arguments = packed(dtype, batch, size, heads, dim) | {"regions": grid, "topk": topk}
    regions = grid[0] * grid[1]
    if keys is not None:
        other = packed(dtype, batch, [n * tokens for n, tokens in zip(grid, keys, strict=True)], heads, dim)
        arguments |= {"k": other["k"], "v": other["v"]}
    if routed or weighted:
        arguments["routes"] = torch.rand(batch, regions, regions).topk(topk).indices
    if weighted:
        arguments["route_weights"] = torch.rand(batch, regions, topk, dtype=torch.float64).to(dtype)
    return arguments


def window(
    dtype, batch=2, size=(7, 9), heads=2, dim=16, window=(3, 3), shift=(0, 0), dilated=False, biased=True, masked=False
) -> dict[str, Any]:
    maps, tokens = packed(dtype, batch, size, heads, dim), math.prod(window)
    bias = draw(heads, tokens, tokens, dtype=dtype) if biased else None
    mask = torch.rand(batch, *size) > 0.4 if masked else None
    return {**maps, "window_size": window, "shift": shift, "dilated": dilated, "bias": bias, "mask": mask}


def sizes(size: st.SearchStrategy, **more: st.SearchStrategy) -> st.SearchStrategy:
    dims = st.sampled_from([16, 24, 32, 48, 64, 96, 128])
    return st.fixed_dictionaries(
        {"batch": st.integers(0, 3), "size": size, "heads": st.integers(1, 3), "dim": dims, **more}
    )


def tuples(count: int, most: int) -> st.SearchStrategy:
    return st.tuples(*[st.integers(1, most)] * count)


@st.composite
def any_halo(draw) -> dict:
    call = draw(sizes(tuples(2, 9), block=st.integers(1, 6), halo=st.integers(0, 3), tables=st.booleans()))
    return call | {"step": draw(st.sampled_from([n for n in (1, 2, 3) if call["block"] % n == 0]))}


@st.composite
def any_neighborhood(draw) -> dict:
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    call = draw(sizes(tuples(axes, {1: 60, 2: 23, 3: 7}[axes]), biased=st.booleans()))
    kernel = [draw(st.integers(1, min(n, 9))) for n in call["size"]]
    dilation = [draw(st.integers(1, n // k)) for n, k in zip(call["size"], kernel, strict=True)]
    return call | {"kernel": kernel, "dilation": dilation, "stride": [draw(st.integers(1, k)) for k in kernel]}


@st.composite
def any_outlook(draw) -> dict:
    kernel = draw(st.integers(1, 4))
    padding = draw(st.integers(0, kernel // 2))
    side = st.integers(max(1, kernel - 2 * padding), 13)
    return draw(sizes(st.tuples(side, side), stride=st.integers(1, 4))) | {"kernel": kernel, "padding": padding}


@st.composite
def any_routing(draw) -> dict:
    grid = draw(tuples(2, 5))
    size = st.tuples(*(st.integers(1, 4).map(lambda tokens, n=n: n * tokens) for n in grid))
    call = draw(sizes(size, topk=st.integers(1, math.prod(grid)), routed=st.booleans(), weighted=st.booleans()))
    return call | {"grid": grid, "keys": draw(st.none() | tuples(2, 4))}


@st.composite
def any_window(draw) -> dict:
    window, dilated = draw(tuples(2, 7)), draw(st.booleans())
    shift = (0, 0) if dilated else tuple(draw(st.integers(0, side - 1)) for side in window)
    call = draw(sizes(tuples(2, 17), biased=st.booleans(), masked=st.booleans()))
    return call | {"window": window, "shift": shift, "dilated": dilated}


def by_tokens(attention: Attention, v: Tensor) -> Tensor:
    v = v.flatten(1, -3)
    if attention.indices is None:
        return torch.einsum("bhnk,bkhd->bnhd", attention.weights, v)
    v = F.pad(v, (0, 0, 0, 0, 0, 1))  # -1 is a place of zeros
    gathered = torch.stack([image[index] for image, index in zip(v, attention.indices, strict=True)])
    return torch.einsum("bhnk,bnkhd->bnhd", attention.weights, gathered)


def by_channels(attention: Attention, v: Tensor) -> Tensor:
    return torch.einsum("bhde,bnhe->bnhd", attention.weights, v.flatten(1, -3))


def by_windows(attention: Attention, v: Tensor) -> Tensor:
    return torch.zeros_like(v.flatten(1, 2)).index_add(1, attention.places, by_tokens(attention, v))


class Pattern(NamedTuple):
    function: Callable[..., Any]
    call: Callable[..., dict[str, Any]]  # (dtype, **sizes) -> arguments of the function
    any: st.SearchStrategy  # sizes of a call, small
    forms: list[dict]  # sizes of a call for each way through the torch form
    more: list[dict]  # other small ones
    stages: list[dict]  # as in models
    budgets: dict[str, int]  # what limits the workspace in the module, and the largest to try
    tolerance: float  # of float32
    mixed: Callable[..., Tensor] = by_tokens  # (what is recorded, v) -> output


ANY_TOKENS = {most: st.one_of(tuples(1, 4 * most), tuples(2, most)) for most in (7, 13)}

CHANNELS = {
    "any": sizes(ANY_TOKENS[13]),
    "forms": [{}],
    "more": [{"size": (5,)}],
    "stages": [{"size": (28, 28), "dim": 32}],
    "budgets": {"LARGE": 0},
    "tolerance": 3e-4,
    "mixed": by_channels,
}

PATTERNS = {
    "agent": Pattern(
        kernels.agent_attention,
        agent,
        any=sizes(ANY_TOKENS[7], agents=st.integers(1, 9), keys=st.none() | tuples(2, 5), biased=st.booleans()),
        forms=[{}],
        more=[{"size": (19,)}, {"keys": (4, 5)}, {"agents": 17, "biased": False}],  # of fewer keys see gated
        stages=[{"size": (28, 28), "agents": 16, "dim": 32}, {"size": (7, 7), "agents": 49, "dim": 32}],
        budgets={},
        tolerance=2e-5,
    ),
    "channel": Pattern(kernels.channel_attention, channel, **CHANNELS),
    "cross_covariance": Pattern(kernels.cross_covariance_attention, cross_covariance, **CHANNELS),
    "decayed": Pattern(
        kernels.decayed_attention,
        decayed,
        any=sizes(tuples(2, 13), along=st.sampled_from(["map", "rows", "columns"])),
        forms=[{"along": "map"}, {"size": (20, 18), "along": "rows"}, {"size": (20, 18), "along": "columns"}],
        more=[{"size": (2, 17)}],  # of fewer than 16 tokens see gated
        stages=[{"size": (14, 14), "dim": 32}, {"size": (28, 28), "dim": 32, "along": "columns"}],
        budgets={"CHUNK": 2**13},
        tolerance=2e-5,
    ),
    "gated": Pattern(
        kernels.gated_positional_attention,
        gated,
        any=sizes(ANY_TOKENS[7]),
        forms=[{}],
        more=[{"size": (19,)}],  # of fewer than 16 tokens, torch's fused attention on a CPU loses a NaN in a query
        stages=[{"size": (14, 14), "dim": 32}],
        budgets={"BUDGET": 2**13},
        tolerance=2e-5,
    ),
    "halo": Pattern(
        kernels.halo_attention,
        halo,
        any=any_halo(),
        forms=[{}],
        more=[{"step": 2, "size": (5, 7)}, {"step": 4, "halo": 2, "size": (5, 6)}, {"tables": False}],
        stages=[
            {"size": (32, 32), "block": 8, "halo": 3},
            {"size": (16, 16), "block": 8, "halo": 3, "step": 2},
            {"size": (8, 8), "block": 8, "halo": 3},
            {"size": (19, 23), "block": 8, "halo": 2},
        ],
        budgets={"CHUNK": 2**18, "SAVED": 2**18},
        tolerance=2e-4,
    ),
    "linear": Pattern(kernels.linear_attention, packed, **CHANNELS | {"mixed": by_tokens}),
    "neighborhood": Pattern(
        kernels.neighborhood_attention,
        neighborhood,
        any=any_neighborhood(),
        forms=[{"dilation": 2}],
        more=[
            {"size": (11,), "kernel": (4,), "dilation": 2, "stride": 3},
            {"size": (7, 8), "kernel": (3, 2), "dilation": (2, 3), "stride": (1, 2)},
            {"size": (4, 3, 5), "kernel": (2, 3, 3), "dilation": (2, 1, 1), "stride": (1, 1, 2)},
        ],
        stages=[
            {"size": (28, 28), "kernel": (7, 7)},
            {"size": (28, 28), "kernel": (7, 7), "dilation": 4},
            {"size": (14, 14), "kernel": (7, 7), "dilation": 2},
            {"size": (7, 7), "kernel": (7, 7)},
            {"size": (31, 37), "kernel": (5, 5), "dilation": 3},
            {"size": (19, 18), "kernel": (3, 3)},
        ],
        budgets={"CHUNK": 2**18},
        tolerance=5e-5,
    ),
    "outlook": Pattern(
        kernels.outlook_attention,
        outlook,
        any=any_outlook(),
        forms=[{}],
        more=[{"size": (5, 4), "kernel": 2, "stride": 1, "padding": 0}],
        stages=[{"size": (28, 28), "dim": 32}],
        budgets={"BAND": 2**14},
        tolerance=1e-5,
        mixed=by_windows,
    ),
    "routing": Pattern(
        kernels.routing_attention,
        routing,
        any=any_routing(),
        forms=[
            {"size": (6, 6)},  # masked
            {"size": (10, 10), "grid": (5, 5), "topk": 2},  # selected, with matmuls
            {"size": (30, 30), "grid": (3, 3), "topk": 1},  # selected and fused
            {"size": (6, 6), "grid": (1, 1), "topk": 1},
        ],
        more=[
            {"size": (8, 12), "grid": (2, 3), "topk": 2, "keys": (3, 3), "weighted": True},
            {"size": (4, 6), "grid": (2, 3), "topk": 1, "routed": True},
        ],
        stages=[
            {"size": (14, 14), "grid": (7, 7), "topk": 16, "heads": 8},
            {"size": (28, 28), "grid": (7, 7), "topk": 4, "heads": 4},
            {"size": (64, 64), "grid": (2, 2), "topk": 1},
            {"size": (7, 7), "grid": (1, 1), "topk": 1},
        ],
        budgets={"CHUNK": 2**17, "SAVED": 2**17},
        tolerance=2e-5,
    ),
    "window": Pattern(
        kernels.window_attention,
        window,
        any=any_window(),
        forms=[{"shift": (1, 1)}, {"dilated": True}],
        more=[
            {"size": (5, 7), "window": (3, 4), "shift": (2, 0)},
            {"size": (5, 7), "window": (3, 2), "dilated": True},
            {"size": (4, 4), "window": (4, 4)},
            {"size": (4, 4), "window": (4, 4), "biased": False},
            {"size": (5, 6), "masked": True},
        ],
        stages=[
            {"size": (28, 28), "window": (7, 7), "shift": (3, 3), "heads": 3},
            {"size": (14, 14), "window": (7, 7), "dilated": True, "heads": 3},
            {"size": (23, 19), "window": (7, 7), "shift": (3, 3), "heads": 3},
            {"size": (20, 20), "window": (7, 7), "dilated": True, "heads": 3},
        ],
        budgets={"CHUNK": 2**16, "SAVED": 2**16},
        tolerance=5e-5,
    ),
}


def each(*lists: str, without: tuple[str, ...] = ()) -> Any:
    """Parametrizes a test with the patterns and the calls of these lists."""
    calls = [
        pytest.param(pattern, sizes, id="-".join([pattern, name, str(i)]))
        for pattern, entry in PATTERNS.items()
        if pattern not in without
        for name in lists
        for i, sizes in enumerate(getattr(entry, name))
    ]
    return pytest.mark.parametrize(("pattern", "sizes"), calls)


BATCHED = ("q", "k", "v", "agents", "logits", "mask", "routes", "route_weights")  # tensors with an axis of images

each_pattern = pytest.mark.parametrize("pattern", PATTERNS)
each_half = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])


def make_arguments(pattern: str, sizes: dict, dtype: torch.dtype = torch.float64, **more: Any) -> dict[str, Any]:
    """Arguments of a call, floating tensors as leaves with a gradient (and their strides)."""
    return leaves(PATTERNS[pattern].call(dtype, **sizes, **more))


def leaves(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {
        name: x.detach().to(dtype or x.dtype).requires_grad_() if name in floating(arguments) else x
        for name, x in arguments.items()
    }


def floating(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}


def attend(pattern: str, arguments: dict[str, Any], lse: bool = False, backend: str = "torch") -> tuple[Tensor, ...]:
    """The output, and the log-sum-exp if asked for and the pattern has one."""
    function = PATTERNS[pattern].function
    options = {"return_lse": True} if lse and "return_lse" in inspect.signature(function).parameters else {}
    result = function(**arguments, **options, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def slope(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.numel(), dtype=torch.float64).bfloat16().to(x.dtype).view(x.shape)


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of the finite outputs: a query without keys has -inf as log-sum-exp.

    The weights are rounded, so that all dtypes have the same; linspace in half precision is wrong for many numbers.
    """
    total = sum((x.where(x.isfinite(), 0) * slope(x)).sum() for x in outputs)
    return dict(zip(inputs, torch.autograd.grad(total, inputs.values()), strict=True))


def agree(pattern: str, sizes: dict, dtype: torch.dtype) -> None:
    """Torch form and reference: the same output, log-sum-exp, and gradient of every input."""
    arguments = make_arguments(pattern, sizes, dtype)
    actual, expected = (attend(pattern, arguments, True, backend) for backend in ("torch", "reference"))
    tolerance = PATTERNS[pattern].tolerance if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = (gradients(x, floating(arguments)) for x in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


def limit(patch: pytest.MonkeyPatch, pattern: str, name: str, budget: int) -> None:
    module = sys.modules[PATTERNS[pattern].function.__module__]
    value = getattr(module, name)
    patch.setattr(module, name, dict.fromkeys(value, budget) if isinstance(value, dict) else budget)


def test_every_public_function_of_a_pattern_file_is_exported_and_tested_here():
    public = {}
    for info in pkgutil.iter_modules(kernels.__path__, "visionattn.kernels."):
        if not info.name.startswith("visionattn.kernels._"):
            module = importlib.import_module(info.name)
            functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == info.name]
            public |= {f.__name__: f for f in functions if not f.__name__.startswith("_")}
    assert public.items() <= vars(kernels).items()
    assert public.keys() <= set(kernels.__all__)
    assert {entry.function for entry in PATTERNS.values()} == set(public.values())


@both_forms
@each_pattern
@SETTINGS
@given(data=st.data())
def test_torch_form_agrees_with_the_reference(pattern, data):
    agree(pattern, data.draw(PATTERNS[pattern].any), torch.float64)


@each("forms", "more")
@pytest.mark.parametrize("share", [0, 1 / 32, 1 / 4])
def test_chunks_of_any_size_give_the_same(pattern, sizes, share, monkeypatch):
    for name, most in PATTERNS[pattern].budgets.items():
        limit(monkeypatch, pattern, name, int(share * most))
    agree(pattern, sizes, torch.float64)


@each("forms", "more", without=("agent", "channel", "cross_covariance", "decayed", "gated", "linear", "outlook"))
def test_more_windows_than_a_launch_can_have_are_done_in_parts(pattern, sizes, form, monkeypatch):
    monkeypatch.setattr("visionattn.kernels._plain.HEADS", 3)
    agree(pattern, sizes, torch.float64)


@both_forms
@each("stages")
def test_stages_of_models_agree_with_the_reference(pattern, sizes):
    agree(pattern, {"dim": 32} | sizes, torch.float32)


@both_forms
@each("forms", "more")
def test_gradients_in_float64(pattern, sizes):
    check_gradients(pattern, sizes)


@each("forms", "more")
def test_gradients_of_chunks_in_float64(pattern, sizes, monkeypatch):
    for name, most in PATTERNS[pattern].budgets.items():
        limit(monkeypatch, pattern, name, most // 16)
    check_gradients(pattern, sizes)


def check_gradients(pattern: str, sizes: dict) -> None:
    arguments = make_arguments(pattern, sizes | {"batch": 1, "dim": 2})
    inputs = floating(arguments)

    def call(*tensors):
        return attend(pattern, arguments | dict(zip(inputs, tensors, strict=True)), lse=True)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()), fast_mode=True)


@both_forms
@each("forms")
def test_gradient_of_one_input_only(pattern, sizes):
    arguments = make_arguments(pattern, sizes)
    for name, x in floating(arguments).items():
        alone = {key: y.detach() if key in floating(arguments) else y for key, y in arguments.items()} | {name: x}
        ours, theirs = (gradients(attend(pattern, alone, backend=b), {name: x}) for b in ("torch", "reference"))
        torch.testing.assert_close(ours, theirs)


@both_forms
@each("forms")
def test_trains_after_inference_of_the_same_sizes(pattern, sizes):
    arguments = make_arguments(pattern, sizes | {"batch": 3})
    with torch.inference_mode():
        first = attend(pattern, arguments)
    again = attend(pattern, arguments)
    torch.testing.assert_close(again, first)
    assert all(x.isfinite().all() for x in gradients(again, floating(arguments)).values())


@both_forms
@each("forms")
def test_without_the_log_sum_exp_the_output_is_the_same(pattern, sizes):
    arguments = make_arguments(pattern, sizes)
    outputs = [attend(pattern, arguments, lse)[:1] for lse in (False, True)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(gradients(x, floating(arguments)) for x in outputs))


@both_forms
@each("forms")
def test_strides_do_not_matter(pattern, sizes):
    arguments = make_arguments(pattern, sizes)
    copies = leaves({name: x.contiguous() if isinstance(x, Tensor) else x for name, x in arguments.items()})
    assert not arguments["v"].is_contiguous()
    assert copies["v"].is_contiguous()
    outputs = [attend(pattern, x) for x in (arguments, copies)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(gradients(x, floating(y)) for x, y in zip(outputs, (arguments, copies), strict=True)))


@both_forms
@each("forms")
@pytest.mark.parametrize("batch", [1, 2])
def test_one_value_for_all_tokens_may_be_expanded(pattern, sizes, batch):
    routed = {"routed": True} if pattern == "routing" else {}  # equal means would choose any regions
    arguments = make_arguments(pattern, sizes | {"batch": batch} | routed)
    maps = {name: x for name, x in arguments.items() if name in ("q", "k", "v")}
    for name, x in maps.items():
        value = x.detach()[(slice(1),) * (x.ndim - 2)].expand(x.shape)
        outputs = [attend(pattern, arguments | {name: y}) for y in (value, value.contiguous())]
        torch.testing.assert_close(*outputs)


@both_forms
@each("forms", "more")
def test_no_images(pattern, sizes):
    arguments = make_arguments(pattern, sizes, batch=0)
    outputs = attend(pattern, arguments, lse=True)
    assert outputs[0].shape == arguments["q" if "q" in arguments else "v"].shape
    assert not any(x.any() for x in gradients(outputs, floating(arguments)).values())


@both_forms
@each("forms")
def test_images_of_a_batch_do_not_mix(pattern, sizes):
    arguments = make_arguments(pattern, sizes, batch=3)
    alone = [
        attend(pattern, arguments | {name: x[i : i + 1] for name, x in floating(arguments).items() if name in BATCHED})[
            0
        ]
        for i in range(3)
    ]
    torch.testing.assert_close(attend(pattern, arguments)[0], torch.cat(alone))


@both_forms
@each("forms")
@each_half
def test_half_precision_is_close_to_the_reference_in_float64(pattern, sizes, dtype, tolerance):
    check_half_precision(pattern, {"size": (13, 17), "dim": 32} | sizes, dtype, tolerance)


@each("forms")
@each_half
def test_half_precision_in_chunks_is_close_to_the_reference(pattern, sizes, dtype, tolerance, monkeypatch):
    for name, most in PATTERNS[pattern].budgets.items():
        limit(monkeypatch, pattern, name, most // 8)
    check_half_precision(pattern, sizes, dtype, tolerance)


def check_half_precision(pattern: str, sizes: dict, dtype: torch.dtype, tolerance: float) -> None:
    arguments = make_arguments(pattern, sizes, dtype)
    exact = leaves(arguments, torch.float64)
    (output, *lse), expected = attend(pattern, arguments, True), attend(pattern, exact, True, "reference")
    assert output.dtype == dtype
    assert (output - expected[0]).norm() <= tolerance * expected[0].norm()
    torch.testing.assert_close(output.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close([x.double() for x in lse], list(expected[1:]), rtol=1e-5, atol=1e-5)
    assert all(x.dtype == torch.float32 for x in lse)
    theirs = gradients(expected[:1], floating(exact))
    for name, ours in gradients((output,), floating(arguments)).items():
        assert ours.dtype == dtype
        assert (ours - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


@both_forms
@each("forms")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_computes_in_its_dtype(pattern, sizes, backend):
    """Of inputs in any dtype; each has its gradient in its own."""
    arguments = make_arguments(pattern, sizes, torch.float32)
    first = next(iter(arguments))
    half = arguments | leaves({first: arguments[first].bfloat16()})
    expected = attend(pattern, arguments | {first: half[first].float()}, backend="reference")[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(pattern, half, backend=backend)[0]
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() <= 1.5e-2 * expected.norm()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=6e-2)
    for name, gradient in gradients((output,), floating(half)).items():
        assert gradient.dtype == half[name].dtype
        assert gradient.any()


@both_forms
@each("forms", "stages", without=("linear",))  # which has no softmax
def test_extreme_logits_stay_finite(pattern, sizes):
    arguments = make_arguments(pattern, sizes, torch.float32)
    extreme = {name: x * 1e4 for name, x in floating(arguments).items() if name not in ("v", "gate")}
    if "scale" in inspect.signature(PATTERNS[pattern].function).parameters:
        extreme["scale"] = 1.0
    (output,) = attend(pattern, arguments | extreme)
    assert output.isfinite().all()
    windows = arguments["kernel_size"] ** 2 if pattern == "outlook" else 1  # that may add up at a place
    assert output.abs().max() <= arguments["v"].abs().max() * 1.001 * windows
    assert all(x.isfinite().all() for x in gradients((output,), floating(arguments)).values())


@both_forms
@each("forms", "stages", without=("halo", "linear", "outlook"))  # whose rows need not sum to 1: keys outside of the map
def test_equal_values_come_out_as_they_are(pattern, sizes):
    arguments = make_arguments(pattern, sizes, torch.float32)
    arguments["v"] = torch.full_like(arguments["v"], 3)
    (output,) = attend(pattern, arguments)
    torch.testing.assert_close(output, torch.full_like(output, 3))


def some_place(name: str, x: Tensor) -> tuple[int, ...]:
    """Of the first image and head, where a tensor has them."""
    if name == "logits":
        return 0, 1, 1, 0
    if name in ("q", "k", "v", "agents"):
        return 0, *[1] * (x.ndim - 3), 0
    middle = tuple(n // 2 for n in x.shape)
    return middle if name in ("rel_height", "rel_width") else (0, *middle[1:])


@both_forms
@each("forms", "more", "stages")
def test_nan_propagates_within_its_image_and_head(pattern, sizes):
    arguments = PATTERNS[pattern].call(torch.float32, **sizes)
    for name, x in floating(arguments).items():
        spoilt = x.clone()
        spoilt[some_place(name, x)] = math.nan
        actual, expected = (
            attend(pattern, arguments | {name: spoilt}, backend=backend)[0].isnan()
            for backend in ("torch", "reference")
        )
        assert expected.any()
        assert actual[expected].all()
        if pattern in ("channel", "cross_covariance", "outlook"):
            assert torch.equal(actual, expected)
        if name in BATCHED:
            assert not actual[1:].any()
        if name not in ("rel_height", "rel_width", "route_weights"):  # which are of all heads
            assert not actual[..., 1:, :].any()


@both_forms
@each_pattern
def test_deterministic_mode_repeats_the_gradients_on_two_threads(pattern):
    arguments = make_arguments(pattern, PATTERNS[pattern].stages[0], torch.float32)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    try:
        first, second = (gradients(attend(pattern, arguments), floating(arguments)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@each("forms")
def test_compiles_to_one_graph_for_each_size(pattern, sizes):
    torch.compiler.reset()  # else what other tests compiled makes every size a symbol
    compiled = torch.compile(PATTERNS[pattern].function, fullgraph=True, backend="aot_eager")
    for factor in (1, 2) if pattern in ("halo", "neighborhood", "window") else (1,):  # their tiles depend on the size
        *rest, width = make_arguments(pattern, sizes)["v"].shape[1:-2]
        arguments = make_arguments(pattern, sizes | {"size": (*rest, width * factor)}, torch.float32)
        output, expected = compiled(**arguments), *attend(pattern, arguments)
        torch.testing.assert_close(output, expected)
        ours, theirs = (gradients((x,), floating(arguments)) for x in (output, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Layer(nn.Module):
    """A call: tensors with a batch axis are given to it, the others are its parameters."""

    def __init__(self, pattern: str, arguments: dict[str, Any]):
        super().__init__()
        rest = {name: x for name, x in arguments.items() if name not in BATCHED}
        self.function = PATTERNS[pattern].function
        self.tensors = nn.ParameterDict(floating(rest))
        self.options = {name: x for name, x in rest.items() if name not in self.tensors}

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return self.function(**maps, **self.tensors, **self.options)


@each("forms")
def test_exports_with_any_batch(pattern, sizes):
    arguments = PATTERNS[pattern].call(torch.float32, **sizes, batch=5)
    layer, batch = Layer(pattern, arguments).eval(), torch.export.Dim("batch")
    maps = {name: x for name, x in arguments.items() if name in BATCHED and x is not None}
    few, shapes = {name: x[:2] for name, x in maps.items()}, {name: {0: batch} for name in maps}
    program = torch.export.export(layer, (few,), dynamic_shapes=(shapes,))
    torch.testing.assert_close(program.module()(maps), layer(maps))


@pytest.mark.slow  # 4 s each
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name")
@each("forms", "more")
def test_onnx_with_any_batch(pattern, sizes, tmp_path):
    """Of what a model makes of it at once, tokens of all heads."""
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments = PATTERNS[pattern].call(torch.float32, **sizes, batch=5)

    class Flat(Layer):
        def forward(self, maps):
            return super().forward(maps).flatten(-2)

    layer, batch = Flat(pattern, arguments).eval(), torch.export.Dim("batch")
    maps = {name: x for name, x in arguments.items() if name in BATCHED and x is not None}
    few, shapes = {name: x[:2] for name, x in maps.items()}, {name: {0: batch} for name in maps}
    path = tmp_path / "kernel.onnx"
    torch.onnx.export(layer, (few, {}), path, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {f"maps_{name}": x.numpy() for name, x in maps.items()})
    torch.testing.assert_close(torch.from_numpy(output), layer(maps), rtol=1e-3, atol=1e-4)


@each("forms")
def test_recorded_weights_give_the_output(pattern, sizes):
    arguments = make_arguments(pattern, sizes)
    layer = Layer(pattern, arguments)
    maps = {name: x for name, x in arguments.items() if name in BATCHED}
    with record_attention(layer) as record:
        output = layer(maps)
        output.sum().backward()
    torch.testing.assert_close(output, layer(maps))
    (attention,) = record[""]
    assert attention.weights.grad.any()
    mixed = PATTERNS[pattern].mixed(attention, maps["v"])
    torch.testing.assert_close(mixed.reshape(output.shape), output)


@each("forms", "more")
def test_per_sample_gradients_equal_a_loop_over_samples(pattern, sizes):
    arguments = PATTERNS[pattern].call(torch.float64, **sizes, batch=3)
    batched = {name: x for name, x in arguments.items() if name in BATCHED and x is not None}
    maps = floating(batched)
    others = {name: x for name, x in batched.items() if name not in maps}
    parameters = {name: x for name, x in floating(arguments).items() if name not in batched}

    def loss(parameters: dict, maps: dict, others: dict) -> Tensor:
        sample = {name: x[None] for name, x in (maps | others).items()}
        return PATTERNS[pattern].function(**arguments | parameters | sample).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    together = torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameters, maps, others)
    for i in range(3):
        maps_i, others_i = ({name: x[i] for name, x in tensors.items()} for tensors in (maps, others))
        leaf_parameters, leaf_maps = leaves(parameters), leaves(maps_i)
        inputs = [*leaf_parameters.values(), *leaf_maps.values()]
        expected = torch.autograd.grad(loss(leaf_parameters, leaf_maps, others_i), inputs)
        actual = [x[i] for gradients in together for x in gradients.values()]
        torch.testing.assert_close(actual, list(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit:")  # by which torch itself defines some derivatives
@each_pattern
def test_forward_derivatives_and_second_ones_equal_differences(pattern):
    arguments = PATTERNS[pattern].call(torch.float64, **PATTERNS[pattern].forms[0])
    v = arguments["v"].contiguous()
    tangent, step = torch.randn_like(v), 1e-5

    def loss(v: Tensor) -> Tensor:
        return PATTERNS[pattern].function(**arguments | {"v": v}).pow(4).sum()

    gradient = torch.func.grad(loss)
    for function in (loss, gradient):
        _, actual = torch.func.jvp(function, (v,), (tangent,))
        expected = (function(v + step * tangent) - function(v - step * tangent)) / (2 * step)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@each_pattern
def test_the_torch_form_is_refused_under_vmap_with_a_way_out(pattern):
    arguments = PATTERNS[pattern].call(torch.float64, **PATTERNS[pattern].forms[0])

    def call(v: Tensor) -> Tensor:
        return PATTERNS[pattern].function(**arguments | {"v": v}, backend="torch")

    message = f"backend='torch' cannot run this {pattern} call under torch.func's Vmap: use backend='auto' or 'ref"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(call)(torch.stack([arguments["v"]] * 2))


@each_pattern
def test_backends_that_cannot_run_are_refused_with_a_reason(pattern):
    arguments = make_arguments(pattern, PATTERNS[pattern].forms[0])
    with pytest.raises(ValueError, match=r"backend='cuda': expected one of auto, reference, torch, triton"):
        attend(pattern, arguments, backend="cuda")
    message = rf"backend='triton' cannot run this {pattern} call: .* on cpu; use backend='auto' or 'torch'"
    with pytest.raises(ValueError, match=message):
        attend(pattern, arguments, backend="triton")
