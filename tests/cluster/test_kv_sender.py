"""What SGLang's prefill is told of decode's grant by our end of it, and what becomes of a grant that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.transfer.test_handoff import AUX, LAYOUT, Pair, eventually, pages
from transfer.session import ReceiverState, SenderState

pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

ROOM, PAGE = 7, LAYOUT.page_tokens


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(("tcp",))
    yield made
    made.close()


def granted(pair: Pair, destination: list[int], prefix_tokens: int) -> Any:
    """SGLang's end of a request whose pages decode has granted."""
    from engine.sglang_handoff import MainstemKVSender

    manager: Any = SimpleNamespace(sender=pair.sender, epoch=1, worker="prefill-0", aux_row=lambda _row: AUX)
    prefill = MainstemKVSender(manager, f"1@127.0.0.1:{pair.port}", ROOM, [0], 0)
    pair.open(ROOM)
    pair.receiver.grant(ROOM, pages(*destination), 1, prefix_tokens)
    eventually(lambda: pair.sender.state(ROOM) is SenderState.GRANTED)
    return prefill


def test_what_decode_holds_of_a_prompt_is_not_sent_and_the_rest_ends_it(pair: Pair) -> None:
    prefill = granted(pair, [3, 4], 2 * PAGE)
    assert prefill.pop_decode_prefix_len() == 2 * PAGE

    prefill.init(2, 0)
    prefill.send(pages(1))
    prefill.send(pages(2))

    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.DONE)
    assert pair.landed([1, 2], [3, 4])


def test_a_prefix_that_is_longer_than_the_prompt_fails_the_request_on_both_sides_at_once(pair: Pair) -> None:
    """No pages are left to be sent, and so none would be the last."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    prefill = granted(pair, [3], 9 * PAGE)

    # Of a prompt of two pages.
    prefill.init(2 - 9, 0)

    assert prefill.poll() == KVPoll.Failed
    assert pair.sender.reason(ROOM) == f"prefix_tokens: wanted no more than the prompt has, found {9 * PAGE}"
    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.FAILED)
    assert "wanted no more than the prompt has" in pair.receiver.reason(ROOM)
