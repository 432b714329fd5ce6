"""Pages from one pool to another, over every transport, and what each side sees when the other is gone."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from transfer import handoff
from transfer.auth import ClusterKey
from transfer.bell import Bell
from transfer.deadlines import Deadlines
from transfer.eager import EagerTransport
from transfer.ended import Ended
from transfer.held import HeldTransport
from transfer.layout import PoolLayout
from transfer.pool import NotShared, Pool, SharedAddress, SharedArena
from transfer.receiver import Receiver
from transfer.sender import Sender
from transfer.session import TERMINAL, ReceiverState, SenderState
from transfer.transport import Transport
from transfer.transports import make

LAYOUT = PoolLayout(
    model="m", dtype="float32", page_tokens=16, page_bytes=(256, 512), aux_row_bytes=(64, 128), pages=64
)
AUX_LAYOUT = PoolLayout(model="", dtype="", page_tokens=1, page_bytes=(64, 128), aux_row_bytes=(), pages=4)
AUX = [b"a" * 64, b"b" * 128]
KEY = ClusterKey(bytes(range(32)))
QUICK = Deadlines(connect_s=2, ping_s=0.05, silence_s=1.0, handoff_s=5, fence_s=1)
TRANSPORTS = [("shm", "tcp"), ("tcp",)]


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.002)


def filled(seed: int) -> Pool:
    pool = Pool.zeros(LAYOUT)
    random = np.random.default_rng(seed)
    for buffer in pool.buffers:
        buffer[:] = random.integers(0, 256, buffer.shape, np.uint8)
    return pool


def made(names: tuple[str, ...], pool: Pool, shared: SharedAddress | None) -> list[Transport]:
    return make(names, pool, shared=shared, tcp_lanes=2, nixl_devices=("lo",), stall_s=QUICK.silence_s)


class Pair:
    """A prefill and a decode side in this process, joined by real sockets."""

    def __init__(
        self,
        transports: tuple[str, ...],
        *,
        key: ClusterKey = KEY,
        layout: PoolLayout = LAYOUT,
        deadlines: Deadlines = QUICK,
        sharing: bool = True,
        eager: bool = False,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """on_change: of prefill's rooms, in place of its bell"""
        self.source = filled(1)
        self.writers = [HeldTransport(one) for one in made(transports, self.source, None)]
        self.eager = [EagerTransport(one) for one in self.writers] if eager else []
        self.prefill_bell, self.decode_bell = Bell(), Bell()
        self.sender = Sender(
            self.source,
            KEY,
            worker="prefill-0",
            epoch=1,
            transports=self.eager or self.writers,
            deadlines=deadlines,
            on_change=on_change or self.prefill_bell.ring,
        )
        self.port = self.sender.listen("127.0.0.1", 0)
        self.destination, address = SharedArena().pool(layout)
        self.aux = Pool.zeros(AUX_LAYOUT)
        self.ended: list[Ended] = []
        self.receiver = Receiver(
            self.destination,
            self.aux,
            key,
            worker="decode-0",
            epoch=2,
            transports=made(transports, self.destination, address if sharing else None),
            deadlines=deadlines,
            on_end=self.ended.append,
            on_change=self.decode_bell.ring,
        )

    def open(self, room: int) -> None:
        self.receiver.open(room, "127.0.0.1", self.port)
        eventually(lambda: self.receiver.state(room) is not ReceiverState.CONNECTING)

    def begin(self, room: int, destination: list[int], *, prefix_tokens: int = 0) -> None:
        self.open(room)
        self.sender.offer(room)
        self.receiver.grant(room, np.array(destination, np.int32), 1, prefix_tokens)
        eventually(lambda: self.sender.state(room) is SenderState.GRANTED)

    def landed(self, source: list[int], destination: list[int]) -> bool:
        return all(
            bool((mine[destination] == theirs[source]).all())
            for mine, theirs in zip(self.destination.buffers, self.source.buffers, strict=True)
        )

    def hold(self) -> None:
        for writer in self.writers:
            writer.hold()

    def wait_held(self) -> None:
        eventually(lambda: any(writer.held.is_set() for writer in self.writers))

    def release(self) -> None:
        for writer in self.writers:
            writer.release()

    def close(self) -> None:
        self.release()
        self.receiver.close()
        self.sender.close()


