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
        self.hooks = OverlapHooks(self.reader)  # type: ignore[arg-type]
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


class Looking:
    """A scheduler that looks at the result of a pass of one request, as SGLang's does."""

    def __init__(self, prompt: list[int], held: int = 0, **request: Any) -> None:
        """held: so many tokens of it were cached when the request was scheduled"""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self.run = Run()
        self.run.request.disagg_kv_sender.sent_first = False
        if held:
            self.run.insert(prompt[:held])
        key = RadixKey(array("q", prompt[:held]), None)
        node = self.run.cache.match_prefix(MatchPrefixParams(key=key)).last_device_node
        fields: dict[str, Any] = {"pending_bootstrap": False, "inflight_middle_chunks": 0, "return_logprob": False}
        fields |= {"return_sampling_mask": False, "extra_key": None, "last_node": node, "cache_protected_len": held}
        vars(self.run.request).update(fields | request)
        self.run.request.get_fill_ids = lambda: array("q", prompt)
        self.prompt = prompt
        self.order: list[str] = []
        self.run.scheduler.send_kv_chunk = self.send
        self.run.scheduler.spec_algorithm = SimpleNamespace(is_none=lambda: True)

    def send(self, request: Any, last_chunk: bool) -> None:
        assert last_chunk
        note = lambda *_arguments, **_named: self.order.append("sent")  # noqa: E731
        self.run.hooks.send(note, self.run.scheduler, request)

    def look(self) -> list[str]:
        def insert(_cache: Any, _request: Any) -> None:
            self.run.hooks.inserted(self.run.insert(self.prompt), self.run.cache)
            self.order.append("cached")

        def process(scheduler: Any, _batch: Any, _result: Any) -> None:
            self.run.hooks.cached(insert, self.run.cache, self.run.request)
            if not self.run.request.pending_bootstrap:
                scheduler.send_kv_chunk(self.run.request, last_chunk=True)

        batch = SimpleNamespace(reqs=[])
        self.run.hooks.result(process, self.run.scheduler, batch, SimpleNamespace(copy_done=None))
        return self.order


@pytest.mark.parametrize("held", [0, 4, 8])
def test_what_is_computed_is_sent_before_the_cache_takes_it_in_and_once(held: int) -> None:
    assert Looking([1, 2, 3, 4, 5, 6, 7, 8, 9], held).look() == ["sent", "cached"]


@pytest.mark.parametrize("held", [0, 4])
def test_where_the_cache_may_give_it_other_slots_it_is_sent_behind_it(held: int) -> None:
    looking = Looking([1, 2, 3, 4, 5, 6, 7, 8], held)
    looking.run.insert([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9])  # Somebody else's, meanwhile.
    assert looking.look() == ["cached", "sent"]


def test_another_prompt_that_parts_within_the_held_ones_changes_no_slots() -> None:
    looking = Looking([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9], held=8)
    looking.run.insert([1, 2, 3, 4, 7, 7, 7, 7])  # The held node is split.
    assert looking.look() == ["sent", "cached"]
    assert not looking.run.request.disagg_kv_sender.slots_changed


@pytest.mark.parametrize("field", ["return_logprob", "return_sampling_mask"])
def test_what_else_goes_with_it_is_waited_for(field: str) -> None:
    assert Looking([1, 2, 3, 4, 5], **{field: True}).look() == ["cached", "sent"]


def test_a_request_without_a_grant_or_with_chunks_to_come_is_not_sent_first() -> None:
    assert Looking([1, 2, 3, 4, 5], pending_bootstrap=True).look() == ["cached"]
    assert Looking([1, 2, 3, 4, 5], inflight_middle_chunks=1).look() == ["cached", "sent"]
