"""The benchmark of lost workers loses real ones, in the middle of real hand-offs."""

from __future__ import annotations

import multiprocessing

import pytest

from benchmarks.handoff_loss import Case, lose

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("moment", ["idle", "writing"])
@pytest.mark.parametrize(("victim", "transport"), [("prefill", "shm"), ("decode", "tcp")])
def test_a_killed_worker_is_told_with_a_reason_and_no_process_stays(victim: str, transport: str, moment: str) -> None:
    found = lose(Case(transport, "SIGKILL", victim, moment))

    assert found["state"] in ("FENCING", "FAILED")
    assert f"lost {victim} worker {victim}-0" in found["reason"]
    assert found["s"] > 0
    assert multiprocessing.active_children() == []


def test_a_frozen_worker_is_told_by_its_silence() -> None:
    found = lose(Case("shm", "SIGSTOP", "prefill", "writing"))

    assert found["state"] in ("FENCING", "FAILED")
    assert "silent for 2.5 s" in found["reason"]
    assert multiprocessing.active_children() == []
