"""The courier runs what it is given, in order, whoever gives it and whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from transfer.courier import Courier


@pytest.fixture
def courier() -> Iterator[Courier]:
    made = Courier("test")
    yield made
    made.close()


def test_calls_of_several_threads_all_run_and_each_threads_in_order(courier: Courier) -> None:
    ran: list[tuple[int, int]] = []
    over = threading.Event()

    def give(thread: int) -> None:
        for number in range(2000):
            courier.call(ran.append, (thread, number))

    threads = [threading.Thread(target=give, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    courier.call(over.set)
    assert over.wait(10)

    assert len(ran) == 8000
    for owner in range(4):
        assert [number for giver, number in ran if giver == owner] == list(range(2000))


def test_a_call_that_raises_keeps_none_of_the_others_from_running(courier: Courier) -> None:
    ran: list[int] = []
    over = threading.Event()

    def burst() -> None:
        for number in range(5):
            courier.call(int, "no number")
            courier.call(ran.append, number)
        courier.call(over.set)

    courier.call(burst)

    assert over.wait(10)
    assert ran == list(range(5))


def test_a_closed_courier_does_nothing() -> None:
    courier = Courier("test")
    courier.close()
    courier.close()
    courier.call(pytest.fail, "it ran")
