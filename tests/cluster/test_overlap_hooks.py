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
    ("pending", "chunks", "state", "found"),
    [
        (True, 0, "granted", True),
        (False, 0, "granted", False),
        (True, 1, "granted", False),
        (True, 0, "offered", False),
    ],
)
def test_a_request_that_was_granted_pages_meanwhile_is_sent_with_the_others(
    pending: bool, chunks: int, state: str, found: bool
) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    run = Run()
    polled = KVPoll.WaitingForInput if state == "granted" else KVPoll.Bootstrapping
    run.request.disagg_kv_sender.poll = lambda: polled
    run.request.pending_bootstrap, run.request.inflight_middle_chunks = pending, chunks
    ready: list[Any] = []
    run.scheduler.disagg_prefill_bootstrap_queue = SimpleNamespace(finalize_bootstrap=ready.append)
    result = SimpleNamespace(copy_done=SimpleNamespace(synchronize=lambda: waited.append(True)))
    waited: list[bool] = []
    run.hooks.granted(run.scheduler, SimpleNamespace(reqs=[run.request]), result)
    assert (ready == [run.request]) is found
    assert waited == [True] * (pending and not chunks), "a grant may come until the pass is over"


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
