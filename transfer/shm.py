"""Pages between two pools on one host: the writer maps the other's pool and copies into it. One copy in all.

What SGLang's decode kernels read is the memory that prefill wrote. A lease (transfer/lease.py)
takes that memory from a writer that is lost.
"""

from __future__ import annotations

import asyncio

import msgspec

from transfer.layout import PoolLayout
from transfer.lease import Lease, LeaseAddress, Leave, Withdrawn
from transfer.plan import Pages, check_lengths, check_range
from transfer.pool import NotShared, Pool, SharedAddress
from transfer.transport import SLICE_BYTES, Ahead, Lanes, RouteLost, Unreachable, Wire
from transfer.undecodable import UNDECODABLE

PIECE_BYTES = 8 << 20
"""Copied at once: the loop looks at its sockets, and the writer at its lease, after each piece (about a ms)."""


class _Address(msgspec.Struct, frozen=True, array_like=True):
    pool: SharedAddress
    lease: LeaseAddress


class ShmTransport:
    """`shared` is where this process's own pool can be mapped; None where it cannot, and only writes."""

    name = "shm"

    def __init__(self, pool: Pool, shared: SharedAddress | None = None) -> None:
        self._pool = pool
        self._shared = shared

    async def land(self, wire: Wire) -> ShmLanding:
        if self._shared is None:
            raise Unreachable("shm: this pool does not lie in shared memory")
        return ShmLanding(self._shared)

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> ShmRoute:
        try:
            address = msgspec.msgpack.decode(description, type=_Address)
            return ShmRoute(self._pool, Pool.open_shared(layout, address.pool), Leave(address.lease))
        except (*UNDECODABLE, NotShared, Withdrawn) as error:
            raise Unreachable(f"shm: {error}") from error


class ShmLanding:
    """Decode's end. It sees nothing of what is written: the writer's word counts, and the lease."""

    def __init__(self, shared: SharedAddress) -> None:
        self._shared = shared
        self._lease: Lease | None = Lease()
        self._address = _Address(shared, self._lease.address)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def expect(self, tag: int, pages: Pages) -> None:
        pass

    def coming(self, tag: int) -> None:
        pass

    def in_place(self, tag: int) -> bool:
        return True

    async def landed(self, tag: int) -> None:
        pass

    async def fence(self, tag: int) -> None:
        pass

    async def disconnect(self) -> None:
        lease, self._lease = self._lease, None
        if lease is None:
            return
        await lease.take_back()


class ShmRoute:
    """Prefill's end."""

    landing_is_polled = False
    slice_bytes = SLICE_BYTES
    ahead: Ahead | None = None

    def __init__(self, pool: Pool, mapped: Pool, leave: Leave) -> None:
        self._pool = pool
        self._mapped = mapped
        self._leave: Leave | None = leave
        self._piece_pages = max(1, PIECE_BYTES // pool.layout.bytes_per_page)

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        check_range(source, self._pool.layout.pages)
        check_range(destination, self._mapped.layout.pages)
        check_lengths(source, destination)
        for start in range(0, len(source), self._piece_pages):
            if start:
                await asyncio.sleep(0)
            if self._leave is None:
                raise RouteLost("shm: disconnected")
            end = start + self._piece_pages
            try:
                with self._leave.writing():
                    self._pool.copy_to(self._mapped, source[start:end], destination[start:end])
            except Withdrawn as error:
                raise RouteLost(f"shm: {error}") from error

    async def settled(self) -> None:
        pass

    async def disconnect(self) -> None:
        if self._leave is not None:
            self._leave.close()
            self._leave = None
