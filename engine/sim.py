"""A simulated worker: SGLang's scheduler and prefix cache in virtual time.

    submit, abort ──> SimWorker ──> advance(now_s): what happened to requests
                          └───────> page_events(): what the cache stored and dropped

It goes in iterations, as SGLang 0.5.16 does without mixed chunks:

* A prefill iteration runs whenever a request can be admitted, first come first served. It computes
  at most `chunk_tokens`, of one request or of several. Running requests get no token meanwhile.
* Otherwise all running requests get a token, again and again. Such steps are one event, up to the
  next that matters: somebody ends or arrives, or the pool runs short.

A request is admitted when the pool, less what running requests may still need, has room for the
tokens it lacks and its longest answer. Its pages are in the tree as soon as they are computed.
When the pool runs short, leaves of the tree go; when there are none, the requests with the
shortest answers so far lose their pages and wait again.

A prefill worker keeps a request's pages locked until they are handed over: the pages that decode
lacks, over the link's rate, from when the prompt is computed. A decode worker takes pages for a
prompt first (`Allocated`), then waits to be told that the KV came (`delivered`).

Pure: no clock, no sockets, no chance. Equal inputs give equal outputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf

from engine.sim_cache import SimCache
from engine.sim_job import (
    Aborted,
    Allocated,
    Ended,
    Finished,
    FirstToken,
    Part,
    Prefilled,
    Refused,
    Retracted,
    SimConfig,
    SimEvent,
    SimJob,
)
from engine.sim_request import Request
from engine.sim_running import RunningBatch
from engine.sim_time import DecodeRun, prefill_s
from transfer.wire import Load, PageEvent, Registration, Role

__all__ = [
    "Aborted",
    "Allocated",
    "Ended",
    "Finished",
    "FirstToken",
    "Prefilled",
    "Refused",
    "Retracted",
    "SimConfig",
    "SimEvent",
    "SimJob",
    "SimWorker",
]

_PARTS: dict[Role, Part] = {"both": "whole", "prefill": "prefill", "decode": "decode"}
_SPARE_TOKENS = 6
"""Slots of the pool that no prompt may use, in SGLang."""


class SimWorker:
    """One worker. `now_s` may never go back. After any call, `next_event_s` says when to come again."""

    def __init__(self, name: str, config: SimConfig, epoch: int, root: int = 0) -> None:
        """root: the id that stands before the first page of every prompt."""
        self.name = name
        self.config = config
        self.epoch = epoch
        self._root = root
        self._part = _PARTS[config.role]
        self._keeps_cache = config.role != "decode" or config.decode_radix_cache
        self._events: list[SimEvent] = []
        self._begin()

    def _begin(self) -> None:
        """Nothing in it, as after a start."""
        self.cache = SimCache(self.config.pages, self._root)
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        """To be prefilled; on a decode worker, to be given room."""
        self._retracted: deque[Request] = deque()
        """Of a decode worker: their KV lies in the host's memory."""
        self._ready: list[Request] = []
        """Of a decode worker: the KV is there, the first token comes with the next iteration."""
        self._running = RunningBatch(self.config.page_tokens)
        self._aborting: list[Request] = []
        """Running requests that end with the iteration."""
        self._handing: list[tuple[float, int, Request]] = []
        """Of a prefill worker: when each hand-off ends. Of those that were aborted too."""
        self._handoffs = 0
        """Hand-offs since the start."""
        self._batch: list[tuple[Request, int]] = []
        """The prefill iteration under way: requests and their tokens in it."""
        self._chunked: Request | None = None
        """The request that is prefilled in part."""
        self._run = DecodeRun(0.0, 0.0)
        self._run_steps = 0
        """Steps of the decode run under way; 0: there is none."""
        self._run_start_s = 0.0
        self._ends_s = inf
        """When the iteration or run under way ends."""
        self._wake_s = inf
        self._full = False
        """Nothing can be admitted until a running request ends."""
        self._ratio = self.config.new_token_ratio
        self._queued_uncached = 0
        self._retracted_before_run = False

    def __repr__(self) -> str:
        return (
            f"SimWorker({self.name!r}, {self.config.role}, running={len(self._running)}, "
            f"waiting={len(self._waiting)}, {self.cache!r})"
        )

    # What the driver does

    def submit(self, job: SimJob, now_s: float) -> None:
        """Takes a request in. Raises ValueError where it is none for this worker, or its rid is in use."""
        if job.part != self._part:
            raise ValueError(f"a {self.config.role} worker takes no part {job.part!r}")
        if job.rid in self._requests:
            raise ValueError(f"request {job.rid} is here already")
        if job.prompt_tokens < 1 or job.output_tokens < 1:
            raise ValueError(f"request {job.rid} has no tokens")
        if len(job.ids) > job.prompt_tokens // self.config.page_tokens:
            raise ValueError(f"request {job.rid} has more whole pages than its tokens fill")
        self._run_before(now_s)
        request = Request(job, self.cache.top)
        if reason := self._cut_to_pool(request):
            self._events.append(Refused(job.rid, now_s, reason))
            return
        self._requests[job.rid] = request
        self._waiting.append(request)
        if self.config.role != "decode":
            held = min(self.cache.holds(request.chain), self._named_pages(request, request.fill - 1))
            self._count_uncached(request, request.fill - held * self.config.page_tokens)
        self._look_again(now_s)

    def delivered(self, rid: int, now_s: float) -> None:
        """The KV of a request that has its room here came in. Unknown requests, aborted meanwhile, are no error."""
        self._run_before(now_s)
        request = self._requests.get(rid)
        if request is None or request.place != "transferring":
            return
        request.place = "ready"
        self._ready.append(request)
        self._look_again(now_s)

    def abort(self, rid: int, now_s: float) -> None:
        """Ends a request; one that is being computed ends with the iteration. Unknown requests are no error."""
        self._run_before(now_s)
        request = self._requests.get(rid)
        if request is None or request.aborted:
            return
        request.aborted = "aborted"
        match request.place:
            case "prefilling":
                """Its iteration is under way."""
            case "running":
                self._aborting.append(request)
                self._cut_run(now_s)
            case _:
                self._end_aborted(request, now_s)
                self._look_again(now_s)

    def flush(self, now_s: float) -> bool:
        """Clears the cache. As in SGLang, False and nothing happens while there are requests."""
        self._run_before(now_s)
        if self._requests:
            return False
        self.cache.clear()
        return True

    def restart(self, epoch: int, now_s: float) -> None:
        """A new life: requests, cache and page events that nobody took are gone."""
        self._run_before(now_s)
        self._events += [Aborted(rid, now_s, "restarted") for rid in self._requests]
        self.epoch = epoch
        self._begin()

    def advance(self, now_s: float) -> list[SimEvent]:
        """Lets time pass. Returns what happened since the last call, in order."""
        while (at_s := self._due_s) <= now_s:
            self._fire(at_s)
        events, self._events = self._events, []
        return events

    # What the driver sees

    @property
    def next_event_s(self) -> float:
        """When to call `advance` next; infinity where nothing happens without another request."""
        return self._events[0].at_s if self._events else self._due_s

    @property
    def queued_uncached_tokens(self) -> int:
        """Tokens that are not computed yet: of waiting requests as far as the cache lacked them when they came."""
        return self._queued_uncached

    @property
    def running_requests(self) -> int:
        """Requests in the worker that do not wait."""
        return len(self._requests) - len(self._waiting) - len(self._retracted)

    @property
    def reserved_pages(self) -> int:
        """Pages that requests hold and that are not in the cache. Visits every request."""
        own = sum(one.private for one in self._requests.values() if one.place != "running")
        return own + sum(self._pages(self._running.kv_tokens(one)) - one.shared for one in self._running)

    def held(self, ids: Iterable[int]) -> int:
        """Leading pages that are in the cache."""
        return self.cache.holds(tuple(ids))

    def page_events(self) -> list[PageEvent]:
        """What the cache stored and dropped since the last call."""
        events, self.cache.events = self.cache.events, []
        return events

    def load(self) -> Load:
        return Load(
            running_requests=self.running_requests,
            waiting_requests=len(self._waiting) + len(self._retracted),
            waiting_uncached_tokens=self._queued_uncached,
            used_tokens=(self.cache.pages - self.cache.free) * self.config.page_tokens,
        )

    def registration(
        self, *, model: str, sequence: int, url: str = "", events: str = "", replay: str = "", lease_s: float = 5.0
    ) -> Registration:
        """What its agent would send. sequence: of the last batch of page events that was published."""
        capacity = self.cache.pages * self.config.page_tokens
        return Registration(
            worker=self.name,
            epoch=self.epoch,
            role=self.config.role,
            state="ready",
            url=url,
            events=events,
            replay=replay,
            model=model,
            page_tokens=self.config.page_tokens,
            kv_dtype="simulated",
            capacity_tokens=capacity,
            max_context_tokens=capacity - _SPARE_TOKENS,
            sequence=sequence,
            held_pages=self.cache.held,
            load=self.load(),
            lease_s=lease_s,
        )

    # Time

    @property
    def _due_s(self) -> float:
        due_s = self._ends_s if self._ends_s < self._wake_s else self._wake_s
        return min(due_s, self._handing[0][0]) if self._handing else due_s

    def _run_before(self, now_s: float) -> None:
        """What is due at `now_s` itself waits: requests that come together are seen together."""
        while (at_s := self._due_s) < now_s:
            self._fire(at_s)

    def _fire(self, at_s: float) -> None:
        self._wake_s = inf
        while self._handing and self._handing[0][0] <= at_s:
            request = heappop(self._handing)[2]
            if request.place == "handing":
                self._finish(request, at_s)
        if self._ends_s <= at_s:
            self._ends_s = inf
            if self._batch:
                self._end_prefill(at_s)
            else:
                self._end_decode(at_s)
            aborting, self._aborting = self._aborting, []
            for request in aborting:
                if request.place == "running":
                    self._end_aborted(request, at_s)
        if self._ends_s == inf:
            self._schedule(at_s)

    def _look_again(self, now_s: float) -> None:
        """Something changed that the scheduler has to see: at once, or when the decode step ends."""
        if self._ends_s == inf:
            self._wake_s = now_s
        elif self.config.role == "decode" or not self._full:
            self._cut_run(now_s)

    def _cut_run(self, now_s: float) -> None:
        """Ends the decode run with the step that is under way."""
        if self._run_steps:
            steps = self._run.steps_by(now_s - self._run_start_s)
            if steps < self._run_steps:
                self._run_steps = steps
                self._ends_s = max(now_s, self._run_start_s + self._run.duration_s(steps))

    def _schedule(self, at_s: float) -> None:
        """Begins the next iteration, if there is anything to do."""
        if self.config.role == "decode":
            self._resume()
            self._allocate(at_s)
            while self._ready:
                self._join(at_s)
                # Who had one token to give has made room.
                self._resume()
                self._allocate(at_s)
        elif self._begin_prefill(at_s):
            return
        if self._running:
            self._begin_decode(at_s)
        elif not self._requests:
            self._ratio = self.config.new_token_ratio

    # Prefill

    def _begin_prefill(self, at_s: float) -> bool:
        if self.config.role == "prefill":
            self._full = False
        if self._chunked is None and (self._full or not self._waiting):
            return False
        self._batch, begun = self._admit()
        if not self._batch:
            return False
        page = self.config.page_tokens
        # SGLang wants a page more for every request, whether or not it begins one.
        wanted = sum(tokens for _, tokens in self._batch) + (page * len(self._batch) if page > 1 else 0)
        if self.cache.free * page < wanted:
            self.cache.evict(-(-wanted // page))
        duration_s = self.config.prefill_overhead_s if begun else 0.0
        for request, tokens in self._batch:
            self._take(request, request.done, request.done + tokens)
            duration_s += prefill_s(self.config, request.done, tokens)
        self._ends_s = at_s + duration_s
        return True

    def _admit(self) -> tuple[list[tuple[Request, int]], bool]:
        """Who is computed next, with how many tokens, and whether anybody begins. SGLang's PrefillAdder."""
        config, page, cache = self.config, self.config.page_tokens, self.cache
        batch: list[tuple[Request, int]] = []
        begun = False
        chunk = config.chunk_tokens
        spoken_for = self._running.may_need_tokens(config.max_new_tokens_reserved) * self._ratio
        """Tokens that requests may need until they end."""
        now_taken = 0
        """Tokens that this iteration takes."""
        if self._chunked is not None:
            request = self._chunked
            room = min(chunk, int((cache.free + cache.evictable) * page - spoken_for))
            left = request.fill - request.done
            tokens = min(left, room if room > 0 else chunk)
            batch.append((request, tokens))
            paged = self._pages(tokens) * page
            if tokens == left:
                self._chunked = None
                spoken_for += min(request.max_new, config.max_new_tokens_reserved)
            spoken_for += paged + page
            now_taken += paged + page
            chunk -= paged
        while self._waiting and not self._full:
            if self.running_requests >= config.max_running_requests:
                self._full = True
                break
            request = self._waiting[0]
            node, held = cache.match(request.chain, self._named_pages(request, request.fill - 1))
            lacking = request.fill - held * page
            longest = min(request.max_new - request.generated, config.max_new_tokens_reserved)
            cache.lock(node)
            if lacking + longest + page >= (cache.free + cache.evictable) * page - spoken_for:
                cache.unlock(node)
                self._full = True
                break
            paged = self._pages(lacking) * page
            tokens = lacking
            if paged > chunk:
                tokens = paged = chunk // page * page
                if not tokens:
                    cache.unlock(node)
                    break
                self._chunked = request
            else:
                spoken_for += min(request.max_new, config.max_new_tokens_reserved)
            self._waiting.popleft()
            request.place = "prefilling"
            request.node, request.shared, request.done = node, held, held * page
            if request.cached < 0:
                request.cached = request.done
            self._count_uncached(request, lacking)
            batch.append((request, tokens))
            begun = True
            spoken_for += paged + page
            now_taken += paged + page
            chunk -= paged
            there = (cache.free + cache.evictable) * page
            if there - spoken_for <= 0 or there - now_taken <= 0:
                self._full = True
            if chunk <= 0:
                break
        return batch, begun

    def _end_prefill(self, at_s: float) -> None:
        batch, self._batch = self._batch, []
        for request, tokens in batch:
            request.done += tokens
            self._count_uncached(request, request.uncached - tokens)
            if request.aborted:
                self._end_aborted(request, at_s)
                continue
            self._share(request, request.done)
            if request.done == request.fill:
                self._prefilled(request, at_s)

    def _prefilled(self, request: Request, at_s: float) -> None:
        if not request.generated:
            self._events.append(Prefilled(request.rid, at_s, request.cached))
        if self.config.role == "prefill":
            pages = max(0, self._pages(request.fill) - request.job.decode_held_pages)
            request.place = "handing"
            self._handoffs += 1
            ends_s = at_s + pages * self.config.page_bytes / self.config.handoff_bytes_per_s
            heappush(self._handing, (ends_s, self._handoffs, request))
            return
        self._answer(request, at_s)

    # Decode

    def _answer(self, request: Request, at_s: float) -> None:
        """The token after `fill`, which comes with the prefill; then the request runs, or ends."""
        request.generated += 1
        if request.generated == 1:
            self._events.append(FirstToken(request.rid, at_s))
        if request.generated >= request.output:
            self._finish(request, at_s)
        else:
            self._running.start(request)

    def _begin_decode(self, at_s: float) -> None:
        cache = self.cache
        retracted = not self._has_room()
        if retracted:
            self._retract(at_s)
            if not self._running:
                self._schedule(at_s)
                return
        # SGLang wants a page for every request, whether or not this step begins one.
        if cache.free < len(self._running):
            cache.evict(len(self._running))
        steps = self._running.steps_to_end()
        if self._waiting and not self._full and self.config.role != "decode":
            steps = 1
        steps = self._steps_without_eviction(steps)
        self._run = DecodeRun.of(self.config, len(self._running), self._running.context_tokens)
        self._run_start_s, self._run_steps = at_s, steps
        self._ends_s = at_s + self._run.duration_s(steps)
        self._retracted_before_run = retracted

    def _steps_without_eviction(self, steps: int) -> int:
        """How many of so many steps can be taken before the pool has to be looked at again; at least one."""
        page, free, requests = self.config.page_tokens, self.cache.free, len(self._running)
        if free - requests * (steps // page + 1) >= requests:
            return steps
        # With nothing to evict, the pool is looked at only once it is used up.
        keep, ahead = (requests, 0) if self.cache.evictable else (0, 1)
        low, high = 1, steps
        while low < high:
            middle = (low + high + 1) // 2
            if free - self._running.pages_begun(middle - 1 + ahead) >= keep:
                low = middle
            else:
                high = middle - 1
        return low

    def _end_decode(self, at_s: float) -> None:
        steps, self._run_steps = self._run_steps, 0
        config = self.config
        decay = (config.new_token_ratio - config.min_new_token_ratio) / config.new_token_ratio_steps
        self._ratio = max(config.min_new_token_ratio, self._ratio - decay * (steps - self._retracted_before_run))
        self.cache.take(self._running.pages_begun(steps))
        for request in self._running.advance(steps):
            self._finish(request, at_s)

    def _has_room(self) -> bool:
        """Whether all that run can have another token; evicts for it."""
        need = self._running.pages_begun(1)
        if self.cache.free < need:
            self.cache.evict(need)
        return self.cache.free >= need

    def _retract(self, at_s: float) -> None:
        """Takes the pages of requests away until the others have room. Those with the longest answers stay."""
        kept = sorted(
            self._running, key=lambda one: (self._running.generated(one), -one.job.prompt_tokens), reverse=True
        )
        taken: list[Request] = []
        while len(kept) > 1 and (not taken or not self._has_room()):
            request = kept.pop()
            taken.append(request)
            self._running.stop(request)
            self._give_back(request)
            request.done = 0
            wanted = len(kept) * self.config.retract_steps
            if self.cache.free * self.config.page_tokens < wanted:
                self.cache.evict(-(-wanted // self.config.page_tokens))
        if not self._has_room():
            request = kept.pop()
            request.aborted = "the pool is full even without all others"
            self._end_aborted(request, at_s, keep=False)
        answered = sum(self._running.generated(one) for one in kept) + self.config.retract_steps * len(kept)
        self._ratio = min(1.0, answered / (sum(one.max_new for one in kept) + 1))
        self._full = False
        for request in taken:
            self._events.append(Retracted(request.rid, at_s))
            if self.config.role == "decode":
                request.place = "retracted"
                self._retracted.append(request)
            else:
                request.place = "waiting"
                self._waiting.append(request)
                self._count_uncached(request, request.fill)

    # Decode worker: room first, then the KV

    def _resume(self) -> None:
        """Gives retracted requests their pages again; the KV comes back from the host in no time."""
        page, reserve = self.config.page_tokens, self.config.decode_reserved_tokens
        while self._retracted:
            request = self._retracted[0]
            others = self.running_requests
            needed = self._pages(request.fill - 1)
            there = self.cache.free + self.cache.evictable
            if others >= self.config.max_running_requests:
                return
            if needed * page + reserve > there * page - reserve * others and (others or needed > there):
                return
            self._retracted.popleft()
            self._evict_to(needed)
            self._take(request, 0, request.fill - 1)
            request.fill -= 1
            request.done = request.fill
            request.place = "ready"
            self._ready.append(request)

    def _allocate(self, at_s: float) -> None:
        """Takes pages for the prompts of waiting requests, first come first served."""
        page, cache, config = self.config.page_tokens, self.cache, self.config
        retractable = self._running.context_tokens + len(self._running)
        while self._waiting and not self._retracted:
            others = self.running_requests
            if others >= config.max_running_requests:
                return
            request = self._waiting[0]
            node, held = cache.top, 0
            if self._keeps_cache:
                node, held = cache.match(request.chain, self._named_pages(request, request.fill))
            cache.lock(node)
            needed = self._pages(request.fill) - held
            longest = request.fill - held * page + min(request.max_new, config.max_new_tokens_reserved) - retractable
            there = (cache.free + cache.evictable) * page - config.decode_reserved_tokens * others
            if max(needed * page + config.decode_reserved_tokens, longest) > there:
                cache.unlock(node)
                return
            self._waiting.popleft()
            request.place = "transferring"
            request.node, request.shared = node, held
            self._evict_to(needed)
            self._take(request, held * page, request.fill)
            request.done = request.fill
            self._events.append(Allocated(request.rid, at_s, held))

    def _join(self, at_s: float) -> None:
        """Requests whose KV is there run from now on."""
        ready, self._ready = self._ready, []
        for request in ready:
            if self._keeps_cache:
                self._share(request, request.fill)
            if request.generated:
                self._running.start(request)
            else:
                self._answer(request, at_s)

    def _evict_to(self, pages: int) -> None:
        if self.cache.free < pages:
            self.cache.evict(pages - self.cache.free)

    # Pages of a request

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.config.page_tokens)

    def _named_pages(self, request: Request, tokens: int) -> int:
        """Whole pages of so many tokens, as far as their ids are known."""
        return min(tokens // self.config.page_tokens, len(request.chain))

    def _take(self, request: Request, before: int, after: int) -> None:
        """Pages for the tokens [before, after) of a request."""
        pages = self._pages(after) - self._pages(before)
        self.cache.take(pages)
        request.private += pages

    def _share(self, request: Request, tokens: int) -> None:
        """Puts the whole pages of so many tokens into the tree, and gives back those that it had already."""
        pages = max(request.shared, self._named_pages(request, tokens))
        node, known = self.cache.insert(request.node, request.shared, request.chain, pages)
        if pages == request.shared:
            return
        self.cache.lock(node)
        self.cache.unlock(request.node)
        self.cache.give(known - request.shared)
        request.private -= pages - request.shared
        request.node, request.shared = node, pages

    def _give_back(self, request: Request) -> None:
        """Frees its own pages, and unlocks those in the tree."""
        self.cache.give(request.private)
        self.cache.unlock(request.node)
        request.private = request.shared = 0
        request.node = self.cache.top

    # Ends

    def _cut_to_pool(self, request: Request) -> str:
        """Shortens the answer to what the pool allows, as SGLang does; says why the request can never fit."""
        page, pool = self.config.page_tokens, self.cache.pages * self.config.page_tokens
        prompt = request.fill
        longest = min(pool - prompt - 2, pool - self._pages(prompt) * page - page - 1)
        if self.config.role == "prefill":
            request.output = request.max_new = 1
        if prompt >= pool - _SPARE_TOKENS or longest < 1:
            return f"{prompt} tokens do not fit into a pool of {pool}"
        if self.config.role == "decode" and self._pages(prompt) * page + self.config.decode_reserved_tokens > pool:
            return f"{prompt} tokens and what is reserved do not fit into a pool of {pool}"
        request.max_new = min(request.max_new, longest)
        request.output = min(request.output, longest)
        return ""

    def _count_uncached(self, request: Request, tokens: int) -> None:
        self._queued_uncached += tokens - request.uncached
        request.uncached = tokens

    def _finish(self, request: Request, at_s: float) -> None:
        self._events.append(Finished(request.rid, at_s))
        self._leave(request, keep=True)

    def _end_aborted(self, request: Request, at_s: float, keep: bool = True) -> None:
        """keep: whether its pages stay in the cache, where the request ran."""
        self._events.append(Aborted(request.rid, at_s, request.aborted))
        match request.place:
            case "waiting":
                self._waiting.remove(request)
            case "retracted":
                self._retracted.remove(request)
            case "prefilling":
                if self._chunked is request:
                    self._chunked = None
                keep = request.done == request.fill
            case "ready":
                self._ready.remove(request)
            case "transferring":
                keep = False
        self._leave(request, keep)

    def _leave(self, request: Request, keep: bool) -> None:
        if request.place == "running":
            self._running.stop(request)
        if keep and self._keeps_cache:
            self._share(request, request.done)
        self._give_back(request)
        self._count_uncached(request, 0)
        request.place = "gone"
        self._full = False
        del self._requests[request.rid]
