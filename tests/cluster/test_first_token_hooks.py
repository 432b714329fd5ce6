"""Which first tokens a decode worker says before their batch is built, and that none is said twice.

SGLang's queue, batch and streamer are stood for by what the hooks use of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


class Request:
    def __init__(self, *, ends: bool = False, holds_back: bool = False, **changes: Any) -> None:
        self.output_ids = [7]
        self.stream = True
        self.grammar = None
        self.return_logprob = self.return_hidden_states = False
        self.send_token_offset = 0
        self.time_stats = SimpleNamespace(set_forward_entry_time=lambda: None)
        self.holds_back = holds_back
        self._ends = ends
        self._finished = False
        vars(self).update(changes)

    def update_finish_state(self) -> None:
        self._finished = self._ends

    def finished(self) -> bool:
        return self._finished


class Worker:
    """As much of a decode scheduler as says tokens."""

    def __init__(self, *, ours: bool = True) -> None:
        from engine.sglang_first_token import FirstTokenHooks

        self.hooks = FirstTokenHooks()
        self.said: list[Request] = []
        manager = SimpleNamespace(receiver="a receiver" if ours else None)
        self.scheduler = SimpleNamespace(
            disagg_decode_prealloc_queue=SimpleNamespace(kv_manager=manager),
            output_streamer=SimpleNamespace(stream_output=self.stream_output),
        )

    def stream_output(self, requests: list[Request], *_arguments: Any) -> None:
        def original(_streamer: Any, ready: list[Request], *_more: Any) -> None:
            for one in ready:
                if one.finished() or not one.holds_back:
                    self.said.append(one)
                    one.send_token_offset = len(one.output_ids)

        self.hooks.stream_output(original, None, requests, False)

    def pages_came(self, *requests: Request) -> None:
        self.hooks.transferred(list(requests), SimpleNamespace(scheduler=self.scheduler))

    def batch_built(self, *requests: Request) -> None:
        def original(_processor: Any, batch: list[Request]) -> None:
            for one in batch:
                one.update_finish_state()
            self.stream_output(batch)

        self.hooks.prebuilt(original, None, list(requests))

    def decoded(self, *requests: Request) -> None:
        for one in requests:
            one.output_ids.append(8)
        self.stream_output(list(requests))


def test_a_first_token_is_said_when_it_comes_and_not_again() -> None:
    worker, one, two = Worker(), Request(), Request()
    worker.pages_came(one, two)
    assert worker.said == [one, two]
    worker.batch_built(one, two)
    assert worker.said == [one, two]
    worker.decoded(one, two)
    assert worker.said == [one, two] * 2


def test_one_that_is_held_back_is_looked_at_again() -> None:
    """It may be the beginning of a stop string."""
    worker, one = Worker(), Request(holds_back=True)
    worker.pages_came(one)
    one.holds_back = False
    worker.batch_built(one)
    assert worker.said == [one]


@pytest.mark.parametrize(
    "other",
    [
        {"ends": True},
        {"stream": False},
        {"grammar": "a grammar"},
        {"return_logprob": True},
        {"return_hidden_states": True},
        {"output_ids": [7, 8]},
    ],
)
def test_whatever_needs_more_than_a_token_is_left_to_sglang(other: dict[str, Any]) -> None:
    worker, one = Worker(), Request(**other)
    worker.pages_came(one)
    assert worker.said == []
    worker.batch_built(one)
    assert worker.said == [one]


def test_another_backends_worker_is_left_alone() -> None:
    worker, one = Worker(ours=False), Request()
    worker.pages_came(one)
    assert worker.said == []
