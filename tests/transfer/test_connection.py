"""A connection's signs of life: silence is the peer's, not this side's own."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import uvloop

from transfer import handoff
from transfer.connection import Connection, PeerLost


def test_a_side_that_was_held_up_itself_does_not_take_its_peer_for_lost() -> None:
    """Its own loop stood still for longer than the silence, while the peer's signs of life waited in the socket."""

    async def work() -> None:
        here, there = socket.socketpair()
        mine, theirs = Connection(here, 1.0), Connection(there, 1.0)
        watching = asyncio.create_task(mine.watch(0.3))
        reading = asyncio.create_task(mine.receive())
        await asyncio.sleep(0)
        await theirs.send(handoff.Ping())

        time.sleep(0.6)

        assert isinstance(await reading, handoff.Ping)
        await asyncio.wait({watching}, timeout=0.15)
        assert not watching.done()
        await asyncio.wait({watching}, timeout=5)
        with pytest.raises(PeerLost, match=r"silent for 0\.3 s"):
            await mine.receive()
        mine.close()
        theirs.close()

    uvloop.run(work())