@pytest.fixture(params=TRANSPORTS, ids=["shm", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


def pages(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


class Step:
    """A step on a GPU, that ends when it is told to."""

    def __init__(self) -> None:
        self.over = False

    def reached(self) -> bool:
        return self.over


def test_no_page_is_named_to_prefill_before_what_may_write_there_is_over(pair: Pair) -> None:
    step = Step()
    pair.open(7)
    pair.sender.offer(7)
    pair.receiver.grant(7, pages(40), 1, 0, step)
    time.sleep(0.05)
    assert (pair.receiver.state(7), pair.sender.state(7)) == (ReceiverState.READY, SenderState.OFFERED)
    step.over = True
    eventually(lambda: pair.sender.state(7) is SenderState.GRANTED)
    pair.sender.send(7, pages(5), AUX)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)
    assert pair.landed([5], [40])


def test_a_room_that_fails_before_its_pages_were_named_waits_for_nobody(pair: Pair) -> None:
    step = Step()
    pair.open(7)
    pair.sender.offer(7)
    pair.receiver.grant(7, pages(40), 1, 0, step)
    pair.receiver.fail(7, "gave up")
    assert pair.receiver.state(7) is ReceiverState.FAILED
    eventually(lambda: pair.sender.state(7) is SenderState.FAILED)
    step.over = True
    time.sleep(0.02)
    assert pair.receiver.state(7) is ReceiverState.FAILED


def test_chunks_land_where_decode_said_and_success_is_its_acknowledgement(pair: Pair) -> None:
    pair.begin(7, [40, 41, 3, 9, 10], prefix_tokens=32)
    assert pair.sender.prefix_tokens(7) == 32

    pair.sender.send(7, pages(1, 2, 3))
    pair.sender.send(7, pages(30, 20), AUX)

    eventually(lambda: pair.sender.state(7) is SenderState.DONE)
    assert pair.receiver.state(7) is ReceiverState.DONE
    assert pair.landed([1, 2, 3, 30, 20], [40, 41, 3, 9, 10])
    assert [bytes(row) for row in pair.aux.views([(1, 1)])] == AUX
    assert pair.sender.sent_bytes(7) == 5 * LAYOUT.bytes_per_page


def wait_rung(bell: Bell, side: Sender | Receiver, room: int, wanted: SenderState | ReceiverState) -> None:
    """As a scheduler waits that looks only when it is rung for."""
    while side.state(room) is not wanted:
        ready, _, _ = select.select([bell], [], [], 5.0)
        assert ready, "the state is another one, or will never be, and nobody rang"
        bell.silence()


def test_whoever_looks_only_when_the_bell_rings_sees_every_state(pair: Pair) -> None:
    receiver, sender = pair.receiver, pair.sender
    for room, failing in ((1, False), (2, True), (3, False)):
        receiver.open(room, "127.0.0.1", pair.port)
        wait_rung(pair.decode_bell, receiver, room, ReceiverState.READY)
        sender.offer(room)
        receiver.grant(room, pages(room, 10 + room), 1, 0)
        wait_rung(pair.prefill_bell, sender, room, SenderState.GRANTED)
        sender.send(room, pages(1))
        if failing:
            sender.fail(room, "request aborted")
            wait_rung(pair.decode_bell, receiver, room, ReceiverState.FAILED)
        else:
            sender.send(room, pages(2), AUX)
            wait_rung(pair.decode_bell, receiver, room, ReceiverState.DONE)
            wait_rung(pair.prefill_bell, sender, room, SenderState.DONE)
    sender.close()
    receiver.open(4, "127.0.0.1", pair.port)
    wait_rung(pair.decode_bell, receiver, 4, ReceiverState.FAILED)


def test_a_scheduler_that_sees_a_grant_at_once_sees_all_of_it() -> None:
    """It reads states without the lock: it may look in the very moment in which the state is another one."""
    seen: list[tuple[SenderState, int]] = []
    joined = Pair(("shm",), on_change=lambda: seen.append((joined.sender.state(7), joined.sender.prefix_tokens(7))))
    joined.begin(7, [40, 41], prefix_tokens=32)
    joined.close()
    assert (SenderState.GRANTED, 32) in seen
    assert (SenderState.GRANTED, 0) not in seen


def test_only_the_pages_that_were_granted_are_written(pair: Pair) -> None:
    pair.begin(7, [40])
    pair.sender.send(7, pages(1), AUX)
    eventually(lambda: pair.sender.state(7) is SenderState.DONE)

    others = [page for page in range(LAYOUT.pages) if page != 40]
    assert not any(buffer[others].any() for buffer in pair.destination.buffers)


def test_a_prompt_that_decode_holds_already_moves_no_page_and_still_its_first_token(pair: Pair) -> None:
    pair.begin(7, [])

    pair.sender.send(7, pages(), AUX)

    eventually(lambda: pair.sender.state(7) is SenderState.DONE)
    assert [bytes(row) for row in pair.aux.views([(1, 1)])] == AUX


def test_the_grant_may_come_before_the_offer(pair: Pair) -> None:
    pair.open(7)
    pair.receiver.grant(7, pages(5), 1, 0)
    eventually(lambda: pair.sender.state(7) is SenderState.RESERVED)

    pair.sender.offer(7)

    assert pair.sender.state(7) is SenderState.GRANTED


def test_many_hand_offs_at_once_do_not_mix(pair: Pair) -> None:
    rooms = range(1, 21)
    for room in rooms:
        pair.begin(room, [room, room + 30])
    for room in rooms:
        pair.sender.send(room, pages(63 - room))
    for room in rooms:
        pair.sender.send(room, pages(room), AUX)

    eventually(lambda: all(pair.sender.state(room) is SenderState.DONE for room in rooms))
    assert all(pair.landed([63 - room, room], [room, room + 30]) for room in rooms)


def test_more_pages_than_granted_fail_the_hand_off_and_write_nothing(pair: Pair) -> None:
    pair.begin(7, [40])

    pair.sender.send(7, pages(1, 2), AUX)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert "wanted at most the 1 granted ones, found 2" in pair.receiver.reason(7)
    assert not any(buffer.any() for buffer in pair.destination.buffers)


def test_fewer_pages_than_granted_are_not_passed_off_as_success(pair: Pair) -> None:
    pair.begin(7, [40, 41])

    pair.sender.send(7, pages(1), AUX)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert "wanted 2, found 1 written of 1 announced" in pair.receiver.reason(7)


def test_an_abort_on_prefill_reaches_decode_with_its_reason(pair: Pair) -> None:
    pair.begin(7, [40, 41])
    pair.sender.send(7, pages(1))

    pair.sender.fail(7, "request aborted")

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert pair.receiver.reason(7) == "prefill worker prefill-0: request aborted"


@pytest.mark.parametrize("aborting", ["decode", "prefill", "both"])
def test_pages_come_free_only_after_the_writer_stopped(pair: Pair, aborting: str) -> None:
    """A write is held in the middle; the hand-off is aborted, and its pages go to another request."""
    pair.begin(7, [40, 41])
    pair.hold()
    pair.sender.send(7, pages(1, 2), AUX)
    pair.wait_held()

    if aborting != "prefill":
        pair.receiver.fail(7, "request aborted")
    if aborting != "decode":
        pair.sender.fail(7, "request aborted")

    time.sleep(0.1)
    assert pair.receiver.state(7) not in TERMINAL
    pair.release()
    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    for buffer in pair.destination.buffers:
        buffer[[40, 41]] = 7
    time.sleep(0.2)
    assert all(bool((buffer[[40, 41]] == 7).all()) for buffer in pair.destination.buffers)
    assert pair.sender.state(7) is SenderState.FAILED


def test_a_room_that_prefill_gave_up_answers_a_late_grant_at_once(pair: Pair) -> None:
    pair.open(7)
    pair.sender.offer(7)
    pair.sender.fail(7, "request aborted")
    pair.sender.forget(7)

    pair.receiver.grant(7, pages(40), 1, 0)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED, within_s=QUICK.handoff_s / 2)
    assert "request aborted" in pair.receiver.reason(7)


def test_a_grant_that_comes_twice_or_too_late_fails_its_room_and_raises_nothing(pair: Pair) -> None:
    pair.begin(7, [40])
    pair.receiver.grant(7, pages(41), 1, 0)
    pair.receiver.grant(8, pages(41), 1, 0)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert "wanted an event that fits GRANTED, found GRANTED" in pair.receiver.reason(7)
    assert pair.receiver.state(8) is ReceiverState.FAILED


def test_a_grant_for_a_page_outside_decodes_own_pool_is_refused(pair: Pair) -> None:
    pair.open(7)
    with pytest.raises(ValueError, match="wanted indices from 0 to 63"):
        pair.receiver.grant(7, pages(64), 1, 0)


@pytest.mark.parametrize("prefix_tokens", [-LAYOUT.page_tokens, LAYOUT.page_tokens + 1])
def test_a_prefix_that_is_not_whole_pages_fails_the_hand_off_and_nothing_else(pair: Pair, prefix_tokens: int) -> None:
    pair.open(7)
    pair.sender.offer(7)
    pair.receiver.grant(7, pages(40), 1, prefix_tokens)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert pair.sender.prefix_tokens(7) == 0
    pair.begin(8, [41])
    pair.sender.send(8, pages(1), AUX)
    eventually(lambda: pair.receiver.state(8) is ReceiverState.DONE)


def test_a_hand_off_that_does_not_end_fails_at_its_deadline_on_both_sides() -> None:
    pair = Pair(("tcp",), deadlines=replace(QUICK, handoff_s=0.2))
    pair.begin(7, [40])

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    eventually(lambda: pair.sender.state(7) is SenderState.FAILED)

    assert "not over after" in pair.receiver.reason(7)
    assert "not over after" in pair.sender.reason(7)
    pair.close()


def test_the_time_that_decode_takes_to_find_pages_is_not_the_hand_offs() -> None:
    pair = Pair(("tcp",), deadlines=replace(QUICK, handoff_s=0.2))
    pair.open(7)
    pair.sender.offer(7)
    time.sleep(0.5)

    pair.receiver.grant(7, pages(40), 1, 0)
    eventually(lambda: pair.sender.state(7) is SenderState.GRANTED)
    pair.sender.send(7, pages(1), AUX)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)
    pair.close()


