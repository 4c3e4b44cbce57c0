"""The Triton kernels against the definition in float64: outputs and every gradient.

Without a CUDA device they run in Triton's interpreter (conftest.py asks for it), on tiny maps; its products of bfloat16
are wrong, so that dtype waits for a device.
"""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionattn.kernels import _proof
from visionattn.kernels._packed import unpack

triton = pytest.importorskip("triton")  # has no packages for Windows and macOS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ["routing", "neighborhood", "window", "halo", "outlook"]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
gpu = pytest.mark.gpu
# NumPy, in the interpreter, tells of what is computed for the padding of tiles and not stored.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def kernels(pattern: str) -> Any:
    return importlib.import_module(f"visionattn.kernels._{pattern}_triton")


def packed(size: tuple[int, ...], heads: int, dim: int) -> list[Tensor]:
    """q, k and v as the slices of one packed projection."""
    return list(torch.randn(*size, 3, heads, dim, device=DEVICE).unbind(-3))


def routing(b=1, size=(8, 8), heads=1, dim=16, grid=(2, 2), topk=2, pool=1, value_dim=None) -> list:
    q, k, v = packed((b, *size), heads, dim)
    k, v = k[:, ::pool, ::pool], v[:, ::pool, ::pool]
    if value_dim is not None:
        v = torch.randn(*v.shape[:4], value_dim, device=DEVICE)
    regions = grid[0] * grid[1]
    scores = torch.rand(b, regions, regions, device=DEVICE)
    scores = scores + torch.eye(regions, device=DEVICE)  # so that each region is attended to
    return [q, k, v, scores.topk(topk).indices, None, grid, dim**-0.5]


def neighborhood(b=1, size=(7, 9), heads=1, dim=16, kernel=(3, 3), dilation=(1, 1), stride=(1, 1), bias=True) -> list:
    table = torch.randn(heads, *(2 * x - 1 for x in kernel), device=DEVICE) if bias else None
    return [*packed((b, *size), heads, dim), table, kernel, dilation, stride, dim**-0.5, True]


def window(b=1, size=(6, 6), heads=1, dim=16, window=(3, 3), shift=(0, 0), dilated=False, bias=True, masks=0) -> list:
    tokens = window[0] * window[1]
    table = torch.randn(heads, tokens, tokens, device=DEVICE) if bias else None
    mask = None
    if masks:
        mask = (torch.arange(masks * size[0] * size[1], device=DEVICE) % 3 > 0).view(masks, *size)
    return [*packed((b, *size), heads, dim), table, mask, window, shift, dilated, dim**-0.5, True]


def halo(b=1, size=(8, 8), heads=1, dim=16, block=4, halo=1, step=1, tables=(True, True)) -> list:
    rows = 2 * (block + 2 * halo) - 1
    tables = [torch.randn(rows, dim, device=DEVICE) / 4 if wanted else None for wanted in tables]
    q, k, v = packed((b, *size), heads, dim)
    return [q[:, ::step, ::step], k, v, *tables, block, halo, dim**-0.5, True]


def outlook(b=1, size=(5, 4), heads=1, dim=16, kernel=3, stride=2, padding=1) -> list:
    h, w = ((x + 2 * padding - kernel) // stride + 1 for x in size)
    v = torch.randn(b, *size[::-1], heads, dim, device=DEVICE).transpose(1, 2)
    return [torch.randn(b, h, w, heads, kernel**2, kernel**2, device=DEVICE), v, kernel, stride, padding, 0.5]


def reference(pattern: str) -> Any:
    return importlib.import_module(f"visionattn.kernels.{pattern}")._reference


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def leaves(arguments: list) -> list[Tensor]:
    """The arguments that get gradients."""
    return [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]


def cast(arguments: list, dtype: torch.dtype) -> list:
    """The arguments with floating tensors as leaves of this dtype, strides kept."""
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in arguments]
    return [x.detach().to(dtype).requires_grad_() if f else x for x, f in zip(arguments, floating, strict=True)]


