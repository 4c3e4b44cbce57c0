"""Which backend runs, and what is said when it cannot."""

import sys
import types

import pytest
import torch

from visionattn.kernels import _dispatch, describe_backends, routing_attention, set_backend


@pytest.fixture
def qkv():
    return torch.randn(1, 6, 6, 3, 2, 4).unbind(3)


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that ran."""
    ran = []
    for name in ("_reference", "_on_cpu", "_plain"):
        original = getattr(sys.modules["visionattn.kernels.routing"], name)

        def spy(*arguments, name=name, original=original):
            ran.append(name)
            return original(*arguments)

        monkeypatch.setattr(f"visionattn.kernels.routing.{name}", spy)
    return ran


def test_auto_on_a_cpu_is_the_torch_form(qkv, calls):
    routing_attention(*qkv, 3, 2)
    assert calls == ["_on_cpu"]


def test_what_a_compiler_traces_is_the_plain_body(qkv, calls):
    torch.compile(routing_attention, fullgraph=True, backend="eager")(*qkv, 3, 2)
    assert calls == ["_plain"]


def test_auto_under_torch_func_is_the_reference_form(qkv, calls):
    q, k, v = qkv
    torch.func.grad(lambda v: routing_attention(q, k, v, 3, 2).sum())(v)
    torch.func.grad(lambda v: routing_attention(q, k, v, 3, 2, backend="torch").sum())(v)
    assert calls == ["_reference", "_on_cpu"]


def test_set_backend_is_the_meaning_of_auto_and_ends_with_its_block(qkv, calls):
    with set_backend("reference"):
        routing_attention(*qkv, 3, 2)
        routing_attention(*qkv, 3, 2, backend="torch")
        with set_backend("torch"):
            routing_attention(*qkv, 3, 2)
    with pytest.raises(KeyError), set_backend("reference"):
        raise KeyError
    routing_attention(*qkv, 3, 2)
    assert calls == ["_reference", *["_on_cpu"] * 3]


def test_set_backend_refuses_unknown_names():
    with pytest.raises(ValueError, match="backend='cuda': expected one of auto, reference, torch, triton"):
        set_backend("cuda").__enter__()


def test_triton_by_name_says_why_it_cannot_run(qkv):
    message = "cannot run this routing call: Triton kernels need CUDA tensors, .* on cpu; use backend='auto' or 'torch'"
    with pytest.raises(ValueError, match=message):
        routing_attention(*qkv, 3, 2, backend="triton")
    with set_backend("triton"), pytest.raises(ValueError, match=message):
        routing_attention(*qkv, 3, 2)


@pytest.fixture
def sibling(monkeypatch):
    """A pattern `fake` with a Triton sibling that runs calls with an even number."""
    module = types.ModuleType("visionattn.kernels._fake_triton")
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    module.unsupported = lambda tensor, number: (
        f"number is {number}, only even ones are supported" if number % 2 else None
    )
    module.unsuited = lambda tensor, number: None
    module.attention = lambda tensor, number: "triton"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_dispatch, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setenv("VISIONATTN_KERNELS", "trust")  # proofs are in test_proof.py


def run(number: int, backend: str = "auto"):
    forms = _dispatch.Forms(lambda *_: ("reference", None, None), lambda *_: "on a CPU", lambda *_: "plain")
    return _dispatch.dispatch("fake", backend, forms, torch.empty(1, 1, 1, 1, 1), number)


def test_a_triton_sibling_is_found_and_used_where_it_supports_the_call(sibling):
    assert run(2) == "triton"
    assert run(2, "triton") == "triton"
    assert run(2, "torch") == "on a CPU"


def test_auto_falls_back_to_pytorch(sibling):
    assert run(1) == "on a CPU"
    with pytest.raises(ValueError, match="number is 1, only even ones are supported; use backend='auto' or 'torch'"):
        run(1, "triton")


def test_backends_are_described_for_every_pattern():
    line = next(line for line in describe_backends() if line.startswith("routing "))
    assert "cpu" in line
    assert "on_cpu (Triton kernels need CUDA tensors" in line
