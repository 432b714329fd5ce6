"""Pages that leave while they are computed: a sender on whose route they do, and what it does about those that change.

`EagerTransport` stands for a GPU that copies whatever is in a page at that time. What real GPUs do: test_nvlink.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.test_handoff import AUX, LAYOUT, Pair, eventually
from transfer.computed import Computed
from transfer.plan import Pages
from transfer.sender import Going
from transfer.session import ReceiverState, SenderState

ROOM = 7
LOOKED_S = 0.01
"""By then a sender has looked whether a pass is nearly over."""
NOW = Computed(before=None, done=None)


class Said:
    """A mark that is reached when that is said."""

    def __init__(self, now: bool = False) -> None:
        self.now = now

    def reached(self) -> bool:
        return self.now

    @property
    def computed(self) -> Computed:
        """A pass that is soon over from then on."""
        return Computed(before=None, done=None, soon=self)


@pytest.fixture
def pair() -> Iterator[Pair]:
    one = Pair(("shm",), eager=True)
    yield one
    one.close()


def pages(*numbers: int) -> Pages:
    return np.array(numbers, np.int32)


def compute(pair: Pair, *numbers: int) -> None:
    """Other bytes than those that were there before."""
    for buffer in pair.source.buffers:
        buffer[list(numbers)] += 1


def ahead(pair: Pair, *numbers: int) -> None:
    """All of them fresh."""
    pair.sender.ahead([Going(ROOM, pages(*numbers), len(numbers))], NOW)


def done(pair: Pair, room: int = ROOM) -> None:
    eventually(lambda: pair.receiver.state(room) is ReceiverState.DONE)


def test_pages_that_went_ahead_are_confirmed_and_not_written_again(pair: Pair) -> None:
    pair.begin(ROOM, [10, 11, 12])
    assert pair.sender.goes_ahead(ROOM)
    ahead(pair, 1, 2, 3)
    eventually(lambda: pair.landed([1, 2, 3], [10, 11, 12]))
    assert pair.receiver.state(ROOM) is ReceiverState.GRANTED, "nobody is told before they are sent"
    pair.sender.send(ROOM, pages(1, 2, 3), AUX)
    done(pair)
    assert (pair.eager[0].confirmed_pages, pair.eager[0].written_pages) == (3, 0)
    assert pair.sender.sent_bytes(ROOM) == 3 * LAYOUT.bytes_per_page
    eventually(lambda: bool(pair.ended))
    assert (pair.ended[0].ahead_pages, pair.ended[0].pages) == (3, 3)


def test_a_page_that_is_another_by_the_time_it_is_sent_is_written_again(pair: Pair) -> None:
    """The cache held the same tokens already: the request's own page was freed, and filled by somebody else."""
    pair.begin(ROOM, [10, 11, 12])
    ahead(pair, 1, 2, 3)
    eventually(lambda: pair.landed([1, 2, 3], [10, 11, 12]))
    compute(pair, 2)
    pair.sender.send(ROOM, pages(1, 5, 3), AUX)
    done(pair)
    assert pair.landed([1, 5, 3], [10, 11, 12])
    assert (pair.eager[0].confirmed_pages, pair.eager[0].again_pages) == (2, 1)
    assert pair.eager[0].written_pages == 0, "that may overtake what went ahead"


def test_chunks_go_ahead_of_those_before_them(pair: Pair) -> None:
    """A pass may be computed while the one before it is not sent yet: its pages come again with the next."""
    pair.begin(ROOM, [10, 11, 12, 13])
    ahead(pair, 1, 2)
    ahead(pair, 1, 2, 3, 4)
    pair.sender.send(ROOM, pages(1, 2))
    pair.sender.send(ROOM, pages(3, 4), AUX)
    done(pair)
    assert pair.landed([1, 2, 3, 4], [10, 11, 12, 13])
    assert pair.eager[0].confirmed_pages == 4


@pytest.mark.parametrize("count", [0, 4], ids=["none", "too many"])
def test_what_was_not_granted_does_not_go_ahead(pair: Pair, count: int) -> None:
    pair.begin(ROOM, [10, 11, 12])
    before = [buffer.copy() for buffer in pair.destination.buffers]
    ahead(pair, *range(1, 1 + count))
    pair.sender.send(ROOM, pages(1, 2, 3), AUX)
    done(pair)
    assert pair.eager[0].confirmed_pages == 0
    for now, then in zip(pair.destination.buffers, before, strict=True):
        assert np.array_equal(np.delete(now, [10, 11, 12], axis=0), np.delete(then, [10, 11, 12], axis=0))