@pytest.mark.parametrize("host", ["not an address", "x" * 70, "127.0.0.1\0"])
def test_an_address_that_is_none_fails_its_room(pair: Pair, host: str) -> None:
    pair.receiver.open(7, host, 70_000)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert "cannot reach the prefill worker" in pair.receiver.reason(7)


def test_strangers_that_say_nothing_do_not_keep_a_peer_out(pair: Pair) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", pair.port)))
        time.sleep(0.2)
        first = [room for room in range(10, 13) if not pair.receiver.open(room, "127.0.0.1", pair.port)]
        assert first == []
    eventually(lambda: pair.receiver.state(10) in TERMINAL or pair.receiver.state(10) is ReceiverState.READY)
    pair.begin(7, [40])
    pair.sender.send(7, pages(1), AUX)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)


def test_a_room_that_another_decode_worker_has_is_refused_to_this_one_and_nobody_is_lost(pair: Pair) -> None:
    pair.begin(7, [40])
    pool, address = SharedArena().pool(LAYOUT)
    names = tuple(writer.name for writer in pair.writers)
    other = Receiver(
        pool,
        Pool.zeros(AUX_LAYOUT),
        KEY,
        worker="decode-1",
        epoch=3,
        transports=made(names, pool, address),
        deadlines=QUICK,
    )
    other.open(7, "127.0.0.1", pair.port)
    other.open(8, "127.0.0.1", pair.port)
    eventually(lambda: other.state(8) is ReceiverState.READY)

    other.grant(7, pages(41), 1, 0)

    eventually(lambda: other.state(7) is ReceiverState.FAILED)
    assert "decode worker decode-0 has this room" in other.reason(7)
    assert other.state(8) is ReceiverState.READY
    pair.sender.send(7, pages(1), AUX)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)
    other.close()


