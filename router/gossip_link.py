"""Carries gossip between routers: one PUB socket here, one SUB socket to all others, with the cluster's key.

    fleet ── what is in flight ──> Announcer ── PUB ══> other routers
    other routers ══ SUB ──> Peers ── worker.elsewhere ──> fleet

When to speak and what counts is decided in `router.gossip`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from router.fleet import Fleet
from router.gossip import CHANGED_S, NOTHING, Announcer, Peers, decode, encode
from transfer.auth import ClusterKey
from transfer.undecodable import UNDECODABLE

log = logging.getLogger(__name__)

UNSENT_MESSAGES = 100
"""Kept for a router that takes nothing: what is older is of no use to it."""
HEARTBEAT_S = 1.0
"""A connection without a sign of life for three times as long is dropped and made anew."""
GOODBYE_S = 0.2
"""How long the last message has to get on its way."""


class GossipLink:
    """Tells the other routers what this one has in flight, and the fleet what they have.

    name     this router, by which the others know it
    host     address to listen on
    port     0 takes a free one
    life     nanoseconds since 1970 when this router began
    clock_s  seconds of a steady clock
    """

    def __init__(
        self,
        key: ClusterKey,
        fleet: Fleet,
        *,
        name: str,
        host: str,
        port: int,
        life: int,
        clock_s: Callable[[], float],
    ) -> None:
        """Listens. Raises zmq.ZMQError for a port in use, OSError for a host without an address."""
        self.peers = Peers(name)
        self._fleet = fleet
        self._clock_s = clock_s
        self._announcer = Announcer(name, life)
        # The process's context, which nobody terminates: `zmq_ctx_term` may wait for ever on a CURVE handshake that was
        # cut off (libzmq issue 2733), whatever the linger.
        context = zmq.asyncio.Context.instance()
        self._publisher = context.socket(zmq.PUB)
        self._heard = context.socket(zmq.SUB)
        key.secure_server(self._publisher)
        key.secure_client(self._heard)
        self._publisher.set_hwm(UNSENT_MESSAGES)
        self._heard.heartbeat_ivl = int(1000 * HEARTBEAT_S)
        self._heard.heartbeat_timeout = self._heard.handshake_ivl = int(3000 * HEARTBEAT_S)
        self._heard.subscribe(b"")
        try:
            _bind(self._publisher, host, port)
        except (OSError, zmq.ZMQError):
            self._close_sockets()
            raise
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it listens, tcp://host:port."""
        endpoint = self._publisher.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.decode().rstrip("\0")

    def start(self, peers: Sequence[str]) -> None:
        """Begins to talk and to listen to the routers at these addresses. They need not be there yet."""
        for address in peers:
            self._heard.ipv6 = "[" in address
            self._heard.connect(address)
        self._task = asyncio.create_task(self._gossip(), name="gossip")
        self._task.add_done_callback(_ended)

    async def close(self) -> None:
        """Says that nothing is in flight from here any more, and ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            await self._publisher.send(encode(self._announcer.say({}, self._clock_s())))
            await asyncio.sleep(GOODBYE_S)
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._publisher.close(linger=0)
        self._heard.close(linger=0)

    async def _gossip(self) -> None:
        try:
            await self._talk()
        finally:
            # Whatever ended it: nothing here would ever expire.
            for worker in self._fleet:
                worker.elsewhere = NOTHING

    async def _talk(self) -> None:
        while True:
            now_s = self._clock_s()
            changed = await self._listen(now_s)
            for name in self.peers.expire(now_s):
                log.warning("router silent, its load is forgotten name=%s", name)
                changed = True
            if changed:
                for worker in self._fleet:
                    worker.elsewhere = self.peers.elsewhere(worker.name, worker.registration.epoch)
            loads = self._announcer.due(self._fleet.in_flight(), now_s)
            if loads is not None:
                await self._publisher.send(encode(loads))
            await asyncio.sleep(CHANGED_S)

    async def _listen(self, now_s: float) -> bool:
        """Takes in all that has come; whether it was anything new."""
        new = False
        with contextlib.suppress(zmq.Again):
            while True:
                payload = await self._heard.recv(zmq.NOBLOCK)
                try:
                    new = self.peers.heard(decode(payload), now_s) or new
                except UNDECODABLE as error:
                    log.warning("gossip refused bytes=%d error=%s", len(payload), error)
        return new


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("gossip ended error=%r", error)


def _bind(publisher: zmq.asyncio.Socket, host: str, port: int) -> None:
    """ZeroMQ binds to numbers only."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    publisher.ipv6 = family is socket.AF_INET6
    number = f"[{address[0]}]" if family is socket.AF_INET6 else str(address[0])
    publisher.bind(f"tcp://{number}:{port or '*'}")
