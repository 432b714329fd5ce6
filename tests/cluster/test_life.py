"""A request's life on real SGLang: streams that go on elsewhere, restarts that nobody notices, faults of every kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_cluster import scheduler_of
from benchmarks.chaos.faults import Flood
from benchmarks.chaos.leaks import flushed
from benchmarks.chaos.traffic import Asked, Verdict
from benchmarks.client import get_json
from benchmarks.reference import OUTPUT_TOKENS, Reference
from benchmarks.rolling import roll
from benchmarks.undisturbed import undisturbed
from engine.launch.cluster import Cluster
from tests.cluster.conftest import local_cpu, started

LENGTHS = (12, 40, 90, 200, 333)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return undisturbed(tmp_path_factory.mktemp("alone"), None, LENGTHS)[0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two of each role: one may go."""
    config = local_cpu()
    groups = tuple(group.model_copy(update={"count": 2}) for group in config.workers)
    # Prompts are short here, and so are the steps of a scheduler.
    router = config.router.model_copy(update={"hung_s": 8.0})
    changed = config.model_copy(update={"workers": groups, "router": router})
    with started(changed, tmp_path_factory.mktemp("life")) as made:
        yield made


def wait_ready(cluster: Cluster) -> None:
    deadline_s = time.monotonic() + 120
    while {one["state"] for one in get_json(cluster.url, "/api/state")["workers"]} != {"ready"}:
        assert time.monotonic() < deadline_s, "not back in time"
        time.sleep(0.2)


def explained(cluster: Cluster, asked: Asked) -> dict[str, Any]:
    found: dict[str, Any] = get_json(cluster.url, f"/api/explain/{asked.rid}")
    return found


def ended(cluster: Cluster, asked: Asked) -> dict[str, Any]:
    """The same once it is over for the router too, which may be a moment later than for the client."""
    deadline_s = time.monotonic() + 5
    while (found := explained(cluster, asked))["outcome"] == "running":
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("reference", range(len(LENGTHS)))
def test_a_stream_whose_decode_worker_is_killed_says_what_it_would_have_said(
    cluster: Cluster, references: list[Reference], reference: int
) -> None:
    wait_ready(cluster)
    asked = Asked(cluster.url, cluster.plan.router.model, references[reference], stream=True, tokens=OUTPUT_TOKENS)
    asked.wait_for(8, 60)
    decode = explained(cluster, asked)["decode"]
    os.kill(scheduler_of(cluster, decode).pid, signal.SIGKILL)

    assert asked.verdict() is Verdict.OK, (asked.error, asked.text, references[reference].text)
    found = ended(cluster, asked)
    assert [one["then"] for one in found["tries"]] == ["resume", None], found
    assert (found["outcome"], found["generated_tokens"]) == ("ok", OUTPUT_TOKENS)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_prefill_worker_is_killed_is_answered_by_another(
    cluster: Cluster, references: list[Reference], stream: bool
) -> None:
    wait_ready(cluster)
    asked = Asked(cluster.url, cluster.plan.router.model, references[-1], stream, OUTPUT_TOKENS)
    time.sleep(0.1)
    newest = get_json(cluster.url, "/api/state")["requests"][0]
    os.kill(scheduler_of(cluster, newest["prefill"]).pid, signal.SIGKILL)

    assert asked.verdict() is Verdict.OK, (asked.error, asked.text)
    assert ended(cluster, asked)["outcome"] == "ok"


def test_a_hung_decode_scheduler_loses_its_stream_to_the_other_and_comes_back(
    cluster: Cluster, references: list[Reference]
) -> None:
    """Its HTTP server answers, its agent renews: only its own sign of life is missing."""
    wait_ready(cluster)
    asked = Asked(cluster.url, cluster.plan.router.model, references[1], stream=True, tokens=OUTPUT_TOKENS)
    asked.wait_for(4, 60)
    decode = explained(cluster, asked)["decode"]
    scheduler = scheduler_of(cluster, decode).pid
    os.kill(scheduler, signal.SIGSTOP)
    try:
        assert asked.verdict() is Verdict.OK, (asked.error, asked.text)
    finally:
        os.kill(scheduler, signal.SIGCONT)
    assert explained(cluster, asked)["tries"][0]["failed"].startswith(f"{decode}: ")
    wait_ready(cluster)


def test_clients_that_leave_while_their_prompts_wait_leave_nothing_behind(cluster: Cluster) -> None:
    """Decode has granted pages for them, and prefill has not begun with them."""
    wait_ready(cluster)
    before = flushed(cluster, cluster.url)
    flood = [Flood(cluster.url, cluster.plan.router.model, number) for number in range(8)]
    time.sleep(1.5)
    for client in flood:
        client.hang_up()

    assert flushed(cluster, cluster.url) == before


def test_a_rolling_restart_under_load_costs_no_client_anything(cluster: Cluster, references: list[Reference]) -> None:
    wait_ready(cluster)
    rolled = roll(cluster, references, print)

    assert rolled.restarted == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    assert set(rolled.verdicts) == {Verdict.OK}, rolled.problems
    assert sum(rolled.verdicts.values()) >= 10


def test_faults_of_every_kind_neither_hang_nor_lie_nor_leak(tmp_path: Path) -> None:
    """A tenth of the whole matrix: `python -m benchmarks.chaos` runs all of it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--quick", "--json"],
        stdout=subprocess.PIPE,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    result = json.loads(done.stdout.decode().splitlines()[-1])

    assert result["injections"] >= 10
    bad = ("hangs", "empty_200", "wrong_output", "leaked_pages", "leaked_requests")
    assert not any(result[name] for name in bad), json.dumps(result, indent=1)
    assert result["success_without_killed_routers"] >= 0.95, json.dumps(result, indent=1)
