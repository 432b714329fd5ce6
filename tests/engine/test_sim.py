"""A simulated worker keeps SGLang's rules: times by hand, and for any history pages and requests that add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.journal import Journal
from engine.sim import (
    Aborted,
    Allocated,
    Ended,
    Finished,
    FirstToken,
    Prefilled,
    Refused,
    Retracted,
    SimConfig,
    SimEvent,
    SimJob,
    SimWorker,
)
from engine.sim_cache import SimCache
from engine.sim_request import Request
from engine.sim_running import RunningBatch
from engine.sim_time import DecodeRun, prefill_s
from transfer import wire
from transfer.pages import chain_ids

PAGE = 4


def config(**changes: object) -> SimConfig:
    """Ten tokens a second and no slower with context; a decode step takes a second."""
    plain: dict[str, object] = {
        "capacity_tokens": 400,
        "page_tokens": PAGE,
        "prefill_overhead_s": 1.0,
        "prefill_tokens_per_s": 10.0,
        "context_halving_tokens": inf,
        "chunk_tokens": 40,
        "decode_step_s": 1.0,
    }
    return SimConfig(**{**plain, **changes})  # type: ignore[arg-type]


def chain(text: str) -> list[int]:
    """A page for each letter. Equal beginnings give equal ids."""
    return chain_ids(0, [ord(letter) for letter in text for _ in range(PAGE)], PAGE)


def job(rid: int, text: str, output_tokens: int = 1, *, more: int = 0, answer: str = "", **fields: object) -> SimJob:
    """A prompt of a page a letter and `more` tokens; `answer` names the pages that come after."""
    output_ids = chain(text + answer) if answer else []
    return SimJob(rid, chain(text), len(text) * PAGE + more, output_tokens, output_ids, **fields)  # type: ignore[arg-type]


def run(worker: SimWorker, until_s: float = inf) -> list[SimEvent]:
    """Everything that happens up to then, one event after the other."""
    events: list[SimEvent] = []
    while worker.next_event_s <= until_s and worker.next_event_s < inf:
        events += worker.advance(worker.next_event_s)
    return events


def at(events: Iterable[SimEvent], kind: type[SimEvent], rid: int) -> float:
    """When this happened, once."""
    (found,) = [event.at_s for event in events if isinstance(event, kind) and event.rid == rid]
    return found


def cached(events: Iterable[SimEvent]) -> dict[int, int]:
    return {event.rid: event.cached_tokens for event in events if isinstance(event, Prefilled)}


# Prefill


def test_a_request_alone_takes_the_overhead_its_tokens_at_their_context_and_its_steps() -> None:
    worker = SimWorker("w", config(context_halving_tokens=10.0, decode_step_s=0.5, decode_request_s=0.25), 1)
    worker.submit(job(1, "abcde", output_tokens=3), 100.0)

    events = run(worker)

    # 1 s, and 20 tokens at 10/s, in the middle of which a token takes twice as long; then two steps of 0.75 s.
    assert events == [
        Prefilled(1, 105.0, 0),
        FirstToken(1, 105.0),
        Finished(1, 106.5),
    ]


def test_only_what_is_not_cached_is_computed_and_at_least_the_last_token() -> None:
    worker = SimWorker("w", config(), 1)
    worker.submit(job(1, "abc"), 0.0)
    run(worker)
    worker.submit(job(2, "abc"), 10.0)
    worker.submit(job(3, "abc", more=1), 20.0)
    worker.submit(job(4, "abx"), 30.0)

    events = run(worker)

    assert cached(events) == {2: 8, 3: 12, 4: 8}
    assert at(events, Finished, 2) == 10 + 1 + 0.4
    assert at(events, Finished, 3) == 20 + 1 + 0.1
    assert at(events, Finished, 4) == 30 + 1 + 0.4


def test_the_pages_of_an_answer_are_cached_but_for_its_last_token() -> None:
    worker = SimWorker("w", config(), 1)
    worker.submit(job(1, "ab", output_tokens=4, answer="c"), 0.0)
    worker.submit(job(2, "xy", output_tokens=5, answer="z"), 0.0)
    run(worker)

    assert worker.held(chain("abc")) == 2
    assert worker.held(chain("xyz")) == 3


def test_requests_that_come_together_are_computed_together_and_share_the_chunk() -> None:
    worker = SimWorker("w", config(chunk_tokens=16), 1)
    worker.submit(job(1, "ab"), 0.0)
    worker.submit(job(2, "cde"), 0.0)
    worker.submit(job(3, "f"), 0.0)

    events = run(worker)

    # 8 + 8 tokens of the second; then its last 4, and the third's 4, which begins then.
    assert at(events, FirstToken, 1) == 1 + 1.6
    assert at(events, FirstToken, 2) == pytest.approx(2.6 + 1 + 0.8)
    assert at(events, FirstToken, 3) == pytest.approx(2.6 + 1 + 0.8)


def test_a_chunk_is_in_the_cache_before_the_next_is_computed() -> None:
    worker = SimWorker("w", config(chunk_tokens=8), 1)
    worker.submit(job(1, "abcdef"), 0.0)

    held = []
    while worker.next_event_s < inf:
        worker.advance(worker.next_event_s)
        held.append(worker.held(chain("abcdef")))

    assert held == [0, 2, 4, 6]
    stored = [event.ids for event in worker.page_events() if isinstance(event, wire.Stored)]
    assert stored == [chain("abcdef")[:2], chain("abcdef")[2:4], chain("abcdef")[4:]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 10))
def test_a_prompt_alone_takes_as_long_however_it_is_cut_into_chunks(tokens: int, chunk: int, warm: int) -> None:
    def prefilled_s(chunk_tokens: int) -> float:
        worker = SimWorker("w", config(capacity_tokens=2000, chunk_tokens=chunk_tokens, context_halving_tokens=50.0), 1)
        ids = list(range(1, tokens // PAGE + 1))
        if ids[:warm]:
            worker.submit(SimJob(0, ids[:warm], len(ids[:warm]) * PAGE, 1), 0.0)
            run(worker)
        worker.submit(SimJob(1, ids, tokens, 1), 1000.0)
        return at(run(worker), Prefilled, 1)

    assert prefilled_s(chunk * PAGE) == pytest.approx(prefilled_s(600))


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.integers(1, 10_000))
def test_prefill_time_of_two_stretches_is_that_of_both_together(start: int, first: int, second: int) -> None:
    some = config(context_halving_tokens=54_000.0)

    together_s = prefill_s(some, start, first + second)

    assert prefill_s(some, start, first) + prefill_s(some, start + first, second) == pytest.approx(together_s)


# Decode


def test_running_requests_get_no_token_while_another_is_prefilled() -> None:
    worker = SimWorker("w", config(), 1)
    worker.submit(job(1, "a", output_tokens=11), 0.0)
    first = at(run(worker, 1.4), FirstToken, 1)
    worker.submit(job(2, "bcde"), first + 2.5)

    events = run(worker)

    # The step under way ends at 3 s; then 1 + 1.6 s of prefill; then the seven steps that are left.
    assert at(events, FirstToken, 2) == pytest.approx(first + 3 + 2.6)
    assert at(events, Finished, 1) == pytest.approx(first + 10 + 2.6)


def test_a_step_takes_longer_with_more_requests_and_more_context() -> None:
    worker = SimWorker("w", config(decode_step_s=1.0, decode_request_s=0.5, decode_context_s=0.125), 1)
    worker.submit(job(1, "a", output_tokens=3), 0.0)
    worker.submit(job(2, "b", output_tokens=2), 0.0)

    events = run(worker)

    both = 1.0 + 2 * 0.5 + 8 * 0.125
    alone = 1.0 + 0.5 + 5 * 0.125
    assert at(events, Finished, 2) == pytest.approx(1.8 + both)
    assert at(events, Finished, 1) == pytest.approx(1.8 + both + alone)


@given(st.floats(0.001, 1.0), st.integers(1, 300), st.integers(1, 5000), st.floats(0.0, 1e-3), st.floats(0.0, 1e4))
def test_decode_steps_in_closed_form_are_those_taken_one_by_one(
    step_s: float, requests: int, context: int, context_s: float, elapsed_s: float
) -> None:
    some = config(decode_step_s=step_s, decode_context_s=context_s)
    steps = DecodeRun.of(some, requests, context).steps_by(min(elapsed_s, 500 * step_s))

    one_by_one = [step_s + context_s * (context + requests * before) for before in range(steps)]

    assert DecodeRun.of(some, requests, context).duration_s(steps) == pytest.approx(sum(one_by_one))
    if steps > 1:
        assert sum(one_by_one[:-1]) < min(elapsed_s, 500 * step_s) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.integers(1, 30), st.integers(2, 20)),
            st.tuples(st.just("stop"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("advance"), st.integers(1, 9), st.just(0)),
        ),
        max_size=40,
    )
)
def test_the_running_batch_counts_as_if_every_request_took_every_step(steps: list[tuple[str, int, int]]) -> None:
    batch = RunningBatch(PAGE)
    model: dict[int, list[int]] = {}
    """rid -> KV tokens, tokens answered, of so many."""
    requests: dict[int, Request] = {}
    for rid, (what, size, output) in enumerate(steps):
        match what:
            case "start":
                requests[rid] = Request(SimJob(rid, [], size, output), SimCache(1).top)
                requests[rid].generated = 1
                batch.start(requests[rid])
                model[rid] = [size, 1, output]
            case "stop" if model:
                gone = list(model)[size % len(model)]
                batch.stop(requests[gone])
                tokens, answered, output = model.pop(gone)
                stopped = requests[gone]
                assert (stopped.done, stopped.fill, stopped.generated) == (tokens, tokens + 1, answered)
                assert stopped.private == -(-tokens // PAGE)
                if tokens % 2:
                    batch.start(stopped)
                    model[gone] = [tokens + 1, answered, output]
            case "advance" if model:
                assert batch.steps_to_end() == min(output - answered for _, answered, output in model.values())
                count = min(size, batch.steps_to_end())
                begun = sum(1 for tokens, *_ in model.values() for step in range(count) if not (tokens + step) % PAGE)
                assert batch.pages_begun(count) == begun
                ended = [one.rid for one in batch.advance(count)]
                for one in model.values():
                    one[0] += count
                    one[1] += count
                assert ended == [one.rid for one in batch if model[one.rid][1] == model[one.rid][2]]
                for rid_ended in ended:
                    batch.stop(requests[rid_ended])
                    del model[rid_ended]
        assert len(batch) == len(model)
        assert batch.context_tokens == sum(tokens for tokens, *_ in model.values())
        for bound in (3, 100):
            left = sum(min(output - answered, bound) for _, answered, output in model.values())
            assert batch.may_need_tokens(bound) == left


def test_a_request_that_stopped_and_started_again_ends_once() -> None:
    batch = RunningBatch(PAGE)
    request = Request(SimJob(1, [], 8, 4), SimCache(1).top)
    request.generated = 1
    batch.start(request)
    batch.stop(request)
    batch.start(request)

    assert batch.advance(3) == [request]


# A pool that is full


def test_a_request_that_can_never_fit_is_refused_and_the_driver_is_told_to_come() -> None:
    worker = SimWorker("w", config(capacity_tokens=40), 1)
    worker.submit(SimJob(1, [], 37, 1), 3.0)

    assert worker.next_event_s == 3.0
    assert worker.advance(3.0) == [Refused(1, 3.0, "37 tokens do not fit into a pool of 40")]
    assert worker.next_event_s == inf


def test_an_answer_is_cut_to_what_the_pool_allows() -> None:
    worker = SimWorker("w", config(capacity_tokens=40), 1)
    worker.submit(job(1, "abcde", output_tokens=1000), 0.0)

    # 40 slots less 20 of the prompt, a page and one: 15 tokens, 14 of them in steps.
    assert at(run(worker), Finished, 1) == 1 + 2 + 14


def test_a_request_waits_until_its_longest_answer_fits_beside_those_that_run() -> None:
    worker = SimWorker("w", config(capacity_tokens=100, new_token_ratio=0.5, min_new_token_ratio=0.5), 1)
    worker.submit(job(1, "abcde", output_tokens=11, max_new_tokens=61), 0.0)
    worker.submit(job(2, "vwxyz", output_tokens=1, max_new_tokens=30), 0.0)

    events = run(worker)

    # Beside the first, 20 + 61 + 4 slots, there is no room for 20 + 30 + 4. When it runs, half of the 60 tokens it may
    # still answer is spoken for, and 80 - 30 are left: not more than 54. So the second waits for its end, at 13 s.
    assert at(events, Finished, 1) == 13
    assert at(events, FirstToken, 2) == 16


def test_the_request_with_the_shortest_answer_loses_its_pages_and_ends_all_the_same() -> None:
    worker = SimWorker("w", config(capacity_tokens=48, new_token_ratio=0.0, min_new_token_ratio=0.0), 1)
    worker.submit(job(1, "abc", output_tokens=18), 0.0)
    assert run(worker, 5.0) == [Prefilled(1, 2.2, 0), FirstToken(1, 2.2)]
    worker.submit(job(2, "xyz", output_tokens=15), 5.0)

    events = run(worker)

    # At 5.2 s three steps were taken; the prefill of the second takes 2.2 s. With 15 + k and 12 + k tokens, the twelve
    # pages are full after nine steps, 24 and 21 tokens: the first wants a seventh page, and there is none.
    assert at(events, Retracted, 2) == pytest.approx(7.4 + 9)
    assert at(events, Finished, 1) > at(events, Retracted, 2)
    assert at(events, Finished, 2) > at(events, Finished, 1)
    assert (worker.reserved_pages, worker.cache.locked) == (0, 0)


def test_a_request_that_lost_its_pages_and_is_aborted_leaves_nothing() -> None:
    worker = SimWorker("w", config(capacity_tokens=48, new_token_ratio=0.0, min_new_token_ratio=0.0), 1)
    worker.submit(job(1, "abc", output_tokens=18), 0.0)
    run(worker, 5.0)
    worker.submit(job(2, "xyz", output_tokens=15, answer="uvw"), 5.0)
    run(worker, 16.5)
    assert worker.load().waiting_requests == 1
    worker.abort(2, 16.6)

    assert worker.held(chain("xyzuvw")) == 0
    assert worker.cache.free + worker.cache.held + worker.reserved_pages == worker.cache.pages


# Aborts, flush, restart


def test_a_waiting_request_is_aborted_at_once_and_a_running_one_with_its_step() -> None:
    worker = SimWorker("w", config(max_running_requests=1), 1)
    worker.submit(job(1, "ab", output_tokens=50), 0.0)
    worker.submit(job(2, "xy"), 0.0)
    run(worker, 5.0)

    worker.abort(2, 5.0)
    worker.abort(1, 5.0)
    events = run(worker)

    # The first token came at 1.8 s, so the step ends at 5.8 s.
    assert [type(event) for event in events] == [Aborted, Aborted]
    assert at(events, Aborted, 2) == 5.0
    assert at(events, Aborted, 1) == pytest.approx(5.8)
    assert (worker.reserved_pages, worker.cache.locked) == (0, 0)
    assert (worker.held(chain("ab")), worker.held(chain("xy"))) == (2, 0)


def test_a_request_that_is_aborted_between_chunks_keeps_the_chunks_that_were_cached() -> None:
    worker = SimWorker("w", config(chunk_tokens=8), 1)
    worker.submit(job(1, "abcdef"), 0.0)
    run(worker, 1.9)
    worker.abort(1, 1.9)

    assert at(run(worker), Aborted, 1) == pytest.approx(2.6)
    assert worker.held(chain("abcdef")) == 2
    assert (worker.reserved_pages, worker.cache.locked, worker.queued_uncached_tokens) == (0, 0, 0)


def test_a_cache_is_flushed_only_while_there_are_no_requests() -> None:
    worker = SimWorker("w", config(), 1)
    worker.submit(job(1, "ab"), 0.0)

    assert not worker.flush(0.5)
    run(worker)
    assert worker.flush(5.0)
    assert worker.held(chain("ab")) == 0
    assert worker.page_events()[-1] == wire.Cleared()


def test_a_restart_ends_every_request_and_forgets_the_cache() -> None:
    worker = SimWorker("w", config(max_running_requests=1), 1)
    worker.submit(job(1, "ab", output_tokens=50), 0.0)
    worker.submit(job(2, "xy"), 0.0)
    run(worker, 4.0)
    worker.restart(2, 4.5)

    assert run(worker) == [Aborted(1, 4.5, "restarted"), Aborted(2, 4.5, "restarted")]
    assert (worker.epoch, worker.page_events(), worker.held(chain("ab"))) == (2, [], 0)
    worker.submit(job(1, "ab"), 5.0)
    assert at(run(worker), Finished, 1) == 5 + 1.8


# Prefill and decode apart


def test_a_prefill_worker_keeps_pages_locked_until_those_that_decode_lacks_are_handed_over() -> None:
    worker = SimWorker("w", config(role="prefill", page_bytes=100, handoff_bytes_per_s=50.0), 1)
    worker.submit(job(1, "abc", output_tokens=500, more=1, part="prefill", decode_held_pages=1), 0.0)

    assert run(worker, 2.3) == [Prefilled(1, 2.3, 0)]
    assert worker.cache.locked == 3
    assert worker.reserved_pages == 1
    # Four pages, one of them in part, less one that decode has.
    assert run(worker) == [Finished(1, 2.3 + 6)]
    assert (worker.cache.locked, worker.reserved_pages, worker.held(chain("abc"))) == (0, 0, 3)


def test_a_prefill_worker_goes_on_while_pages_are_handed_over_as_long_as_there_is_room() -> None:
    worker = SimWorker("w", config(role="prefill", capacity_tokens=40, page_bytes=100, handoff_bytes_per_s=1.0), 1)
    worker.submit(job(1, "abcd", part="prefill"), 0.0)
    worker.submit(job(2, "wxyz", part="prefill"), 0.0)
    worker.submit(job(3, "klmn", part="prefill"), 0.0)

    events = run(worker)

    # Not together: what may be needed is more than the pool. The third has to wait until the first is handed over.
    assert at(events, Prefilled, 1) == 2.6
    assert at(events, Prefilled, 2) == 5.2
    assert at(events, Prefilled, 3) == pytest.approx(2.6 + 400 + 2.6)


def test_an_aborted_hand_off_gives_its_pages_back_at_once() -> None:
    worker = SimWorker("w", config(role="prefill", page_bytes=100, handoff_bytes_per_s=50.0), 1)
    worker.submit(job(1, "abc", part="prefill"), 0.0)
    run(worker, 3.0)
    worker.abort(1, 3.0)
    worker.submit(job(1, "abc", part="prefill"), 4.0)

    events = run(worker)

    assert at(events, Aborted, 1) == 3.0
    assert at(events, Finished, 1) == 4 + 1 + 0.4 + 6


def test_a_decode_worker_takes_pages_that_it_lacks_and_answers_when_the_kv_came() -> None:
    worker = SimWorker("w", config(role="decode", decode_reserved_tokens=4), 1)
    worker.submit(job(1, "abc", output_tokens=3, part="decode"), 0.0)

    assert run(worker) == [Allocated(1, 0.0, 0)]
    assert worker.reserved_pages == 3
    worker.delivered(1, 7.0)
    assert run(worker) == [FirstToken(1, 7.0), Finished(1, 9.0)]

    worker.submit(job(2, "abcd", output_tokens=3, part="decode"), 10.0)
    assert run(worker) == [Allocated(2, 10.0, 3)]
    assert (worker.reserved_pages, worker.cache.locked) == (1, 3)


def test_a_decode_worker_that_is_full_makes_requests_wait() -> None:
    worker = SimWorker("w", config(role="decode", capacity_tokens=40, decode_reserved_tokens=4), 1)
    worker.submit(job(1, "abcde", output_tokens=3, part="decode"), 0.0)
    worker.submit(job(2, "vwxyz", output_tokens=3, part="decode"), 0.0)

    assert run(worker) == [Allocated(1, 0.0, 0)]
    worker.delivered(1, 5.0)
    assert run(worker) == [FirstToken(1, 5.0), Finished(1, 7.0), Allocated(2, 7.0, 0)]


def test_a_decode_worker_without_a_cache_holds_nothing_of_a_request_that_ended() -> None:
    worker = SimWorker("w", config(role="decode", decode_reserved_tokens=4, decode_radix_cache=False), 1)
    worker.submit(job(1, "abc", output_tokens=3, part="decode"), 0.0)
    run(worker)
    worker.delivered(1, 1.0)
    run(worker)

    assert (worker.held(chain("abc")), worker.cache.free, worker.page_events()) == (0, 100, [])


# What is told


def test_what_it_registers_and_loads_passes_the_wire_unchanged() -> None:
    worker = SimWorker("w", config(), 5)
    worker.submit(job(1, "abc", output_tokens=9), 0.0)
    run(worker, 3.0)
    worker.submit(job(2, "abcdefg", output_tokens=9), 3.0)

    registration = worker.registration(model="m", sequence=3)

    assert msgspec.json.decode(msgspec.json.encode(registration), type=wire.Registration) == registration
    assert (registration.epoch, registration.capacity_tokens, registration.held_pages) == (5, 400, 3)
    assert registration.load == wire.Load(
        running_requests=1, waiting_requests=1, waiting_uncached_tokens=16, used_tokens=12
    )


def test_a_job_that_is_none_for_this_worker_is_an_error() -> None:
    worker = SimWorker("w", config(), 1)
    worker.submit(job(1, "ab"), 0.0)

    for wrong in (job(2, "ab", part="decode"), job(1, "ab"), SimJob(3, [], 0, 1), SimJob(4, chain("ab"), 7, 1)):
        with pytest.raises(ValueError, match=r"request|part"):
            worker.submit(wrong, 1.0)


def test_a_configuration_that_cannot_work_is_an_error() -> None:
    for wrong in ({"chunk_tokens": 10}, {"capacity_tokens": 12}, {"decode_step_s": 0.0}):
        with pytest.raises(ValueError, match=r"chunk_tokens|capacity_tokens|some time"):
            config(**wrong)


# Any history


@dataclass
class Watch:
    """Looks at one worker after everything that happens."""

    worker: SimWorker
    jobs: dict[int, SimJob] = field(default_factory=dict)
    most_held: dict[int, int] = field(default_factory=dict)
    seen: dict[int, list[SimEvent]] = field(default_factory=dict)
    journal: Journal = field(default_factory=lambda: Journal("w", 1))

    def submit(self, job: SimJob, now_s: float) -> None:
        self.jobs[job.rid], self.most_held[job.rid], self.seen[job.rid] = job, 0, []
        self.worker.submit(job, now_s)
        self.look()

    def advance(self, now_s: float) -> list[SimEvent]:
        events = self.worker.advance(now_s)
        self.look()
        for event in events:
            self.happened(event)
        return events

    def happened(self, event: SimEvent) -> None:
        seen = self.seen[event.rid]
        assert not any(isinstance(one, Ended) for one in seen), "something came after the end"
        assert not seen or seen[-1].at_s <= event.at_s
        kinds = [type(one) for one in seen]
        assert type(event) is Retracted or type(event) not in kinds
        if isinstance(event, Prefilled):
            assert event.cached_tokens <= self.most_held[event.rid] * PAGE
            assert event.cached_tokens < self.jobs[event.rid].prompt_tokens
        if isinstance(event, Finished) and self.worker.config.role != "prefill":
            assert FirstToken in kinds
        seen.append(event)

    def look(self) -> None:
        worker, cache = self.worker, self.worker.cache
        assert cache.free >= 0
        assert cache.free + cache.held + worker.reserved_pages == cache.pages
        assert 0 <= cache.locked <= cache.held
        assert worker.queued_uncached_tokens >= 0
        batch = self.journal.apply(worker.page_events())
        decoded = wire.decode_page_message(wire.encode(batch))
        assert decoded == batch
        assert len(self.journal.held) == cache.held
        for rid, job in self.jobs.items():
            held = worker.held(job.ids)
            known = [page in self.journal.held for page in job.ids]
            assert known == [True] * held + [False] * (len(job.ids) - held)
            if not any(isinstance(one, Ended) for one in self.seen[rid]):
                self.most_held[rid] = max(self.most_held[rid], held)

    def assert_all_is_over(self) -> None:
        assert all(sum(isinstance(one, Ended) for one in seen) == 1 for seen in self.seen.values())
        assert (self.worker.reserved_pages, self.worker.cache.locked) == (0, 0)
        assert (self.worker.queued_uncached_tokens, self.worker.running_requests) == (0, 0)
        assert self.worker.next_event_s == inf


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[float, SimJob, float | None]]:
    """Jobs with the time from one to the next, and after how long they are aborted, if they are."""
    history = []
    for rid in range(draw(st.integers(1, 14))):
        text = draw(st.text("ab", max_size=5)) + draw(st.sampled_from(["", chr(99 + rid), chr(99 + rid) * 3]))
        answer = draw(st.sampled_from(["", "x", "xyz"]))
        output = draw(st.integers(1, 30))
        one = job(
            rid,
            text,
            output,
            more=draw(st.integers(0 if text else 1, PAGE - 1)),
            answer=answer,
            max_new_tokens=output + draw(st.integers(0, 20)),
        )
        gap_s = draw(st.sampled_from([0.0, 0.0, 0.3, 2.5, 20.0]))
        history.append((gap_s, one, draw(st.sampled_from([None, None, None, 0.0, 1.7, 9.0]))))
    return history


sizes = {
    "capacity_tokens": st.integers(5, 30).map(lambda pages: pages * PAGE),
    "chunk_tokens": st.integers(1, 6).map(lambda pages: pages * PAGE),
    "max_running_requests": st.integers(1, 5),
    "new_token_ratio": st.sampled_from([0.0, 0.3, 0.7]),
    "decode_context_s": st.sampled_from([0.0, 0.01]),
}


@settings(max_examples=60, deadline=None)
@given(histories(), st.fixed_dictionaries(sizes))
def test_whatever_comes_pages_add_up_and_every_request_ends_once(
    history: list[tuple[float, SimJob, float | None]], size: dict[str, object]
) -> None:
    watch = Watch(SimWorker("w", config(**size, min_new_token_ratio=0.0), 1))
    inputs: list[tuple[float, int, SimJob | int]] = []
    now_s = 0.0
    for gap_s, one, abort_s in history:
        now_s += gap_s
        inputs.append((now_s, one.rid, one))
        if abort_s is not None:
            inputs.append((now_s + abort_s, 100 + one.rid, one.rid))

    for at_s, _, what in sorted(inputs, key=lambda entry: entry[:2]):
        while watch.worker.next_event_s < at_s:
            watch.advance(watch.worker.next_event_s)
        if isinstance(what, SimJob):
            watch.submit(what, at_s)
        else:
            watch.worker.abort(what, at_s)
            watch.look()
    while watch.worker.next_event_s < inf:
        watch.advance(watch.worker.next_event_s)

    watch.assert_all_is_over()


@settings(max_examples=50, deadline=None)
@given(histories(), st.fixed_dictionaries(sizes), st.sampled_from([0.0, 0.4]), st.booleans())
def test_whatever_comes_to_a_pair_pages_add_up_and_both_parts_end_once(
    history: list[tuple[float, SimJob, float | None]], size: dict[str, object], page_s: float, radix_cache: bool
) -> None:
    link = {"page_bytes": 1000, "handoff_bytes_per_s": 1000 / page_s if page_s else inf}
    prefill = Watch(SimWorker("p", config(**size, **link, role="prefill"), 1))
    decode = Watch(
        SimWorker("d", config(**size, role="decode", decode_reserved_tokens=PAGE, decode_radix_cache=radix_cache), 1)
    )
    jobs = {one.rid: one for _, one, _ in history}

    def part(one: SimJob, name: str, held_pages: int = 0) -> SimJob:
        return SimJob(
            one.rid,
            one.ids,
            one.prompt_tokens,
            one.output_tokens,
            one.output_ids,
            part="prefill" if name == "prefill" else "decode",
            max_new_tokens=one.max_new_tokens,
            decode_held_pages=held_pages,
        )

    def pump(until_s: float) -> None:
        while (at_s := min(prefill.worker.next_event_s, decode.worker.next_event_s)) < until_s:
            for event in decode.advance(at_s):
                if isinstance(event, Allocated):
                    assert decode.worker.held(jobs[event.rid].ids) >= event.held_pages
                    prefill.submit(part(jobs[event.rid], "prefill", event.held_pages), at_s)
                elif isinstance(event, Aborted):
                    prefill.worker.abort(event.rid, at_s)
            for event in prefill.advance(at_s):
                if isinstance(event, Finished):
                    decode.worker.delivered(event.rid, at_s)
                    decode.look()
                elif isinstance(event, Refused | Aborted):
                    decode.worker.abort(event.rid, at_s)

    inputs: list[tuple[float, int, SimJob | int]] = []
    now_s = 0.0
    for gap_s, one, abort_s in history:
        now_s += gap_s
        inputs.append((now_s, one.rid, part(one, "decode")))
        if abort_s is not None:
            inputs.append((now_s + abort_s, 100 + one.rid, one.rid))
    for at_s, _, what in sorted(inputs, key=lambda entry: entry[:2]):
        pump(at_s)
        if isinstance(what, SimJob):
            decode.submit(what, at_s)
        else:
            decode.worker.abort(what, at_s)
            prefill.worker.abort(what, at_s)
    pump(inf)

    prefill.assert_all_is_over()
    decode.assert_all_is_over()
