"""Hand-offs under real faults, between real processes: nothing wrong, stuck or lost. And that this would be seen."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.handoff_faults import DEADLINES, KEY, LAYOUT, Tally, stage, untaken
from transfer.held import HeldTransport
from transfer.layout import PoolLayout
from transfer.pool import Pool
from transfer.receiver import Receiver
from transfer.sender import Sender
from transfer.session import TERMINAL, ReceiverState, SenderState
from transfer.tcp import TcpLanding, TcpTransport

pytestmark = pytest.mark.thorough

TRIES = 20
SHORT = replace(DEADLINES, queue_s=1.2, handoff_s=1.2)
"""Most of a round is waiting for these."""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_no_fault_makes_a_byte_wrong_loses_a_page_or_leaves_a_room_stuck(transport: str) -> None:
    faults = ("none", "prefill stopped in a copy", "prefill killed in a copy", "decode killed", "one connection cut")
    total = Tally()
    with stage(transport, 3, deadlines=SHORT) as (made, logs):
        for number, fault in enumerate(faults):
            total.add(made.play(number, fault, TRIES))
        lines = untaken(logs)

    found = total.as_dict()
    assert [found[name] for name in ("hangs", "wrong_bytes", "leaked_pages", "crashes")] == [0, 0, 0, 0], found
    assert lines == []
    assert total.tried == TRIES * len(faults)
    assert total.done > 0


@pytest.mark.parametrize(("transport", "fault"), [("shm", "prefill stopped in a copy"), ("tcp", "slow network")])
def test_without_the_fence_wrong_bytes_are_found(transport: str, fault: str) -> None:
    """Not about the product: a harness that finds nothing here would find nothing anywhere."""
    with stage(transport, 5, deadlines=SHORT, fenced=False) as (made, _logs):
        assert any(made.play(number, fault, 40)["wrong_bytes"] for number in range(8))


def test_a_fence_waits_for_the_lane_that_still_writes_where_another_lane_is_gone() -> None:
    layout = PoolLayout("m", "uint8", 16, (4096,), (), 8)
    pool = Pool.zeros(layout)
    header = struct.pack("<qII", 7, 0, 4)

    async def scenario() -> None:
        (mine, theirs), (gone, theirs_gone) = socket.socketpair(), socket.socketpair()
        landing = TcpLanding(pool, [mine, gone], b"x" * 16, lambda _reason: None)
        landing.expect(7, np.arange(4, dtype=np.int32))
        theirs.sendall(header + b"\1" * 4096)
        await _until_written(pool)
        theirs_gone.close()
        fence = asyncio.create_task(landing.fence(7))
        await asyncio.wait({fence}, timeout=0.3)
        assert not fence.done()

        theirs.sendall(b"\1" * 3 * 4096)
        await asyncio.wait_for(fence, 5)
        await landing.disconnect()
        theirs.close()

    asyncio.run(scenario())


async def _until_written(pool: Pool) -> None:
    async with asyncio.timeout(5):
        while not pool.buffers[0].any():
            await asyncio.sleep(0.001)


@contextmanager
def joined(silence_s: float) -> Iterator[tuple[Sender, Receiver, HeldTransport, int]]:
    deadlines = replace(DEADLINES, silence_s=silence_s, handoff_s=20.0)
    source, destination = Pool.zeros(LAYOUT), Pool.zeros(LAYOUT)
    held = HeldTransport(TcpTransport(source))
    sender = Sender(source, KEY, worker="prefill-0", epoch=1, transports=[held], deadlines=deadlines)
    receiver = Receiver(
        destination,
        Pool.zeros(PoolLayout("", "", 1, LAYOUT.aux_row_bytes, (), 4)),
        KEY,
        worker="decode-0",
        epoch=1,
        transports=[TcpTransport(destination)],
        deadlines=deadlines,
    )
    try:
        yield sender, receiver, held, sender.listen("127.0.0.1", 0)
    finally:
        held.release()
        receiver.close()
        sender.close()


def test_a_write_that_takes_longer_than_the_longest_silence_loses_nobody() -> None:
    silence_s = 0.5
    with joined(silence_s) as (sender, receiver, held, port):
        receiver.open(7, "127.0.0.1", port)
        sender.offer(7)
        _wait_until(lambda: receiver.state(7) is ReceiverState.READY)
        receiver.grant(7, np.arange(4, dtype=np.int32), 0, 0)
        _wait_until(lambda: sender.state(7) is SenderState.GRANTED)
        held.hold()
        sender.send(7, np.arange(4, dtype=np.int32), [bytes(64)])
        time.sleep(3 * silence_s)
        held.release()

        _wait_until(lambda: receiver.state(7) in TERMINAL)
        assert receiver.state(7) is ReceiverState.DONE, receiver.reason(7)


def _wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.002)
