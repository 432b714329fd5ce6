"""Who waits for a lull, and until when, by a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from router.lull import LOOK_S, PATIENCE_S, SILENT_S, Lull


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("before_s", [None, 2 * SILENT_S], ids=["never", "a while ago"])
def test_nobody_waits_where_no_tokens_pass(before_s: float | None) -> None:
    clock = Clock()
    lull = Lull(clock)
    if before_s is not None:
        lull.passed()
        clock.now_s += before_s
    with pytest.raises(StopIteration):
        lull.come().send(None)


def test_it_comes_when_the_last_token_of_a_step_has_passed() -> None:
    async def scenario() -> None:
        clock = Clock()
        lull = Lull(clock)
        lull.passed()
        coming = asyncio.create_task(lull.come())
        for _ in range(4):
            clock.now_s += SILENT_S / 2
            lull.passed()
            await asyncio.sleep(2 * LOOK_S)
            assert not coming.done()
        clock.now_s += 2 * SILENT_S
        await asyncio.wait_for(coming, 5)

    asyncio.run(scenario())


def test_where_tokens_always_pass_it_is_not_waited_for_for_long() -> None:
    async def scenario() -> None:
        clock = Clock()
        lull = Lull(clock)
        lull.passed()
        coming = asyncio.create_task(lull.come())
        await asyncio.sleep(2 * LOOK_S)
        assert not coming.done()
        clock.now_s += 2 * PATIENCE_S
        lull.passed()
        await asyncio.wait_for(coming, 5)

    asyncio.run(scenario())
