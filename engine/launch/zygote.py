"""The process that imports SGLang once and forks workers from it; see engine.launch.fork for who talks to it.

It has one thread and no event loop, as a fork copies one thread only: whatever
another one held locked would stay locked in the child for ever. It reaps its
workers, and what they leave behind, and reports the workers' ends. It ends when
its input ends, and its workers with it.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec

from engine.launch.births import Began, Birth, Ended, Imported, Report
from engine.launch.lifeline import adopt_orphans, die_with_parent
from engine.launch.program import Program, run_to_end
from engine.spec import WorkerSpec

_decode = msgspec.json.Decoder(Birth).decode


def run_zygote(program: Program) -> None:
    """Reads births from stdin and reports on stdout until stdin ends. Does not return in a forked worker."""
    adopt_orphans()
    zygote = _Zygote(program, reports=os.dup(1))
    os.dup2(2, 1)  # What an import prints is no report.
    began_s = time.monotonic()
    program.import_engine()
    # Objects that exist now are never looked at by a child's garbage collector, so their memory stays shared.
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        print(f"zygote: {threads} threads after the import, wanted 1: a fork may deadlock", file=sys.stderr, flush=True)
    zygote.tell(Imported(time.monotonic() - began_s))
    zygote.serve()


class _Zygote:
    def __init__(self, program: Program, reports: int) -> None:
        self._program = program
        self._reports = reports
        self._wake, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, _wake_up)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        self._wake_end = wake_end
        self._workers: dict[int, Birth] = {}

    def tell(self, report: Report) -> None:
        os.write(self._reports, msgspec.json.encode(report) + b"\n")

    def serve(self) -> None:
        asked = b""
        while True:
            readable, _, _ = select.select([0, self._wake], [], [])
            if self._wake in readable:
                os.read(self._wake, 4096)
                self._reap()
            if 0 in readable:
                more = os.read(0, 65_536)
                if not more:
                    return
                *lines, asked = (asked + more).split(b"\n")
                for line in lines:
                    self._fork(_decode(line))

    def _fork(self, birth: Birth) -> None:
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(birth, parent_pid)
        self._workers[pid] = birth
        self.tell(Began(birth.name, birth.life, pid))

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            # Others are what a dead worker had started; nobody waits for them but us.
            if birth := self._workers.pop(pid, None):
                self.tell(Ended(birth.name, birth.life, os.waitstatus_to_exitcode(status)))

    def _become_worker(self, birth: Birth, parent_pid: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        die_with_parent(parent_pid)
        for descriptor in (self._reports, self._wake, self._wake_end):
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(birth.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.close(nothing)
        os.close(log)
        os.environ.update(birth.environment)
        os._exit(run_to_end(lambda: self._program.run_worker(WorkerSpec.read(Path(birth.spec_file)))))


def _wake_up(number: int, frame: FrameType | None) -> None:
    """Python writes to the wake-up pipe for signals that have a handler only."""
