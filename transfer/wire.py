"""Every message between a worker's agent and a router, with one version number.

    agent ── POST /internal/register (JSON, signed) ──> router     every `renew_s`: it is the heartbeat too
    agent ══ PUB  Batch (msgpack)                   ══> router     what its KV cache stored and dropped
    agent ══ PUB  Audit (msgpack)                   ══> router     a sample of what it holds, every `audit_s`
    router ── DEALER PageRequest (msgpack)          ──> agent      "I have up to sequence n of epoch e"
    agent ── ROUTER Batch… | Snapshot… then CaughtUp ─> router
    agent ══ PUB  Handoffs (msgpack)                ══> router     decode: what each hand-off came to, as it ends

Sums over all hand-offs stand in every registration, so a lost `Handoffs` costs the story of
single requests and no count.

A worker's batches carry (worker, epoch, sequence). Sequence starts at 1 in each
epoch and grows by one. A router that sees a gap, or a new epoch, asks. Snapshots
come in parts, parents before children; `CaughtUp` says which sequence they reach.
An audit stands in the stream of batches: whoever has applied all before it holds the
same sample, page for page, or is wrong.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

import msgspec

from transfer.ended import Ended

VERSION = 3
"""Raised when a message changes its meaning. Both sides refuse another version."""

Role = Literal["prefill", "decode", "both"]
WorkerState = Literal["starting", "ready", "draining"]


class Tier(IntEnum):
    """Where a page lies; lower is nearer to the accelerator."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    EXTERNAL = 3


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """These pages, one after the other, are in the cache now.

    parent  id of the page before ids[0], or its namespace's root id
    depth   pages before ids[0]: 0 where `parent` is a root
    """

    parent: int
    depth: int
    ids: list[int]
    tier: Tier = Tier.DEVICE


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """These pages are no longer in the cache."""

    ids: list[int]
    tier: Tier = Tier.DEVICE


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """The cache is empty now."""


PageEvent = Stored | Removed | Cleared


class Batch(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """Events in the order in which they happened."""

    worker: str
    epoch: int
    sequence: int
    events: list[PageEvent]


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag="S"):
    """A part of everything that the worker holds. The first part has index 0 and replaces all before it."""

    worker: str
    epoch: int
    index: int
    pages: list[Stored]


class CaughtUp(msgspec.Struct, frozen=True, array_like=True, tag="u"):
    """The end of an answer: whoever applied it stands at `sequence`."""

    worker: str
    epoch: int
    sequence: int


PageMessage = Batch | Snapshot | CaughtUp


class PageRequest(msgspec.Struct, frozen=True, array_like=True, tag="q"):
    """Send what came after `sequence` of `epoch`; (0, 0) asks for everything."""

    epoch: int
    sequence: int


