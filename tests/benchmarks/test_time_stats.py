"""Lines as SGLang 0.5.16 writes them."""

from __future__ import annotations

from benchmarks.time_stats import medians_ms, read

PREFILL = (
    "[2026-11-24 02:37:23] ReqTimeStats(rid=a1, bootstrap_room=7, input_len=64, cached_input_len=0, output_len=1, "
    "attempts=0, type=prefill): bootstrap_duration=1.50ms, queue_duration={queue}ms, forward_duration=30.00ms, "
    "entry_time=1795487843.123, transfer_speed=0.10 GB/s, transfer_total=8.00 MB"
)
DECODE = (
    "[2026-11-24 02:37:23] ReqTimeStats(rid=b2, bootstrap_room=7, input_len=64, cached_input_len={cached}, "
    "output_len=4, attempts=0, type=decode): bootstrap_duration=0.50ms, alloc_wait_duration=0.25ms, "
    "transfer_duration=33.00ms, queue_duration=0.10ms, forward_duration=20.00ms, entry_time=1795487843.120"
)


def test_spans_are_read_by_role_and_their_medians_taken_of_what_was_not_cached() -> None:
    lines = [PREFILL.format(queue=queue) for queue in ("0.10", "0.20", "9.00")]
    lines += [DECODE.format(cached=0), DECODE.format(cached=48), "[…] Prefill batch, #new-seq: 1"]
    stats = read(lines)
    assert [one.role for one in stats] == ["prefill"] * 3 + ["decode"] * 2
    assert medians_ms(stats, 64) == {
        "prefill": {"bootstrap": 1.5, "queue": 0.2, "forward": 30.0},
        "decode": {"bootstrap": 0.5, "alloc_wait": 0.25, "transfer": 33.0, "queue": 0.1, "forward": 20.0},
    }
    assert medians_ms(stats, 1024) == {}
