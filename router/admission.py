"""Requests are sent when there is room for them: until then they wait here, where all can be treated alike.

    enter ──room, and nobody waits──> plan
      └──> FairQueue ──its turn, and room──> plan
               └──too many, its time is over──> 429, 503 with Retry-After

An engine would put them into a queue of its own, first come, first served, on a worker that was chosen before it was
known how long that queue takes; and prefill would compute what decode then has no pages for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from router.avoid import Avoid
from router.client import ClientGone
from router.config import RouterSection
from router.fair_queue import FairQueue, Full, Waiting
from router.fleet import Fleet
from router.openai import ApiError, ClientRequest
from router.planner import NoRoom, Plan, Planner, Prompt
from router.policy import NoWorker

LOOK_S = 0.1
"""How often those that wait look for room, if nobody tells them."""
MAX_RETRY_AFTER_S = 60


@dataclass(slots=True, eq=False)
class _Entry:
    request: ClientRequest
    prompt: Prompt
    answer: asyncio.Future[Plan]


class Admission:
    """Of one router."""

    def __init__(self, section: RouterSection, fleet: Fleet, planner: Planner, clock_s: Callable[[], float]) -> None:
        self._section = section
        self._fleet = fleet
        self._planner = planner
        self._clock_s = clock_s
        self._queue = FairQueue(section.queue_max_requests)
        self._entries: dict[Waiting, _Entry] = {}
        self._granted: Waiting | None = None
        """Whose turn it is: it has a plan, and has not been sent yet."""
        self.refused: dict[str, int] = {}
        """Requests that were turned away, by why: full, late, no_worker."""

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def plan(
        self, request: ClientRequest, prompt: Prompt, tenant: str, gone: asyncio.Future[None], until_s: float
    ) -> Plan:
        """A pair that has room for this request, when it is its turn. The caller sends it at once, without awaiting
        anything, and then calls `changed`. Raises ApiError, ClientGone.
        """
        while True:
            plan = self._now(request, prompt) or await self._wait(request, prompt, tenant, gone, until_s)
            if all(self._fleet.get(worker.name) is worker for worker in (plan.prefill, plan.decode)):
                return plan
            # A worker left, or began another life, between the grant and now.

    def changed(self) -> None:
        """There may be room now."""
        while self._granted is None and (first := self._queue.first()) is not None:
            entry = self._entries[first]
            try:
                plan = self._planner.plan(entry.request, entry.prompt, self._clock_s(), Avoid())
            except NoRoom:
                return
            except NoWorker as error:
                if self._may_wait():
                    return
                self._take_out(first, served=False)
                entry.answer.set_exception(self._refusal("no_worker", 503, str(error)))
            except ApiError as error:
                # It fitted when it came, and the workers that it fitted are gone.
                self._take_out(first, served=False)
                entry.answer.set_exception(error)
            else:
                self._take_out(first, served=True)
                # Its load counts when it is sent: until then nobody else is given room.
                self._granted = first
                entry.answer.set_result(plan)

    def _now(self, request: ClientRequest, prompt: Prompt) -> Plan | None:
        """The plan of a request that need not wait. Raises ApiError."""
        if len(self._queue) or self._granted is not None:
            return None
        try:
            return self._planner.plan(request, prompt, self._clock_s(), Avoid())
        except NoRoom:
            return None
        except NoWorker as error:
            if not self._may_wait():
                raise self._refusal("no_worker", 503, str(error)) from None
            return None

    async def _wait(
        self, request: ClientRequest, prompt: Prompt, tenant: str, gone: asyncio.Future[None], until_s: float
    ) -> Plan:
        try:
            place, pushed_out = self._queue.enter(tenant, prompt.tokens)
        except Full:
            raise self._refusal("full", 429, f"{len(self._queue)} requests wait already") from None
        if pushed_out is not None:
            loser = self._entries.pop(pushed_out)
            loser.answer.set_exception(self._refusal("full", 429, "too many requests of this client wait already"))
        answer: asyncio.Future[Plan] = asyncio.get_running_loop().create_future()
        self._entries[place] = _Entry(request, prompt, answer)
        well = False
        try:
            plan = await self._answered(place, answer, gone, until_s)
            well = True
            return plan
        finally:
            if place in self._entries:
                self._take_out(place, served=False)
            if self._granted is place:
                self._granted = None
            if not well:
                self.changed()

    async def _answered(
        self, place: Waiting, answer: asyncio.Future[Plan], gone: asyncio.Future[None], until_s: float
    ) -> Plan:
        while True:
            left_s = until_s - self._clock_s()
            if left_s <= 0 and not answer.done():
                raise self._late(self._entries[place])
            either: set[asyncio.Future[Any]] = {answer, gone}
            await asyncio.wait(either, timeout=min(left_s, LOOK_S), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone
            if answer.done():
                return answer.result()
            if self._queue.first() is place:
                self.changed()

    def _late(self, entry: _Entry) -> ApiError:
        seconds = self._section.queue_timeout_s
        try:
            self._planner.plan(entry.request, entry.prompt, self._clock_s(), Avoid())
        except NoRoom:
            pass
        except NoWorker as error:
            return self._refusal("no_worker", 503, f"{error}, and none came within {seconds:g} s")
        except ApiError as error:
            return error
        return self._refusal("late", 503, f"no worker had room within {seconds:g} s")

    def _take_out(self, place: Waiting, *, served: bool) -> None:
        del self._entries[place]
        self._queue.leave(place, served=served)

    def _may_wait(self) -> bool:
        """Whether a request for which there is nobody may wait for somebody to come."""
        return self._section.on_no_prefill != "fail" and self._fleet.may_come(self._clock_s())

    def _refusal(self, why: str, status: int, message: str) -> ApiError:
        self.refused[why] = self.refused.get(why, 0) + 1
        kind = "rate_limit_error" if status == 429 else "service_unavailable"
        code = {"full": "overloaded", "late": "overloaded"}.get(why, why)
        return ApiError(status, message, kind, code=code, retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> int:
        """Until what waits now is computed, as far as anybody can tell."""
        prefills, _ = self._fleet.ready()
        if not prefills:
            return 1
        seconds = self._queue.tokens * self._planner.token_s / len(prefills)
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(seconds)))