def test_a_room_belongs_to_one_request_and_a_second_one_harms_nobody(pair: Pair) -> None:
    pair.begin(7, [40])

    assert not pair.sender.offer(7)
    assert not pair.receiver.open(7, "127.0.0.1", pair.port)

    pair.sender.send(7, pages(1), AUX)
    eventually(lambda: pair.sender.state(7) is SenderState.DONE)
    assert not pair.sender.offer(7)


def test_a_room_is_remembered_as_long_as_its_request_asks_for_it() -> None:
    pair = Pair(("tcp",), deadlines=replace(QUICK, memory_s=0.0))
    pair.begin(7, [40])
    pair.sender.fail(7, "request aborted")
    time.sleep(4 * QUICK.ping_s)  # several sweeps

    assert pair.sender.state(7) is SenderState.FAILED
    assert pair.receiver.state(7) is ReceiverState.FAILED
    pair.sender.forget(7)
    eventually(lambda: pair.sender.state(7) is SenderState.ABSENT)
    pair.close()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"page_tokens": 32}, "page_tokens: wanted 16, found 32"),
        ({"dtype": "bfloat16"}, "dtype: wanted float32, found bfloat16"),
        ({"model": "other"}, "model: wanted m, found other"),
        ({"page_bytes": (256, 256)}, r"page_bytes: wanted \(256, 512\), found \(256, 256\)"),
    ],
)
def test_a_peer_whose_pages_do_not_fit_is_refused_with_the_difference(
    change: dict[str, object], difference: str
) -> None:
    pair = Pair(("tcp",), layout=msgspec.structs.replace(LAYOUT, **change))
    pair.open(7)

    assert pair.receiver.state(7) is ReceiverState.FAILED

    assert re.search(difference, pair.receiver.reason(7))
    pair.close()


