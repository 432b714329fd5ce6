"""The command as people meet it: one line for a mistake, Ctrl-C, SIGTERM, kill -9, and what another terminal sees."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.launch.cli import main
from engine.launch.lifeline import Identity, group_members
from engine.launch.state import ClusterRecord, StateFolder

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A cluster file for stand-in processes, whose state is kept in tmp_path/state/tiny."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"name: tiny\nmodel: {{path: {tmp_path / 'model'}}}\nengine: {{device: cpu}}\n"
        "workers: [{role: prefill, environment: {STAND_IN_CHILD: 1}}, {role: decode}]\n"
    )
    return path


class Up:
    """`mainstem up` in a process of its own, with stand-in processes."""

    def __init__(self, file: Path, terminal: bool = False) -> None:
        self.folder = StateFolder(file.parent / "state" / "tiny")
        words = ["up", str(file), "--port", "0", "--state-dir", str(file.parent / "state"), "--program", "stand-in"]
        self._screen, inner = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL if terminal else PLAIN, *words],
            cwd=ROOT,
            stdin=inner if terminal else subprocess.DEVNULL,
            stdout=inner,
            stderr=inner,
        )
        os.close(inner)
        self._shown = b""

    def record_when(self, phase: str) -> ClusterRecord:
        end_s = time.monotonic() + DEADLINE_S
        while True:
            record = self.folder.read()
            if record is not None and record.phase == phase:
                return record
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end_s, f"not {phase}: {record}"
            time.sleep(0.05)

    def type(self, text: bytes) -> None:
        os.write(self._screen, text)

    def output(self) -> str:
        """All that it wrote; once it has ended."""
        self.process.wait(DEADLINE_S)
        while self._read():
            pass
        return self._shown.decode()

    def wait_shown(self, text: str) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while text not in self._shown.decode(errors="replace"):
            assert time.monotonic() < end_s, f"{text!r} was not shown"
            if select.select([self._screen], [], [], 1)[0]:
                assert self._read(), "it ended"

    def _read(self) -> bool:
        try:
            part = os.read(self._screen, 65_536)
        except OSError:
            return False  # How a terminal says that nobody has its other end any more.
        self._shown += part
        return bool(part)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        os.close(self._screen)


PLAIN = "import sys; from engine.launch.cli import main; sys.exit(main())"
IN_A_TERMINAL = f"import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); {PLAIN}"


@pytest.fixture
def up(file: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(terminal: bool = False) -> Up:
        started.append(Up(file, terminal))
        return started[-1]

    yield start
    for one in started:
        one.close()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def nothing_left(record: ClusterRecord) -> bool:
    return not any(group_members(one.pid) for one in record.processes if one.pid)


def until(fact: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


@pytest.mark.thorough
def test_ctrl_c_in_a_terminal_stops_everything_and_the_table_was_there(up: Callable[..., Up]) -> None:
    one = up(terminal=True)
    record = one.record_when("ready")
    one.wait_shown("tiny runs, ")
    one.type(b"\x03")
    shown = one.output()

    assert one.process.returncode == 0
    assert nothing_left(record)
    assert one.folder.read() is None
    for text in ("router", "prefill-0", "decode-0", "restarts", "ready", f"{record.url}/v1", "dashboard", "stopped"):
        assert text in shown


@pytest.mark.thorough
def test_sigterm_stops_everything_and_each_change_was_one_plain_line(up: Callable[..., Up]) -> None:
    one = up()
    record = one.record_when("ready")
    one.process.send_signal(signal.SIGTERM)
    lines = one.output().splitlines()

    assert one.process.returncode == 0
    assert nothing_left(record)
    told = [line.partition(" s  ")[2] for line in lines]
    assert "prefill-0: starting" in told
    assert any(line.startswith("tiny: ready after ") for line in told)
    assert f"API        {record.url}/v1      model model" in lines
    assert {"router: stopped", "prefill-0: stopped", "decode-0: stopped"} <= set(told)
    assert "\x1b" not in "".join(lines)


@pytest.mark.thorough
def test_when_the_launcher_is_killed_its_processes_die_with_it_and_the_next_start_or_down_clears_up(
    up: Callable[..., Up], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ("--state-dir", str(file.parent / "state"))

    def killed() -> ClusterRecord:
        one = up()
        until(lambda: (found := one.folder.read()) is not None and found.launcher_pid == one.process.pid, "taken over")
        record = one.record_when("ready")
        one.process.kill()
        one.process.wait(DEADLINE_S)
        until(lambda: not any(Identity.of(process.pid) for process in record.processes), "they outlive the launcher")
        return record

    first = killed()
    died = "mainstem: tiny: its launcher died; `mainstem down tiny` clears up what it left\n"
    assert run(capsys, "status", *state) == (1, "", died)
    # What a worker started without binding it to itself, as prefill-0 does here, is there until somebody clears up.
    assert not nothing_left(first)

    second = killed()
    assert nothing_left(first)
    assert not Path(first.run_dir).exists()

    assert run(capsys, "down", *state) == (0, "tiny: stopped, had to kill prefill-0\n", "")
    assert nothing_left(second)
    assert not Path(second.run_dir).exists()


@pytest.mark.thorough
def test_status_and_down_from_another_terminal(
    up: Callable[..., Up], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ("--state-dir", str(file.parent / "state"))
    assert run(capsys, "down", *state) == (0, "nothing is running\n", "")

    one = up()
    record = one.record_when("ready")
    code, out, _ = run(capsys, "status", str(file), *state, "--json")
    told = json.loads(out)
    assert (code, told["ready"], told["url"]) == (0, True, record.url)
    assert {worker["name"] for worker in told["router"]["workers"]} == {"prefill-0", "decode-0"}
    code, out, _ = run(capsys, "status", "tiny", *state)
    assert (code, out.splitlines()[-1]) == (0, f"tiny is ready: {record.url}")

    assert run(capsys, "down", *state) == (0, "tiny: stopped\n", "")
    assert nothing_left(record)
    one.output()
    assert one.process.returncode == 0
    assert run(capsys, "down", "tiny", *state) == (0, "tiny: nothing is running\n", "")


def test_plan_shows_every_process_and_starts_none(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = file.parent / "state"
    code, out, _ = run(capsys, "plan", str(file), "--state-dir", str(state))
    assert code == 0
    for text in ("router", "prefill-0", "decode-0", "--page-size 16 --device cpu", "STAND_IN_CHILD=1"):
        assert text in out
    code, out, _ = run(capsys, "plan", str(file), "--state-dir", str(state), "--json")
    told = json.loads(out)
    assert [worker["name"] for worker in told["workers"]] == ["prefill-0", "decode-0"]
    assert told["workers"][0]["routers"] == ["http://127.0.0.1:8000"]
    assert told["fork"] is True
    assert not state.exists()


def test_plan_tells_several_routers_of_each_other_and_workers_of_all(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(file.read_text() + "router: {replicas: 2}\ntransfer: {audit_s: 7}\n")
    state = ("--state-dir", str(file.parent / "state"))
    code, out, _ = run(capsys, "plan", str(file), *state)
    assert code == 0
    assert "router-1" in out
    assert "gossip   between routers: router on " in out

    told = json.loads(run(capsys, "plan", str(file), *state, "--json")[1])
    first, second = told["routers"]
    assert (first["name"], first["section"]["port"]) == ("router", 8000)
    assert (second["name"], second["section"]["port"]) == ("router-1", 8001)
    assert first["peers"] == [f"tcp://127.0.0.1:{second['gossip_port']}"]
    assert second["peers"] == [f"tcp://127.0.0.1:{first['gossip_port']}"]
    assert len({first["gossip_port"], second["gossip_port"], 0}) == 3
    assert [worker["routers"] for worker in told["workers"]] == 2 * [["http://127.0.0.1:8000", "http://127.0.0.1:8001"]]
    assert {worker["audit_s"] for worker in told["workers"]} == {7}


def with_nixl(file: Path, **transfer: list[str]) -> Path:
    """The same cluster over nixl, its workers on this machine's loopback."""
    changed = file.with_name("nixl.yaml")
    changed.write_text(file.read_text() + f"transfer: {json.dumps({'transports': ['nixl'], **transfer})}\n")
    return changed


