"""What --count counts: right by hand on small calls, in both passes and under autocast, without a CUDA device."""

import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionattn.errors import UserError
from visionattn.tools import benchmark
from visionattn.tools._count import Waits, count, fake_cuda, to_fake_cuda
from visionattn.tools._roofline import Device

IN, OUT, ROWS = 8, 16, 32


@pytest.fixture
def linear():
    model = nn.Linear(IN, OUT)
    with fake_cuda():
        to_fake_cuda(model)
        yield model, torch.empty(ROWS, IN, device="cuda")


def test_a_layer_is_one_launch_that_reads_its_arguments_and_writes_its_result(linear):
    model, x = linear
    counted = count(lambda: model(x).view(-1), [])
    assert counted.operators == {"addmm": 1}
    assert counted.launches == 1
    assert counted.bytes == 4 * (ROWS * IN + IN * OUT + OUT + ROWS * OUT)
    assert counted.flops == {torch.float32: 2 * ROWS * IN * OUT}


def test_the_backward_pass_is_counted(linear):
    model, x = linear
    counted = count(lambda: model(x), list(model.parameters()))
    assert counted.flops == {torch.float32: 2 * 2 * ROWS * IN * OUT}  # x needs no gradient
    assert counted.operators["mm"] == 1
    assert counted.operators["sum"] == 1  # of the bias


def test_autocast_of_cuda_casts_what_it_casts_on_a_gpu(linear):
    model, x = linear
    counted = count(lambda: F.softmax(model(x), -1), [], torch.bfloat16)
    assert counted.operators == {"_to_copy": 4, "addmm": 1, "_softmax": 1}  # and softmax runs in float32
    assert counted.flops == {torch.bfloat16: 2 * ROWS * IN * OUT}
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"),
    [
        (torch.bfloat16, False, "_scaled_dot_product_flash_attention"),
        (torch.bfloat16, True, "_scaled_dot_product_efficient_attention"),
        (torch.float32, False, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_fused_attention_is_one_launch_forward_and_one_backward(dtype, masked, kernel):
    with fake_cuda():
        q, k, v = (torch.empty(2, 3, 16, 32, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.empty(16, 16, device="cuda", dtype=dtype) if masked else None
        counted = count(lambda: F.scaled_dot_product_attention(q, k, v, mask), [q, k, v])
    assert counted.operators[kernel] == counted.operators[f"{kernel}_backward"] == 1


def test_what_is_expanded_is_read_once_and_what_is_filled_reads_nothing():
    with fake_cuda():
        x = torch.empty(1, IN, device="cuda")
        assert count(lambda: x.expand(ROWS, -1) + 1, []).bytes == 4 * (IN + ROWS * IN)
        assert count(lambda: torch.zeros_like(x), []).bytes == 4 * IN


def test_the_peak_is_what_is_held_at_one_time():
    with fake_cuda():
        x = torch.empty(ROWS, device="cuda", requires_grad=True)
        assert count(lambda: ((x + 1) + 1) + 1, []).peak == 2 * 4 * ROWS  # an argument and the result
        assert count(lambda: x.exp().exp().exp(), [x]).peak >= 4 * 4 * ROWS  # all three are saved for a gradient


def test_what_waits_for_the_device_is_told():
    with fake_cuda():
        x = torch.empty(4, device="cuda")
        for call in (lambda: x[x > 0], lambda: x * x.sum().item(), x.nonzero):
            with pytest.raises(Waits, match="makes the host wait for the device"):
                count(call, [])


def test_the_roofline_counts_launches_or_the_slower_of_bytes_and_products(linear):
    model, x = linear
    counted = count(lambda: model(x), [])
    assert counted.seconds(Device(1, 1e30, 1e30, launch=7)) == 7
    assert counted.seconds(Device(1, 1e30, counted.bytes / 3, launch=0)) == 3
    assert counted.seconds(Device(1e30, 2 * ROWS * IN * OUT / 5, 1e30, launch=0)) == 5


@pytest.mark.parametrize(
    "arguments",
    [["kernels", "--pattern", "channel", "--sizes", "64"], ["models", "test_vit", "--sizes", "160", "--train"]],
)
def test_counts_are_written_for_both_passes_and_precisions(arguments, tmp_path, capsys):
    benchmark.main([*arguments, "--count", "--batch", "2", "--out", str(tmp_path)])
    rows = list(csv.DictReader(next(tmp_path.glob("*.csv")).read_text().splitlines()))
    assert {(row["step"], row["precision"]) for row in rows} == {
        (step, precision) for step in ("forward", "forward+backward") for precision in ("float32", "bfloat16")
    }
    for row in rows:
        assert int(row["launches"]) > 0
        assert float(row["H200 least ms"]) >= 5e-3 * int(row["launches"]) * 0.999
        assert float(row["half_gflop" if row["precision"] == "bfloat16" else "single_gflop"]) > 0
    assert "launches" in capsys.readouterr().out


def test_a_model_that_reads_values_of_the_device_is_refused(monkeypatch, tmp_path):
    class Reading(nn.Linear):
        def forward(self, x):
            return x[x > 0].sum()

    monkeypatch.setattr(benchmark, "_model", lambda name, size: Reading(1, 1))
    with pytest.raises(UserError, match="--count: a call cannot be counted without its values"):
        benchmark.main(["models", "test_vit", "--sizes", "64", "--count", "--out", str(tmp_path)])
