"""A bell is heard by whoever waits for its file, once for any number of rings."""

from __future__ import annotations

import select
import threading

from transfer.bell import Bell


def heard(bell: Bell, timeout_s: float) -> bool:
    ready, _, _ = select.select([bell], [], [], timeout_s)
    return bool(ready)


def test_it_is_heard_by_another_thread_that_waits() -> None:
    bell = Bell()
    assert not heard(bell, 0)
    ringer = threading.Timer(0.05, bell.ring)
    ringer.start()
    assert heard(bell, 10)
    ringer.join()


def test_many_rings_are_one_and_silence_is_quick() -> None:
    bell = Bell()
    for _ in range(1000):
        bell.ring()
    assert bell.silence()
    assert not bell.silence()
    assert not heard(bell, 0)
    bell.ring()
    assert heard(bell, 0)
