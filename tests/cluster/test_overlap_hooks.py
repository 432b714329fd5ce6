"""When a prefill worker with SGLang's overlap asks aside for the pages to send, and when it may not.

SGLang's cache is real; its scheduler is stood for by one with the same fields, and so is the stream of a GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

PAGE = 4


class Reader:
    """Counts what is asked aside."""

    def __init__(self) -> None:
        self.inside = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


class Run:
    def __init__(self, *, overlap: bool = True, goes: bool = True) -> None:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        from engine.sglang_overlap import OverlapHooks

        self.reader = Reader()
        self.hooks = OverlapHooks(self.reader, lambda *_pass: None)  # type: ignore[arg-type]
        self.cache = RadixCache.create_simulated(page_size=PAGE)
        self.scheduler = SimpleNamespace(
            enable_overlap=overlap,
            tree_cache=self.cache,
        )
        sender = SimpleNamespace(slots_changed=False, leaves_ahead=goes)
        self.request = SimpleNamespace(disagg_kv_sender=sender, cache_protected_len=0)

    def sent_aside(self) -> bool:
        found = []
        self.hooks.send(lambda *_arguments, **_named: found.append(self.reader.inside), self.scheduler, self.request)
        [aside] = found
        return aside

    def cached(self, tokens: list[int]) -> None:
        """As SGLang's cache takes a request that is computed."""

        def original(cache: Any, request: Any) -> None:
            self.hooks.inserted(self.insert(tokens), cache)
            request.cache_protected_len = len(tokens)

        self.hooks.cached(original, self.cache, self.request)

    def insert(self, tokens: list[int]) -> Any:
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(array("q", tokens), None)
        return self.cache.insert(InsertParams(key=key, value=torch.arange(len(tokens))))


def test_pages_are_asked_for_aside_where_the_overlap_is_on() -> None:
    assert Run().sent_aside()
    assert not Run(overlap=False).sent_aside()


@pytest.mark.parametrize(
    ("pending", "chunks", "granted", "found", "waits"),
    [
        (True, 0, "before", True, False),
        (True, 0, "meanwhile", True, True),
        (True, 0, "never", False, True),
        (False, 0, "before", False, False),
        (True, 1, "before", False, False),
    ],
)
def test_a_request_that_is_granted_pages_until_its_pass_is_over_is_sent_with_the_others(
    pending: bool, chunks: int, granted: str, found: bool, waits: bool
) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    run = Run()
    waited: list[bool] = []

    def poll() -> int:
        is_granted = granted == "before" or (granted == "meanwhile" and bool(waited))
        return int(KVPoll.WaitingForInput if is_granted else KVPoll.Bootstrapping)

    run.request.disagg_kv_sender.poll = poll
    run.request.pending_bootstrap, run.request.inflight_middle_chunks = pending, chunks
    ready: list[Any] = []
    run.scheduler.disagg_prefill_bootstrap_queue = SimpleNamespace(finalize_bootstrap=ready.append)
    result = SimpleNamespace(copy_done=SimpleNamespace(synchronize=lambda: waited.append(True)))
    run.hooks.granted(run.scheduler, SimpleNamespace(reqs=[run.request]), result)
    assert (ready == [run.request]) is found
    assert bool(waited) is waits


def test_a_request_to_which_the_cache_gave_other_pages_waits_once() -> None:
    run = Run()
    run.insert([1, 2, 3, 4, 5, 6, 7, 8])  # Somebody else's, meanwhile.
    run.cached([1, 2, 3, 4, 9, 9, 9, 9])
    assert run.request.disagg_kv_sender.slots_changed
    assert not run.sent_aside()
    assert run.sent_aside()


def test_a_request_that_keeps_its_pages_does_not_wait() -> None:
    run = Run()
    run.insert([1, 2, 3, 4])
    run.request.cache_protected_len = 4  # It was matched when it was scheduled.
    run.cached([1, 2, 3, 4, 5, 6, 7, 8])
    assert run.sent_aside()


def test_a_cache_of_another_kind_is_not_trusted() -> None:
    run = Run()
    run.scheduler.tree_cache = SimpleNamespace()
    assert not run.sent_aside()


def test_a_sender_of_sglangs_own_is_left_alone() -> None:
    run = Run()
    run.request.disagg_kv_sender = SimpleNamespace()
    assert not run.sent_aside()


@pytest.mark.parametrize(("overlap", "goes", "sent"), [(True, True, False), (False, True, True), (True, False, True)])
def test_what_the_cache_had_is_sent_early_where_it_does_not_go_ahead(overlap: bool, goes: bool, sent: bool) -> None:
    run = Run(overlap=overlap, goes=goes)
    asides: list[bool] = []
    run.hooks.send_early(lambda *_arguments: asides.append(run.sent_aside()), run.scheduler, run.request)
    assert asides == ([False] if sent else []), "never aside: its slots are just being written"


