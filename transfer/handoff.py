"""What prefill and decode say to each other on a hand-off connection.

Decode connects to prefill. Both prove that they hold the cluster's key, describe
their pools, and prefill chooses the transport: the first of decode's offers that it
can reach.

    prefill ── Challenge ──────────────────> decode
    decode  ── Hello(proof, pool, offers) ─> prefill
    prefill ── Welcome(proof, transport) ──> decode           or Refused(reason), then it closes
    decode  ── Grant(room, pages) ─────────> prefill          where this request's pages shall go
    prefill ── Chunk(room, …) [+ pages] ───> decode           written (shm), or following the frame (tcp)
    prefill ── Last(room, …) + aux rows ───> decode           the first token and its company
    decode  ── Ack(room) ──────────────────> prefill          this, and only this, is success
    either  ── Stop(room, reason) ─────────> the other        answered by Stopped(room): no write follows
    both    ── Ping ───────────────────────> the other        silence for too long is a lost peer

A frame is a length (uint32), the length of the payload behind it (uint64), the message in
msgpack, the payload.
"""

from __future__ import annotations

import struct

import msgspec

from transfer.layout import PoolLayout
from transfer.pool import SharedAddress

VERSION = 1
FRAME = struct.Struct("<IQ")
MAX_MESSAGE_BYTES = 1 << 20
"""A longer message is a broken or hostile peer; payloads (pages) are not counted."""
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
    shared: SharedAddress | None

    def signed(self) -> bytes:
        """The bytes that the proof covers: all but the proof."""
        return msgspec.msgpack.encode(msgspec.structs.replace(self, proof=b""))


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    proof: bytes
    worker: str
    epoch: int
    transport: str
    reason: str
    """Why not a transport that decode preferred; empty where the first one was taken."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    reason: str


class Grant(msgspec.Struct, frozen=True, array_like=True, tag="grant"):
    room: int
    pages: bytes
    """Destination pages, int32 little-endian, in the order of the prompt, after the prefix that decode has."""
    prefix_tokens: int
    """Tokens at the start of the prompt that decode already holds: they are not sent."""


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    room: int
    first: int
    """Index of the chunk's first page in the granted list."""
    count: int


class Last(msgspec.Struct, frozen=True, array_like=True, tag="last"):
    room: int
    pages: int
    """Pages sent in all: decode checks it against what it granted."""


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    room: int


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    room: int
    reason: str


class Stopped(msgspec.Struct, frozen=True, array_like=True, tag="stopped"):
    room: int


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    pass


Message = Challenge | Hello | Welcome | Refused | Grant | Chunk | Last | Ack | Stop | Stopped | Ping

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
DecodeError = msgspec.MsgspecError
"""What `decode` raises for bytes that are no message."""
