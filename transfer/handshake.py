"""The beginning of a hand-off connection: who are you, do our pages fit, which way do they go.

Both sides hold the cluster's key and prove it with a MAC over both nonces; nothing else is
answered before. What does not fit is refused with the difference spelled out.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import msgspec

from transfer import handoff
from transfer.auth import ClusterKey
from transfer.connection import Connection, PeerLost
from transfer.layout import PoolLayout
from transfer.transport import Landing, Lanes, Route, Transport, Unreachable, Wire

_DECODE, _PREFILL = "handoff-decode", "handoff-prefill"
_LANE, _LANE_OPEN = "handoff-lane", "handoff-lane-open"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Identity:
    """This side of every connection."""

    worker: str
    epoch: int
    key: ClusterKey
    layout: PoolLayout


# Prefill.


@dataclass(frozen=True)
class Guest:
    """A decode worker that was let in."""

    hello: handoff.Hello
    proof: bytes
    """This side's, made for that worker's nonce."""


async def admit(connection: Connection, me: Identity) -> Guest | handoff.Lane:
    """Lets in who holds the key and whose pages fit. Raises PeerLost, after saying why to a peer that may know."""
    nonce = secrets.token_bytes(handoff.NONCE_BYTES)
    await connection.send(handoff.Challenge(handoff.VERSION, nonce))
    match await connection.receive():
        case handoff.Lane() as lane:
            wanted = me.key.mac(_LANE, nonce, lane.nonce, lane.token)
            await _prove(connection, wanted, lane.proof)
            await connection.send(handoff.LaneOpen(me.key.mac(_LANE_OPEN, lane.nonce, nonce, lane.token)))
            return lane
        case handoff.Hello() as hello:
            await _prove(connection, me.key.mac(_DECODE, nonce, hello.nonce, hello.signed()), hello.proof)
            connection.trust()
            if hello.version != handoff.VERSION:
                await _refuse(connection, f"version: wanted {handoff.VERSION}, found {hello.version}")
            if difference := me.layout.mismatch(hello.layout):
                await _refuse(connection, difference)
            return Guest(hello, me.key.mac(_PREFILL, hello.nonce, nonce))
        case other:
            raise PeerLost(f"handshake: wanted Hello or Lane, found {type(other).__name__}")


async def reach(
    connection: Connection, me: Identity, guest: Guest, transports: Sequence[Transport], lanes: Lanes
) -> tuple[str, Route]:
    """The first transport of decode's that leads to its pool. Raises PeerLost."""
    mine = {transport.name: transport for transport in transports}
    theirs = guest.hello.transports
    common = tuple(name for name in theirs if name in mine)
    if not common:
        await _refuse(connection, f"transports: wanted one of {', '.join(mine)}, found {', '.join(theirs)}")
    await connection.send(handoff.Welcome(guest.proof, me.worker, me.epoch, common))
    while True:
        offer = await connection.receive()
        if not isinstance(offer, handoff.Offer) or offer.transport not in mine:
            raise PeerLost(f"handshake: wanted Offer of one of {', '.join(common)}, found {offer!r:.80}")
        try:
            route = await mine[offer.transport].connect(offer.address, guest.hello.layout, lanes)
        except Unreachable as error:
            await connection.send(handoff.NotReached(str(error)))
            continue
        try:
            await connection.send(handoff.Reached())
        except BaseException:
            await route.disconnect()
            raise
        return offer.transport, route


async def _prove(connection: Connection, wanted: bytes, found: bytes) -> None:
    if not hmac.compare_digest(wanted, found):
        await _refuse(connection, "proof: wanted one made with this cluster's key")


async def _refuse(connection: Connection, reason: str) -> NoReturn:
    await connection.send(handoff.Refused(reason))
    raise PeerLost(reason)


# Decode.


async def introduce(connection: Connection, me: Identity, transports: Sequence[Transport]) -> handoff.Welcome:
    """Says who this is and hears who prefill is. Raises PeerLost, with prefill's reason where it refuses."""
    challenge = await _challenge(connection)
    nonce = secrets.token_bytes(handoff.NONCE_BYTES)
    names = tuple(transport.name for transport in transports)
    hello = handoff.Hello(handoff.VERSION, nonce, b"", me.worker, me.epoch, me.layout, names)
    proof = me.key.mac(_DECODE, challenge.nonce, nonce, hello.signed())
    await connection.send(msgspec.structs.replace(hello, proof=proof))
    welcome = await _answer(connection, handoff.Welcome)
    if not hmac.compare_digest(me.key.mac(_PREFILL, nonce, challenge.nonce), welcome.proof):
        raise PeerLost("proof: wanted one made with this cluster's key")
    connection.trust()
    return welcome


async def offer(
    connection: Connection, welcome: handoff.Welcome, transports: Sequence[Transport], wire: Wire
) -> tuple[str, Landing, str]:
    """The first transport that prefill reaches, its landing, and why no better one. Raises PeerLost."""
    reasons = [f"{one.name}: off there" for one in transports if one.name not in welcome.transports]
    for transport in transports:
        if transport.name not in welcome.transports:
            continue
        try:
            landing = await transport.land(wire)
        except Unreachable as error:
            reasons.append(str(error))
            continue
        try:
            await connection.send(handoff.Offer(transport.name, landing.describe()))
            answer = await connection.receive()
        except BaseException:
            await landing.disconnect()
            raise
        if isinstance(answer, handoff.Reached):
            return transport.name, landing, "; ".join(reasons)
        await landing.disconnect()
        if not isinstance(answer, handoff.NotReached):
            raise PeerLost(f"handshake: wanted Reached or NotReached, found {type(answer).__name__}")
        reasons.append(answer.reason)
    raise PeerLost(f"transports: wanted one that leads here, found none: {'; '.join(reasons)}")


async def open_lane(connection: Connection, key: ClusterKey, token: bytes) -> None:
    """One more connection, which belongs to whoever knows the token from here on. Raises PeerLost."""
    challenge = await _challenge(connection)
    nonce = secrets.token_bytes(handoff.NONCE_BYTES)
    await connection.send(handoff.Lane(nonce, key.mac(_LANE, challenge.nonce, nonce, token), token))
    answer = await _answer(connection, handoff.LaneOpen)
    if not hmac.compare_digest(key.mac(_LANE_OPEN, nonce, challenge.nonce, token), answer.proof):
        raise PeerLost("proof: wanted one made with this cluster's key")


async def _challenge(connection: Connection) -> handoff.Challenge:
    challenge = await _answer(connection, handoff.Challenge)
    if challenge.version != handoff.VERSION:
        raise PeerLost(f"version: wanted {handoff.VERSION}, found {challenge.version}")
    return challenge


async def _answer(connection: Connection, kind: type[Answer]) -> Answer:
    answer = await connection.receive()
    if isinstance(answer, handoff.Refused):
        raise PeerLost(f"refused: {answer.reason}")
    if not isinstance(answer, kind):
        raise PeerLost(f"handshake: wanted {kind.__name__}, found {type(answer).__name__}")
    return answer