def test_pools_of_different_size_fit() -> None:
    pair = Pair(("shm",), layout=msgspec.structs.replace(LAYOUT, pages=200))
    pair.begin(7, [199])
    pair.sender.send(7, pages(63), AUX)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)
    assert pair.landed([63], [199])
    pair.close()


def test_a_peer_without_the_clusters_key_is_refused() -> None:
    pair = Pair(("tcp",), key=ClusterKey.generate())
    pair.open(7)

    assert pair.receiver.state(7) is ReceiverState.FAILED
    assert "proof: wanted one made with this cluster's key" in pair.receiver.reason(7)
    pair.close()


def test_nobody_there_fails_at_once_and_the_next_attempt_is_a_fresh_one() -> None:
    pair = Pair(("tcp",))
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    pair.receiver.open(7, "127.0.0.1", port)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    assert f"cannot reach the prefill worker at 127.0.0.1:{port}" in pair.receiver.reason(7)

    source = filled(1)
    transports = made(("tcp",), source, None)
    late = Sender(source, KEY, worker="prefill-1", epoch=9, transports=transports, deadlines=QUICK)
    late.listen("127.0.0.1", port)
    pair.receiver.open(8, "127.0.0.1", port)

    eventually(lambda: pair.receiver.state(8) is ReceiverState.READY)
    late.close()
    pair.close()


def test_garbage_on_the_port_harms_nobody(pair: Pair) -> None:
    pair.begin(7, [40])
    random = np.random.default_rng(3)
    for size in (0, 1, 12, 200, 5000):
        with socket.create_connection(("127.0.0.1", pair.port)) as hostile:
            hostile.sendall(random.bytes(size))

    pair.sender.send(7, pages(1), AUX)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)


@pytest.mark.parametrize(
    "body", [b"\x93\xa4stop\x01\xa2\xff\xfe", b"\x92\xa4ping" + b"\x91" * 60_000 + b"\x00"], ids=["no text", "deep"]
)
def test_a_message_that_is_none_ends_its_connection_quietly(pair: Pair, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", pair.port)) as hostile:
        hostile.settimeout(5)
        hostile.sendall(handoff.FRAME.pack(len(body)) + body)
        while hostile.recv(4096):
            pass
    pair.begin(7, [40])
    pair.sender.send(7, pages(1), AUX)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)


def test_a_write_that_takes_longer_than_the_silence_is_no_loss(pair: Pair) -> None:
    pair.begin(7, [40, 41])
    pair.hold()
    pair.sender.send(7, pages(1, 2), AUX)

    time.sleep(1.5 * QUICK.silence_s)
    pair.release()

    eventually(lambda: pair.receiver.state(7) in TERMINAL)
    assert pair.receiver.state(7) is ReceiverState.DONE


def test_a_room_bound_for_another_life_of_the_prefill_worker_fails_at_once(pair: Pair) -> None:
    for room, epoch in ((7, 1), (8, 999), (9, 0)):
        pair.receiver.open(room, "127.0.0.1", pair.port, epoch)
        eventually(lambda room=room: pair.receiver.state(room) is not ReceiverState.CONNECTING)  # type: ignore[misc]

    for room, wanted in ((8, 999), (9, 0)):
        assert pair.receiver.state(room) is ReceiverState.FAILED
        assert f"prefill-0 was restarted: wanted epoch {wanted}, found 1" in pair.receiver.reason(room)
    assert pair.receiver.state(7) is ReceiverState.READY
    pair.sender.offer(7)
    pair.receiver.grant(7, pages(40), 1, 0)
    eventually(lambda: pair.sender.state(7) is SenderState.GRANTED)
    pair.sender.send(7, pages(1), AUX)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)