class Audit(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """All pages, in whatever tier, that the worker holds after batch `sequence` and that fall into one class of ids.

    ids         those with id % modulus == residue, in no order
    held_pages  all pages that it holds
    """

    worker: str
    epoch: int
    sequence: int
    modulus: int
    residue: int
    ids: list[int]
    held_pages: int


class Handoffs(msgspec.Struct, frozen=True, array_like=True, tag="h"):
    """Hand-offs to this decode worker that ended just now."""

    worker: str
    epoch: int
    ended: list[Ended]


Published = Batch | Audit | Handoffs


class HandoffTotals(msgspec.Struct, frozen=True, array_like=True):
    """Sums over the hand-offs of one kind that a decode worker has had in its present epoch."""

    prefill: str
    """The worker; "" where none was reached."""
    transport: str
    outcome: Literal["ok", "failed"]
    handoffs: int = 0
    pages: int = 0
    """Pages that were moved."""
    moved_bytes: int = 0
    prefix_tokens: int = 0
    """Tokens that were not moved, as decode held them already."""
    took_s: float = 0.0
    ahead_pages: int = 0
    """Of the pages, those that left before they were sent."""
    handover_s: float = 0.0
    """Of took_s, what the hand-offs themselves took, beside finding pages for them and computing them."""

    @classmethod
    def kind(cls, ended: Ended) -> HandoffTotals:
        """The sum, still empty, that this hand-off belongs to."""
        return cls(ended.prefill, ended.transport, "failed" if ended.reason else "ok")

    def plus(self, ended: Ended) -> HandoffTotals:
        """The sum with one more hand-off. Of one that failed, nothing counts as moved or as held already."""
        moved = self.outcome == "ok"
        return msgspec.structs.replace(
            self,
            handoffs=self.handoffs + 1,
            pages=self.pages + (ended.pages if moved else 0),
            moved_bytes=self.moved_bytes + (ended.moved_bytes if moved else 0),
            prefix_tokens=self.prefix_tokens + (ended.prefix_tokens if moved else 0),
            took_s=self.took_s + ended.took_s,
            ahead_pages=self.ahead_pages + (ended.ahead_pages if moved else 0),
            handover_s=self.handover_s + (ended.handover_s if moved else 0.0),
        )


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has to give, and has not given away: on an idle one whose cache was flushed, as at its start."""

    free_tokens: int
    """KV slots that neither a request nor the cache has."""
    free_requests: int
    """Slots of running requests."""
    free_rows: int = 0
    """Auxiliary rows of hand-offs."""
    rooms: int = 0
    """Hand-offs that are spoken of and not over."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's own account of its load, read from its load endpoint."""

    running_requests: int = 0
    waiting_requests: int = 0
    waiting_uncached_tokens: int = 0
    used_tokens: int = 0
    """KV slots in use by running requests and by the cache."""
    silent_s: float = 0.0
    """Since its scheduler last gave a sign of life. It does so between any two steps, and at least once a second."""
    pools: Pools | None = None
    """None where the engine has not said."""


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """Who a worker is. All of it is read back from the engine, none of it is typed twice."""

    version: int = VERSION
    worker: str
    epoch: int
    """Nanoseconds since 1970 when this life of the worker began: a restarted worker is a new one."""
    role: Role
    state: WorkerState
    url: str
    """The engine's HTTP address, http://host:port."""
    handoff_host: str = ""
    handoff_port: int = 0
    """Where a prefill worker takes hand-off connections; 0 for decode."""
    events: str
    """ZeroMQ address of the PUB socket."""
    replay: str
    """ZeroMQ address of the ROUTER socket."""
    model: str
    """The name under which the model is served."""
    revision: str = ""
    page_tokens: int
    kv_dtype: str
    capacity_tokens: int
    """KV slots, in tokens."""
    max_context_tokens: int
    ungranted_tokens: int = 0
    """Of a prompt, so many does a prefill worker compute before decode has to have granted pages; 0: it does not begin
    without."""
    sequence: int = 0
    """Last page-event sequence published: a router that stands below it has missed the tail."""
    held_pages: int = 0
    audit_s: float = 0.0
    """An `Audit` is published this often, so silence says that the router is cut off; 0: never."""
    load: Load = Load()
    handoffs: list[HandoffTotals] = []
    """Of a decode worker: what was handed over to it in this epoch, one sum for each kind."""
    lease_s: float = 5.0
    """The router forgets the worker when it has not been renewed for so long."""
    leaving: bool = False
    """Says goodbye: forget this epoch at once."""


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """The router's answer to a registration."""

    version: int = VERSION
    router: str
    """An id of this life of the router; a new one has to be told nothing else, it asks for a snapshot."""
    drain: bool | None = None
    """Whether the worker shall drain; None: nobody asked."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Somebody who has the cluster's key asks a router about one of its workers. A registration is none of these."""

    version: int = VERSION
    worker: str
    drain: bool = True
    """False: it shall take requests again."""
    move: bool = False
    """Requests that it still has shall go on elsewhere now, where they can."""


_batch_encoder = msgspec.msgpack.Encoder()
encode = _batch_encoder.encode
"""Any message of this module as msgpack. Safe to call from several threads."""

decode_page_message = msgspec.msgpack.Decoder(PageMessage).decode
"""bytes -> Batch | Snapshot | CaughtUp. Raises msgspec.ValidationError or DecodeError."""

decode_published = msgspec.msgpack.Decoder(Published).decode
"""bytes -> Batch | Audit | Handoffs. Raises msgspec.ValidationError or DecodeError."""

decode_page_request = msgspec.msgpack.Decoder(PageRequest).decode
"""bytes -> PageRequest. Raises msgspec.ValidationError or DecodeError."""


def bound_host(host: str, epoch: int) -> str:
    """`bootstrap_host` of a request that is meant for one life of a prefill worker, and for no other: EPOCH@HOST.

    SGLang hands it on without looking into it.
    """
    return f"{epoch}@{host}"


def parse_bound_host(text: str) -> tuple[str, int | None]:
    """The host, and the epoch where one is given: another router may not know of epochs. Raises ValueError."""
    epoch, _, host = text.rpartition("@")
    return host, int(epoch) if epoch else None
