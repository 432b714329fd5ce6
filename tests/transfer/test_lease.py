"""A writer's leave to write: taken back, it is gone, whatever state the writer is in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from transfer.lease import Lease, LeaseAddress, Leave, Withdrawn

WITHIN_S = 10.0
WRITER = """
import sys, time
sys.path.insert(0, {root!r})
from transfer.lease import Leave, LeaseAddress, Withdrawn
leave = Leave(LeaseAddress({path!r}, {token!r}))
with leave.writing():
    print("writing", flush=True)
    sys.stdin.readline()
try:
    with leave.writing():
        print("again", flush=True)
except Withdrawn:
    print("withdrawn", flush=True)
sys.stdin.readline()
"""

UNLOCKED = """
import fcntl, sys
sys.path.insert(0, {root!r})
from transfer.lease import Leave, LeaseAddress
leave = Leave(LeaseAddress({path!r}, {token!r}))
leave.begin()
fcntl.flock(leave._descriptor, fcntl.LOCK_UN)
print("unlocked", flush=True)
sys.stdin.readline()
"""


@contextmanager
def writer(lease: Lease) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a copy; a line lets it go on."""
    root = str(Path(__file__).parents[2])
    program = WRITER.format(root=root, path=lease.address.path, token=lease.address.token)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert said(process) == "writing"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def eventually_withdrawn(lease: Lease) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not lease.withdraw():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.002)


def test_a_leave_lasts_until_it_is_withdrawn() -> None:
    lease = Lease()
    leave = Leave(lease.address)
    for _ in range(3):
        with leave.writing():
            pass

    assert lease.withdraw()
    assert lease.withdraw()

    with pytest.raises(Withdrawn, match="has withdrawn the leave to write"), leave.writing():
        pytest.fail("written without leave")
    lease.close()
    with pytest.raises(Withdrawn), leave.writing():
        pytest.fail("written without leave")
    leave.close()


def test_a_writer_in_the_middle_of_a_copy_is_waited_for() -> None:
    lease = Lease()
    with writer(lease) as process:
        assert not lease.withdraw()
        tell(process)

        assert said(process) == "withdrawn"
        eventually_withdrawn(lease)
    lease.close()


def test_a_killed_writer_holds_nothing() -> None:
    lease = Lease()
    with writer(lease) as process:
        assert not lease.withdraw()

        process.kill()

        eventually_withdrawn(lease)
    lease.close()


def test_a_frozen_writer_holds_its_lock_until_it_goes_on() -> None:
    lease = Lease()
    with writer(lease) as process:
        os.kill(process.pid, signal.SIGSTOP)
        tell(process)
        for _ in range(20):
            assert not lease.withdraw()
            time.sleep(0.01)

        os.kill(process.pid, signal.SIGCONT)

        assert said(process) == "withdrawn"
        eventually_withdrawn(lease)
    lease.close()


def test_an_address_that_leads_to_no_lease_is_refused() -> None:
    lease = Lease()
    for path in ("/dev/null", "/proc/1/fd/987654", "/proc/self/environ", ""):
        with pytest.raises(Withdrawn, match=r"^lease: "):
            Leave(LeaseAddress(path, lease.address.token))
    with pytest.raises(Withdrawn, match="not the peer's"):
        Leave(msgspec.structs.replace(lease.address, token=b"x" * 32))
    lease.withdraw()
    lease.close()


def test_what_a_process_has_set_going_is_waited_for_until_it_is_gone() -> None:
    """The kernel lets go of a killed process's locks before its GPU has stopped: a free lock is not enough."""
    lease = Lease()
    program = UNLOCKED.format(root=str(Path(__file__).parents[2]), path=lease.address.path, token=lease.address.token)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert said(process) == "unlocked"
        for _ in range(20):
            assert not lease.withdraw()
            time.sleep(0.01)

        process.kill()

        eventually_withdrawn(lease)
    lease.close()
