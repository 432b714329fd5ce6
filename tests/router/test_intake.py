"""In which order requests that come at once are read and sent."""

from __future__ import annotations

import asyncio

from router.intake import MOST_IN_ORDER, Intake


async def sent(number: int, log: list[str]) -> None:
    """As a leg is: it takes a turn of the event loop to begin, and one to write."""
    await asyncio.sleep(0)
    log.append(f"sent {number}")


async def served(intake: Intake, number: int, log: list[str]) -> None:
    await intake.turn()
    log.append(f"read {number}")
    await asyncio.create_task(sent(number, log))


def test_each_is_sent_before_the_next_is_read() -> None:
    async def scenario() -> list[str]:
        intake, log = Intake(), list[str]()
        await asyncio.gather(*(served(intake, number, log) for number in range(5)))
        return log

    assert asyncio.run(scenario()) == [f"{what} {number}" for number in range(5) for what in ("read", "sent")]


def test_one_that_gives_up_waiting_holds_nobody_up() -> None:
    async def scenario() -> list[str]:
        intake, log = Intake(), list[str]()
        tasks = [asyncio.create_task(served(intake, number, log)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
            # And one that comes later is not kept by any of them.
            await served(intake, 4, log)
        return log

    assert [one for one in asyncio.run(scenario()) if one[:4] == "read"] == ["read 0", "read 2", "read 3", "read 4"]


def test_of_too_many_the_rest_do_not_wait() -> None:
    async def scenario() -> list[str]:
        intake, log = Intake(), list[str]()
        many = range(MOST_IN_ORDER + 10)
        await asyncio.gather(*(served(intake, number, log) for number in many))
        assert sorted(log) == sorted(f"{what} {number}" for number in many for what in ("read", "sent"))
        return log

    # One has its turn, and so many wait.
    first = [f"read {number}" for number in (0, *range(MOST_IN_ORDER + 1, MOST_IN_ORDER + 10))]
    assert asyncio.run(scenario())[: len(first)] == first
