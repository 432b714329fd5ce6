"""What of a worker can be reached from outside: its own ports on its own address, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from engine.launch.cluster import Cluster
from engine.spec import WorkerSpec
from tests.cluster.conftest import local_cpu, started

HOST = "127.0.0.2"
"""Stands for an address that others reach: it is not the one that a program takes for local use."""
LOCAL = {"127.0.0.1", "::1"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = local_cpu()
    workers = tuple(group.model_copy(update={"host": HOST, "count": 1}) for group in config.workers)
    with started(config.model_copy(update={"workers": workers}), tmp_path_factory.mktemp("ports")) as cluster:
        yield cluster


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket and every UDP socket that the process and its children wait on."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(family) >= 3, "HTTP server, scheduler and detokenizer are processes of their own"
    found = set()
    for process in family:
        for connection in process.net_connections(kind="inet"):
            connected = bool(connection.raddr)
            if connection.status == psutil.CONN_LISTEN or (connection.status == psutil.CONN_NONE and not connected):
                found.add((connection.laddr.ip, connection.laddr.port))
    return found


def test_a_worker_listens_where_its_spec_says_and_else_on_loopback_only(elsewhere: Cluster) -> None:
    for worker in elsewhere.plan.workers:
        found = listening(elsewhere.workers[worker.name])
        reachable = {(host, port) for host, port in found if host not in LOCAL}
        assert reachable == ports_of(worker), f"{worker.name}: {sorted(found)}"


def test_a_decode_worker_has_no_hand_off_port(elsewhere: Cluster) -> None:
    decode = next(worker for worker in elsewhere.plan.workers if worker.role == "decode")
    assert decode.handoff_port == 0
    assert len(ports_of(decode)) == 3


def ports_of(worker: WorkerSpec) -> set[tuple[str, int]]:
    ports = (worker.port, worker.handoff_port, worker.events_port, worker.replay_port)
    return {(worker.host, port) for port in ports if port}