def check(pattern: str, arguments: list, dtype: torch.dtype = torch.float32) -> None:
    """Outputs and gradients agree with the reference in float64, by relative error."""
    arguments = cast(arguments, dtype)
    assert kernels(pattern).unsupported(*arguments) is None
    results = outputs(kernels(pattern).attention(*arguments))
    gradients = [torch.randn_like(x) for x in results]
    results += torch.autograd.grad(results, leaves(arguments), gradients)
    exact = cast(arguments, torch.float64)
    expected = outputs(reference(pattern)(*exact)[0])
    expected += torch.autograd.grad(expected, leaves(exact), [x.double() for x in gradients])
    for result, right in zip(results, expected, strict=True):
        assert result.shape == right.shape
        # With one key alone, gradients are nothing but rounding, of a bias that of as many terms as there are queries.
        least = 0.1 * max(right.numel(), results[0].shape[:-1].numel()) ** 0.5
        error = (result.double() - right).norm() / right.norm().clamp_min(least)
        assert error < TOLERANCES[dtype], f"relative error {error:.1e} of {tuple(right.shape)}"


@pytest.fixture(autouse=True)
def poison():
    """Numbers repeat; memory that no kernel writes holds NaN; operations that are not deterministic raise."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SMALL = [
    ("routing", {"b": 2, "size": (6, 4), "heads": 2, "grid": (3, 2)}),  # 4 tokens in a region
    ("routing", {"size": (4, 4), "dim": 24, "grid": (4, 2), "topk": 3}),  # 2 tokens
    ("routing", {"size": (10, 6), "grid": (1, 1), "topk": 1, "value_dim": 40}),
    ("routing", {"size": (4, 4), "pool": 2, "topk": 4}),
    ("neighborhood", {"b": 2, "size": (3, 4), "heads": 2}),
    ("neighborhood", {"size": (9, 7), "dim": 48, "kernel": (3, 5)}),
    ("neighborhood", {"size": (9, 5), "kernel": (3, 5), "dilation": (2, 1), "bias": False}),
    ("neighborhood", {"size": (11, 4), "kernel": (4, 3), "stride": (3, 2)}),
    ("neighborhood", {"size": (37,), "kernel": (7,), "dilation": (2,), "stride": (1,)}),
    ("window", {"b": 2, "heads": 2, "bias": False}),
    ("window", {"size": (7, 5), "dim": 24, "window": (4, 3), "shift": (2, 1)}),
    ("window", {"size": (9, 5), "window": (4, 3), "dilated": True, "masks": 1}),
    ("window", {"b": 2, "size": (6, 7), "window": (6, 7), "shift": (4, 3), "masks": 2}),
    ("halo", {"b": 2, "size": (4, 3), "heads": 2, "tables": (False, False)}),
    ("halo", {"size": (7, 5), "dim": 24}),
    ("halo", {"size": (6, 4), "block": 5, "halo": 0}),
    ("halo", {"size": (7, 6), "step": 2}),
    ("halo", {"size": (4, 4), "halo": 2, "tables": (False, True)}),
    ("outlook", {"size": (3, 2)}),
    ("outlook", {"size": (2, 3), "dim": 24, "stride": 1}),
    ("outlook", {"b": 2, "size": (5, 4), "heads": 2, "kernel": 2, "padding": 0}),
]


@pytest.mark.parametrize(("pattern", "call"), SMALL)
def test_matches_reference(pattern, call):
    check(pattern, globals()[pattern](**call))


@pytest.mark.parametrize("b", [1, 2])
def test_long_lists_of_queries_are_split(b):
    """All regions attend to one, and in one image two of them to another."""
    arguments = routing(b=b, size=(6, 6), heads=2, grid=(3, 3), topk=1)
    arguments[3][:] = 4
    arguments[3][-1, 2:4] = 7
    check("routing", arguments)


TINY = {
    "routing": {"size": (4, 4)},
    "neighborhood": {"size": (4, 3)},
    "window": {"size": (3, 3), "shift": (1, 1)},
    "halo": {"size": (4, 4)},
    "outlook": {"size": (3, 2), "kernel": 2, "stride": 1, "padding": 1},
}


def tiny(pattern: str) -> list:
    return globals()[pattern](**TINY[pattern])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_half_precision_matches_reference(pattern, dtype):
    check(pattern, tiny(pattern), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_proofs_find_the_kernels_right(pattern, training):
    """Their problems, run as on a user's machine. In the interpreter all are slower."""
    arguments, module = tiny(pattern), importlib.import_module(f"visionattn.kernels.{pattern}")
    problems = kernels(pattern).problems(*arguments)
    verdict = _proof.try_kernel(
        kernels(pattern).attention, module._plain, module._reference, problems, tuple(arguments), training
    )
    assert verdict.status in ("ok", "slower"), verdict


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zero_images(pattern):
    arguments = cast([x[:0] if isinstance(x, Tensor) and x.ndim > 4 else x for x in tiny(pattern)], torch.float32)
    if pattern == "routing":
        arguments[3] = arguments[3][:0]
    results = outputs(kernels(pattern).attention(*arguments))
    for gradient in torch.autograd.grad(results, leaves(arguments), [torch.zeros_like(x) for x in results]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_the_output_alone(pattern):
    """As a caller has them that does not ask for the log-sum-exp; without the bias needing one."""
    arguments = cast(tiny(pattern), torch.float32)
    exact = cast(arguments, torch.float64)
    inputs, right = leaves(arguments)[:2], leaves(exact)[:2]
    for bias in leaves(arguments)[3:]:
        bias.requires_grad_(False)
    results = torch.autograd.grad(outputs(kernels(pattern).attention(*arguments))[0].sum(), inputs)
    expected = torch.autograd.grad(outputs(reference(pattern)(*exact)[0])[0].sum(), right)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pattern", "size"), [("window", (3, 3)), ("window", (9, 8)), ("neighborhood", (4, 4))])
def test_gradients_of_a_packed_projection_are_written_as_one(pattern, size):
    more = {"window": size} if pattern == "window" else {}
    arguments = globals()[pattern](b=2, size=size, heads=2, dim=24, **more)
    packed = torch.stack(arguments[:3], 3).requires_grad_()
    output = outputs(kernels(pattern).attention(*unpack(packed), *arguments[3:]))[0]
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    with Watch():
        (gradient,) = torch.autograd.grad(output.square().sum(), packed)
    assert "visionattn::softmax_attention_backward" in called
    assert not {"aten::stack", "aten::cat", "aten::copy_", "aten::clone"} & set(called)
    exact = packed.detach().double().requires_grad_()
    arguments = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    expected = outputs(reference(pattern)(*exact.unbind(3), *arguments[3:])[0])[0]
    torch.testing.assert_close(
        gradient.double(), *torch.autograd.grad(expected.square().sum(), exact), rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of opcheck
@pytest.mark.parametrize("pattern", PATTERNS)
def test_operators_obey_torch_library(pattern):
    """Schema, fakes, autograd registration, and tracing with static and dynamic shapes."""
    name = f"{pattern}_attention" if pattern in ("halo", "outlook") else "softmax_attention"
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is getattr(torch.ops.visionattn, name).default:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    with Watch():
        kernels(pattern).attention(*tiny(pattern))
    arguments = [x.detach().requires_grad_() if x in leaves([x]) else x for x in calls[0]]
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that no one has to write
    torch.library.opcheck(getattr(torch.ops.visionattn, name).default, tuple(arguments))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiles_as_one_graph(pattern):
    arguments = cast(tiny(pattern), torch.float32)
    expected = outputs(kernels(pattern).attention(*arguments))[0]
    compiled = torch.compile(kernels(pattern).attention, fullgraph=True, backend="aot_eager")
    result = outputs(compiled(*arguments))[0]
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(x.sum(), leaves(arguments)) for x in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pattern", ["routing", "neighborhood", "window", "halo"])
def test_huge_and_equal_logits(pattern):
    arguments = cast(tiny(pattern), torch.float32)
    for q, tolerance in ((1e4 * arguments[0].sign(), 1e-2), (torch.zeros_like(arguments[0]), 1e-5)):
        exact = cast([q, *arguments[1:]], torch.float64)
        result = outputs(kernels(pattern).attention(q, *arguments[1:]))
        expected = outputs(reference(pattern)(*exact)[0])
        for x, right in zip(result, expected, strict=True):
            assert (x.double() - right).norm() < tolerance * right.norm()


def test_bias_of_minus_infinity_forbids_a_key():
    arguments = neighborhood(size=(5, 5))
    arguments[3][:, :, 1] = -torch.inf  # keys one column to the left
    check("neighborhood", arguments)


def test_query_without_keys_yields_zero():
    arguments = cast(window(masks=1), torch.float32)
    arguments[4][:, :3, :3] = False
    output, lse = kernels("window").attention(*arguments)
    assert (output[:, :3, :3] == 0).all()
    assert (lse[..., :3, :3] == -torch.inf).all()
    for gradient in torch.autograd.grad(output.sum(), leaves(arguments)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("pattern", ["routing", "neighborhood", "window", "halo"])
def test_nan_reaches_whom_it_concerns(pattern):
    """A NaN in a key reaches all its queries; one in a query reaches that query alone."""
    arguments = [x.clone() if isinstance(x, Tensor) else x for x in tiny(pattern)]
    arguments[1][0, 1, 1, 0, 0] = torch.nan
    expected = outputs(reference(pattern)(*arguments)[0])[0].isnan()
    result = outputs(kernels(pattern).attention(*arguments))[0].isnan()
    assert (result | ~expected).all()
    assert expected.any()
    arguments[1].nan_to_num_()
    arguments[0][0, 1, 1, 0, 0] = torch.nan
    result = outputs(kernels(pattern).attention(*arguments))[0].isnan()
    assert result[0, 1, 1, 0].all()
    assert result.sum() == result.shape[-1]


def test_reasons_for_what_is_not_supported():
    case = routing(dim=16)
    weights = torch.ones(case[3].shape)
    assert "route_weights" in kernels("routing").unsupported(*case[:4], weights, *case[5:])
    assert "float64" in kernels("routing").unsupported(*cast(case, torch.float64))
    assert "at most 128" in kernels("routing").unsupported(*routing(dim=144))
    one = [x[:, :1, :1] for x in case[:3]]
    assert "dtypes" in kernels("routing").unsupported(case[0].half(), *case[1:])
    assert "at most 16384 are" in kernels("routing").unsupported(
        *(x.expand(-1, 2**9, 2**9, -1, -1) for x in one), *case[3:]
    )
    case = neighborhood(size=(3, 3, 3), kernel=(3, 3, 3), dilation=(1, 1, 1), stride=(1, 1, 1))
    assert "3 axes" in kernels("neighborhood").unsupported(*case)
    assert "at most 32" in kernels("halo").unsupported(*halo(block=32))
    assert "at most 5" in kernels("outlook").unsupported(*outlook(size=(7, 7), kernel=7, padding=3))
    huge = outlook()
    huge[0] = huge[0][:, :1, :1].expand(-1, 2**13, 2**12, -1, -1, -1)
    assert "fewer than 2 ** 31" in kernels("outlook").unsupported(*huge)


def test_what_pytorch_does_better_is_not_tried():
    assert "whole map" in kernels("window").unsuited(*window(b=999, size=(7, 7), window=(7, 7)))
    assert "whole map" in kernels("neighborhood").unsuited(*neighborhood(b=999, size=(3, 3)))
    assert "whole map" in kernels("halo").unsuited(*halo(b=999, size=(4, 4)))
    assert "all regions" in kernels("routing").unsuited(*routing(b=999, topk=4))
    assert kernels("window").unsuited(*window(b=8, size=(64, 64))) is None
    for few in ("window", "neighborhood", "routing", "outlook"):
        assert "fewer than 32768 tokens" in kernels(few).unsuited(*globals()[few]())


def test_products_of_float32_are_as_exact_as_torch_is_told(fp32_precision, monkeypatch):
    """The interpreter multiplies exactly: what kernels are told is all there is to see."""
    from visionattn.kernels import _attention_triton

    told = []
    monkeypatch.setattr(_attention_triton._Call, "launch", lambda self, kernel, n, prepared, *_: told.append(prepared))
    outputs(kernels("window").attention(*cast(tiny("window"), torch.float32)))[0].sum().backward()
    assert [prepared.constants.precision.value for prepared in told] == [fp32_precision] * 2


def test_devices_of_amd_and_old_ones_are_refused_by_name(monkeypatch):
    from visionattn.kernels import _attention_triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older than compute capability 8.0" in _attention_triton._unsupported_device(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in _attention_triton._unsupported_device(torch.device("cuda"))


dims = st.sampled_from([16, 24, 32, 48, 64])
sides = st.integers(1, 13)


@st.composite
def any_neighborhood(draw) -> list:
    axes = []
    for _ in range(2):
        kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        axes.append((draw(st.integers(kernel * dilation, 17)), kernel, dilation, draw(st.integers(1, kernel))))
    size, kernel, dilation, stride = zip(*axes, strict=True)
    return neighborhood(draw(st.integers(1, 2)), size, draw(st.integers(1, 2)), draw(dims), kernel, dilation, stride)


@st.composite
def any_routing(draw) -> list:
    grid = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = grid[0] * draw(st.integers(1, 5)), grid[1] * draw(st.integers(1, 5))
    return routing(1, size, draw(st.integers(1, 2)), draw(dims), grid, draw(st.integers(1, grid[0] * grid[1])))


@st.composite
def any_window(draw) -> list:
    window_size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    dilated = draw(st.booleans())
    shift = (0, 0) if dilated else tuple(draw(st.integers(0, x - 1)) for x in window_size)
    return window(1, (draw(sides), draw(sides)), draw(st.integers(1, 2)), draw(dims), window_size, shift, dilated)


@st.composite
def any_halo(draw) -> list:
    return halo(1, (draw(sides), draw(sides)), 1, draw(dims), draw(st.integers(1, 6)), draw(st.integers(0, 4)))


@st.composite
def any_outlook(draw) -> list:
    kernel = draw(st.integers(1, 3))
    padding = draw(st.integers(0, kernel // 2))
    size = st.integers(kernel, 6)
    return outlook(1, (draw(size), draw(size)), 1, draw(dims), kernel, draw(st.integers(1, 3)), padding)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_reference_at_any_shape(pattern):
    @settings(max_examples=25, deadline=None, derandomize=False)
    @given(globals()[f"any_{pattern}"]())
    def run(arguments):
        check(pattern, arguments)

    run()


STAGES = [
    ("routing", {"b": 8, "size": (56, 56), "heads": 2, "dim": 32, "grid": (7, 7), "topk": 1}),
    ("routing", {"b": 8, "size": (28, 28), "heads": 4, "dim": 32, "grid": (7, 7), "topk": 4}),
    ("routing", {"b": 8, "size": (14, 14), "heads": 8, "dim": 32, "grid": (7, 7), "topk": 16}),
    ("routing", {"b": 1, "size": (128, 128), "heads": 2, "dim": 32, "grid": (8, 8), "topk": 4}),
    ("neighborhood", {"b": 2, "size": (56, 56), "heads": 2, "dim": 32, "kernel": (7, 7)}),
    ("neighborhood", {"b": 2, "size": (56, 56), "heads": 2, "dim": 32, "kernel": (7, 7), "dilation": (8, 8)}),
    ("neighborhood", {"b": 4, "size": (14, 14), "heads": 8, "dim": 32, "kernel": (7, 7), "dilation": (2, 2)}),
    ("neighborhood", {"b": 4, "size": (7, 7), "heads": 16, "dim": 128, "kernel": (7, 7)}),
    ("window", {"b": 2, "size": (56, 56), "heads": 3, "dim": 32, "window": (7, 7), "shift": (3, 3)}),
    ("window", {"b": 2, "size": (50, 45), "heads": 3, "dim": 48, "window": (12, 12), "shift": (6, 6)}),
    ("window", {"b": 2, "size": (56, 56), "heads": 2, "dim": 64, "window": (7, 7), "dilated": True}),
    ("halo", {"b": 4, "size": (64, 64), "heads": 4, "dim": 16, "block": 8, "halo": 3}),
    ("halo", {"b": 4, "size": (64, 64), "heads": 4, "dim": 32, "block": 8, "halo": 3, "step": 2}),
    ("halo", {"b": 4, "size": (33, 31), "heads": 8, "dim": 64, "block": 8, "halo": 2}),
    ("outlook", {"b": 4, "size": (28, 28), "heads": 6, "dim": 32}),
    ("outlook", {"b": 2, "size": (28, 28), "heads": 2, "dim": 96, "stride": 1}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("pattern", "case"), STAGES)
def test_stage_shapes_match_reference(pattern, case, dtype):
    assert torch.cuda.is_available(), "this test needs a CUDA device"
    check(pattern, globals()[pattern](**case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "case"), STAGES)
def test_results_repeat_bit_by_bit_without_waiting(pattern, case):
    """Two runs give the same bits, the second on another stream, with an error if anything synchronises the device."""
    assert torch.cuda.is_available(), "this test needs a CUDA device"
    arguments = cast(globals()[pattern](**case), torch.bfloat16)
    runs, stream = [], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for mode, where in (("default", torch.cuda.current_stream()), ("error", stream)):
        with torch.cuda.stream(where):
            torch.cuda.set_sync_debug_mode(mode)
            results = outputs(kernels(pattern).attention(*arguments))
            gradients = torch.autograd.grad(results[0], leaves(arguments), torch.ones_like(results[0]))
            torch.cuda.set_sync_debug_mode("default")
        runs.append((*results, *gradients))
    torch.cuda.synchronize()
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def apart(*command: str, **variables: str) -> str:
    """Output of Python in a process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def compile_apart(folder: Path, path: str = "", **options: Any) -> list[dict[str, str]]:
    """What `visionattn.tools.instructions` tells of kernels that it compiles, without a device."""
    command = [x for name, value in options.items() for x in (f"--{name}", *map(str, value))]
    apart("-m", "visionattn.tools.instructions", "--out", str(folder / "found.csv"), *command, PYTHONPATH=path)
    with (folder / "found.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_compiles_for_hopper(tmp_path):
    found = compile_apart(tmp_path, pattern=["routing"], capability=[90], dim=[16])
    assert [row["kernel"] for row in found] == ["forward", "backward_dq", "backward_dkv", "sum_parts"]
    assert all(int(row["matrix"]) and int(row["instructions"]) < 1000 for row in found[:3])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiles_everywhere_with_few_spills(pattern, capability, tmp_path):
    """Spills are those of the assembler of this version of Triton; a few bytes, of what is held beside the loop."""
    options = {"pattern": [pattern], "capability": [capability], "dim": [16, 32, 64, 128]}
    found = compile_apart(tmp_path, **options, dtype=["bfloat16", "float32"])
    assert len(found) >= 16
    assert not [row for row in found if int(row["spilled"]) > 160]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.7.0", "3.9.0"])
def test_compiles_with_the_oldest_and_the_newest_triton(version, tmp_path):
    """That of torch 2.12, and the last there was when this was written; pip fetches them."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "triton")]
    subprocess.run([*pip, f"triton=={version}"], check=True)
    found = compile_apart(tmp_path, str(tmp_path / "triton"), pattern=PATTERNS, capability=[80])
    assert len(found) == 16
    assert not [row for row in found if int(row["spilled"]) > 160]


SIZES = """
import torch, triton
from visionattn.kernels import _{pattern}_triton as kernels
from visionattn.tools.instructions import Target

triton.runtime.driver.set_active(Target(80))
run, compiled = triton.JITFunction.run, set()
triton.JITFunction.run = lambda self, *x, **options: compiled.add(run(self, *x, **options | {{"warmup": True}}).hash)
for batch, height, width, heads in ((1, 56, 56, 2), (2, 42, 63, 3), (16, 49, 70, 16), (1, 28, 35, 1)):
    q, k, v = torch.zeros(batch, height, width, 3, heads, 16, dtype=torch.bfloat16).unbind(3)
    logits = torch.zeros(batch, (height + 1) // 2, (width + 1) // 2, heads, 9, 9, dtype=torch.bfloat16)
    kernels.attention({call})
print(len(compiled))
"""


@pytest.mark.parametrize(
    ("pattern", "call", "compiled"),
    [
        ("window", "q, k, v, None, None, (7, 7), (3, 3), False, 0.25, False", "1"),
        # Regions of 64, 54, 70 and 20 tokens, of which 64 at a time, or 32.
        ("routing", "q, k, v, torch.zeros(batch, 49, 4, dtype=torch.int64), None, (7, 7), 0.25", "2"),
        pytest.param("outlook", "logits, v, 3, 2, 1, 0.25", "1", marks=pytest.mark.slow),
        pytest.param("neighborhood", "q, k, v, None, (7, 7), (1, 1), (1, 1), 0.25, False", "1", marks=pytest.mark.slow),
        pytest.param("halo", "q, k, v, None, None, 8, 3, 0.25, False", "1", marks=pytest.mark.slow),
    ],
)
def test_other_sizes_compile_nothing_new(pattern, call, compiled):
    assert apart("-W", "ignore", "-c", SIZES.format(pattern=pattern, call=call)).split() == [compiled]
