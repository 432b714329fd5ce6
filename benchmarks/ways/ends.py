"""What a way of moving pages has to offer to be measured: an end in each of two processes.

    decode                                prefill
    DecodeEnd(…).describe()     ──────>   PrefillEnd(…, description).describe()
    join(answer)                <──────
    expect(room, destination)   ──────>   send(room, source, destination): when it began
    wait(room): when it was done

Both ends read CLOCK_MONOTONIC, which the processes of one host share.
"""

from __future__ import annotations

from typing import Any, Protocol

from transfer.plan import Pages
from transfer.pool import Pool

WAIT_S = 60.0
"""No hand-off of the benchmark takes nearly so long."""


class HandOffFailed(Exception):
    """A way did not deliver: there is nothing to measure."""


class PrefillEnd(Protocol):
    def describe(self) -> Any:
        """For `DecodeEnd.join`; anything that can be pickled."""

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        """Hands the pages over, or starts to. Returns the moment at which it began, in monotonic seconds."""

    def close(self) -> None: ...


class PrefillEnds(Protocol):
    """The ways, as the prefill process knows them."""

    def end(self, way: str, cell: Any, lanes: int, description: Any) -> PrefillEnd: ...


class DecodeEnd(Protocol):
    pool: Pool
    """Where pages are when a hand-off is done."""

    def describe(self) -> Any: ...

    def join(self, answer: Any) -> None: ...

    def expect(self, room: int, destination: Pages) -> None:
        """Before prefill is told to send: not timed."""

    def wait(self, room: int) -> float:
        """Returns the moment, in monotonic seconds, from which decode may use the pages. Raises HandOffFailed."""

    def close(self) -> None: ...
