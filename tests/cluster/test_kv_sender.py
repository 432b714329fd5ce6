"""What SGLang's prefill is told of decode's grant by our end of it, and what becomes of a grant that cannot be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.handoff_faults import AUX_LAYOUT, KEY, LAYOUT
from transfer.deadlines import Deadlines
from transfer.pool import Pool
from transfer.receiver import Receiver
from transfer.sender import Sender
from transfer.session import ReceiverState, SenderState
from transfer.tcp import TcpTransport

pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

ROOM, PAGE = 7, LAYOUT.page_tokens


def eventually(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until_s, "wanted within 5 s"
        time.sleep(0.002)


class Pair:
    """Prefill's end as SGLang has it, and decode's."""

    def __init__(self) -> None:
        from engine.sglang_handoff import MainstemKVSender

        pool, destination = Pool.zeros(LAYOUT), Pool.zeros(LAYOUT)
        deadlines = Deadlines()
        self.sender = Sender(
            pool, KEY, worker="prefill-0", epoch=1, transports=[TcpTransport(pool)], deadlines=deadlines
        )
        port = self.sender.listen("127.0.0.1", 0)
        self.receiver = Receiver(
            destination,
            Pool.zeros(AUX_LAYOUT),
            KEY,
            worker="decode-0",
            epoch=2,
            transports=[TcpTransport(destination)],
            deadlines=deadlines,
        )
        rows: Any = SimpleNamespace(
            sender=self.sender,
            epoch=1,
            worker="prefill-0",
            aux_row=lambda _row: [bytes(size) for size in AUX_LAYOUT.page_bytes],
        )
        self.receiver.open(ROOM, "127.0.0.1", port, 1)
        self.prefill = MainstemKVSender(rows, f"1@127.0.0.1:{port}", ROOM, [0], 0)

    def granted(self, pages: list[int], prefix_tokens: int) -> None:
        eventually(lambda: self.receiver.state(ROOM) is not ReceiverState.CONNECTING)
        self.receiver.grant(ROOM, np.array(pages, np.int32), 1, prefix_tokens)
        eventually(lambda: self.sender.state(ROOM) is SenderState.GRANTED)

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_what_decode_holds_of_a_prompt_is_not_sent_and_the_rest_ends_it(pair: Pair) -> None:
    pair.granted([3, 4], 2 * PAGE)
    assert pair.prefill.pop_decode_prefix_len() == 2 * PAGE

    pair.prefill.init(2, 0)
    pair.prefill.send(np.array([1], np.int32))
    pair.prefill.send(np.array([2], np.int32))

    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.DONE)


def test_a_prefix_that_is_longer_than_the_prompt_fails_the_request_on_both_sides_at_once(pair: Pair) -> None:
    """No pages are left to be sent, and so none would be the last."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    pair.granted([3], 9 * PAGE)

    # Of a prompt of two pages.
    pair.prefill.init(2 - 9, 0)

    assert pair.prefill.poll() == KVPoll.Failed
    assert pair.sender.reason(ROOM) == f"prefix_tokens: wanted no more than the prompt has, found {9 * PAGE}"
    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.FAILED)
    assert "wanted no more than the prompt has" in pair.receiver.reason(ROOM)
