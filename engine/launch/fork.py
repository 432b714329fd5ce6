"""Start workers by forking them from one process that has imported SGLang already.

The import takes half a minute of CPU; three workers that share it are ready in a
third of the time of three that do not, and a crashed one is back in seconds. Only
right without a GPU: a process that has used one cannot be forked.

    launcher ── Birth, one JSON line each ──> zygote ── fork ──> worker
             <── Imported, Began, Ended ─────        <─ reaps ──
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from engine.launch.births import Began, Birth, Ended, Imported, Report, Reporter
from engine.launch.lifeline import describe_exit, kill_group
from engine.launch.logs import telling_line
from engine.launch.spawn import child_environment, launch_command

_CLOSE_S = 5.0
_decode = msgspec.json.Decoder(Report).decode


class ForkStarter:
    """Keeps one zygote, and starts another when that has died.

    environment  what SGLang reads while it is imported has to be in here
    """

    def __init__(self, program: str, environment: Mapping[str, str], log_file: Path, report: Reporter) -> None:
        self._program = program
        self._environment = environment
        self._log_file = log_file
        self._report = report
        self._zygote: _Zygote | None = None

    def start(self, birth: Birth) -> None:
        if self._zygote is None or not self._zygote.asked(birth):
            self._zygote = _Zygote(self._open(), self._log_file, self._report)
            if not self._zygote.asked(birth):
                self._report(Ended(birth.name, birth.life, 1, self._zygote.why()))

    def interrupt(self) -> None:
        if self._zygote is not None:
            self._zygote.interrupt()

    def close(self) -> None:
        if self._zygote is not None:
            self._zygote.close()

    def _open(self) -> subprocess.Popen[bytes]:
        with self._log_file.open("ab") as log:
            return subprocess.Popen(
                launch_command("zygote", "--program", self._program),
                env=child_environment(self._environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )


class _Zygote:
    """The launcher's end of one zygote process."""

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path, report: Reporter) -> None:
        self._process = process
        self._log_file = log_file
        self._report = report
        self._lock = threading.Lock()
        self._pids: dict[tuple[str, int], int | None] = {}
        """Births that have not ended; None until they began. Guarded by the lock, as is `_over`."""
        self._over = False
        self._imported = False
        self._listener = threading.Thread(target=self._listen, name="zygote-reports", daemon=True)
        self._listener.start()

    def asked(self, birth: Birth) -> bool:
        """Whether the zygote was there to be asked."""
        assert self._process.stdin is not None, "it was opened as a pipe"
        with self._lock:
            if self._over:
                return False
            try:
                self._process.stdin.write(msgspec.json.encode(birth) + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                return False
            self._pids[birth.name, birth.life] = None
            return True

    def why(self) -> str:
        return f"the process that imports SGLang {describe_exit(self._process.wait())}: {telling_line(self._log_file)}"

    def interrupt(self) -> None:
        """Ends it while it imports; afterwards every birth begins within milliseconds."""
        with self._lock:
            if not self._imported:
                self._process.kill()

    def close(self) -> None:
        with self._lock:
            pids = [pid for pid in self._pids.values() if pid is not None]
            self._pids.clear()
            self._over = True
        for pid in (self._process.pid, *pids):
            kill_group(pid, _CLOSE_S)
        self._listener.join(_CLOSE_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None, "it was opened as a pipe"
        for line in self._process.stdout:
            report = _decode(line)
            with self._lock:
                if isinstance(report, Imported):
                    self._imported = True
                elif isinstance(report, Began):
                    self._pids[report.name, report.life] = report.pid
                elif isinstance(report, Ended) and self._pids.pop((report.name, report.life), 0) == 0:
                    continue
            self._report(report)
        self._bury()

    def _bury(self) -> None:
        """The zygote has died, and the kernel ends its children with it: report them, since it cannot."""
        code = self._process.wait()
        with self._lock:
            self._over = True
            orphans, self._pids = self._pids, {}
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):  # What it has not read is lost with it.
                    if pipe is not None:
                        pipe.close()
        for (name, life), pid in orphans.items():
            if pid is not None:
                kill_group(pid, _CLOSE_S)
            self._report(Ended(name, life, code if code > 0 else -9, self.why()))
