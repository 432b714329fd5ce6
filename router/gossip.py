"""What other routers have sent to the same workers, so that several routers load them as one would.

    router-1 ── Loads, all that it has in flight ──> Peers ──> elsewhere(worker, epoch) ──> the cost of a choice here
    Announcer: when to say again what is in flight from here

Loads are sums as they stand, never differences: one that is lost is made good by the
next, and one that comes twice or late changes nothing. A router that says nothing for
`EXPIRE_S` is gone, and what it had sent with it; so are loads for a worker's last life.

Messages and time come in: no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

VERSION = 1
"""Raised when a message changes its meaning. Loads of another version are not listened to."""
CHANGED_S = 0.02
"""What has changed is said at most so often."""
UNCHANGED_S = 1.0
"""What has not changed is said so often: it is the sign of life."""
EXPIRE_S = 3.0
"""Loads of a router that has been silent for so long do not count any more."""


class WorkerLoad(msgspec.Struct, frozen=True, array_like=True):
    """What one router has in flight on one life of a worker."""

    epoch: int
    outstanding_tokens: int = 0
    """Prompt tokens that it has to compute and has not reported done."""
    outstanding_requests: int = 0
    """Prefills that are not done."""
    outstanding_s: float = 0.0
    """What those are expected to take, one after the other."""
    inflight_requests: int = 0
    inflight_tokens: int = 0
    """Prompt tokens of the requests that decode there."""


class Loads(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """All that one router has in flight. A worker that is not named has nothing from it.

    life      nanoseconds since 1970 when this router began: a restarted one is a new one
    sequence  grows with every message of a life
    """

    version: int
    router: str
    life: int
    sequence: int
    workers: dict[str, WorkerLoad]


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Loads).decode
"""bytes -> Loads. Raises msgspec.ValidationError or DecodeError."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What all other routers together have in flight on one worker."""

    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    outstanding_s: float = 0.0
    inflight_requests: int = 0
    inflight_tokens: int = 0


NOTHING = Elsewhere()


class Announcer:
    """Decides when this router says what it has in flight."""

    def __init__(self, router: str, life: int) -> None:
        self._router = router
        self._life = life
        self._sequence = 0
        self._said: dict[str, WorkerLoad] | None = None
        self._said_s = 0.0

    def due(self, workers: dict[str, WorkerLoad], now_s: float) -> Loads | None:
        """The message to send now, where one is due."""
        waited_s = now_s - self._said_s
        if self._said is not None and waited_s < (UNCHANGED_S if workers == self._said else CHANGED_S):
            return None
        return self.say(workers, now_s)

    def say(self, workers: dict[str, WorkerLoad], now_s: float) -> Loads:
        """The message to send now, due or not."""
        self._sequence += 1
        self._said, self._said_s = workers, now_s
        return Loads(VERSION, self._router, self._life, self._sequence, workers)


class Peers:
    """What the other routers said last.

    router  the name of this one, to which nobody need tell what it knows
    """

    def __init__(self, router: str) -> None:
        self._router = router
        self._said: dict[str, tuple[Loads, float]] = {}

    def __iter__(self) -> Iterator[str]:
        """Names of the routers that are heard, the longest known first."""
        return iter(self._said)

    def heard(self, loads: Loads, now_s: float) -> bool:
        """Takes loads in. False where they are of this router, of another version, or older than what is known."""
        if loads.version != VERSION or loads.router == self._router:
            return False
        known, _ = self._said.get(loads.router, (None, 0.0))
        if known is not None and (loads.life, loads.sequence) <= (known.life, known.sequence):
            return False
        self._said[loads.router] = loads, now_s
        return True

    def expire(self, now_s: float) -> list[str]:
        """Names of the routers that have been silent for too long and are forgotten now."""
        gone = [name for name, (_, heard_s) in self._said.items() if now_s - heard_s > EXPIRE_S]
        for name in gone:
            del self._said[name]
        return gone

    def elsewhere(self, worker: str, epoch: int) -> Elsewhere:
        """What they have in flight on this life of the worker."""
        found = [loads.workers[worker] for loads, _ in self._said.values() if worker in loads.workers]
        found = [load for load in found if load.epoch == epoch]
        if not found:
            return NOTHING
        return Elsewhere(
            outstanding_tokens=sum(load.outstanding_tokens for load in found),
            outstanding_requests=sum(load.outstanding_requests for load in found),
            outstanding_s=sum(load.outstanding_s for load in found),
            inflight_requests=sum(load.inflight_requests for load in found),
            inflight_tokens=sum(load.inflight_tokens for load in found),
        )
