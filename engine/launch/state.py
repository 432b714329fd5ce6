"""A cluster's folder on disk: what runs, who may start it, and what a launcher that died left behind.

.mainstem/local-cpu/
  lock         held by the running launcher; the kernel lets go of it with the process
  state.json   what runs: pids, ports, addresses; replaced as a whole, gone after a clean end
  key          the cluster's secret, made anew for each start
  specs/       what each process was told
  logs/        what each process said; logs.previous/ is the start before
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from engine.launch.errors import BadInput, LaunchFailed
from engine.launch.lifeline import Identity, group_members, kill_group, wait_gone
from engine.launch.plan import Folders
from transfer.auth import ClusterKey

STATE_DIR_VARIABLE = "MAINSTEM_STATE_DIR"
_KILL_S = 5.0
_STOP_MARGIN_S = 15.0
"""A launcher needs this much longer than its processes' stop_timeout_s, at most."""
_RUN_PREFIX = "mainstem-"


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a running cluster."""

    name: str
    role: str
    state: str
    pid: int = 0
    """0 while it does not run."""
    started_ticks: int = 0
    """With the pid: which process it is (engine.launch.lifeline.Identity)."""
    host: str
    port: int
    restarts: int = 0
    log: str
    note: str = ""
    """Why it is not ready, where that is known."""


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """state.json"""

    version: int = 1
    name: str
    phase: str
    launcher_pid: int
    launcher_started_ticks: int
    stop_timeout_s: float
    ready_timeout_s: float = 600.0
    url: str
    """The first router's."""
    urls: dict[str, str] = {}
    """Every router's, by its name; a launcher of an earlier version wrote none."""
    model: str
    """The name clients ask for."""
    api_key_file: str = ""
    run_dir: str
    processes: list[ProcessRecord]

    @property
    def launcher(self) -> Identity:
        return Identity(self.launcher_pid, self.launcher_started_ticks)


class StateFolder:
    """One cluster's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def _record_file(self) -> Path:
        return self.path / "state.json"

    def read(self) -> ClusterRecord | None:
        """None where nothing was started, or it ended cleanly."""
        try:
            return msgspec.json.decode(self._record_file.read_bytes(), type=ClusterRecord)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise BadInput(f"{self._record_file}: wanted the state of a cluster, found {error}") from None

    def write(self, record: ClusterRecord) -> None:
        staged = self._record_file.with_suffix(".new")
        staged.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        staged.replace(self._record_file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the cluster for this process. Raises LaunchFailed where another one has it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LaunchFailed(self._taken()) from None
            yield
        finally:
            os.close(descriptor)

    def prepare(self) -> Folders:
        """Clears what the last launcher left, then makes the folders and the key. Only under the lock."""
        if record := self.read():
            clear_leftovers(record)
        previous, logs = self.path / "logs.previous", self.path / "logs"
        if logs.exists():
            shutil.rmtree(previous, ignore_errors=True)
            logs.rename(previous)
        for folder in (logs, self.path / "specs"):
            folder.mkdir(mode=0o700, exist_ok=True)
        run = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX))
        folders = Folders(state=self.path, run=run)
        ClusterKey.generate().write(folders.key_file)
        return folders

    def clear(self, run: Path) -> None:
        """After a clean end: nothing runs any more. Logs stay. Only under the lock."""
        self._record_file.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)

    def _taken(self) -> str:
        record = self.read()
        who = f" (pid {record.launcher_pid}, {record.url})" if record else ""
        return f"cluster {self.path.name} is running already{who}: `mainstem down {self.path.name}` stops it"


def clear_leftovers(record: ClusterRecord) -> list[str]:
    """Ends what still runs of a cluster whose launcher is dead; the names of the processes that were found.

    A group is left alone where its leader's pid now belongs to another process. Where the leader is gone, the
    kernel does not use its number again as long as the group has members. Raises LaunchFailed where one does not die.
    """
    found = []
    for process in record.processes:
        identity = Identity(process.pid, process.started_ticks)
        if not process.pid or Identity.of(process.pid) not in (None, identity) or not group_members(process.pid):
            continue
        found.append(process.name)
        if left := kill_group(process.pid, _KILL_S):
            raise LaunchFailed(f"{process.name}: processes {', '.join(map(str, left))} do not end although killed")
    if Path(record.run_dir).name.startswith(_RUN_PREFIX):
        shutil.rmtree(record.run_dir, ignore_errors=True)
    return found


def stop_cluster(folder: StateFolder) -> str:
    """Asks the running launcher to stop, waits, kills what remains; says in one line what happened. Idempotent."""
    record = folder.read()
    if record is None:
        return f"{folder.path.name}: nothing is running"
    launcher = record.launcher
    launcher.signal(signal.SIGTERM)
    if not wait_gone(launcher, record.stop_timeout_s + _STOP_MARGIN_S):
        launcher.signal(signal.SIGKILL)
        wait_gone(launcher, _KILL_S)
    with folder.locked():
        # A launcher that stopped as asked has cleared its record.
        left = folder.read()
        killed = clear_leftovers(left) if left else []
        if left:
            folder.clear(Path(left.run_dir))
    return f"{record.name}: stopped" + (f", had to kill {', '.join(killed)}" if killed else "")
