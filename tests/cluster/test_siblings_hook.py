"""What prefill's scheduler forms a pass of, where requests begin alike, and in which order the others still wait.

SGLang's cache is real; its scheduler is stood for by one with the same fields, which takes into a pass whoever waits.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from engine.siblings import LEAST_TOKENS
from engine.spec import SPEC_VARIABLE

torch = pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

PAGE = 16
SYSTEM = array("q", range(2 * LEAST_TOKENS))


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPEC_VARIABLE, "of a worker of ours")


def asks(name: str, question: int, *, system: array[int] = SYSTEM, salt: str | None = None) -> SimpleNamespace:
    ids = system + array("q", [1_000_000 + question] * PAGE)
    return SimpleNamespace(name=name, origin_input_ids=ids, extra_key=salt, return_logprob=False, session=None)


class Scheduler:
    """takes  how many requests fit into a pass; comes  one that joins the queue while the pass is formed"""

    def __init__(self, *waiting: SimpleNamespace, takes: int = 99, comes: SimpleNamespace | None = None) -> None:
        from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.tree_cache = RadixCache.create_simulated(page_size=PAGE)
        self.waiting_queue = list(waiting)
        self.last_batch: Any = None
        self.chunked_req: Any = None
        self.policy = SimpleNamespace(policy=CacheAgnosticPolicy.FCFS)
        self.enable_priority_scheduling = self.enable_hicache_storage = False
        self.page_size = PAGE
        self._takes = takes
        self._comes = comes

    def under_way(self, *requests: SimpleNamespace, mode: str = "EXTEND") -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self.last_batch = SimpleNamespace(reqs=list(requests), forward_mode=ForwardMode[mode])

    def computed(self, request: SimpleNamespace) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(request.origin_input_ids, request.extra_key)
        self.tree_cache.insert(InsertParams(key=key, value=torch.arange(len(key))))

    def next_pass(self) -> list[str]:
        from engine.sglang_siblings import SiblingHook

        def original(scheduler: Scheduler) -> list[SimpleNamespace]:
            taken = scheduler.waiting_queue[: self._takes]
            scheduler.waiting_queue = scheduler.waiting_queue[self._takes :]
            if self._comes is not None:
                scheduler.waiting_queue.append(self._comes)
            return taken

        return [request.name for request in SiblingHook().form(original, self)]

    @property
    def waits(self) -> list[str]:
        return [request.name for request in self.waiting_queue]


def test_one_of_those_that_begin_alike_is_computed_and_the_others_come_one_pass_later() -> None:
    first, *others = (asks(name, number) for number, name in enumerate("abc"))
    scheduler = Scheduler(first, *others, asks("other", 4, system=SYSTEM[::-1]))

    assert scheduler.next_pass() == ["a", "other"]
    assert scheduler.waits == ["b", "c"]
    scheduler.computed(first)
    assert scheduler.next_pass() == ["b", "c"]


def test_those_that_wait_keep_their_places_and_who_comes_meanwhile_is_behind_them() -> None:
    waiting = [asks("a", 1), asks("b", 2), asks("other", 3, system=SYSTEM[::-1]), asks("c", 4)]
    scheduler = Scheduler(*waiting, takes=1, comes=asks("late", 5))

    assert scheduler.next_pass() == ["a"]
    assert scheduler.waits == ["b", "other", "c", "late"]


def test_a_pass_under_way_and_a_prompt_computed_in_part_are_waited_for() -> None:
    scheduler = Scheduler(asks("b", 2))
    scheduler.under_way(asks("a", 1))
    assert (scheduler.next_pass(), scheduler.waits) == ([], ["b"])

    scheduler.last_batch, scheduler.chunked_req = None, asks("a", 1)
    assert (scheduler.next_pass(), scheduler.waits) == ([], ["b"])

    # It has ended without leaving anything, as where it was aborted.
    scheduler.chunked_req = None
    assert scheduler.next_pass() == ["b"]


@pytest.mark.parametrize("mode", ["DECODE", "MIXED"])
def test_a_step_of_running_requests_is_not_waited_for(mode: str) -> None:
    scheduler = Scheduler(asks("b", 2))
    scheduler.under_way(asks("a", 1), mode=mode)

    assert scheduler.next_pass() == ["b"]


def test_of_forty_alike_none_overtakes() -> None:
    first, *others = (asks(str(number), number) for number in range(40))
    scheduler = Scheduler(first, *others)

    assert scheduler.next_pass() == ["0"]
    scheduler.computed(first)
    assert scheduler.next_pass() == [other.name for other in others]


def test_those_with_a_cached_beginning_wait_where_they_go_on_alike() -> None:
    scheduler = Scheduler(asks("a", 1), asks("b", 2), asks("c", 1))
    scheduler.computed(asks("before", 7))
    assert scheduler.next_pass() == ["a", "b", "c"]

    more = SYSTEM + array("q", range(5000, 5000 + LEAST_TOKENS))
    scheduler = Scheduler(asks("a", 1, system=more), asks("b", 2), asks("c", 3, system=more))
    scheduler.computed(asks("before", 7))
    assert scheduler.next_pass() == ["a", "b"]


def test_where_others_than_the_first_may_go_first_nobody_waits() -> None:
    from sglang.srt.managers.schedule_policy import CacheAwarePolicy

    by_prefix, by_priority = (Scheduler(asks("a", 1), asks("b", 2)) for _ in range(2))
    by_prefix.policy.policy = CacheAwarePolicy.LPM
    by_priority.enable_priority_scheduling = True

    assert by_prefix.next_pass() == by_priority.next_pass() == ["a", "b"]


def test_one_that_wants_its_prompts_log_probabilities_waits_for_nobody() -> None:
    wants = asks("b", 2)
    wants.return_logprob = True

    assert Scheduler(asks("a", 1), wants).next_pass() == ["a", "b"]


def test_salts_share_nothing() -> None:
    assert Scheduler(asks("a", 1, salt="red"), asks("b", 2, salt="blue")).next_pass() == ["a", "b"]


def test_where_there_is_no_cache_nobody_waits() -> None:
    scheduler = Scheduler(asks("a", 1), asks("b", 2))
    scheduler.tree_cache.disable = True

    assert scheduler.next_pass() == ["a", "b"]


def test_another_sglang_than_ours_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPEC_VARIABLE)

    assert Scheduler(asks("a", 1), asks("b", 2)).next_pass() == ["a", "b"]


def test_a_failure_loses_nobody() -> None:
    def fails(scheduler: Any) -> None:
        raise RuntimeError("out of memory")

    from engine.sglang_siblings import SiblingHook

    scheduler = Scheduler(asks("a", 1), asks("b", 2))
    with pytest.raises(RuntimeError):
        SiblingHook().form(fails, scheduler)

    assert scheduler.waits == ["a", "b"]
