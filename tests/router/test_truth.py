"""Sums of an answer that do not add up are found."""

from __future__ import annotations

import pytest

from router.answer import Usage
from router.truth import untrue


@pytest.mark.parametrize(
    ("usage", "ids", "reason", "asked", "wrong"),
    [
        (None, [1, 2], "length", 4, ""),
        (Usage(2, 4), [1, 2], "length", 4, ""),
        (Usage(2, 3), [1, 2], "stop", 4, ""),
        (Usage(9, 3), None, "stop", None, ""),
        (Usage(3, 4), [1, 2], "length", 4, "computed 3 tokens of a prompt of 2"),
        (Usage(2, 5), [1, 2], "stop", 4, "made 5 tokens where at most 4 were asked for"),
        (Usage(2, 3), [1, 2], "length", 4, "ended for its length after 3 of 4 tokens"),
    ],
)
def test_sums_are_compared_with_what_was_asked_for(
    usage: Usage | None, ids: list[int] | None, reason: str, asked: int | None, wrong: str
) -> None:
    assert untrue(usage, ids, reason, asked) == wrong