def test_a_page_that_is_none_does_not_go_ahead_and_fails_its_room_when_it_is_sent(pair: Pair) -> None:
    pair.begin(ROOM, [10])
    ahead(pair, LAYOUT.pages)
    assert pair.sender.state(ROOM) is SenderState.GRANTED
    pair.sender.send(ROOM, pages(LAYOUT.pages), AUX)
    assert pair.sender.state(ROOM) is SenderState.FAILED
    assert str(LAYOUT.pages) in pair.sender.reason(ROOM)


def test_nothing_goes_ahead_of_a_room_that_is_not_granted_or_has_ended(pair: Pair) -> None:
    pair.open(ROOM)
    pair.sender.offer(ROOM)
    assert pair.sender.goes_ahead(ROOM), "it may be granted by the time that its pages are computed"
    ahead(pair, 1)
    pair.receiver.grant(ROOM, pages(10), 1, 0)
    eventually(lambda: pair.sender.state(ROOM) is SenderState.GRANTED)
    pair.sender.fail(ROOM, "gave up")
    assert not pair.sender.goes_ahead(ROOM)
    before = pair.destination.buffers[0].copy()
    ahead(pair, 1)
    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.FAILED)
    assert np.array_equal(pair.destination.buffers[0], before)


def test_requests_of_one_pass_leave_together(pair: Pair) -> None:
    """A layer of the second must not wait for the last layer of the first. One that has ended is left out."""
    for number in range(3):
        pair.begin(ROOM + number, [10 + number])
    pair.sender.fail(ROOM + 2, "gave up")
    pair.sender.ahead([Going(ROOM + number, pages(1 + number), 1) for number in range(3)], NOW)
    eventually(lambda: pair.landed([1, 2], [10, 11]))
    assert pair.eager[0].ahead_writes == [2]
    for number in range(2):
        pair.sender.send(ROOM + number, pages(1 + number), AUX)
        done(pair, ROOM + number)
    assert pair.eager[0].confirmed_pages == 2


def test_a_route_that_writes_what_is_computed_lets_nothing_go_ahead() -> None:
    pair = Pair(("shm",))
    try:
        pair.begin(ROOM, [10])
        assert not pair.sender.goes_ahead(ROOM)
        ahead(pair, 1)
        pair.sender.send(ROOM, pages(1), AUX)
        done(pair)
        assert pair.landed([1], [10])
    finally:
        pair.close()


def test_nothing_is_asked_of_a_route_before_the_pass_is_soon_over(pair: Pair) -> None:
    """And by then decode may have granted pages that it had not."""
    soon = Said()
    pair.begin(ROOM, [10, 11])
    pair.open(ROOM + 1)
    pair.sender.offer(ROOM + 1)
    pair.sender.ahead([Going(ROOM, pages(1, 2), 2), Going(ROOM + 1, pages(3), 1)], soon.computed)
    pair.receiver.grant(ROOM + 1, pages(12), 1, 0)
    eventually(lambda: pair.sender.state(ROOM + 1) is SenderState.GRANTED)
    assert pair.eager[0].ahead_writes == []
    soon.now = True
    eventually(lambda: pair.landed([1, 2, 3], [10, 11, 12]))
    assert pair.eager[0].ahead_writes == [3]
    pair.sender.send(ROOM, pages(1, 2), AUX)
    pair.sender.send(ROOM + 1, pages(3), AUX)
    done(pair)
    done(pair, ROOM + 1)
    assert (pair.eager[0].confirmed_pages, pair.eager[0].written_pages) == (3, 0)


def test_what_earlier_passes_have_computed_does_not_wait_for_this_one(pair: Pair) -> None:
    soon = Said()
    pair.begin(ROOM, [10, 11, 12])
    pair.sender.ahead([Going(ROOM, pages(1, 2, 3), 1)], soon.computed)
    eventually(lambda: pair.landed([1, 2], [10, 11]))
    soon.now = True
    eventually(lambda: pair.landed([3], [12]))
    assert pair.eager[0].ahead_writes == [2, 1]
    pair.sender.send(ROOM, pages(1, 2, 3), AUX)
    done(pair)
    assert pair.eager[0].confirmed_pages == 3


