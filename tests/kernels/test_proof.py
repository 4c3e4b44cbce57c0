"""Proof before use: what is tried, what it finds, where verdicts are kept, and who may take a kernel without trying.

Stand-in kernels on a CPU: the plain body, made wrong, slow or crashing; the kernels themselves are in test_triton.py.
"""

import itertools
import json
import multiprocessing
import types
from dataclasses import replace

import pytest
import torch

from visionattn.kernels import _attention_triton, _dispatch, _plain, _proof, bodies, set_backend, window
from visionattn.kernels._window_triton import problems, unsuited
from visionattn.tools import benchmark

window_attention = window.window_attention
SIZES = {"window_size": 3, "shift": 1}


def right(*arguments):
    return window._plain(*arguments)


def off_by_one(q, k, v, bias, *rest):
    return right(q, k, v, None if bias is None else bias.roll(1, -1), *rest)


runs = itertools.count()


def racing(*arguments):
    """One bit of one number, in every other run."""
    output = right(*arguments).clone()
    output.view(-1)[-1] *= 1 + 2e-7 * (next(runs) % 2)
    return output


def nan_in_an_empty_tile(q, k, v, bias, mask, *rest):
    """Softmax over no keys, as it comes out where nobody thinks of it."""
    output = right(q, k, v, bias, mask, *rest)
    return output.where(output != 0, torch.nan)


def leaving_memory_unwritten(*arguments):
    output = torch.empty(arguments[0].shape)
    output[:, :-1] = right(*arguments)[:, :-1].detach()
    return output


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def with_wrong_gradient(q, *rest):
    return right(WrongGradient.apply(q), *rest)


def crashing(*arguments):
    raise RuntimeError("an illegal memory access was encountered\nwith more lines")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU that Triton could run on, with an empty cache. Returns a function that puts a kernel in place, and its
    calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VISIONATTN_KERNELS", raising=False)
    monkeypatch.setattr(_dispatch, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(_dispatch, "_ran", {})
    monkeypatch.setattr(_dispatch, "_compiled", set())
    monkeypatch.setattr(_attention_triton, "FEW", 0)
    monkeypatch.setattr(_proof, "_known", {})
    speedup = [2.0]
    monkeypatch.setattr(_proof, "_speedup", lambda *_: speedup[0])
    calls = []

    def put(kernel, faster: float = 2.0):
        def attention(*arguments):
            calls.append(arguments[0].shape)
            return kernel(*arguments)

        speedup[0] = faster
        module = types.SimpleNamespace(
            attention=attention, problems=problems, unsuited=unsuited, unsupported=lambda *_: None
        )
        monkeypatch.setattr(_dispatch, "_sibling", lambda pattern: module)
        return calls

    return put


def call(training: bool = False, **more):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 7, 8, 3, 2, 16).requires_grad_(training).unbind(3)
    bias = torch.randn(2, 9, 9)
    mask = torch.rand(1, 7, 8) > 0.2
    return window_attention(q, k, v, **SIZES, **{"bias": bias, "mask": mask} | more)


def body() -> str:
    """The last that ran."""
    return list(_dispatch._ran)[-1][1]


def verdict() -> _proof.Verdict:
    (found,) = _proof._read().values()
    return found


@pytest.mark.parametrize("training", [False, True])
def test_a_right_and_faster_kernel_is_taken_and_tried_once(machine, training):
    calls = machine(right)
    first = call(training)
    tried = len(calls)
    assert tried > 1
    assert body() == "triton"
    again = call(training)
    assert len(calls) == tried + 1
    torch.testing.assert_close(first, again)
    assert verdict() == _proof.Verdict("ok", 2.0)


@pytest.mark.parametrize(
    ("kernel", "training", "why"),
    [
        (off_by_one, False, "is off by"),
        (racing, False, "changes from run to run"),
        (nan_in_an_empty_tile, False, "is off by nan"),
        (leaving_memory_unwritten, False, "is off by nan"),
        (with_wrong_gradient, True, "is off by"),
    ],
)
def test_a_wrong_kernel_is_found_and_never_taken(machine, kernel, training, why):
    machine(kernel)
    expected = call(training, backend="torch")
    torch.testing.assert_close(call(training), expected)
    assert verdict().status == "wrong"
    assert why in verdict().why
    assert body() == "on_cpu"
    assert any("wrong" in line and why in line for line in bodies())


def test_a_kernel_wrong_in_backward_alone_serves_inference(machine):
    machine(with_wrong_gradient)
    call(training=False)
    assert body() == "triton"
    call(training=True)
    assert body() == "on_cpu"


def test_a_slower_kernel_is_not_taken(machine):
    machine(right, faster=1.05)
    call()
    assert verdict() == _proof.Verdict("slower", 1.05)
    assert body() == "on_cpu"


