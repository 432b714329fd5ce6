"""Records that a GPU writes, read in order: here numpy stands for the GPU and writes at the places that it is told."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.landed_ring import RECORDS, SIZE_BYTES, NoRing, RingAddress, RingReader, RingWriter, record


class Gpu:
    """Writes records where a writer says, as the kernel does."""

    def __init__(self, writer: RingWriter) -> None:
        self._writer = writer
        self._words = np.frombuffer(writer._words, np.uint64)
        self._late: list[tuple[int, int, int, int]] = []

    def launch(self, tag: int, pages: int) -> None:
        sequence, offset = self._writer.next()
        self._late.append((offset, tag, pages, sequence))

    def finish(self, count: int) -> list[tuple[int, int]]:
        done, self._late = self._late[:count], self._late[count:]
        for offset, tag, pages, sequence in done:
            self._words[offset // 8 : offset // 8 + 2] = record(sequence, tag, pages)
        return [(tag, pages) for _, tag, pages, _ in done]


def test_an_address_that_leads_elsewhere_is_none() -> None:
    reader = RingReader()
    for address in (
        RingAddress("/proc/1/fd/1", b""),
        RingAddress("elsewhere", reader.address.token),
        RingAddress(reader.address.path, b"x" * 32),
    ):
        with pytest.raises(NoRing, match=r"^ring: "):
            RingWriter(address)
    reader.close()


def test_the_whole_begins_at_a_memory_page() -> None:
    """A GPU is given whole ones."""
    reader = RingReader()
    assert RingWriter(reader.address).pointer % mmap.PAGESIZE == 0
    assert SIZE_BYTES % mmap.PAGESIZE == 0
    reader.close()


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 4)), max_size=60))
def test_what_has_landed_is_read_once_and_in_order(work: list[tuple[int, int, int]]) -> None:
    reader = RingReader()
    gpu = Gpu(RingWriter(reader.address))
    for tag, pages, finished in work:
        gpu.launch(tag, pages)
        assert reader.take() == []
        assert reader.take() + gpu.finish(0) == []
        done = gpu.finish(finished)
        assert reader.take() == done
    assert gpu.finish(len(work)) == reader.take()
    reader.close()


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1))
def test_a_record_of_which_one_word_is_there_is_none(tag: int, pages: int) -> None:
    """Nothing says which of the two comes first."""
    for late in range(2):
        reader = RingReader()
        writer = RingWriter(reader.address)
        sequence, offset = writer.next()
        words, place = record(sequence, tag, pages), offset // 8
        writer._words[place + 1 - late] = words[1 - late]
        assert reader.take() == []
        writer._words[place + late] = words[late]
        assert reader.take() == [(tag, pages)]
        reader.close()


def test_sequences_outlast_the_bits_that_a_record_has_for_them() -> None:
    reader = RingReader()
    gpu = Gpu(RingWriter(reader.address))
    for turn in range(2**16 // RECORDS + 2):
        for number in range(RECORDS):
            gpu.launch(turn, number)
        assert reader.take() == []
        assert gpu.finish(RECORDS) == reader.take()
    reader.close()


def test_no_record_takes_the_place_of_one_that_nobody_has_read() -> None:
    reader = RingReader()
    writer = RingWriter(reader.address)
    gpu = Gpu(writer)
    for turn in range(3):
        for number in range(RECORDS):
            assert not writer.full
            gpu.launch(turn, number)
        assert writer.full
        assert gpu.finish(RECORDS) == reader.take()
    assert not writer.full
    reader.close()