class Pass:
    """A scheduler that looks at the result of a pass, as SGLang's does, request by request."""

    def __init__(self) -> None:
        self.run = Run()
        self.run.scheduler.send_kv_chunk = self.send
        self.run.scheduler.spec_algorithm = SimpleNamespace(is_none=lambda: True)
        self.requests: list[Any] = []
        self.order: list[tuple[str, int]] = []
        self.freed: dict[int, int] = {}
        """Slots of each request's own that the cache freed, as it had them already."""

    def add(self, prompt: list[int], **fields: Any) -> Pass:
        """A request that is scheduled now: what the cache has of it is not computed again."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        match = self.run.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt[:-1]), None)))
        made: dict[str, Any] = {"pending_bootstrap": False, "inflight_middle_chunks": 0, "return_logprob": False}
        made |= {"return_sampling_mask": False, "extra_key": None, "number": len(self.requests)}
        made |= {"last_node": match.last_device_node, "cache_protected_len": len(match.device_indices)}
        sender = SimpleNamespace(slots_changed=False, leaves_ahead=True, sent_first=False)
        request = SimpleNamespace(disagg_kv_sender=sender, **(made | fields))
        request.get_fill_ids = lambda: array("q", prompt)
        self.requests.append(request)
        return self

    def send(self, request: Any, last_chunk: bool) -> None:
        assert last_chunk
        note = lambda *_arguments, **_named: self.order.append(("sent", request.number))  # noqa: E731
        self.run.hooks.send(note, self.run.scheduler, request)

    def insert(self, _cache: Any, request: Any) -> None:
        result = self.run.insert(list(request.get_fill_ids()))
        self.run.hooks.inserted(result, self.run.cache)
        self.freed[request.number] = max(0, result.prefix_len - request.cache_protected_len)
        self.order.append(("cached", request.number))

    def look(self) -> list[tuple[str, int]]:
        def process(scheduler: Any, _batch: Any, _result: Any) -> None:
            for request in self.requests:
                self.run.hooks.cached(self.insert, self.run.cache, request)
                if not request.pending_bootstrap:
                    scheduler.send_kv_chunk(request, last_chunk=True)

        batch = SimpleNamespace(reqs=[])
        self.run.hooks.result(process, self.run.scheduler, batch, SimpleNamespace(copy_done=None))
        return self.order


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("held", [0, 4, 8])
def test_what_is_computed_is_sent_before_the_cache_takes_it_in_and_once(held: int) -> None:
    one = Pass()
    one.run.insert(PROMPT[:held])
    assert one.add(PROMPT).look() == [("sent", 0), ("cached", 0)]


def test_all_of_a_pass_is_sent_before_the_cache_takes_any_of_it_in() -> None:
    one = Pass().add(PROMPT).add([2, *PROMPT]).add([3, *PROMPT])
    assert one.look() == [("sent", 0), ("sent", 1), ("sent", 2), ("cached", 0), ("cached", 1), ("cached", 2)]


@pytest.mark.parametrize("held", [0, 4])
def test_where_the_cache_may_give_it_other_slots_it_is_sent_behind_it(held: int) -> None:
    one = Pass()
    one.run.insert(PROMPT[:held])
    one.add(PROMPT)
    one.run.insert([*PROMPT[:8], 9, 9, 9, 9])  # Somebody else's, meanwhile.
    assert one.look() == [("cached", 0), ("sent", 0)]


def test_of_two_equal_prompts_in_a_pass_the_second_is_sent_when_the_cache_has_the_first() -> None:
    one = Pass().add(PROMPT).add(PROMPT)
    assert one.look() == [("sent", 0), ("cached", 0), ("cached", 1), ("sent", 1)]
    assert one.freed == {0: 0, 1: 8}


def test_another_prompt_that_parts_within_the_held_ones_changes_no_slots() -> None:
    one = Pass()
    one.run.insert(PROMPT[:8])
    one.add([*PROMPT[:8], 9, 9, 9, 9])
    one.run.insert([1, 2, 3, 4, 7, 7, 7, 7])  # The held node is split.
    assert one.look() == [("sent", 0), ("cached", 0)]
    assert one.freed == {0: 0}


def test_a_request_that_leaves_its_prompt_in_the_cache_comes_behind_what_was_sent() -> None:
    one = Pass().add(PROMPT)

    def process(scheduler: Any, _batch: Any, _result: Any) -> None:
        one.run.hooks.cached(one.insert, one.run.cache, one.requests[0])
        assert one.order == [("sent", 0)]
        one.run.hooks.released(one.run.cache, one.requests[0])
        assert one.order == [("sent", 0), ("cached", 0)]

    one.run.hooks.result(process, one.run.scheduler, SimpleNamespace(reqs=[]), SimpleNamespace(copy_done=None))
    assert one.order == [("sent", 0), ("cached", 0)]


@pytest.mark.parametrize("field", ["return_logprob", "return_sampling_mask"])
def test_what_else_goes_with_it_is_waited_for(field: str) -> None:
    assert Pass().add(PROMPT, **{field: True}).look() == [("cached", 0), ("sent", 0)]


def test_a_request_without_a_grant_or_with_chunks_to_come_is_not_sent_first() -> None:
    assert Pass().add(PROMPT, pending_bootstrap=True).look() == [("cached", 0)]
    assert Pass().add(PROMPT, inflight_middle_chunks=1).look() == [("cached", 0), ("sent", 0)]


tokens = st.lists(st.integers(1, 2), min_size=1, max_size=13)


@settings(max_examples=300, deadline=None)
@given(cached=st.lists(tokens, max_size=3), prompts=st.lists(tokens, min_size=1, max_size=5), meanwhile=st.data())
def test_no_slot_is_freed_that_was_sent_before_in_whatever_pass(
    cached: list[list[int]], prompts: list[list[int]], meanwhile: st.DataObject
) -> None:
    one = Pass()
    for other in cached:
        one.run.insert(other)
    for prompt in prompts:
        one.add(prompt, pending_bootstrap=meanwhile.draw(st.booleans(), "without a grant"))
        for other in meanwhile.draw(st.lists(tokens, max_size=1), "somebody else's"):
            one.run.insert(other)
    order = one.look()
    for request in one.requests:
        said = [word for word, number in order if number == request.number]
        assert sorted(said) == (["cached"] if request.pending_bootstrap else ["cached", "sent"])
        if said[0] == "sent":
            assert one.freed[request.number] == 0
