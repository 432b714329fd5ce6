"""Which first tokens prefill says before it sends pages, and decode before their batch is built; none is said twice.

SGLang's queue, batch and streamer are stood for by what the hooks use of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
# SGLang warns of what a CPU lacks when it is imported.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


NEEDS_MORE: tuple[dict[str, Any], ...] = (
    {"ends": True},
    {"stream": False},
    {"grammar": "a grammar"},
    {"return_logprob": True},
    {"return_hidden_states": True},
)
"""Of which SGLang says more than a token, or not yet."""


class Request:
    def __init__(self, *, ends: bool = False, holds_back: bool = False, **changes: Any) -> None:
        self.output_ids = [7]
        self.stream = True
        self.grammar = None
        self.return_logprob = self.return_hidden_states = False
        self.send_token_offset = 0
        self.time_stats = SimpleNamespace(set_forward_entry_time=lambda: None)
        self.holds_back = holds_back
        self.finished_reason: str | None = None
        self.finished_len: int | None = None
        self.disagg_kv_sender = SimpleNamespace(slots_changed=False)
        self.inflight_middle_chunks = 0
        self.to_finish = None
        self.sampling_params = SimpleNamespace(max_new_tokens=8)
        self._ends = ends
        vars(self).update(changes)

    def update_finish_state(self) -> None:
        if self._ends or len(self.output_ids) >= self.sampling_params.max_new_tokens:
            self.finished_reason, self.finished_len = "its end", len(self.output_ids)

    def finished(self) -> bool:
        return self.finished_reason is not None


@dataclass
class Streamer:
    """SGLang's is a dataclass too."""

    say: Callable[[list[Request]], None]
    ways: list[str]
    send_to_detokenizer: str = "detokenizer"

    def stream_output(self, requests: list[Request], *_arguments: Any) -> None:
        self.ways.append(self.send_to_detokenizer)
        self.say(requests)


class Worker:
    """As much of a scheduler as says tokens. servers: that read them"""

    def __init__(self, *, ours: bool = True, servers: int = 1) -> None:
        from engine.sglang_first_token import FirstTokenHooks

        self.hooks = FirstTokenHooks()
        self.said: list[Request] = []
        self.ways: list[str] = []
        """To whom, each time."""
        manager = SimpleNamespace(receiver="a receiver" if ours else None)
        self.scheduler = SimpleNamespace(
            disagg_decode_prealloc_queue=SimpleNamespace(kv_manager=manager),
            output_streamer=Streamer(self.stream_output, self.ways),
            ipc_channels=SimpleNamespace(send_to_tokenizer="HTTP server"),
            server_args=SimpleNamespace(tokenizer_worker_num=servers, skip_tokenizer_init=False),
        )

    def stream_output(self, requests: list[Request]) -> None:
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
        *NEEDS_MORE,
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


def computing(**changes: Any) -> Request:
    """A request of a prefill worker, which SGLang lets make one token."""
    return Request(**{"output_ids": [], "sampling_params": SimpleNamespace(max_new_tokens=1), **changes})


class Copied:
    """The event after which a pass's tokens are there."""

    def __init__(self, *, there: bool = True) -> None:
        self.there = there
        self.waited = False

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.waited = True


def result_of(*requests: Request, copied: Copied | None = None) -> SimpleNamespace:
    return SimpleNamespace(copy_done=copied or Copied(), next_token_ids=torch.tensor([7] * len(requests)))


def computed(worker: Worker, *requests: Request) -> Copied:
    result = result_of(*requests)
    worker.hooks.computed(worker.scheduler, SimpleNamespace(reqs=list(requests)), result)
    copied: Copied = result.copy_done
    return copied


def next_pass(
    worker: Worker, before: SimpleNamespace, *requests: Request, extends: bool = True, **changes: Any
) -> None:
    """SGLang is about to launch one, with its overlap, and has not looked at the one before."""
    fields = {
        "enable_overlap": True,
        "disagg_prefill_bootstrap_queue": "a queue",
        "result_queue": [(SimpleNamespace(reqs=list(requests)), before)],
    }
    vars(worker.scheduler).update(fields | changes)
    mode = SimpleNamespace(is_extend=lambda: extends)
    worker.hooks.before_pass(worker.scheduler, SimpleNamespace(forward_mode=mode))


def test_prefill_says_a_token_when_it_is_computed_and_leaves_the_request_as_it_was() -> None:
    worker, one, two = Worker(), computing(), computing()
    assert computed(worker, one, two).waited
    assert worker.said == [one, two]
    assert [one.output_ids, two.output_ids] == [[], []]
    assert one.sampling_params.max_new_tokens == 1
    assert not one.finished()
    # As SGLang does next: it appends the token, and says at the end of the hand-off that there was no more.
    one.output_ids.append(7)
    assert one.send_token_offset == len(one.output_ids)


@pytest.mark.parametrize(("servers", "way"), [(1, "HTTP server"), (2, "detokenizer")])
def test_what_prefill_says_goes_straight_to_its_http_server_where_there_is_one(servers: int, way: str) -> None:
    worker = Worker(servers=servers)
    computed(worker, computing())
    assert worker.ways == [way]


@pytest.mark.parametrize(
    "other",
    [
        *NEEDS_MORE,
        {"inflight_middle_chunks": 1},
        {"to_finish": "aborted"},
        {"disagg_kv_sender": SimpleNamespace()},
    ],
)
def test_prefill_says_nothing_of_one_that_is_over_or_needs_more(other: dict[str, Any]) -> None:
    worker, one = Worker(), computing(**other)
    computed(worker, one)
    assert worker.said == []
    assert (one.output_ids, one.finished_reason, one.finished_len) == ([], None, None)
    assert one.sampling_params.max_new_tokens == 1


def test_what_the_gpu_has_when_the_next_pass_is_launched_is_said_before_that_and_not_again() -> None:
    worker, one = Worker(), computing()
    result = result_of(one)
    next_pass(worker, result, one)
    assert worker.said == [one]
    worker.hooks.computed(worker.scheduler, SimpleNamespace(reqs=[one]), result)
    assert worker.said == [one]
    two = computing()
    computed(worker, two)
    assert worker.said == [one, two]


@pytest.mark.parametrize(
    "other",
    [
        {"enable_overlap": False},
        {"disagg_prefill_bootstrap_queue": None},
        {"result_queue": []},
        {"extends": False},
    ],
)
def test_where_no_pass_of_prefills_is_over_nothing_is_said_early(other: dict[str, Any]) -> None:
    worker, one = Worker(), computing()
    next_pass(worker, result_of(one), one, **other)
    assert worker.said == []


def test_a_pass_that_is_under_way_is_not_waited_for() -> None:
    worker, one = Worker(), computing()
    result = result_of(one, copied=Copied(there=False))
    next_pass(worker, result, one)
    assert worker.said == []
    worker.hooks.computed(worker.scheduler, SimpleNamespace(reqs=[one]), result)
    assert worker.said == [one]


def test_nobody_waits_for_a_pass_of_which_nothing_is_said() -> None:
    assert not computed(Worker(), computing(stream=False), computing(inflight_middle_chunks=2)).waited
