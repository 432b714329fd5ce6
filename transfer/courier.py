"""A thread with an event loop of its own, which does all the waiting.

The scheduler's thread calls into it and returns at once; what it asked for happens
here. Nothing in this package ever blocks the caller's thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

STOP_TIMEOUT_S = 5.0

T = TypeVar("T")


class Courier:
    """Owns the loop. `call` and `spawn` may be used from any thread, `close` from any but its own."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._calls: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._woken = False
        """Whether a look at `_calls` is on its way."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs `function` on the loop soon, in the order of the calls. Does nothing once closed.

        Waking a thread takes a system call, and may cost the caller its turn; a burst of calls wakes it once.
        """
        self._calls.append((function, arguments))
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._run_calls)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Runs `work` on the loop and waits for it. Raises what it raises, or TimeoutError."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that ends with the courier. To be called on the loop."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Cancels every task, then ends the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)

    def _run_calls(self) -> None:
        # First: what is appended from here on is either seen below or wakes the loop again.
        self._woken = False
        for _ in range(len(self._calls)):
            function, arguments = self._calls.popleft()
            # By the loop, so that one that raises does not keep the others from running.
            self._loop.call_soon(function, *arguments)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        finally:
            self._loop.close()
