"""That work which holds a loop up comes behind tokens, one piece a step, and never waits for long."""

from __future__ import annotations

import asyncio

from engine import between_steps
from engine.between_steps import TURNS, BetweenSteps


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def at_once(between: BetweenSteps) -> bool:
    """Whether there is a place within a turn of the loop."""
    placing = asyncio.create_task(between.place())
    await turns(1)
    had = placing.done()
    placing.cancel()
    return had


def test_where_nothing_is_passed_on_nothing_waits() -> None:
    now_s = [100.0]

    async def placed() -> None:
        between = BetweenSteps(lambda: now_s[0])
        assert await at_once(between)
        between.stepped(goes_on=True)
        assert not await at_once(between)
        now_s[0] += 2 * between_steps.RUNNING_S
        assert await at_once(between)

    asyncio.run(placed())


def test_one_piece_of_work_a_step_in_the_order_in_which_it_came() -> None:
    async def placed() -> None:
        between, done = BetweenSteps(), []
        between.stepped(goes_on=True)

        async def work(number: int) -> None:
            await between.place()
            done.append(number)

        working = [asyncio.create_task(work(number)) for number in range(3)]
        await turns(2)
        assert done == []
        for count in range(1, 4):
            between.stepped(goes_on=True)
            await turns(TURNS)
            assert len(done) == count - 1, "the step's tokens come first"
            await turns(2)
            assert done == list(range(count))
        await asyncio.gather(*working)

    asyncio.run(placed())


def test_a_step_that_does_not_come_is_not_waited_for() -> None:
    async def placed() -> None:
        between = BetweenSteps()
        between.stepped(goes_on=True)
        await asyncio.wait_for(between.place(), 10 * between_steps.PATIENCE_S)
        # What has been given up takes no step from others.
        between.stepped(goes_on=True)
        waiting = asyncio.create_task(between.place())
        await turns(1)
        between.stepped(goes_on=True)
        await turns(TURNS + 2)
        assert waiting.done()

    asyncio.run(placed())


def test_behind_the_last_step_nothing_waits() -> None:
    async def placed() -> None:
        between = BetweenSteps()
        between.stepped(goes_on=True)
        waiting = [asyncio.create_task(between.place()) for _ in range(2)]
        await turns(1)
        between.stepped(goes_on=False)
        await turns(TURNS + 2)
        assert [one.done() for one in waiting] == [True, True]
        assert await at_once(between)

    asyncio.run(placed())
