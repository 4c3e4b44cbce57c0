"""Tiles of Triton kernels are chosen by time; a stand-in for the clock of a GPU says which is fast."""

import pytest
import torch

from visionattn.errors import UserError
from visionattn.kernels import _blocks, _proof
from visionattn.kernels._blocks import Blocks, Entry
from visionattn.tools import _tune, benchmark

FASTEST = Blocks(64, 64, 4, 3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def forget() -> None:
        for known in (_blocks._look_up, _blocks._users, _proof._machine):
            known.cache_clear()

    forget()
    yield tmp_path / "visionattn" / "blocks.csv"
    forget()


def entry(kernel: str, capability: int = 90, pattern: str = "window") -> Entry:
    return Entry(capability, pattern, kernel, 16, 32)


def by_tiles(call) -> float:
    """1 ms, half of it for the fastest tiles of the forward kernel; one choice does not compile."""
    blocks = _blocks.blocks(entry("forward"))
    if blocks == Blocks(128, 64, 8, 2):
        raise RuntimeError("out of resources")
    return 0.5 if blocks == FASTEST else 1.0


def tune(*patterns: str, capability: int = 90) -> None:
    _tune.tune(patterns, device="cpu", time=by_tiles, capability=capability)


def test_what_is_faster_is_kept_for_the_user(own_cache, capsys):
    machine = _proof._machine(torch.device("cpu"))
    tune("window", "channel")
    assert _blocks.read(own_cache) == {entry("forward"): FASTEST}
    told = capsys.readouterr().out
    assert str(own_cache) in told
    assert "passed over: RuntimeError: out of resources" in told
    for known in (_blocks._look_up, _blocks._users, _proof._machine):
        known.cache_clear()
    assert _blocks.blocks(entry("forward")) == _blocks.blocks(entry("forward", capability=100)) == FASTEST
    assert _blocks.blocks(entry("forward", capability=89)) != FASTEST
    assert _blocks.blocks(entry("forward", pattern="routing")) != FASTEST
    assert _proof._machine(torch.device("cpu")) != machine  # so that kernels are proved anew


def test_rows_of_other_devices_stay_in_the_table(own_cache):
    own_cache.parent.mkdir()
    header, *_ = _blocks.OURS.read_text().splitlines()
    own_cache.write_text(f"{header}\n80,window,forward,16,32,32,32,4,1\n90,window,forward,16,32,32,32,4,1\n")
    tune("window")
    assert _blocks.read(own_cache) == {entry("forward", 80): Blocks(32, 32, 4, 1), entry("forward"): FASTEST}


def test_nothing_faster_writes_nothing(own_cache, capsys):
    _tune.tune(["routing"], device="cpu", time=lambda call: 1.0, capability=90)
    assert "nothing is written" in capsys.readouterr().out
    assert not own_cache.exists()


def test_a_file_that_is_no_table_is_told_and_not_used(own_cache):
    own_cache.parent.mkdir()
    own_cache.write_text("capability,pattern\n80,window\n")
    with pytest.warns(UserWarning, match="it is not used"):
        assert _blocks.blocks(entry("forward")) == _blocks.read(_blocks.OURS)[entry("forward", 80, "any")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_or_a_pattern_it_refuses():
    with pytest.raises(UserError, match="--tune times kernels on a GPU, and PyTorch finds no CUDA device here"):
        benchmark.main(["kernels", "--tune"])
    with pytest.raises(UserError, match="give a --pattern of window"):
        tune("channel")
