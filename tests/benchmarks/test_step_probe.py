"""The probe's records of a scheduler's steps, and what is read of them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.decode_itl import longest
from benchmarks.probes import probed, told_by
from benchmarks.step_probe import FILE_VARIABLE, FLUSH_S, Probe, steps

SLEPT_S = 0.02


def loop(probe: Probe, scheduler: Any, requests: int) -> None:
    """One turn of a scheduler that works for SLEPT_S in `launch`, and not at all elsewhere."""
    batch = SimpleNamespace(reqs=[None] * requests)
    probe.clock("launch")(lambda scheduler, batch: time.sleep(SLEPT_S), scheduler, batch)
    probe.clock("result")(lambda scheduler, batch, result: None, scheduler, batch, None)


def test_a_step_is_told_with_its_parts_and_only_those_of_the_span_that_ran_enough(tmp_path: Path) -> None:
    probe, decode = Probe(str(tmp_path / "steps")), SimpleNamespace(disagg_decode_prealloc_queue=object())
    loop(probe, decode, 4)
    began_s = time.perf_counter()
    for requests in (4, 4, 3, 4):
        loop(probe, decode, requests)
    ended_s = time.perf_counter()
    time.sleep(FLUSH_S)
    loop(probe, decode, 4)
    found = steps(list(tmp_path.glob("steps.*")), began_s - SLEPT_S / 2, ended_s, least_requests=4)
    assert [step["requests"] for step in found] == [4, 4, 4]
    for step in found:
        assert 1e3 * SLEPT_S <= step["launch"] <= step["gap_ms"]
        assert step["result"] < 1e3 * SLEPT_S
    assert longest(found)["launch"] == pytest.approx(max(step["launch"] for step in found), abs=2)


def test_a_worker_that_does_not_decode_tells_nothing(tmp_path: Path) -> None:
    loop(Probe(str(tmp_path / "steps")), SimpleNamespace(disagg_decode_prealloc_queue=None), 4)
    assert list(tmp_path.iterdir()) == []
    assert longest([]) == {}


def test_a_probe_is_found_beside_what_was_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = probed(tmp_path / "made", "steps", "benchmarks.step_probe:register", FILE_VARIABLE)
    path = environment["PYTHONPATH"].split(":")
    assert path[0] == str(tmp_path / "made")
    assert path[-1] == "/elsewhere"
    assert "SGLANG_PLUGINS" not in environment
    loop(Probe(environment[FILE_VARIABLE]), SimpleNamespace(disagg_decode_prealloc_queue=object()), 4)
    assert len(told_by(tmp_path / "made", "steps")) == 1


def test_a_probe_alone_keeps_other_plugins_out(tmp_path: Path) -> None:
    environment = probed(tmp_path, "steps", "benchmarks.step_probe:register", FILE_VARIABLE, alone=True)
    assert environment["SGLANG_PLUGINS"] == "steps"
