"""The launcher with real processes that stand in for router and workers: ready, crashes, ends, leftovers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from engine.config import ClusterConfig, parse_cluster
from engine.launch.cluster import Cluster, Event, Phase, ProcessView
from engine.launch.errors import BadInput, LaunchFailed
from engine.launch.lifeline import Identity, group_members
from engine.launch.ports import PortPicker, is_free
from engine.launch.probe import look
from engine.launch.state import StateFolder

BOTH_WAYS = pytest.mark.parametrize("way", ["fork", "spawn"])
DEADLINE_S = 30.0
PAIR = "[{role: prefill, environment: {STAND_IN_CHILD: 1}}, {role: decode, environment: {ONLY_HERE: yes-it-is}}]"


@dataclass(frozen=True)
class Running:
    """A cluster that several tests share: each leaves it ready, as it found it."""

    cluster: Cluster
    state_dir: Path
    events: list[Event]

    def one(self, name: str) -> ProcessView:
        return next(one for one in self.cluster.view.processes if one.name == name)

    def until_ready_again(self, name: str, before: int) -> None:
        until(lambda: self.one(name).pid not in (None, before), f"another life of {name}")
        until(lambda: {one.state for one in self.cluster.view.processes} == {"ready"}, "everything ready again")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module", params=["fork", "spawn"])
def running(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state_dir = tmp_path_factory.mktemp("state") / "tiny"
    events: list[Event] = []
    with start(cluster_file(model, f"start: {request.param}, restarts: 50", PAIR), state_dir, events) as cluster:
        cluster.wait_ready()
        yield Running(cluster, state_dir, events)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state" / "tiny"


def cluster_file(model: Path, launch: str, workers: str = "[{role: both}]", routers: int = 1) -> ClusterConfig:
    text = f"name: tiny\nmodel: {{path: {model}}}\nengine: {{device: cpu}}\nworkers: {workers}\n"
    text += f"router: {{replicas: {routers}}}\n"
    return parse_cluster(f"{text}launch: {{{launch}}}", model).with_router_port(0)


def start(config: ClusterConfig, state_dir: Path, events: list[Event] | None = None) -> Cluster:
    return Cluster.start(config, state_dir, on_event=None if events is None else events.append, program="stand-in")


def until(fact: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < end_s, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)


def test_it_lists_the_router_and_the_workers_as_ready(running: Running) -> None:
    shown = [(one.name, one.role, one.state) for one in running.cluster.view.processes]
    assert shown == [
        ("router", "router", "ready"),
        ("prefill-0", "prefill", "ready"),
        ("decode-0", "decode", "ready"),
    ]
    record = StateFolder(running.state_dir).read()
    assert record is not None
    assert (record.phase, record.url, record.launcher_pid) == ("ready", running.cluster.url, os.getpid())
    assert [(one.name, one.state) for one in record.processes] == [(name, state) for name, _, state in shown]


def test_each_worker_leads_a_session_and_is_told_its_environment(running: Running) -> None:
    for name, pid in running.cluster.workers.items():
        assert os.getsid(pid) == pid
        assert (running.state_dir / "logs" / f"{name}.log").exists()
    told = msgspec.json.decode((running.state_dir / "specs" / "decode-0.json").read_bytes())["environment"]
    assert told["ONLY_HERE"] == "yes-it-is"


def test_secrets_are_for_their_owner_only(running: Running) -> None:
    assert (running.state_dir / "key").stat().st_mode & 0o777 == 0o600
    assert running.state_dir.stat().st_mode & 0o777 == 0o700
    assert running.cluster.plan.folders.run.stat().st_mode & 0o777 == 0o700


def test_the_same_cluster_is_not_started_twice(running: Running, model: Path) -> None:
    with pytest.raises(LaunchFailed) as caught:
        start(cluster_file(model, "start: spawn"), running.state_dir)
    assert str(caught.value) == (
        f"cluster tiny is running already (pid {os.getpid()}, {running.cluster.url}): `mainstem down tiny` stops it"
    )
    assert {one.state for one in running.cluster.view.processes} == {"ready"}


def test_a_port_in_use_is_refused_and_names_who_has_it(running: Running, model: Path, state_dir: Path) -> None:
    port = running.one("router").port
    with pytest.raises(BadInput) as caught:
        start(cluster_file(model, "start: spawn").with_router_port(port), state_dir)
    said = str(caught.value)
    assert said.startswith(f"router.port: wanted a free port, {port} on 127.0.0.1 is in use by ")
    assert said.endswith(f"(pid {running.one('router').pid})")


def test_a_port_that_the_user_may_not_have_is_not_called_in_use() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("this machine lets everybody have every port")
    as_nobody = (  # The codec is loaded while its file may still be read.
        "import os, encodings.idna; from engine.launch.ports import is_free, why_not_free; "
        "os.geteuid() or os.setuid(65534); "
        f"print(is_free('127.0.0.1', {lowest - 1}), why_not_free('127.0.0.1', {lowest - 1}))"
    )
    said = subprocess.run([sys.executable, "-c", as_nobody], capture_output=True, text=True, timeout=DEADLINE_S)
    assert said.stdout == "False not allowed for this user\n", said.stderr


def test_a_reserved_port_is_never_handed_out() -> None:
    first_choices = PortPicker(seed=1, reserved=())
    reserved = {first_choices.pick("127.0.0.1") for _ in range(5)}
    picker = PortPicker(seed=1, reserved=reserved)
    assert not reserved & {picker.pick("127.0.0.1") for _ in range(50)}


def test_a_killed_worker_is_named_and_started_again(running: Running) -> None:
    killed, untouched = running.cluster.workers["decode-0"], running.cluster.workers["prefill-0"]
    seen = len(running.events)
    os.kill(killed, signal.SIGKILL)
    running.until_ready_again("decode-0", killed)

    assert running.cluster.workers["prefill-0"] == untouched
    (said,) = [event for event in running.events[seen:] if event.kind == "problem"]
    assert said.name == "decode-0"
    assert said.text.startswith("was killed by SIGKILL after ")
    assert "starting it again in" in said.text


def test_what_a_dead_worker_had_started_dies_with_it_and_a_stolen_port_is_replaced(running: Running) -> None:
    before = running.one("prefill-0")
    assert before.pid is not None
    (child,) = [pid for pid in group_members(before.pid) if pid != before.pid]
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(before.pid, signal.SIGKILL)
        until(lambda: is_free("127.0.0.1", before.port), "the port")
        thief.bind(("127.0.0.1", before.port))
        thief.listen()
        running.until_ready_again("prefill-0", before.pid)

    assert Identity.of(child) is None
    assert running.one("prefill-0").port != before.port


@pytest.mark.parametrize("running", ["fork"], indirect=True)
def test_a_killed_router_is_started_again_at_the_same_address(running: Running) -> None:
    killed, port, workers = running.cluster.router_pid, running.one("router").port, running.cluster.workers
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    running.until_ready_again("router", killed)
    assert running.one("router").port == port
    assert running.cluster.workers == workers


@pytest.mark.parametrize("running", ["fork"], indirect=True)
@pytest.mark.thorough
def test_when_the_zygote_dies_its_workers_are_started_again_from_another(running: Running) -> None:
    before = running.cluster.workers
    zygote = parent_of(before["prefill-0"])
    os.kill(zygote, signal.SIGKILL)
    for name, pid in before.items():
        running.until_ready_again(name, pid)
        assert Identity.of(pid) is None
        assert parent_of(running.cluster.workers[name]) != zygote


@pytest.mark.thorough
def test_several_routers_are_ready_together_and_each_is_started_again_by_itself(model: Path, state_dir: Path) -> None:
    with start(cluster_file(model, "start: fork", PAIR, routers=2), state_dir) as cluster:
        cluster.wait_ready()
        one = {view.name: view for view in cluster.view.processes}
        assert {name: (view.role, view.state) for name, view in one.items()} == {
            "router": ("router", "ready"),
            "router-1": ("router", "ready"),
            "prefill-0": ("prefill", "ready"),
            "decode-0": ("decode", "ready"),
        }
        for url in cluster.plan.urls:
            assert set(look(url).workers) == {"prefill-0", "decode-0"}
        assert set(cluster.workers) == {"prefill-0", "decode-0"}
        record = StateFolder(state_dir).read()
        assert record is not None
        assert record.urls == dict(zip(("router", "router-1"), cluster.plan.urls, strict=True))

        killed = one["router-1"].pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        until(
            lambda: (
                {view.state for view in cluster.view.processes} == {"ready"}
                and all(view.pid not in (None, killed) for view in cluster.view.processes)
            ),
            "another life of router-1",
        )
        assert cluster.router_pid == one["router"].pid
        assert look(cluster.plan.urls[1]).healthy


@BOTH_WAYS
def test_after_a_stop_no_process_is_left_and_its_ports_are_free(way: str, model: Path, state_dir: Path) -> None:
    with start(cluster_file(model, f"start: {way}", PAIR), state_dir) as cluster:
        cluster.wait_ready()
        leaders = [*cluster.workers.values(), cluster.router_pid or 0]
        ports = [one.port for one in cluster.view.processes]
        assert all(Identity.of(pid) for pid in leaders)
        assert not any(is_free("127.0.0.1", port) for port in ports)

    assert cluster.view.phase is Phase.STOPPED
    assert not any(group_members(pid) for pid in leaders)
    assert all(is_free("127.0.0.1", port) for port in ports)
    assert StateFolder(state_dir).read() is None
    assert not cluster.plan.folders.run.exists()


@BOTH_WAYS
def test_one_that_ends_by_itself_waits_for_nothing_that_it_has_started(model: Path, state_dir: Path, way: str) -> None:
    workers = "[{role: both, environment: {STAND_IN_CHILD: 1}}]"
    with start(cluster_file(model, f"start: {way}, stop_timeout_s: 600", workers), state_dir) as cluster:
        cluster.wait_ready()
        members = group_members(cluster.workers["both-0"])
        cluster.ask_stop()
        assert cluster.wait_over(DEADLINE_S)
    assert not any(Identity.of(pid) for pid in members)


def test_one_that_ignores_the_wish_to_end_is_killed_with_all_it_started(model: Path, state_dir: Path) -> None:
    workers = "[{role: both, environment: {STAND_IN_DEAF: 1, STAND_IN_CHILD: 1}}]"
    with start(cluster_file(model, "start: fork, stop_timeout_s: 0.3", workers), state_dir) as cluster:
        cluster.wait_ready()
        members = group_members(cluster.workers["both-0"])
        assert len(members) == 2
    assert cluster.view.phase is Phase.STOPPED
    assert not any(Identity.of(pid) for pid in members)


def test_a_second_wish_to_stop_waits_for_nobody(model: Path, state_dir: Path) -> None:
    workers = "[{role: both, environment: {STAND_IN_DEAF: 1}}]"
    with start(cluster_file(model, "start: fork, stop_timeout_s: 600", workers), state_dir) as cluster:
        cluster.wait_ready()
        (pid,) = cluster.workers.values()
        cluster.ask_stop()
        until(lambda: cluster.view.phase is Phase.STOPPING, "stopping")
        assert Identity.of(pid)
        cluster.kill()
        assert cluster.wait_over(DEADLINE_S)
    assert not group_members(pid)


@pytest.mark.thorough
def test_one_that_cannot_be_recovered_stops_everything_and_its_last_words_are_the_reason(
    model: Path, state_dir: Path
) -> None:
    workers = "[{role: prefill}, {role: decode, environment: {STAND_IN_EXIT: 3}}]"
    with start(cluster_file(model, "start: fork", workers), state_dir) as cluster:
        with pytest.raises(LaunchFailed) as caught:
            cluster.wait_ready()
        assert cluster.wait_over(DEADLINE_S)
    first = str(caught.value).splitlines()[0]
    assert first.startswith("decode-0 2 times exited with code 3: RuntimeError: told to end with code 3; log: ")
    assert str(state_dir / "logs" / "decode-0.log") in first
    assert cluster.view.phase is Phase.FAILED
    assert cluster.workers == {}


def test_a_worker_that_says_its_input_is_wrong_is_not_started_twice(model: Path, state_dir: Path) -> None:
    workers = "[{role: both, environment: {STAND_IN_EXIT: 2}}]"
    with (
        start(cluster_file(model, "start: fork", workers), state_dir) as cluster,
        pytest.raises(LaunchFailed, match="both-0 exited with code 2: RuntimeError: told to end with code 2"),
    ):
        cluster.wait_ready()


@pytest.mark.thorough
def test_a_worker_that_is_not_ready_in_time_ends_the_start(model: Path, state_dir: Path) -> None:
    workers = "[{role: both, environment: {STAND_IN_MUTE: 1}}]"
    with (
        start(cluster_file(model, "start: fork, ready_timeout_s: 3", workers), state_dir) as cluster,
        pytest.raises(LaunchFailed, match=r"(both-0|router) was not ready after 3 s"),
    ):
        cluster.wait_ready()


def test_a_stop_during_the_start_ends_it_cleanly(model: Path, state_dir: Path) -> None:
    with start(cluster_file(model, "start: fork"), state_dir) as cluster:
        cluster.ask_stop()
        with pytest.raises(LaunchFailed, match="it was stopped before it was ready"):
            cluster.wait_ready()
    assert cluster.view.phase is Phase.STOPPED
    assert cluster.workers == {}


def parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])
