"""What prefill and decode say to each other on a hand-off connection.

Decode connects to prefill. Both prove that they hold the cluster's key and describe their
pools; then decode offers transports, the preferred one first, until prefill reaches one.

    prefill ── Challenge ──────────────────> decode
    decode  ── Hello(proof, pool, names) ──> prefill
    prefill ── Welcome(proof, names) ──────> decode           or Refused(reason), then it closes
    decode  ── Offer(transport, address) ──> prefill
    prefill ── Reached ────────────────────> decode           or NotReached(reason): decode offers the next
    decode  ── Grant(room, pages) ─────────> prefill          where this request's pages shall go
    prefill ── Chunk(room, count) ─────────> decode           so many pages are about to be written, or were just now
    prefill ── Last(room, pages, rows) ────> decode           all are written; the first token and its company
    decode  ── Ack(room) ──────────────────> prefill          this, and only this, is success
    either  ── Stop(room, reason) ─────────> the other        answered by Stopped(room): no write follows
    both    ── Ping ───────────────────────> the other        silence for too long is a lost peer

A transport may ask for more connections to the same port. They begin with a Challenge too, go on
with Lane(proof, token) and LaneOpen(proof), and belong to the transport from there on.

A frame is a length (uint32) and a message of that length in msgpack.
"""

from __future__ import annotations

import struct

import msgspec

from transfer.layout import PoolLayout

VERSION = 3
FRAME = struct.Struct("<I")
MAX_STRANGER_BYTES = 1 << 16
"""A longer message from a peer that has not proved yet who it is ends the connection."""
MAX_MESSAGE_BYTES = 1 << 26
"""A longer message from any peer does. A grant takes 4 bytes for each page of a prompt."""
NONCE_BYTES = 32


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag="challenge"):
    version: int
    nonce: bytes


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    version: int
    nonce: bytes
    proof: bytes
    worker: str
    epoch: int
    layout: PoolLayout
    transports: tuple[str, ...]
    """The preferred one first."""

    def signed(self) -> bytes:
        """The bytes that the proof covers: all but the proof."""
        return msgspec.msgpack.encode(msgspec.structs.replace(self, proof=b""))


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    proof: bytes
    worker: str
    epoch: int
    transports: tuple[str, ...]
    """Those of Hello that prefill has too, in the same order."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    reason: str


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    transport: str
    address: bytes
    """What `transfer.transport.Landing.describe` says; only the transport understands it."""


class Reached(msgspec.Struct, frozen=True, array_like=True, tag="reached"):
    pass


class NotReached(msgspec.Struct, frozen=True, array_like=True, tag="not-reached"):
    reason: str


class Lane(msgspec.Struct, frozen=True, array_like=True, tag="lane"):
    nonce: bytes
    proof: bytes
    token: bytes
    """Under which the transport's route finds this connection."""


class LaneOpen(msgspec.Struct, frozen=True, array_like=True, tag="lane-open"):
    proof: bytes


class Grant(msgspec.Struct, frozen=True, array_like=True, tag="grant"):
    room: int
    pages: bytes
    """Destination pages, int32 little-endian, in the order of the prompt, after the prefix that decode has."""
    prefix_tokens: int
    """Tokens at the start of the prompt that decode already holds: they are not sent."""


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    room: int
    count: int
    """Pages, the next ones of the granted list."""


class Last(msgspec.Struct, frozen=True, array_like=True, tag="last"):
    room: int
    pages: int
    """Pages written in all: decode checks it against what it granted."""
    rows: list[bytes]
    """The request's row of each auxiliary buffer."""
    writing_s: float = 0.0
    """How long prefill was writing pages, without the time in which it computed them. Those that left ahead add none:
    it is what the hand-off costs behind the computing, not what the link can do."""
    ahead_pages: int = 0
    """Of the pages, those that left before they were sent."""
    computing_s: float = 0.0
    """From the grant until the last pages were there to be sent: prefill's queue and its compute."""


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    room: int


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    room: int
    reason: str


class Stopped(msgspec.Struct, frozen=True, array_like=True, tag="stopped"):
    room: int


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    pass


Message = (
    Challenge
    | Hello
    | Welcome
    | Refused
    | Offer
    | Reached
    | NotReached
    | Lane
    | LaneOpen
    | Grant
    | Chunk
    | Last
    | Ack
    | Stop
    | Stopped
    | Ping
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