def test_of_a_prompt_whose_beginning_decode_holds_the_rest_goes_where_it_was_granted(pair: Pair) -> None:
    """Also where that is granted while the pass is computed."""
    soon = Said()
    pair.open(ROOM)
    pair.sender.offer(ROOM)
    pair.sender.ahead([Going(ROOM, pages(1, 2, 3, 4), 3)], soon.computed)
    pair.receiver.grant(ROOM, pages(12, 13), 1, 2 * LAYOUT.page_tokens)
    eventually(lambda: pair.sender.state(ROOM) is SenderState.GRANTED)
    before = [buffer.copy() for buffer in pair.destination.buffers]
    soon.now = True
    eventually(lambda: pair.landed([3, 4], [12, 13]))
    pair.sender.send(ROOM, pages(3, 4), AUX)
    done(pair)
    assert (pair.eager[0].ahead_writes, pair.eager[0].confirmed_pages) == ([2], 2)
    for now, then in zip(pair.destination.buffers, before, strict=True):
        assert np.array_equal(np.delete(now, [12, 13], axis=0), np.delete(then, [12, 13], axis=0))


def test_of_a_chunk_that_decode_holds_nothing_goes(pair: Pair) -> None:
    soon = Said()
    pair.open(ROOM)
    pair.sender.offer(ROOM)
    pair.sender.ahead([Going(ROOM, pages(1, 2), 2)], soon.computed)
    pair.receiver.grant(ROOM, pages(12, 13), 1, 2 * LAYOUT.page_tokens)
    eventually(lambda: pair.sender.state(ROOM) is SenderState.GRANTED)
    soon.now = True
    pair.sender.ahead([Going(ROOM, pages(1, 2, 3, 4), 2)], NOW)
    eventually(lambda: pair.landed([3, 4], [12, 13]))
    pair.sender.send(ROOM, pages(3, 4), AUX)
    done(pair)
    assert (pair.eager[0].ahead_writes, pair.eager[0].confirmed_pages) == ([2], 2)


@pytest.mark.parametrize("how", ["failed", "forgotten", "given up by decode", "not granted"])
def test_a_room_that_is_over_when_the_pass_nearly_is_gets_nothing(pair: Pair, how: str) -> None:
    soon = Said()
    pair.begin(ROOM + 1, [20])
    if how == "not granted":
        pair.open(ROOM)
        pair.sender.offer(ROOM)
    else:
        pair.begin(ROOM, [10])
    before = pair.destination.buffers[0][10].copy()
    pair.sender.ahead([Going(ROOM, pages(1), 1), Going(ROOM + 1, pages(2), 1)], soon.computed)
    if how == "failed":
        pair.sender.fail(ROOM, "gave up")
    elif how == "forgotten":
        pair.sender.forget(ROOM)
    elif how == "given up by decode":
        pair.receiver.fail(ROOM, "gave up")
        eventually(lambda: pair.sender.state(ROOM) is SenderState.FAILED)
    soon.now = True
    eventually(lambda: pair.landed([2], [20]))
    assert pair.eager[0].ahead_writes == [1]
    assert np.array_equal(pair.destination.buffers[0][10], before)


def test_nobody_waits_for_a_pass_all_of_whose_rooms_are_over(pair: Pair) -> None:
    class Counted(Said):
        looks = 0

        def reached(self) -> bool:
            self.looks += 1
            return False

    soon = Counted()
    pair.begin(ROOM, [10])
    pair.sender.ahead([Going(ROOM, pages(1), 1)], soon.computed)
    eventually(lambda: soon.looks > 2)
    pair.sender.fail(ROOM, "gave up")
    looks = soon.looks
    time.sleep(0.1)
    assert soon.looks <= looks + 2


def test_what_was_sent_before_the_pass_was_known_to_be_soon_over_does_not_go_ahead(pair: Pair) -> None:
    soon = Said()
    pair.begin(ROOM, [10, 11, 12])
    pair.sender.ahead([Going(ROOM, pages(1, 2, 3), 3)], soon.computed)
    pair.sender.send(ROOM, pages(1, 2))
    soon.now = True
    eventually(lambda: pair.eager[0].ahead_writes == [1])
    pair.sender.send(ROOM, pages(3), AUX)
    done(pair)
    assert pair.landed([1, 2, 3], [10, 11, 12])


