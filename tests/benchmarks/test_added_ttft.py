"""In which order a cell is measured, and what is counted."""

from __future__ import annotations

import pytest

from benchmarks.added_ttft import CHURN, LARGE_REPEATS, Ask, Cell, Handoffs, Taken, Text, Way, measure, row, ttfts
from benchmarks.client import Answer


class Fake:
    """Ways whose answers take as many seconds as their number says; `ids` takes no text."""

    def __init__(self, *names: str) -> None:
        self.asked: list[tuple[str, Text]] = []
        self.error = ""
        self.ways = [Way(name, name, self._of(name, 1.0 + number), name != "ids") for number, name in enumerate(names)]

    def _of(self, name: str, first_s: float) -> Ask:
        def ask(prompt: Text) -> Answer:
            self.asked.append((name, prompt))
            return Answer(200, text="text", first_s=first_s, error=self.error)

        return ask


def test_ways_are_asked_in_turn_after_requests_that_do_not_count() -> None:
    fake, taken, handoffs = Fake("mono", "pair"), Taken(), Handoffs()
    measure(Cell(64), fake.ways, 3, taken, handoffs)
    assert [name for name, _ in fake.asked] == ["mono"] * 2 + ["pair"] * 2 + ["mono", "pair"] * 3
    assert ttfts("mono", Cell(64), taken) == [1.0] * 3
    assert ttfts("pair", Cell(64), taken) == [2.0] * 3
    assert len({str(prompt) for _, prompt in fake.asked}) == len(fake.asked), "a cached prompt is another measurement"
    assert all(len(prompt) == 64 for _, prompt in fake.asked)
    told = row(Cell(64), "pair", taken, handoffs)
    assert (told["ttft_ms"], told["added_ms"], told["requests"]) == (2000.0, 1000.0, 3)


def test_large_cells_are_repeated_less_and_text_goes_to_those_who_take_it() -> None:
    fake, taken = Fake("mono", "ids"), Taken()
    measure(Cell(32768, text=True), fake.ways, 9, taken, Handoffs())
    assert [name for name, _ in fake.asked] == ["mono"] * (1 + LARGE_REPEATS)
    assert all(isinstance(prompt, str) for _, prompt in fake.asked)
    assert set(taken) == {("mono", Cell(32768, text=True))}


def test_pools_are_churned_once_before_the_first_cell_that_wants_them_so() -> None:
    fake, taken = Fake("mono", "pair"), Taken()
    cell = Cell(64, at_once=8, fragmented=True)
    measure(cell, fake.ways, 2, taken, Handoffs())
    churning = len(fake.asked)
    assert churning >= 2 * (CHURN - 4) + 2 * 4 * 8
    measure(cell, fake.ways, 2, taken, Handoffs())
    assert len(fake.asked) - churning == 2 * 4 * 8


def test_a_way_that_fails_ends_it() -> None:
    fake = Fake("mono")
    fake.error = "503"
    with pytest.raises(SystemExit, match="mono: wanted a token, found 200 503"):
        measure(Cell(64), fake.ways, 1, {}, {})
