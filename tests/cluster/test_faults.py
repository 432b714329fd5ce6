"""Kill -9 during traffic: the client gets an error or the answer, soon; afterwards everything works again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.bench_cluster import scheduler_of
from benchmarks.client import Answer, complete, get_json
from benchmarks.words import sentence
from engine.launch.cluster import Cluster, Event
from tests.cluster.conftest import local_cpu, started

HANG_S = 15.0
BACK_S = 120.0


class Traffic:
    """Clients that ask one question after the other."""

    def __init__(self, cluster: Cluster, clients: int) -> None:
        self.answers: list[tuple[float, Answer]] = []
        self._cluster = cluster
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _talk(self, number: int) -> None:
        asked = 0
        while not self._over.is_set():
            began_s = time.monotonic()
            prompt = sentence(number * 1000 + asked, 60)
            answer = complete(self._cluster.url, self._cluster.plan.router.model, prompt, 24, ignore_eos=True)
            self.answers.append((began_s, answer))
            asked += 1
            time.sleep(0.05 if not answer.error else 0.5)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=300)
            assert not thread.is_alive(), "a client hangs"


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> Iterator[Cluster]:
    """One of its own: these tests leave it restarted."""
    with started(local_cpu(), tmp_path_factory.mktemp("faults"), events) as made:
        yield made


def ready(cluster: Cluster) -> bool:
    try:
        workers = get_json(cluster.url, "/api/state")["workers"]
    except (OSError, ValueError):
        return False
    return sorted(one["name"] for one in workers if one["state"] == "ready") == ["decode-0", "prefill-0", "prefill-1"]


def wait_ready(cluster: Cluster) -> None:
    deadline_s = time.monotonic() + BACK_S
    while not ready(cluster):
        assert time.monotonic() < deadline_s, "not back in time"
        time.sleep(0.3)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "prefill-1 scheduler", "router"])
def test_a_killed_process_costs_its_requests_and_comes_back(cluster: Cluster, events: list[Event], victim: str) -> None:
    wait_ready(cluster)
    name, _, part = victim.partition(" ")
    pid = cluster.router_pid if name == "router" else cluster.workers[name]
    assert pid is not None
    traffic = Traffic(cluster, clients=3)
    try:
        time.sleep(4)
        told = len(events)
        killed_s = time.monotonic()
        os.kill(scheduler_of(cluster, name).pid if part else pid, signal.SIGKILL)
        time.sleep(HANG_S + 2)
    finally:
        traffic.stop()

    at_the_kill = [answer for began_s, answer in traffic.answers if began_s < killed_s < began_s + answer.total_s]
    for answer in at_the_kill:
        assert answer.total_s < HANG_S + 5, f"hung: {answer}"
        assert answer.error or answer.usage["completion_tokens"] == 24, f"neither answer nor error: {answer}"
    for began_s, answer in traffic.answers:
        if began_s > killed_s:
            assert answer.total_s < HANG_S, f"hung: {answer}"
    assert any(event.name == name and event.kind == "problem" for event in events[told:]), events[told:]
    wait_ready(cluster)
    after = complete(cluster.url, cluster.plan.router.model, sentence(9, 40), 4)
    assert after.error == ""


def test_a_frozen_prefill_worker_does_not_hang_its_clients(cluster: Cluster) -> None:
    """SIGSTOP is what a machine that swaps or a stuck kernel looks like: nothing is closed, nothing answers."""
    wait_ready(cluster)
    victims = [cluster.workers["prefill-0"], scheduler_of(cluster, "prefill-0").pid]
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    try:
        answers = [complete(cluster.url, cluster.plan.router.model, sentence(500 + n, 30), 4) for n in range(4)]
    finally:
        for pid in victims:
            os.kill(pid, signal.SIGCONT)

    assert all(answer.total_s < HANG_S for answer in answers), [answer.total_s for answer in answers]
    wait_ready(cluster)


def test_afterwards_no_process_is_left_and_the_ports_are_free(tmp_path: Path) -> None:
    """Of a cluster with traffic, stopped: whatever a client was told, nothing stays behind."""
    with started(local_cpu(), tmp_path) as made:
        traffic = Traffic(made, clients=2)
        time.sleep(3)
        processes = [psutil.Process(pid) for pid in (*made.workers.values(), made.router_pid or 0)]
        processes += [child for process in processes for child in process.children(recursive=True)]
        ports = {port for process in processes for port in _listening(process.net_connections(kind="tcp"))}
    traffic.stop()

    assert len(processes) >= 10
    assert [process for process in processes if _runs(process)] == []
    assert ports & _listening(psutil.net_connections(kind="tcp")) == set()


def _runs(process: psutil.Process) -> bool:
    """False also for what has ended and waits for init to take note of it: its parent is gone."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _listening(connections: list[Any]) -> set[int]:
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
