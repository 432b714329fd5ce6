"""When a request was where: what the probe writes in a worker, and what is read of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.ttft_probe import Asked, Probe, read, timeline


def stats(role: str, **times: float) -> Any:
    return SimpleNamespace(disagg_mode_str=lambda: role, decode_ct=3, **times)


def test_a_request_is_followed_through_the_workers_that_had_it(tmp_path: Path) -> None:
    """Of two requests one after the other each has its own times, and what never happened is missing."""
    prefill, decode = Probe(str(tmp_path / "prefill")), Probe(str(tmp_path / "decode"))
    for start_s, pass_s in ((10.0, 0.2), (20.0, 0.4)):
        prefill.answered(None, stats("prefill", created_time=start_s + 0.001, first_token_time=start_s + 0.7))
        times = {"forward_entry_time": start_s + 0.002, "prefill_finished_time": start_s + 0.002 + pass_s}
        prefill.over(SimpleNamespace(time_stats=stats("prefill", **times, completion_time=0.0)))
        decode.over(SimpleNamespace(time_stats=stats("decode", forward_entry_time=start_s + 0.5)))
        decode.answered(None, stats("decode", first_token_time=start_s + 0.6))
    records = read(tmp_path.iterdir())
    first, second = Asked(10.0, 10.61), Asked(20.0, 20.63)
    assert timeline(records, [first]) == {
        "HTTP has read it": 1.0,
        "pass begins": 2.0,
        "pass seen over": 202.0,
        "decode has the pages": 500.0,
        "HTTP has a token": 600.0,
        "client has a token": 610.0,
    }
    both = timeline(records, [first, second])
    assert (both["pass seen over"], both["client has a token"]) == (302.0, 620.0)
    assert timeline(records, [Asked(30.0, 31.0)]) == {"client has a token": 1000.0}


def test_a_pass_tells_how_long_its_launch_was_computed_and_how_long_it_waited(tmp_path: Path) -> None:
    probe = Probe(str(tmp_path / "unified"))
    request = SimpleNamespace(time_stats=stats("unified", created_time=1.0))
    scheduler = SimpleNamespace(device="cpu")

    def sleeping(*_arguments: Any) -> str:
        time.sleep(0.02)
        return "result"

    def launch(extends: bool) -> None:
        batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: extends), reqs=[request])
        assert probe.run_batch(sleeping, scheduler, batch) == "result"

    sent_s = time.perf_counter()
    launch(True)
    launch(False)
    launch(True)
    found = timeline([], [Asked(sent_s, time.perf_counter())])
    assert "pass launch_ms" not in found, "a pass is told of when its request is over"
    asked = Asked(sent_s, time.perf_counter())
    probe.over(request)
    found = timeline(read(tmp_path.iterdir()), [asked])
    assert found["pass launch_ms"] >= 40
    assert found["pass launch_cpu_ms"] < found["pass launch_ms"]
    assert found["pass waits"] >= 2
    assert "pass gpu_ms" not in found


def test_where_the_gpu_was_is_told_of_its_passes() -> None:
    """Of a request in two chunks: the launch of the first, and the end of the second."""
    chunks = [{"who": "pass", "role": "prefill", "began_time": at_s, "gpu_ms": 80.0} for at_s in (10.125, 10.25)]
    found = timeline(chunks, [Asked(10.0, 10.5)])
    assert (found["pass launched"], found["GPU is through"], found["pass gpu_ms"]) == (125.0, 330.0, 160.0)
    for one in chunks:
        one["gpu_ms"] = 150.0
    overlapping = timeline(chunks, [Asked(10.0, 10.5)])
    assert overlapping["GPU is through"] == pytest.approx(425.0), "the second waits for the first"
    del chunks[1]["gpu_ms"]
    assert "GPU is through" not in timeline(chunks, [Asked(10.0, 10.5)])


def test_of_requests_at_once_only_the_passes_are_told_apart() -> None:
    """Whose times are whose is not known; what the GPU did until a token came is."""
    passes = [{"who": "pass", "role": "prefill", "began_time": at_s, "gpu_ms": 80.0} for at_s in (10.125, 10.25)]
    first, second = Asked(10.0, 10.2), Asked(10.0, 10.5)
    other = {"who": "scheduler", "role": "prefill", "forward_entry_time": 10.125}
    assert "pass begins" not in timeline([*passes, other], [first, second], together=True)
    assert timeline(passes, [second], together=True)["of that, beside the pass"] == 340.0
    late = {"who": "pass", "role": "prefill", "began_time": 10.45, "gpu_ms": 80.0}
    found = timeline([*passes, late], [second], together=True)
    assert found["of that, beside the pass"] == 340.0, "one that is not over is none of its"
