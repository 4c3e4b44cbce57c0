"""What tests of kernels share. One thread: on tensors this small, threads wait for each other more than they work."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Maps of tests count as large: what small ones get on a CPU is tested as the plain body, or in test_gated.py."""
    for pattern in ("gated", "outlook", "window"):
        monkeypatch.setattr(f"visionattn.kernels.{pattern}.SMALL", 0)


@pytest.fixture(params=["ieee", "tf32"])
def fp32_precision(request):
    """How exactly torch is told to multiply matrices of float32 on CUDA."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before
