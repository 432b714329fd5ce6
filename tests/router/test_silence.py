"""That a wait ends when nothing has come for so long at a stretch, and at no other time."""

from __future__ import annotations

import asyncio

import pytest

from router.silence import Silence

LIMIT_S = 0.08


async def heard(gaps_s: list[float], *, busy_s: float = 0.0, says: bool = True) -> int:
    """How many pieces were heard until the wait was ended, or all had come. busy_s: spent on each, not waiting"""
    count = 0
    try:
        async with Silence(LIMIT_S) as silence:
            for gap_s in gaps_s:
                if says:
                    silence.waits()
                await asyncio.sleep(gap_s)
                silence.heard()
                count += 1
                await asyncio.sleep(busy_s)
    except TimeoutError:
        return -count
    return count


@pytest.mark.parametrize(
    ("gaps_s", "busy_s", "found"),
    [
        ([], 0.0, 0),
        ([LIMIT_S / 4] * 10, 0.0, 10),
        ([LIMIT_S / 4, 9.0], 0.0, -1),
        ([0.0, 0.0, 9.0], LIMIT_S * 1.5, -2),
    ],
    ids=["nothing", "long, but never silent", "silent", "busy for longer than the limit"],
)
def test_only_silence_ends_it(gaps_s: list[float], busy_s: float, found: int) -> None:
    assert asyncio.run(asyncio.wait_for(heard(gaps_s, busy_s=busy_s), 5.0)) == found


def test_who_does_not_say_that_he_waits_waits_for_as_long_as_it_takes() -> None:
    assert asyncio.run(heard([LIMIT_S * 3], says=False)) == 1


def test_another_error_is_what_it_was_and_nothing_is_left_behind() -> None:
    async def fails() -> None:
        async with Silence(LIMIT_S) as silence:
            silence.waits()
            raise KeyError

    async def goes_on() -> str:
        with pytest.raises(KeyError):
            await fails()
        await asyncio.sleep(2 * LIMIT_S)
        return "not cancelled"

    assert asyncio.run(goes_on()) == "not cancelled"


def test_whoever_is_cancelled_is() -> None:
    async def cancelled() -> bool:
        waiting = asyncio.create_task(heard([9.0]))
        await asyncio.sleep(LIMIT_S / 4)
        waiting.cancel()
        await asyncio.wait([waiting])
        return waiting.cancelled()

    assert asyncio.run(cancelled())