def test_a_later_life_takes_the_place_of_one_that_nobody_has_missed_yet() -> None:
    """The old process hangs with its connection open, as behind a host that vanished; a new one has its port."""
    pair = Pair(("tcp",), deadlines=replace(QUICK, silence_s=30.0))
    pair.begin(7, [40])
    listener = socket.create_server(("127.0.0.1", 0))
    old, new = pair.port, listener.getsockname()[1]
    listener.close()
    source = filled(1)
    later = Sender(source, KEY, worker="prefill-0", epoch=5, transports=made(("tcp",), source, None), deadlines=QUICK)
    later.listen("127.0.0.1", new)
    # The same address for both: what a restart on the same port looks like to decode.
    pair.receiver._peers[("127.0.0.1", new)] = pair.receiver._peers.pop(("127.0.0.1", old))
    pair.receiver._peers[("127.0.0.1", new)].address = ("127.0.0.1", new)

    pair.receiver.open(8, "127.0.0.1", new, 5)

    eventually(lambda: pair.receiver.state(8) is ReceiverState.READY)
    eventually(lambda: pair.receiver.state(7) is ReceiverState.FAILED)
    later.close()
    pair.close()


def test_every_end_is_told_once_with_what_it_came_to(pair: Pair) -> None:
    pair.begin(7, [40, 41], prefix_tokens=32)
    pair.sender.send(7, pages(1, 2), AUX)
    eventually(lambda: len(pair.ended) == 1)
    pair.begin(8, [42])
    pair.sender.fail(8, "request aborted")
    eventually(lambda: len(pair.ended) == 2)

    done, failed = pair.ended
    assert (done.room, done.pages, done.moved_bytes) == (7, 2, 2 * LAYOUT.bytes_per_page)
    assert (done.prefix_tokens, done.reason, done.prefill) == (32, "", "prefill-0")
    assert (failed.room, failed.moved_bytes) == (8, 0)
    assert failed.reason == "prefill worker prefill-0: request aborted"
    pair.receiver.forget(7)
    pair.receiver.forget(8)
    time.sleep(3 * QUICK.ping_s)
    assert len(pair.ended) == 2


def test_its_end_tells_where_the_time_went(pair: Pair) -> None:
    pair.open(7)
    pair.sender.offer(7)
    time.sleep(0.03)
    pair.receiver.grant(7, pages(40, 41), 1, 0)
    eventually(lambda: pair.sender.state(7) is SenderState.GRANTED)
    pair.sender.send(7, pages(1))
    time.sleep(0.06)
    pair.hold()
    pair.sender.send(7, pages(2), AUX)
    pair.wait_held()
    time.sleep(0.09)
    pair.release()
    eventually(lambda: len(pair.ended) == 1)

    (done,) = pair.ended
    assert done.opening_s >= 0.03
    assert done.computing_s >= 0.06
    assert done.writing_s >= 0.09
    assert done.handover_s >= 0.09
    assert done.took_s == pytest.approx(done.opening_s + done.computing_s + done.handover_s)


@pytest.mark.thorough
def test_a_frozen_prefill_that_goes_on_writes_into_no_page_that_was_given_away() -> None:
    """A child process holds its write, is frozen past the silence, and goes on when its pages are another's."""
    root = str(Path(__file__).parents[2])
    for transports in TRANSPORTS:
        with ExitStack() as stack:
            program = FROZEN_PROCESS.format(root=root, transports=transports)
            prefill = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(prefill.kill)
            assert prefill.stdout is not None
            port = int(prefill.stdout.readline())
            pair = Pair(transports)
            stack.callback(pair.close)
            pair.receiver.open(7, "127.0.0.1", port)
            eventually(lambda pair=pair: pair.receiver.state(7) is ReceiverState.READY)  # type: ignore[misc]
            pair.receiver.grant(7, pages(40, 41), 1, 0)
            assert prefill.stdout.readline() == "held\n"

            os.kill(prefill.pid, signal.SIGSTOP)
            eventually(lambda pair=pair: pair.receiver.state(7) is ReceiverState.FAILED)  # type: ignore[misc]
            for buffer in pair.destination.buffers:
                buffer[[40, 41]] = 7
            os.kill(prefill.pid, signal.SIGCONT)

            assert prefill.stdout.readline() == "over\n"
            assert all(bool((buffer[[40, 41]] == 7).all()) for buffer in pair.destination.buffers)


