"""What the hooks make of a batch of SGLang's: which pages are about to be computed, and when that is said.

SGLang's own objects are stood for by ones with the same fields.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

PAGE, STREAM = 16, 7


class Sender:
    def __init__(self, *, goes: bool = True) -> None:
        self.goes = goes
        self.leaves_ahead = False
        self.went: list[tuple[list[int], int]] = []
        """Pages, and how many of them are fresh."""

    def goes_ahead(self) -> bool:
        return self.goes

    def going(self, pages: Any, fresh: int) -> Any:
        return self, pages.tolist(), fresh


class Manager:
    def __init__(self, passes: Any) -> None:
        self.passes = passes
        self.computed: list[Any] = []

    def ahead(self, going: list[Any], computed: Any) -> None:
        for sender, pages, fresh in going:
            sender.went.append((pages, fresh))
        self.computed.append(computed)


class Run:
    """A scheduler that runs one batch with the hooks around it."""

    def __init__(self, layers: int = 3, *, counts: bool = True, apart: bool = True, reader: Any = None) -> None:
        from engine.forward_passes import Events, ForwardPasses
        from engine.sglang_layers import LayerHooks
        from engine.sglang_slots import SlotReader

        self.recorded: list[str] = []
        self.hooks = LayerHooks(reader or SlotReader())
        self.layers = layers
        passes = ForwardPasses(
            layers,
            [Events("before", "nearly", "done")],
            lambda event, _stream: self.recorded.append(event),
            lambda: STREAM,
            lambda event: SimpleNamespace(event=event, reached=lambda: False),
            apart=apart,
        )
        self.manager = Manager(passes if counts else None)
        self.pool = SimpleNamespace(layer_transfer_counter=None)
        self.scheduler = SimpleNamespace(
            disagg_prefill_bootstrap_queue=SimpleNamespace(kv_manager=self.manager),
            enable_overlap=True,
            forward_stream=SimpleNamespace(cuda_stream=STREAM),
            token_to_kv_pool_allocator=SimpleNamespace(page_size=PAGE, get_kvcache=lambda: self.pool),
            # Request 0 has the pages 10, 11, …; request 1 the pages 50, 51, ….
            req_to_token_pool=SimpleNamespace(
                req_to_token=torch.stack([torch.arange(160, 416), torch.arange(800, 1056)]).to(torch.int32)
            ),
        )

    def request(self, row: int, start: int, end: int, prompt: int, sender: Any, **changes: Any) -> SimpleNamespace:
        fields: dict[str, Any] = {
            "req_pool_idx": row,
            "extend_range": SimpleNamespace(start=start, end=end),
            "origin_input_ids": [0] * prompt,
            "disagg_kv_sender": sender,
        }
        return SimpleNamespace(**(fields | changes))

    def batch(self, *requests: SimpleNamespace, extend: bool = True, fails: bool = False, sent: bool = True) -> Any:
        """sent: whether all that was computed before is, by then"""
        before = len(self.manager.computed)

        def original(scheduler: Any, _batch: Any) -> str:
            for layer in range(self.layers):
                self.hooks.attention("backend", "q", "k", "v", SimpleNamespace(layer_id=layer), "batch")
            assert len(self.manager.computed) == before, "not before all is in the stream"
            if fails:
                raise RuntimeError("out of memory")
            return "result"

        mode = SimpleNamespace(is_extend=lambda: extend)
        batch = SimpleNamespace(forward_mode=mode, reqs=list(requests))
        result = self.hooks.run_batch(original, self.scheduler, batch)
        if sent:
            self.hooks.others_sent([], self.scheduler)
        return result


def test_a_whole_prompt_goes_ahead_with_its_last_page_and_most_layers_before_the_last() -> None:
    run, sender = Run(), Sender()
    assert run.batch(run.request(0, 0, 100, 100, sender)) == "result"
    assert sender.went == [(list(range(10, 17)), 7)]
    [computed] = run.manager.computed
    assert (computed.before, computed.nearly, computed.layers, computed.done) == ("before", "nearly", 2, "done")
    assert run.recorded == ["before", "nearly", "done"]


def test_of_a_chunk_the_page_that_it_does_not_fill_stays_and_the_next_one_brings_it() -> None:
    """And those before it: the sender knows which of them have left."""
    run, sender = Run(), Sender()
    run.batch(run.request(1, 0, 40, 100, sender))
    run.batch(run.request(1, 40, 100, 100, sender))
    assert sender.went == [([50, 51], 2), ([50, 51, 52, 53, 54, 55, 56], 5)]


def test_what_a_cache_had_goes_ahead_too() -> None:
    run, sender = Run(), Sender()
    run.batch(run.request(1, 48, 100, 100, sender))
    assert sender.went == [([50, 51, 52, 53, 54, 55, 56], 4)]


def test_what_a_cache_beyond_the_gpu_loads_while_the_pass_runs_is_not_there_before() -> None:
    run, sender = Run(), Sender()
    run.pool.layer_transfer_counter = "of a hierarchical cache"
    run.batch(run.request(1, 48, 100, 100, sender))
    assert sender.went == [([50, 51, 52, 53, 54, 55, 56], 7)]


def test_two_requests_of_a_batch_leave_together() -> None:
    run, one, two = Run(), Sender(), Sender()
    run.batch(run.request(0, 0, 64, 64, one), run.request(1, 16, 64, 64, two))
    assert len(run.manager.computed) == 1
    assert (one.went, two.went) == ([([10, 11, 12, 13], 4)], [([50, 51, 52, 53], 3)])


def test_a_pass_leaves_at_its_end_where_that_is_asked_for() -> None:
    run, sender = Run(apart=False), Sender()
    run.batch(run.request(0, 0, 64, 64, sender))
    assert (sender.went, run.recorded) == ([([10, 11, 12, 13], 4)], ["before", "nearly", "done"])
    [computed] = run.manager.computed
    assert (computed.nearly, computed.layers, computed.soon.event) == (None, 0, "nearly")


def test_a_pass_that_begins_before_the_last_one_was_sent_waits_for_that() -> None:
    """A route copies in order: what was computed would wait behind what is not."""
    run, first, second = Run(), Sender(), Sender()
    run.batch(run.request(0, 0, 64, 64, first))
    run.batch(run.request(1, 0, 64, 64, second), sent=False)
    assert (len(first.went), len(second.went)) == (1, 0)
    run.hooks.others_sent([], run.scheduler)
    assert second.went == [([50, 51, 52, 53], 4)]
    run.hooks.others_sent([], run.scheduler)
    assert len(second.went) == 1


def test_the_gpu_is_asked_for_the_slots_once_it_computes_and_says_what_they_were_before() -> None:
    from engine.sglang_slots import SlotReader, SlotsRead

    asked: list[str] = []

    class Noted(SlotReader):
        """Whose table is on a GPU, that is: what is written to it later is not seen by who has `written`."""

        def written(self, table: Any) -> Any:
            asked.append("written")
            return table.clone()

        def read(self, slots: Any, page_tokens: int, written: Any) -> SlotsRead:
            asked.append("read")
            return super().read(written[0, : len(slots)], page_tokens, None)

    run, sender = Run(reader=Noted()), Sender()
    run.hooks.attention = lambda *_arguments, **_named: asked.append("computes")  # type: ignore[method-assign]
    table = run.scheduler.req_to_token_pool.req_to_token
    request = run.request(0, 0, 64, 64, sender)
    run.batch(request, sent=False)
    table[0] = 0
    run.hooks.others_sent([], run.scheduler)
    assert asked == ["written", *["computes"] * 3, "read"]
    assert sender.went == [([10, 11, 12, 13], 4)]


@pytest.mark.parametrize("how", ["no route for it", "no GPU", "decode"])
def test_nothing_is_recorded_where_nothing_goes_ahead(how: str) -> None:
    run, sender = Run(counts=how != "no GPU"), Sender(goes=how != "no route for it")
    assert run.batch(run.request(0, 0, 64, 64, sender), extend=how != "decode")
    assert (sender.went, run.recorded) == ([], [])


def test_a_pass_that_fails_sends_nothing_and_leaves_nothing_behind() -> None:
    run, sender, later = Run(), Sender(), Sender()
    with pytest.raises(RuntimeError, match="out of memory"):
        run.batch(run.request(0, 0, 64, 64, sender), fails=True)
    run.batch(run.request(1, 0, 16, 16, later))
    assert (sender.went, later.went) == ([], [([50], 1)])


def test_requests_with_a_sender_of_sglangs_own_are_left_alone() -> None:
    run, sender = Run(), Sender()
    assert run.batch(run.request(0, 0, 64, 64, SimpleNamespace()), run.request(1, 0, 64, 64, sender)) == "result"
    assert sender.went == [([50, 51, 52, 53], 4)]


def test_which_buffers_are_whose() -> None:
    from engine.sglang_layers import layers_of

    assert layers_of(6, is_mla=False) == ((0, 3), (1, 4), (2, 5))
    assert layers_of(3, is_mla=True) == ((0,), (1,), (2,))
