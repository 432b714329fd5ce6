"""A thread with an event loop of its own, which does all the waiting.

The scheduler's thread calls into it and returns at once; what it asked for happens
here. Nothing in this package ever blocks the caller's thread.
"""

from __future__ import annotations

import asyncio
import threading
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
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs `function` on the loop soon. Does nothing once closed."""
        if self._loop.is_closed():
            return
        if threading.current_thread() is self._thread:
            self._loop.call_soon(function, *arguments)
        else:
            self._loop.call_soon_threadsafe(function, *arguments)

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

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        finally:
            self._loop.close()