def test_pages_that_are_sent_early_wait_until_they_are_computed(pair: Pair) -> None:
    computed = Said()
    pair.begin(ROOM, [10, 11])
    pair.sender.send(ROOM, pages(1), after=computed)
    pair.begin(ROOM + 1, [12])
    compute(pair, 1)
    assert pair.eager[0].written_pages == 0
    computed.now = True
    pair.sender.send(ROOM, pages(2), AUX)
    done(pair)
    assert pair.landed([1, 2], [10, 11])


def test_a_room_that_ends_while_its_pages_are_not_computed_holds_nothing_up(pair: Pair) -> None:
    pair.begin(ROOM, [10, 11])
    pair.sender.send(ROOM, pages(1), after=Said())
    pair.sender.fail(ROOM, "aborted")
    pair.begin(ROOM + 1, [12])
    pair.sender.send(ROOM + 1, pages(3), AUX)
    done(pair, ROOM + 1)
    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.FAILED)


def test_a_stop_waits_for_what_is_computed_and_nobody_waits_for_the_stop(pair: Pair) -> None:
    pair.begin(ROOM, [10])
    pair.begin(ROOM + 1, [11])
    pair.eager[0].computed.clear()
    ahead(pair, 1)
    pair.receiver.fail(ROOM, "gave up")
    eventually(lambda: pair.sender.state(ROOM) is SenderState.FAILED)
    pair.sender.send(ROOM + 1, pages(2), AUX)
    done(pair, ROOM + 1)
    assert pair.receiver.state(ROOM) is ReceiverState.STOPPING, "its page may still be written to"
    pair.eager[0].computed.set()
    eventually(lambda: pair.receiver.state(ROOM) is ReceiverState.FAILED)


def test_many_stops_wait_together(pair: Pair) -> None:
    rooms = range(ROOM, ROOM + 20)
    for number, room in enumerate(rooms):
        pair.begin(room, [10 + number])
    pair.eager[0].computed.clear()
    for room in rooms:
        pair.receiver.fail(room, "gave up")
    eventually(lambda: all(pair.sender.state(room) is SenderState.FAILED for room in rooms))
    pair.eager[0].computed.set()
    eventually(lambda: all(pair.receiver.state(room) is ReceiverState.FAILED for room in rooms))
    assert pair.eager[0].settlings <= 3


class _Shared:
    """One pair for all of hypothesis's examples: to connect takes longer than an example."""

    def __init__(self) -> None:
        self.pair = Pair(("shm",), eager=True)
        self.room = 0


@pytest.fixture(scope="module")
def shared() -> Iterator[_Shared]:
    one = _Shared()
    yield one
    one.pair.close()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_goes_ahead_what_was_sent_is_what_lands(shared: _Shared, data: st.DataObject) -> None:
    pair = shared.pair
    shared.room += 1
    room = shared.room
    count = data.draw(st.integers(1, 12), "pages")
    destination = data.draw(st.permutations(range(1, LAYOUT.pages)), "destination")[:count]
    sent = data.draw(st.permutations(range(1, LAYOUT.pages)), "source")[:count]
    pair.begin(room, destination)
    start, passes = 0, []
    while start < count:
        end = data.draw(st.integers(start + 1, count), "end")
        if data.draw(st.booleans(), "ahead"):
            until = data.draw(st.integers(0, count), "until")
            guess = [
                data.draw(st.sampled_from([page, 1 + page % (LAYOUT.pages - 1)]), "guess") for page in sent[:until]
            ]
            fresh = data.draw(st.integers(0, until), "fresh")
            passes.append(Said(data.draw(st.booleans(), "soon over")))
            pair.sender.ahead([Going(room, np.array(guess, np.int32), fresh)], passes[-1].computed)
        last = end == count
        pair.sender.send(room, np.array(sent[start:end], np.int32), AUX if last else None)
        start = end
        for one in passes:
            one.now = one.now or data.draw(st.booleans(), "by now")
    done(pair, room)
    written = len(pair.eager[0].ahead_writes)
    for one in passes:
        one.now = True
    time.sleep(LOOKED_S)
    assert len(pair.eager[0].ahead_writes) == written
    assert pair.landed(sent, destination)
    pair.receiver.forget(room)
    pair.sender.forget(room)
