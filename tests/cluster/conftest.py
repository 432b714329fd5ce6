"""Real SGLang on a CPU: one cluster for all tests that leave it as it was, and what a test needs to start its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import ClusterConfig, parse_cluster, read_cluster
from engine.launch.cluster import Cluster, Event

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is slow and real; nobody has to remember the mark."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


def free_port() -> int:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        port: int = placeholder.getsockname()[1]
        return port


def local_cpu(**changes: Any) -> ClusterConfig:
    """configs/local-cpu.yaml, on a free port, with some of its sections replaced."""
    config = read_cluster(ROOT / "configs" / "local-cpu.yaml").with_router_port(free_port())
    return config.model_copy(update=changes)


def monolithic() -> ClusterConfig:
    """The same model and flags, prefill and decode in one worker: what SGLang does by itself."""
    text = (ROOT / "configs" / "local-cpu.yaml").read_text()
    config = parse_cluster(text.partition("workers:")[0] + "workers: [{role: both}]\n", ROOT / "configs")
    return config.with_router_port(free_port())


def started(config: ClusterConfig, folder: Path, events: list[Event] | None = None) -> Cluster:
    """A ready cluster; whoever asks for it stops it."""
    cluster = Cluster.start(config, folder, on_event=None if events is None else events.append)
    try:
        cluster.wait_ready()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two prefill workers, one decode worker, a router: shared, so its caches are not empty."""
    with started(local_cpu(), tmp_path_factory.mktemp("live")) as cluster:
        yield cluster
