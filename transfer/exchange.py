"""A hand-off connection after its handshake: the same on both sides, whatever they say."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

from transfer import handoff
from transfer.connection import Connection, PeerLost
from transfer.courier import Courier
from transfer.deadlines import Deadlines
from transfer.session import IllegalEvent


async def exchange(
    connection: Connection,
    courier: Courier,
    deadlines: Deadlines,
    write: Coroutine[None, None, None],
    take: Callable[[handoff.Message], None],
) -> str:
    """Reads until the connection ends, with `write` and signs of life beside it. Returns why it ended.

    write  what this side says; it ends with the connection
    take   does something about a message; a ValueError or IllegalEvent of its is the peer's fault, and the end
    """
    tasks = [
        courier.spawn(write),
        courier.spawn(connection.ping(deadlines.ping_s)),
        courier.spawn(connection.watch(deadlines.silence_s)),
    ]
    try:
        while True:
            take(await connection.receive())
    except (PeerLost, IllegalEvent, ValueError) as error:
        return str(error)
    finally:
        for task in tasks:
            task.cancel()