def test_a_crashing_kernel_is_an_error_in_one_line_and_not_tried_again(machine):
    calls = machine(crashing)
    call()
    assert verdict() == _proof.Verdict("error", why="RuntimeError: an illegal memory access was encountered")
    tried = len(calls)
    call()
    assert len(calls) == tried
    assert body() == "on_cpu"


def test_out_of_memory_is_no_verdict(machine):
    def hungry(*arguments):
        raise torch.OutOfMemoryError

    machine(hungry)
    call()
    assert body() == "on_cpu"
    assert _proof._read() == {}


def test_an_interrupted_trial_is_no_verdict_and_a_killed_one_an_error(machine):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    machine(interrupted)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert _proof._read() == {}
    seen = []

    def looking(*arguments):
        seen.append(verdict())  # what a killed process leaves
        return right(*arguments)

    machine(looking)
    call()
    assert seen[0] == _proof.Verdict("error", why="the process ended while the kernel was tried")


def test_a_trial_leaves_random_numbers_gradients_and_settings_alone(machine):
    machine(right)
    q = torch.randn(1, 7, 8, 2, 16, requires_grad=True)
    state = torch.get_rng_state()
    window_attention(q, q, q, **SIZES).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    expected = torch.autograd.grad(window_attention(q, q, q, **SIZES, backend="torch").sum(), q)[0]
    torch.testing.assert_close(q.grad, expected)


def test_a_kind_of_call_has_its_own_verdict(machine):
    machine(right)
    kinds = [{}, {"bias": None}, {"shift": 0}, {"window_size": 2}, {"mask": None}]
    for more in kinds:
        q = torch.randn(1, 7, 8, 2, 16)
        options = {"bias": None, "mask": None} | SIZES | more
        if more == {}:
            call()
        else:
            window_attention(q, q, q, **options)
    assert len(_proof._read()) == 4  # without bias or mask is what the second, and the last, are
    with torch.inference_mode():
        q = torch.randn(9, 7, 8, 2, 16)  # another class of sizes
        window_attention(q, q, q, **SIZES)
    assert len(_proof._read()) == 5


def test_verdicts_of_other_machines_versions_and_sources_do_not_count(machine, monkeypatch):
    calls = machine(right)
    call()
    tried = len(calls)
    for facts in ("NVIDIA H200 sm_90; ", "another source; "):
        monkeypatch.setattr(_proof, "_known", {})
        monkeypatch.setattr(_proof, "_machine", lambda where, facts=facts: facts)
        _proof._key.cache_clear()
        call()
        assert len(calls) > tried
        tried = len(calls)
    _proof._key.cache_clear()
    assert len(_proof._read()) == 3


def test_a_machine_is_named_with_versions_and_the_source_of_kernels():
    facts = _proof._machine(torch.device("cpu"))
    assert f"torch {torch.__version__.partition('+')[0]}" in facts
    assert "triton " in facts
    assert "kernels " in facts


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"key": 1}', '{"key": {"status": "ok", "more": 1}}'])
def test_a_corrupt_file_is_told_and_written_anew(machine, text):
    machine(right)
    _proof.path().parent.mkdir(parents=True)
    _proof.path().write_text(text)
    with pytest.warns(UserWarning, match=r"kernels\.json is no file of verdicts on kernels .* tried anew"):
        call()
    assert body() == "triton"
    assert verdict().status == "ok"


def test_a_file_that_cannot_be_written_costs_a_warning_only(machine, monkeypatch, tmp_path):
    machine(right)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="verdicts on kernels are not kept"):
        call()
    assert body() == "triton"
    call()  # and is tried once all the same


def _prove(cache: str, name: str) -> str:
    """In a process of its own: says whether it tried."""
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    tried = []
    kind = _proof.Kind(torch.device("cpu"), name.rstrip("0123456789"), torch.float32, (16,), (), False, (1,))

    def try_it():
        tried.append(1)
        import time

        time.sleep(0.2)
        return _proof.Verdict("ok", 2.0)

    assert _proof.prove(kind, try_it).is_taken
    return "tried" if tried else "read"


