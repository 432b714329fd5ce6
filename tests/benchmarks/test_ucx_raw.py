"""UCX by hand moves pages between processes: over host memory here, so its structures and numbers are right."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.ways import nixl_raw, ucx_raw
from benchmarks.ways.ends import HandOffFailed
from benchmarks.ways.ucx_raw import Buffers, UcxDecode, UcxPrefill
from transfer.layout import PoolLayout
from transfer.plan import Pages
from transfer.pool import Pool

PAGES, PAGE_BYTES = 64, (4096, 4096, 96 << 10)
"""One buffer's pages are longer, for which UCX has another protocol."""
ROUNDS = 3
HOST_MEMORY = {"UCX_TLS": "sm,tcp", "UCX_NET_DEVICES": "lo"}

Memory = list[npt.NDArray[np.uint8]]

pytestmark = pytest.mark.skipif(nixl_raw.package() is None, reason="NIXL's package, which brings UCX, is not installed")


@pytest.fixture(autouse=True)
def over_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_raw, "ENVIRONMENT", HOST_MEMORY)


@pytest.mark.parametrize("listed", [False, True], ids=["a call for each", "a list"])
def test_every_byte_of_every_page_is_there_when_decode_is_told(listed: bool) -> None:
    sent, landed = filled(1), filled(0)
    decode = UcxDecode(buffers_of(landed), pool_of(landed))
    with prefill_process(listed) as prefill:
        prefill.send(decode.describe())
        for round_number in range(ROUNDS):
            source, destination = chosen(round_number)
            wanted = [buffer.copy() for buffer in landed]
            for number, buffer in enumerate(wanted):
                buffer[destination] = sent[number][source]

            prefill.send(round_number)
            decode.wait(round_number)

            for found, right in zip(landed, wanted, strict=True):
                np.testing.assert_array_equal(found, right)
        prefill.send(None)
    decode.close()


def test_what_ucx_refuses_is_said_in_its_words() -> None:
    memory = filled(0)
    worker = ucx_raw._Worker(buffers_of(memory))
    try:
        with pytest.raises(HandOffFailed, match="ucp_ep_create: "):
            worker.connect(bytes(64))
    finally:
        worker.close()


@contextmanager
def prefill_process(listed: bool) -> Iterator[Connection]:
    """Another process, with a prefill end; at its end it must have been content."""
    here, there = multiprocessing.Pipe()
    command = [sys.executable, "-m", "tests.benchmarks.test_ucx_raw", str(there.fileno()), "list" if listed else "each"]
    with here, subprocess.Popen(command, pass_fds=[there.fileno()]) as process:
        there.close()
        try:
            yield here
            assert process.wait(10) == 0
        finally:
            process.kill()


def serve(connection: Connection, *, listed: bool) -> None:
    sent = filled(1)
    prefill = UcxPrefill(buffers_of(sent), connection.recv(), listed=listed)
    while (round_number := connection.recv()) is not None:
        prefill.send(round_number, *chosen(round_number))
    prefill.close()


def filled(seed: int) -> Memory:
    chooser = np.random.default_rng(seed)
    return [chooser.integers(0, 256, (PAGES, size), np.uint8) for size in PAGE_BYTES]


def chosen(seed: int) -> tuple[Pages, Pages]:
    chooser = np.random.default_rng(seed)
    source, destination = (chooser.permutation(PAGES)[: PAGES // 2].astype(np.int32) for _ in range(2))
    return source, destination


def buffers_of(memory: Memory) -> Buffers:
    return Buffers([int(buffer.ctypes.data) for buffer in memory], PAGE_BYTES, PAGES)


def pool_of(memory: Memory) -> Pool:
    return Pool.at(PoolLayout("test", "uint8", 1, PAGE_BYTES, (), PAGES), buffers_of(memory).pointers)


if __name__ == "__main__":
    ucx_raw.ENVIRONMENT = HOST_MEMORY
    serve(Connection(int(sys.argv[1])), listed=sys.argv[2] == "list")
