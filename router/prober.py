"""Probes suspects, each as soon as its time has come (`router.health` says when)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from router.fleet import Fleet, Worker

LOOK_S = 0.05


class Prober:
    """probe  whether the worker at a base URL answers; bounded in time, never raises"""

    def __init__(self, fleet: Fleet, probe: Callable[[str], Awaitable[bool]], clock_s: Callable[[], float]) -> None:
        self._fleet = fleet
        self._probe = probe
        self._clock_s = clock_s
        self._under_way: dict[Worker, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                for worker in self._fleet.to_probe(self._clock_s()):
                    if worker not in self._under_way:
                        self._under_way[worker] = asyncio.create_task(self._look(worker))
                await asyncio.sleep(LOOK_S)
        finally:
            for task in self._under_way.values():
                task.cancel()

    async def _look(self, worker: Worker) -> None:
        try:
            answered = await self._probe(worker.registration.url)
            worker.health.probed(answered, self._clock_s())
        finally:
            del self._under_way[worker]