def test_processes_of_one_machine_try_once_and_lose_no_verdict(tmp_path):
    """As ranks of DDP do, which must take the same body, and as jobs that start together."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = ["a1", "a2", "b1", "b2"]
        results = pool.starmap(_prove, [(str(tmp_path), name) for name in names])
    assert sorted(results) == ["read", "read", "tried", "tried"]
    entries = json.loads((tmp_path / "visionattn" / "kernels.json").read_text())
    assert len(entries) == 2
    assert all(entry["status"] == "ok" for entry in entries.values())


@pytest.mark.parametrize(("mode", "expected"), [("off", "on_cpu"), ("trust", "triton")])
def test_the_environment_overrides(machine, monkeypatch, mode, expected):
    calls = machine(off_by_one)
    monkeypatch.setenv("VISIONATTN_KERNELS", mode)
    call()
    assert body() == expected
    assert len(calls) == (expected == "triton")
    assert _proof._read() == {}


def test_other_values_of_the_environment_are_refused(machine, monkeypatch):
    machine(right)
    monkeypatch.setenv("VISIONATTN_KERNELS", "on")
    with pytest.raises(ValueError, match="VISIONATTN_KERNELS='on': expected one of check, off, trust"):
        call()


def test_triton_by_name_is_not_tried(machine):
    calls = machine(off_by_one)
    call(backend="triton")
    with set_backend("triton"):
        call()
    assert len(calls) == 2
    assert _proof._read() == {}


@pytest.mark.parametrize(("faster", "expected"), [(None, "plain"), (2.0, "triton"), (1.0, "plain")])
def test_compiled_code_reads_verdicts_and_tries_nothing(machine, faster, expected):
    calls = machine(right, faster or 2.0)
    if faster is not None:
        call()
    tried = len(calls)
    torch.compiler.reset()
    q, k, v = torch.randn(1, 7, 8, 3, 2, 16).unbind(3)
    bias, mask = torch.randn(2, 9, 9), torch.rand(1, 7, 8) > 0.2
    torch.compile(window_attention, fullgraph=True, backend="eager")(q, k, v, **SIZES, bias=bias, mask=mask)
    assert body() == expected
    assert len(calls) - tried == (expected == "triton")
    why = list(_dispatch._ran)[-1][2]
    assert ("visionattn doctor --kernels" in why) == (faster is None)


@pytest.fixture
def capture(monkeypatch):
    """A function that says whether a CUDA graph is being captured from now on."""

    def say(is_capturing: bool):
        for module in (_plain, _dispatch):
            monkeypatch.setattr(module, "capturing", lambda x: is_capturing)

    return say


@pytest.mark.parametrize("mode", ["check", "trust"])
def test_captured_code_takes_what_has_run_before(machine, monkeypatch, capture, mode):
    monkeypatch.setenv("VISIONATTN_KERNELS", mode)
    calls = machine(right)
    capture(True)
    call()
    assert body() == "on_cpu"
    assert not calls
    capture(False)
    call()
    capture(True)
    tried = len(calls)
    call()
    assert len(calls) == tried + 1


def test_triton_by_name_is_refused_in_a_capture_that_would_compile_it(machine, capture):
    calls = machine(off_by_one)
    capture(True)
    with pytest.raises(ValueError, match=r"cannot run this window call: a CUDA graph is being captured, .* before it;"):
        call(backend="triton")
    assert not calls
    capture(False)
    call(backend="triton")
    capture(True)
    call(backend="triton")
    assert len(calls) == 2
    call()  # by "auto" it is not proved
    assert body() == "on_cpu"


def test_float32_is_tried_as_exactly_as_torch_is_told(machine, fp32_precision):
    def rounded(q, *rest):
        """As tf32 reads it: 10 bits of the mantissa."""
        return right((q.view(torch.int32) & ~0x1FFF).view(torch.float32), *rest)

    machine(rounded)
    call()
    assert verdict().status == {"ieee": "wrong", "tf32": "ok"}[fp32_precision]


def test_fake_tensors_try_nothing(machine):
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls = machine(right)
    with FakeTensorMode():
        q = torch.empty(1, 6, 6, 2, 16)
        window_attention(q, q, q, 6)
    assert body() == "on_cpu"
    assert not calls


def test_autocast_is_tried_in_its_dtype(machine):
    machine(right)
    with torch.autocast("cpu", torch.bfloat16):
        call()
    (key,) = _proof._read()
    assert " bfloat16 " in key


def test_attention_over_the_whole_map_is_left_to_pytorch_untried(machine):
    calls = machine(right)
    q = torch.randn(1, 3, 3, 2, 16)
    window_attention(q, q, q, 3)
    assert not calls
    assert "PyTorch has its own kernel" in list(_dispatch._ran)[-1][2]


def test_describing_the_bodies_that_ran(machine):
    machine(right, faster=1.0)
    call()
    assert bodies() == ["window: on_cpu (slower, 1.00 times as fast as the plain body)"]


def test_doctor_tries_calls_of_models_in_all_precisions_and_both_directions(machine, monkeypatch):
    machine(right)
    case = benchmark.Case("tiny", 7, 2, 16, (3, 1, False, torch.randn(2, 9, 9)))
    only = {"window": replace(benchmark.PATTERNS["window"], cases=lambda size: [case])}
    monkeypatch.setattr(benchmark, "PATTERNS", only)
    benchmark.try_kernels("cpu", batch=1)
    tried = {tuple(key.split("; ")[-1].split()[:3]) for key in _proof._read()}
    dtypes = ("float32", "bfloat16", "float16")
    assert tried == {("window", way, dtype) for way in ("inference", "training") for dtype in dtypes}