def test_plan_says_that_nixl_is_not_installed_before_anything_is_started(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python itself takes for: there is no such module.
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run(capsys, "plan", str(with_nixl(file)))
    wanted = "mainstem: transfer.transports: nixl wants one of the packages nixl_cu13, nixl_cu12, found none"
    assert (code, err) == (2, f"{wanted}: install mainstem[nixl]\n")


def test_plan_says_what_a_reachable_nixl_port_means(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nixl_cu13.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = run(capsys, "plan", str(with_nixl(file, nixl_devices=["eth0"])))
    assert (code, err.count("\n")) == (2, 1)
    assert "whoever reaches it can write any memory of the worker" in err

    code, out, _ = run(capsys, "plan", str(with_nixl(file, nixl_devices=["eth0"], trusted_devices=["eth0"])))
    assert code == 0
    assert "listens on eth0, where no key protects it" in " ".join(out.split())


def test_another_model_goes_by_its_own_name(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "other-model"
    other.mkdir()
    (other / "config.json").write_text("{}")
    code, out, _ = run(capsys, "plan", str(file), "--model", str(other), "--json")
    told = json.loads(out)
    assert code == 0
    assert {worker["model_path"] for worker in told["workers"]} == {str(other)} == {told["router"]["model_path"]}
    assert {worker["served_model"] for worker in told["workers"]} == {"other-model"} == {told["router"]["model"]}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["up", "none.yaml"], "none.yaml: no such file"),
        (["plan", "none.yaml"], "none.yaml: no such file"),
        (["down", "none.yaml"], "none.yaml: no such file"),
        (["upp"], "No such command 'upp'."),
        (["worker", "--spec", "none.json"], "--spec: wanted a file, found none at none.json"),
        (["model", "pull", "smolm"], "wanted one of smollm2, found 'smolm', did you mean 'smollm2'?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"mainstem: {line}")


def test_a_model_that_is_not_here_says_what_to_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "up", str(file), "--model", "/no/such/folder")
    assert (code, err) == (
        2,
        "mainstem: --model: wanted one of smollm2 or a checkpoint's folder, found '/no/such/folder'\n",
    )


def test_the_command_starts_without_torch_sglang_or_the_configuration() -> None:
    code = (
        "import sys; from engine.launch.cli import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sglang', 'pydantic', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    for command in ("up", "plan", "status", "down", "model"):
        assert f"\n  {command} " in done.stdout
