"""Which tokens an event of a stream is: none is told twice, none before its text is whole."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.token_marks import INCOMPLETE, MORE, Marks, Whole

TEXT = "a é 你 🙂 ok"
BYTES = TEXT.encode()


def decode(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def test_a_token_that_ends_within_a_character_waits_for_the_rest() -> None:
    whole = Whole(decode)
    ends = [place for place in range(1, len(BYTES) + 1) if whole(BYTES[:place])]

    assert ends == [place for place in range(1, len(BYTES) + 1) if not decode(BYTES[:place]).endswith(INCOMPLETE)]
    assert len(ends) == len(TEXT)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), st.lists(st.booleans(), min_size=30, max_size=30))
def test_what_is_told_is_every_token_once_and_text_of_whole_characters(steps: list[int], sent: list[bool]) -> None:
    marks, told, reached = Marks(Whole(decode)), list[int](), 0
    for size, is_sent in zip(steps, sent, strict=False):
        reached = min(len(BYTES), reached + size)
        mark = marks.reached(list(BYTES[:reached]), finished=False)
        if not is_sent:
            # A step without text makes no event, and so tells nothing.
            continue
        marks.told()
        if mark != MORE:
            told += map(int, mark.removeprefix("mainstem: ").strip().split(","))
        assert bytes(told) == BYTES[: len(told)]
        assert not decode(told).endswith(INCOMPLETE)


def test_the_last_event_of_an_answer_and_one_that_says_nothing_new_have_more_to_come() -> None:
    marks = Marks(Whole(decode))
    assert marks.reached(b"ab", finished=False) == "mainstem: 97,98\n"
    marks.told()
    assert marks.reached(b"ab", finished=False) == MORE
    marks.told()
    assert marks.reached(b"abc", finished=True) == MORE
