"""visionattn benchmark: the peers are right, the results are written once, wrong requests are explained."""

import csv
import json
from dataclasses import replace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from visionattn.errors import UserError
from visionattn.listing import gmacs
from visionattn.tools import benchmark


@pytest.mark.parametrize("pattern", benchmark.PATTERNS)
def test_the_candidates_of_a_pattern_agree(pattern):
    first, *others = benchmark.PATTERNS[pattern].candidates
    for case in benchmark.PATTERNS[pattern].cases(224)[-1:]:
        expected = benchmark.kernel_call(pattern, case, first, "forward", 1, "cpu")()
        for other in others:
            found = benchmark.kernel_call(pattern, case, other, "forward", 1, "cpu")()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_case(monkeypatch):
    """Only the smallest case, and no fresh processes."""
    pattern = benchmark.PATTERNS["routing"]
    cases = pattern.cases(224)[2:]
    monkeypatch.setitem(benchmark.PATTERNS, "routing", replace(pattern, cases=lambda size: cases))
    monkeypatch.setattr(benchmark, "peak_memory", lambda *arguments: 1.0)


KERNELS = ["kernels", "--pattern", "routing", "--sizes", "224", "--batch", "1", "--rounds", "2", "--out"]


def test_kernels_writes_table_chart_and_surroundings(one_case, tmp_path, capsys):
    benchmark.main([*KERNELS, str(tmp_path)])
    (table,), (chart,), (facts,) = (list(tmp_path.glob(f"*.{kind}")) for kind in ("csv", "png", "json"))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["candidate"], row["step"]) for row in rows] == [
        (candidate, step) for step in ("forward", "forward+backward") for candidate in ("gather", "visionattn")
    ]
    for row in rows:
        assert 0 < float(row["quartile1_ms"]) <= float(row["median_ms"]) <= float(row["quartile3_ms"])
    ours, peer = rows[1], rows[0]
    assert float(ours["speedup"]) == pytest.approx(float(peer["median_ms"]) / float(ours["median_ms"]))
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "torch" in json.loads(facts.read_text())["versions"]
    assert str(table) in capsys.readouterr().out


def test_results_are_never_overwritten(tmp_path):
    row = benchmark.Row("routing", "stage 1", "gather", "forward", 1, 2.0, 1.0, 3.0, 4.0)
    stem = tmp_path / "result"
    benchmark.save([row], stem)
    before = stem.with_suffix(".csv").read_bytes()
    with pytest.raises(UserError, match=r"result\.csv exists: results are never overwritten"):
        benchmark.save([row, row], stem)
    assert stem.with_suffix(".csv").read_bytes() == before


def test_models_are_timed_per_gmac(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "peak_memory", lambda *arguments: 1.0)
    arguments = ["models", "test_vit", "test_resnet", "--sizes", "128x160", "--batch", "1", "--rounds", "2", "--train"]
    benchmark.main([*arguments, "--out", str(tmp_path)])
    rows = list(csv.DictReader(next(tmp_path.glob("*.csv")).read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["test_vit", "test_resnet"] * 2
    assert all(float(row["gmacs"]) > 0 and float(row["ms_per_gmac"]) > 0 for row in rows)


def test_models_of_a_pattern_are_timed_against_their_twins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "peak_memory", lambda *arguments: 1.0)
    arguments = ["models", "--pattern", "va_convit_t*", "va_convit_tiny", "--sizes", "64", "--batch", "1"]
    benchmark.main([*arguments, "--rounds", "2", "--out", str(tmp_path)])
    rows = list(csv.DictReader(next(tmp_path.glob("*.csv")).read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["convit_tiny", "va_convit_tiny"]
    peer, ours = (float(row["gmacs"]) for row in rows)
    assert ours == pytest.approx(peer, rel=0.02)
    assert f"forward: geometric mean {float(rows[1]['speedup']):.2f}x" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", benchmark.PATTERNS)
def test_multiply_adds_of_a_pattern_are_those_of_its_textbook_form(pattern):
    """Products with keys or weights; what mixes copies of the map, or tables, may add a little."""
    (first, *_), case = benchmark.PATTERNS[pattern].candidates, benchmark.PATTERNS[pattern].cases(224)[0]
    call = benchmark.kernel_call(pattern, case, first, "forward", 1, "cpu")
    with FlopCounterMode(display=False) as counter:
        call()
    assert benchmark.PATTERNS[pattern].macs(case) == pytest.approx(counter.get_total_flops() / 2, rel=0.08)


def test_no_candidate_passes_the_roofline(one_case, tmp_path):
    benchmark.main([*KERNELS, str(tmp_path)])
    rows = csv.DictReader(next(tmp_path.glob("*.csv")).read_text().splitlines())
    assert all(0 < float(row["roofline"]) < 1 for row in rows)


def test_gmacs_count_attention():
    model = timm.create_model("test_vit").eval()
    tokens, width, depth = 101, model.embed_dim, len(model.blocks)  # 160 px, patches of 16, one class token
    linear = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)) * tokens
    attention = depth * 2 * tokens * tokens * width
    rest = model.patch_embed.proj.weight.numel() * 100 + model.head.weight.numel()
    assert gmacs(model, (3, 160, 160)) == pytest.approx((linear + attention + rest) / 1e9)


def test_peak_memory_of_a_call_is_that_of_its_tensors():
    case = benchmark.PATTERNS["routing"].cases(448)[0]  # output of 8 images: 49 MiB
    peak = benchmark.peak_memory("cpu", benchmark.kernel_call, "routing", case, "visionattn", "forward", 8, "cpu")
    output = 8 * case.side**2 * case.heads * case.dim * 4 / 2**20
    assert output * 0.95 < peak < output + 64


REFUSED = [
    ([*KERNELS[:3], "--sizes", "200"], "--sizes 200: routing needs a multiple of 112"),
    (["kernels", "--rounds", "1"], "--rounds 1: expected at least 2"),
    (["kernels", "--batch", "0"], "--batch 0: expected at least 1"),
    (["models"], "give names of models, or --pattern"),
    (["models", "--pattern", "no_*"], "--pattern no_.: none of our models"),
    (["models", "no_such_model"], "no model called no_such_model"),
    (["models", "test_vit", "halonet26t"], "halonet26t does not take images of 224 x 224 pixels"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_impossible_requests_are_refused_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        benchmark.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
