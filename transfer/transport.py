"""How pages get from one pool into another: the contract that every transport keeps.

    register     a transport is made with the pool that it reads from or lands in
    land         decode, once for each prefill worker that connects: a Landing
    describe     what that worker needs to reach the landing; travels over the authenticated connection
    connect      prefill: the Route to the landing that was described
    write        prefill: a list of pages, under a tag
    write_ahead, confirm, write_again
                 prefill, where the route can: pages that are still being computed; that they were; that they changed
    settled      prefill: what was begun until now is over
    expect, coming, landed
                 decode: where a tag's pages go; that they are about to come; that all are there
    fence        decode: nothing lands under a tag any more
    disconnect   either: nothing of this peer lands any more, whatever the peer does

A tag is a hand-off's room. Messages (what to write where, what was written, Stop, Stopped)
are not the transport's: they go over the hand-off connection, which is authenticated.

Who keeps a page from being reused too early: `fence` may rely on the writer's word that it
stopped, `disconnect` may not. A landing that cannot take the memory from its writer (shm:
the writer is frozen in the middle of a copy) returns from `disconnect` only once it has.

Everything here runs on the courier's loop, and nothing here blocks it for longer than a
millisecond or so: what takes longer has a thread of its own.
"""

from __future__ import annotations

import socket
from typing import Protocol

from transfer.computed import Computed
from transfer.layout import PoolLayout
from transfer.plan import Pages

SLICE_BYTES = 64 << 20
"""For a route that copies while `write` runs."""


class Unreachable(Exception):
    """The description does not lead to the peer's pool from here; another transport is needed."""


class RouteLost(Exception):
    """Nothing can be written to this peer any more, or nothing more of it will land."""


class Wire(Protocol):
    """What a landing may ask of the hand-off connection that it belongs to."""

    async def dial(self, token: bytes) -> socket.socket:
        """One more connection to the same prefill worker, authenticated, which finds it under `token` (see `Lanes`).

        The socket is not blocking. Raises RouteLost.
        """

    def broken(self, reason: str) -> None:
        """The transport found that the peer is gone, or breaks the rules: the connection will be cut.

        May be called from any thread.
        """


class Lanes(Protocol):
    """Connections that decode workers dialled beside their hand-off connection, for the routes that want them."""

    def take(self, token: bytes) -> list[socket.socket]:
        """Those announced with this token, in the order in which they came; empty where there are none."""


class Landing(Protocol):
    """Decode's end: where the pages of one prefill worker come down."""

    def describe(self) -> bytes:
        """For `Transport.connect` on the other side."""

    def expect(self, tag: int, pages: Pages) -> None:
        """From now on the writer may write under this tag, to these pages of the pool, in this order."""

    def coming(self, tag: int) -> None:
        """The writer is about to write under this tag: a transport that has to be polled is polled from now on."""

    def in_place(self, tag: int) -> bool:
        """Whether `landed` would return at once, given the same. The tag is over if so."""

    async def landed(self, tag: int) -> None:
        """Returns once every expected page is in place, given that the writer wrote them all. The tag is over then.

        Raises RouteLost.
        """

    async def fence(self, tag: int) -> None:
        """Returns once nothing can land under this tag any more, given that the writer said that it stopped.

        The tag is over then. Does nothing for a tag that is not expected (any more).
        """

    async def disconnect(self) -> None:
        """Returns once nothing of this peer can land at all, whatever the peer does. All its tags are over then."""


class Ahead(Protocol):
    """What a route can do besides, if its pool's layers are known to it: pages leave while they are still computed."""

    async def write_ahead(self, source: Pages, destination: Pages, fresh: int, computed: Computed) -> None:
        """Writes pages of this side's pool, layers as soon as they are known to be computed. Returns at once.

        source       indices into this side's pool
        destination  indices into the peer's pool, as many
        fresh        so many of them, the last ones, are computed by this pass; those before it are when it begins
        computed     when the pass's layers are

        Nobody is told that they are there. Raises RouteLost.
        """

    async def confirm(self, tag: int, pages: int) -> None:
        """Counts as a write, under the tag, of so many pages that were written ahead. Raises RouteLost."""

    async def write_again(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        """As `Route.write`, behind all that was written ahead: for a tag of which something was.

        `Route.write` need not wait for that, as other tags' pages may go ahead with a pass that has just begun.
        """


class Route(Protocol):
    """Prefill's end: the way into one decode worker's pool. One write at a time, and `settled` beside it."""

    @property
    def landing_is_polled(self) -> bool:
        """Whether decode has to be told before a write that it is coming (`Landing.coming`); else behind it will do."""

    @property
    def slice_bytes(self) -> int:
        """What should be written at once: in between, a hand-off that ended is noticed."""

    @property
    def ahead(self) -> Ahead | None:
        """None where pages are written once they are computed, and not before."""

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        """Writes pages of this side's pool. Returns when they are in place, or sent, or somebody was told to send them.

        tag          the hand-off
        first        index of the first of these pages among all that the landing expects under the tag
        source       indices into this side's pool
        destination  indices into the peer's pool, as many

        Raises RouteLost.
        """

    async def settled(self) -> None:
        """Returns once this side has nothing to do any more for what was begun until now; more may be meanwhile.

        Raises RouteLost.
        """

    async def disconnect(self) -> None:
        """Ends the route; a write that is under way ends or raises RouteLost first. A second call does nothing."""


class Transport(Protocol):
    """One way to move pages, over one pool of this process. It may serve many peers at once."""

    @property
    def name(self) -> str:
        """As the cluster file and the handshake call it."""

    async def land(self, wire: Wire) -> Landing:
        """Decode: prepares to be written to by one more peer. Raises Unreachable where this pool cannot be."""

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> Route:
        """Prefill: the way to the landing that was described, whose pool has this layout.

        The description is from a peer that holds the cluster's key, and is checked nevertheless.
        Raises Unreachable.
        """
