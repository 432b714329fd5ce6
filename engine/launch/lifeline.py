"""Processes as the kernel knows them: who is still the same, who belongs to whom, who dies with whom.

A pid alone is no identity, it is used again. A pid with its start time is, so
everything that is signalled later than it was started is checked by both.

Each worker leads a session of its own; what it starts stays in that session, so

    launcher ─┬─ router                      PR_SET_PDEATHSIG: dies with the launcher
              └─ zygote ─── worker           PR_SET_PDEATHSIG: dies with the zygote
                              ├─ scheduler     ┐ the worker's session: one SIGKILL to
                              └─ detokenizer   ┘ its group ends all of it
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


@dataclass(frozen=True)
class Identity:
    """One life of one process."""

    pid: int
    started_ticks: int
    """Clock ticks from the machine's boot to the process's start."""

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """None where no such process is, or only its zombie."""
        stat = _read_stat(pid)
        return None if stat is None or stat.zombie else cls(pid, stat.started_ticks)

    def alive(self) -> bool:
        return Identity.of(self.pid) == self

    def signal(self, number: signal.Signals) -> None:
        """To this process only, and only if it is still the same."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills the calling process when the thread that started it ends. `parent_pid` is who should be there.

    Exits at once where the parent has gone before the call: the signal is sent on the event only.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Processes whose parent dies become children of the calling one, which can then reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def group_members(leader_pid: int) -> list[int]:
    """Processes, zombies left out, in the group or the session that `leader_pid` leads or led."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        stat = _read_stat(int(entry.name))
        if stat is not None and not stat.zombie and leader_pid in (stat.group, stat.session):
            found.append(int(entry.name))
    return found


def kill_group(leader_pid: int, deadline_s: float) -> list[int]:
    """SIGKILL to all of `leader_pid`'s group and session; who is left after `deadline_s` seconds (normally nobody)."""
    end_s = time.monotonic() + deadline_s
    while members := group_members(leader_pid):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end_s:
            return members
        time.sleep(_POLL_S)
    return []


def wait_gone(identity: Identity, deadline_s: float) -> bool:
    """Whether it ended within `deadline_s` seconds."""
    end_s = time.monotonic() + deadline_s
    while identity.alive():
        if time.monotonic() > end_s:
            return False
        time.sleep(_POLL_S)
    return True


def describe_exit(code: int) -> str:
    """A Popen return code in words."""
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


@dataclass(frozen=True)
class _Stat:
    zombie: bool
    group: int
    session: int
    started_ticks: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command stands in parentheses and may contain both spaces and parentheses: fields count from the last one.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(fields[0] in "ZX", int(fields[2]), int(fields[3]), int(fields[19]))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
