"""Hostile bytes, in small: `benchmarks.handoff_fuzz` with few frames, and each finding of the large one by itself."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import zmq

from benchmarks.handoff_faults import KEY, LAYOUT
from benchmarks.handoff_fuzz import DEADLINES, fuzz
from engine.agent import Agent
from engine.spec import WorkerSpec
from transfer import handoff, wire
from transfer.auth import ClusterKey
from transfer.lanes import ParkedLanes
from transfer.lease import LeaseAddress, Leave, Withdrawn
from transfer.pool import NotShared, Pool, SharedAddress, SharedArena
from transfer.sender import Sender
from transfer.shm import ShmTransport
from transfer.tcp import TcpTransport
from transfer.transport import Unreachable

pytestmark = pytest.mark.thorough

SHORT = replace(DEADLINES, connect_s=1, memory_s=0.5)
"""The end of the run waits until prefill has forgotten what it may forget."""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_hostile_peers_harm_nobody(transport: str) -> None:
    found = fuzz(transport, 1500, 11, SHORT)

    bad = ("crashes", "hangs", "wrong_bytes", "leaked_pages", "legit_failed", "untaken")
    assert [found[name] for name in bad] == [0] * len(bad), found
    assert found["frames"] >= 1500
    assert found["legit_handoffs"] > 0
    assert found["fd_growth"] <= 4, found


@pytest.fixture
def port() -> Iterator[int]:
    pool = Pool.zeros(LAYOUT)
    sender = Sender(pool, KEY, worker="p", epoch=1, transports=[TcpTransport(pool)], deadlines=SHORT)
    yield sender.listen("127.0.0.1", 0)
    sender.close()


@pytest.mark.parametrize(
    "body",
    [b"\x93\xa4stop\x01\xa2\xff\xfe", b"\x92\xa4\xff\xfe\xff\xfe\x01", b"\x92\xa4ping" + b"\x91" * 60_000 + b"\x00"],
    ids=["text that is none", "a tag that is none", "lists in lists in lists"],
)
def test_bytes_that_are_no_message_end_the_connection_and_nothing_else(
    port: int, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), socket.create_connection(("127.0.0.1", port), 5) as hostile:
        hostile.sendall(handoff.FRAME.pack(len(body)) + body)
        while hostile.recv(1 << 16):
            pass
        gc.collect()

    assert caplog.records == []


def test_an_address_with_text_that_is_none_is_not_reached() -> None:
    path_of_bad_text = b"\x92\x94\xa4\xff\xfe\xff\xfe\xc4\x01x\x01\x91\x01\x92\xa1x\xc4\x01x"

    async def connect() -> None:
        await ShmTransport(Pool.zeros(LAYOUT)).connect(path_of_bad_text, LAYOUT, ParkedLanes(1.0, time.monotonic))

    with pytest.raises(Unreachable):
        asyncio.run(connect())


def test_a_lease_that_leads_to_a_pipe_is_refused_and_its_descriptor_given_back() -> None:
    reading, writing = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Withdrawn):
        Leave(LeaseAddress(f"/proc/{os.getpid()}/fd/{reading}", b"\0" * 32))

    assert len(os.listdir("/proc/self/fd")) == before
    os.close(reading)
    os.close(writing)


def test_memory_that_its_owner_could_take_away_is_not_mapped() -> None:
    """A write to it would kill the writer, and nobody could catch that."""
    size_bytes, token = 4096 + LAYOUT.pages * LAYOUT.bytes_per_page, bytes(range(32))
    memory = os.memfd_create("hostile")
    os.ftruncate(memory, size_bytes)
    os.pwrite(memory, token, 0)
    address = SharedAddress(
        f"/proc/{os.getpid()}/fd/{memory}", token, size_bytes, (4096, 4096 + LAYOUT.pages * LAYOUT.page_bytes[0])
    )
    with pytest.raises(NotShared):
        Pool.open_shared(LAYOUT, address)
    os.close(memory)


def test_a_pool_cannot_be_made_smaller_by_a_peer_that_maps_it() -> None:
    arena = SharedArena()
    (memory,) = arena.allocate([8192])
    path = next(
        f"/proc/self/fd/{name}"
        for name in os.listdir("/proc/self/fd")
        if "mainstem-kv" in os.readlink(f"/proc/self/fd/{name}")
    )
    with open(path, "r+b") as peer, pytest.raises(PermissionError):
        peer.truncate(0)
    assert bytes(memory) == bytes(8192)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerSpec]:
    """An agent's two ports, open."""
    with zmq.Context() as context, context.socket(zmq.PUB) as first, context.socket(zmq.PUB) as second:
        ports = [one.bind_to_random_port("tcp://127.0.0.1") for one in (first, second)]
    spec = WorkerSpec(
        name="prefill-0",
        role="prefill",
        host="127.0.0.1",
        port=1,
        events_port=ports[0],
        replay_port=ports[1],
        model_path="/model",
        served_model="m",
        page_tokens=16,
        key_file="unused",
        run_dir=str(tmp_path),
    )
    agent = Agent(spec, epoch=7, key=KEY)
    agent.start()
    yield spec
    agent.close()


def asked(spec: WorkerSpec, body: bytes, key: ClusterKey | None, timeout_s: float) -> bytes | None:
    """The answer of the agent's replay port; None where there is none."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        if key is not None:
            key.secure_client(dealer)
        dealer.connect(f"tcp://127.0.0.1:{spec.replay_port}")
        dealer.send(body)
        return dealer.recv_multipart()[-1] if dealer.poll(int(timeout_s * 1000)) else None


def test_the_agents_ports_survive_garbage_and_answer_only_who_holds_the_key(worker: WorkerSpec) -> None:
    random = Random(3)
    question = wire.encode(wire.PageRequest(0, 0))
    for port in (worker.events_port, worker.replay_port):
        for mechanism in (b"NULL", b"PLAIN", b"CURVE", b"") * 25:
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)
            with socket.create_connection(("127.0.0.1", port), 5) as hostile:
                hostile.sendall((greeting if mechanism else b"") + random.randbytes(random.randrange(300)))

    assert asked(worker, question, None, 0.5) is None
    assert asked(worker, question, ClusterKey.generate(), 0.5) is None
    answer = asked(worker, question, KEY, 10)
    assert answer is not None
    assert isinstance(wire.decode_page_message(answer), wire.Snapshot)


def test_a_page_request_that_is_none_is_not_the_replay_ports_last(worker: WorkerSpec) -> None:
    asked(worker, b"\x93\xa2\xff\xfe\x01\x01", KEY, 0.5)

    assert asked(worker, wire.encode(wire.PageRequest(0, 0)), KEY, 10) is not None
