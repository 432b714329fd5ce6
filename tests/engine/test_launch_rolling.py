"""Draining and restarting from another terminal, with real processes that stand in for workers and router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import parse_cluster
from engine.launch.cli import main
from engine.launch.cluster import Cluster, Event
from engine.launch.control import Control, ask_restart
from engine.launch.errors import BadInput, LaunchFailed

FILE = """
name: rolling
model: {path: %s, served_name: tiny}
engine: {device: cpu}
workers: [{role: prefill, count: 2}, {role: decode}]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def cluster(tmp_path: Path, model: Path, told: list[Event]) -> Iterator[Cluster]:
    config = parse_cluster(FILE % model, tmp_path).with_router_port(0)
    with Cluster.start(config, tmp_path / "state" / "rolling", on_event=told.append, program="stand-in") as made:
        made.wait_ready()
        yield made


def state_dir(cluster: Cluster) -> str:
    return str(cluster.plan.folders.state.parent)


def test_a_rolling_restart_starts_every_worker_anew_one_after_the_other(
    cluster: Cluster, told: list[Event], capsys: pytest.CaptureFixture[str]
) -> None:
    before = cluster.workers

    assert main(["restart", "--rolling", "--state-dir", state_dir(cluster)]) == 0

    after = cluster.workers
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    printed = capsys.readouterr().out.splitlines()
    backs = [line.partition(":")[0] for line in printed if ": back after" in line]
    assert backs == ["decode-0", "prefill-0", "prefill-1"]
    assert not [event for event in told if event.kind == "problem"]
    assert [event.text for event in told if event.name == "decode-0"].count("stopped, to begin anew") == 1


def test_one_worker_is_drained_and_taken_back(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    before = cluster.workers
    assert main(["drain", "prefill-1", "--state-dir", state_dir(cluster)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "prefill-1: idle"
    assert main(["drain", "prefill-1", "--undo", "--state-dir", state_dir(cluster)]) == 0
    assert cluster.workers == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["drain", "nobody"], 2, "worker: wanted one of this cluster's"),
        (["restart"], 2, "wanted a worker's name or --rolling, found neither"),
        (["restart", "decode-0", "--rolling"], 2, "wanted a worker's name or --rolling, found both"),
        (["restart", "nobody"], 2, "worker: wanted one of this cluster's"),
    ],
)
def test_a_mistake_is_one_line(
    cluster: Cluster, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--state-dir", state_dir(cluster)]) == code
    assert said in capsys.readouterr().err


def test_without_a_cluster_nothing_is_restarted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restart", "--rolling", "--state-dir", str(tmp_path)]) == 1
    assert "nothing is running" in capsys.readouterr().err


def test_a_launcher_answers_what_it_is_asked_and_names_what_it_does_not_know(tmp_path: Path) -> None:
    asked: list[str] = []

    def restart(name: str) -> None:
        if name != "decode-0":
            raise BadInput(f"process: wanted one of decode-0, found {name!r}")
        asked.append(name)

    folder = tmp_path / ("a" * 90)  # A longer path than a socket's address may be.
    folder.mkdir()
    control = Control(folder, restart)
    try:
        ask_restart(folder, "decode-0")
        with pytest.raises(BadInput, match="wanted one of decode-0, found 'x'"):
            ask_restart(folder, "x")
    finally:
        control.close()

    assert asked == ["decode-0"]
    with pytest.raises(LaunchFailed, match="its launcher does not answer"):
        ask_restart(folder, "decode-0")
