"""What a worker did wrong with a request, said in one way whatever it was."""

from __future__ import annotations

import re
from enum import StrEnum

from router.answer import Failure

_HANDOFF = re.compile(r"\b(?:Prefill|Decode) (?:bootstrap|handshake|transfer) failed\b|HandoffFailed|KVTransferError")
"""How SGLang 0.5.16 (`disaggregation/prefill.py`, `decode.py`) and our own part of it say that a hand-off failed."""
_APART = re.compile(r"\bcannot reach the prefill worker\b")
"""How `transfer.receiver` says that there was no connection for it."""


class Fault(StrEnum):
    """What a worker did wrong."""

    UNREACHABLE = "unreachable"
    """No connection, so it did not see the request."""
    REFUSED = "refused"
    """It answered with an error."""
    BROKEN = "broken"
    """Its answer stopped, was empty or makes no sense."""
    TIMEOUT = "timeout"
    LOST = "lost"
    """Its lease ran out, it was started anew, or its engine does not move."""
    HANDOFF = "handoff"
    """It could not hand over, or take over, the pages: one of the two is to blame, or what is between them."""
    APART = "apart"
    """Decode found no way to prefill: nothing was begun."""
    UNTRUE = "untrue"
    """Its answer's own sums do not add up."""


BETWEEN = frozenset({Fault.HANDOFF, Fault.APART})
"""Told by one of a pair, and perhaps the other's: nobody knows whom to blame."""
UNSEEN = frozenset({Fault.UNREACHABLE, Fault.APART})
"""Nobody has computed anything for the request."""


class LegFailed(Exception):
    """A worker did not do its part.

    status   what the client is told: 400 to 499 where the request is to blame, else 502, 503 or 504
    message  for the client; may quote the request where the engine does
    """

    def __init__(self, worker: str, fault: Fault, message: str, status: int = 502) -> None:
        super().__init__(f"{worker}: {fault}")
        self.worker = worker
        self.fault = fault
        self.message = message
        self.status = status

    @property
    def client_to_blame(self) -> bool:
        return self.status < 500


def refused(worker: str, failure: Failure) -> LegFailed:
    """A worker's error as the client gets it: its own mistakes as they are, ours as a bad gateway."""
    status, message = failure.status, failure.message
    if _HANDOFF.search(message):
        fault = Fault.APART if _APART.search(message) else Fault.HANDOFF
        return LegFailed(worker, fault, f"{worker}: {message}")
    if 400 <= status < 500 and status not in (401, 403, 404):
        return LegFailed(worker, Fault.REFUSED, message, status)
    return LegFailed(worker, Fault.REFUSED, f"{worker}: {message}", 503 if status == 503 else 502)
