"""Prefill on one worker and decode on another gives the very tokens that one SGLang gives by itself.

References come from a monolithic run that nothing disturbs, at temperature 0, with
log-probabilities. Where the two best tokens are closer than 1e-3 at any compared
position, float arithmetic may rightly choose either, so such a prompt is replaced
before anything is compared, and how many were is printed.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.handoff_aborts import disturb
from benchmarks.reference import OUTPUT_TOKENS, Reference, find_references, generate
from engine.launch.cluster import Cluster
from tests.cluster.conftest import monolithic, started

SHORT = 25
LONG_LENGTHS = (330, 500, 760, 1200, 1900, 3000)
ABORTS = 30


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    chooser = random.Random(11)
    lengths = [chooser.randint(5, 299) for _ in range(SHORT)] + list(LONG_LENGTHS)
    with started(monolithic(), tmp_path_factory.mktemp("mono")) as cluster:
        worker = cluster.plan.workers[0]
        url = f"http://{worker.host}:{worker.port}"
        found, replaced = find_references(url, worker.served_model, lengths)
    print(f"references: {len(found)} prompts, {replaced} near ties replaced before the comparison")
    assert all(len(reference.tokens) == OUTPUT_TOKENS for reference in found)
    return found


def differing(cluster: Cluster, references: list[Reference]) -> list[int]:
    """Lengths of the prompts whose output is another through the router, prefill and decode."""

    def differs(reference: Reference) -> bool:
        choice = generate(cluster.url, cluster.plan.router.model, reference.prompt)
        return (choice["logprobs"]["tokens"], choice["text"]) != (reference.tokens, reference.text)

    with ThreadPoolExecutor(3) as pool:
        return [
            len(reference.prompt)
            for reference, other in zip(references, pool.map(differs, references), strict=True)
            if other
        ]


def test_outputs_are_the_monolithic_ones_cold(live: Cluster, references: list[Reference]) -> None:
    assert len(references[:-1]) >= 30
    assert differing(live, references[:-1]) == []


def test_outputs_are_the_monolithic_ones_with_cached_prefixes(live: Cluster, references: list[Reference]) -> None:
    """Prefill computes little more than the last page, decode holds the rest, and is sent only what it lacks."""
    assert differing(live, references[:-1]) == []


def test_outputs_differ_when_one_landed_page_is_corrupted(live: Cluster, references: list[Reference]) -> None:
    """The comparison can fail: one page of one prompt, changed after it landed, is seen in the output."""
    reference = references[-1]
    pool = DecodePool(live)
    before = pool.first_buffer()
    corrupted = threading.Event()

    def corrupt_once_landed() -> None:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and not corrupted.is_set():
            landed = np.flatnonzero((pool.first_buffer() != before).any(axis=1))
            if len(landed) >= len(reference.prompt) // pool.page_tokens:
                pool.corrupt(int(landed[0]))
                corrupted.set()
            time.sleep(0.005)

    watcher = threading.Thread(target=corrupt_once_landed)
    watcher.start()
    different = differing(live, [reference])
    watcher.join()

    assert corrupted.is_set()
    assert different == [len(reference.prompt)]


def test_outputs_stay_the_same_while_others_are_aborted(live: Cluster, references: list[Reference]) -> None:
    """On either worker alone, on both, or by a client that hangs up; `benchmarks.handoff_aborts` does it 500 times."""
    tally = disturb(live, references[:8], ABORTS, seed=3)

    assert sum(tally.aborts.values()) >= ABORTS
    assert tally.compared >= 8
    assert (tally.different, tally.hangs, dict(tally.failed)) == (0, 0, {})


class DecodePool:
    """The decode worker's KV pool, seen from outside: the memory that prefill workers write into."""

    HEADER_BYTES = mmap.PAGESIZE

    def __init__(self, cluster: Cluster) -> None:
        decode = next(worker for worker in cluster.plan.workers if worker.role == "decode")
        self.page_tokens = decode.page_tokens
        path = self._memory_file(cluster.workers[decode.name])
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)
        token_bytes, buffers = 3 * 64 * 4, 60  # SmolLM2-135M: 3 KV heads of 64 float32, K and V of 30 layers
        self._page_bytes = self.page_tokens * token_bytes
        self._stride_bytes = (len(self._memory) - self.HEADER_BYTES) // buffers
        self._buffers = buffers
        self._pages = self._stride_bytes // self._page_bytes

    def first_buffer(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A copy of the first layer's K, shape (pages, bytes)."""
        return self._buffer(0).copy()

    def corrupt(self, page: int) -> None:
        for buffer in range(self._buffers):
            self._buffer(buffer)[page] ^= 0x80  # the sign of every fourth byte's number, and some of its digits

    def _buffer(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        whole = np.frombuffer(self._memory, np.uint8)
        start = self.HEADER_BYTES + index * self._stride_bytes
        return whole[start : start + self._pages * self._page_bytes].reshape(self._pages, self._page_bytes)

    @staticmethod
    def _memory_file(pid: int) -> Path:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if "memfd:mainstem-kv" in os.readlink(link):
                    return link
        raise AssertionError("the decode worker has no shared pool")