def test_shared_memory_of_another_process_is_refused_without_its_token() -> None:
    _pool, address = SharedArena().pool(LAYOUT)
    with pytest.raises(NotShared, match="not the peer's memory"):
        Pool.open_shared(LAYOUT, msgspec.structs.replace(address, token=b"x" * 32))
    with pytest.raises(NotShared, match="wanted /proc/PROCESS/fd/NUMBER"):
        Pool.open_shared(LAYOUT, msgspec.structs.replace(address, path="/dev/zero"))
    with pytest.raises(NotShared, match="No such file"):
        Pool.open_shared(LAYOUT, msgspec.structs.replace(address, path="/proc/1/fd/987654"))


def test_where_memory_cannot_be_shared_tcp_takes_over_and_says_why() -> None:
    pair = Pair(("shm", "tcp"), sharing=False)  # as a decode worker on another host
    pair.begin(7, [40])
    pair.sender.send(7, pages(1), AUX)

    eventually(lambda: pair.receiver.state(7) is ReceiverState.DONE)
    assert pair.landed([1], [40])
    pair.close()


FROZEN_PROCESS = """
import sys, time
import numpy as np
sys.path.insert(0, {root!r})
from transfer.auth import ClusterKey
from transfer.bell import Bell
from transfer.deadlines import Deadlines
from transfer.eager import EagerTransport
from transfer.held import HeldTransport
from transfer.layout import PoolLayout
from transfer.pool import Pool
from transfer.sender import Sender
from transfer.session import SenderState
from transfer.transports import make
pool = Pool.zeros(PoolLayout("m", "float32", 16, (256, 512), (64, 128), 64))
transports = make({transports!r}, pool, shared=None, tcp_lanes=2, nixl_devices=("lo",), stall_s=1.0)
held = [HeldTransport(one) for one in transports]
sender = Sender(pool, ClusterKey(bytes(range(32))), worker="prefill-0", epoch=1, transports=held,
                deadlines=Deadlines(ping_s=0.05))
for one in held:
    one.hold()
print(sender.listen("127.0.0.1", 0), flush=True)
sender.offer(7)
while sender.state(7) is not SenderState.GRANTED:
    time.sleep(0.001)
sender.send(7, np.array([1, 2], np.int32), [b"a" * 64, b"b" * 128])
while not any(one.held.is_set() for one in held):
    time.sleep(0.001)
print("held", flush=True)
time.sleep(0.5)  # Frozen here.
for one in held:
    one.release()
while sender.state(7) is not SenderState.FAILED:
    time.sleep(0.001)
time.sleep(0.2)
print("over", flush=True)
"""
PREFILL_PROCESS = """
import sys, time
sys.path.insert(0, {root!r})
from transfer.auth import ClusterKey
from transfer.bell import Bell
from transfer.deadlines import Deadlines
from transfer.layout import PoolLayout
from transfer.pool import Pool
from transfer.sender import Sender
from transfer.transports import make
pool = Pool.zeros(PoolLayout("m", "float32", 16, (256, 512), (64, 128), 64))
transports = make({transports!r}, pool, shared=None, tcp_lanes=2, nixl_devices=("lo",), stall_s=1.0)
sender = Sender(pool, ClusterKey(bytes(range(32))), worker="prefill-0", epoch=1,
                transports=transports, deadlines=Deadlines(ping_s=0.05))
print(sender.listen("127.0.0.1", 0), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("transports", TRANSPORTS, ids=["shm", "tcp"])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_decode_notices_a_prefill_process_that_is_gone(transports: tuple[str, ...], kill: signal.Signals) -> None:
    root = str(Path(__file__).parents[2])
    program = PREFILL_PROCESS.format(root=root, transports=transports)
    with ExitStack() as stack:
        prefill = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        )
        stack.callback(prefill.kill)
        stack.callback(os.kill, prefill.pid, signal.SIGCONT)
        assert prefill.stdout is not None
        port = int(prefill.stdout.readline())
        pair = Pair(transports)
        stack.callback(pair.close)
        pair.receiver.open(7, "127.0.0.1", port)
        eventually(lambda: pair.receiver.state(7) is ReceiverState.READY)
        pair.receiver.grant(7, pages(40), 1, 0)

        os.kill(prefill.pid, kill)

        eventually(lambda: pair.receiver.state(7) in TERMINAL, within_s=QUICK.silence_s + 3)
        assert "lost prefill worker prefill-0" in pair.receiver.reason(7)
