"""A first token that prefill says: what passes of it, what is left out of decode's answer, what a client sees of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.events import END, data, text_of
from router.fake_worker import Fault, FaultsLeft
from router.first_token import FirstToken, Said
from router.token_stream import TokenStream
from tests.router.served import BOTH, MESSAGE, WHOLE, chat, run, spoken
from tests.router.test_token_stream import DONE, MORE, chunk, event, finish, mark, opening

PROMPT = [5, 6, 7]
COUNTED = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}


def counted(text: str, **other: Any) -> bytes:
    """A token's event as prefill says it, with the usage so far."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "r0", "object": "chat.completion.chunk", "choices": [choice], "usage": COUNTED}
    return event({**body, **other})


def prefills(said: bytes) -> bytes:
    return opening() + said + finish() + event({"choices": [], "usage": COUNTED}) + DONE


def of(raw: bytes, *, wants_usage: bool = False) -> tuple[Said | None, FirstToken]:
    first = FirstToken(PROMPT, wants_usage)
    return first.feed(raw), first


def said_in(raw: bytes) -> str:
    """Of a stream."""
    return "".join(text_of(data(event)) for event in raw.split(END))


def test_only_the_beginning_passes_and_the_rest_is_known() -> None:
    said, first = of(prefills(mark(9) + counted("Hi")))

    assert said is not None
    assert (said.token, said.text, said.cached_tokens) == (9, "Hi", 2)
    assert said.events.count(b'"role"') == 1
    assert said_in(said.events) == "Hi"
    assert not any(word in said.events for word in (b"usage", b'finish_reason": "', b"mainstem", b"DONE"))
    assert first.stream.done
    assert first.stream.seen.finish_reason == "length"


def test_what_is_not_said_of_the_cache_is_not_known() -> None:
    """SGLang's completions leave it out, whatever it was."""
    said, _ = of(prefills(mark(9) + counted("Hi", usage={**COUNTED, "prompt_tokens_details": None})))

    assert said is not None
    assert said.cached_tokens is None


def test_a_client_that_wants_the_usage_in_each_event_gets_it() -> None:
    said, _ = of(prefills(mark(9) + counted("Hi")), wants_usage=True)

    assert said is not None
    assert b'"cached_tokens": 2' in said.events


@pytest.mark.parametrize(
    "raw",
    [
        prefills(MORE + counted("Hi")),
        prefills(counted("Hi")),
        prefills(mark(9) + chunk("Hi")),
        prefills(mark(9) + counted("Hi", usage={**COUNTED, "prompt_tokens": 4})),
        prefills(mark(9) + counted("Hi").replace(b'"content"', b'"reasoning_content"')),
        opening() + finish() + DONE,
        opening() + event({"error": {"message": "out of memory", "code": 500}}),
        event({"error": {"message": "out of memory", "code": 500}}),
        b"",
    ],
    ids=[
        "not whole",
        "unmarked",
        "no sums",
        "another prompt",
        "reasoning",
        "no text",
        "error",
        "error alone",
        "nothing",
    ],
)
def test_whatever_could_not_be_gone_on_from_is_left_to_decode(raw: bytes) -> None:
    said, _ = of(raw)

    assert said is None


@given(st.lists(st.integers(0, 400), max_size=6))
def test_it_is_told_once_however_the_answer_is_cut(cuts: list[int]) -> None:
    raw, first = prefills(mark(9) + counted("Hi")), FirstToken(PROMPT, False)
    told = [
        first.feed(raw[start:end])
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), max(len(raw), *cuts, 0)], strict=True)
    ]

    assert [said.text for said in told if said is not None] == ["Hi"]


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[list[int], bool]]:
    """Tokens of an answer's steps, and whether all text of a step is there with it."""
    made = st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=3), st.booleans())
    return draw(st.lists(made, min_size=1, max_size=6))


def word(token: int) -> str:
    return f"<{token}é>"


@given(steps(), st.lists(st.integers(0, 3000), max_size=6), st.booleans())
def test_decodes_answer_goes_on_exactly_where_prefills_ended(
    made: list[tuple[list[int], bool]], cuts: list[int], usage: bool
) -> None:
    """However decode puts its tokens together: what both have said is what decode would have said alone."""
    ids = [token for step, _ in made for token in step]
    raw, pending, at_mark = opening(), [], []
    for step, whole in made:
        pending += step
        text = "".join(map(word, step))
        raw += (mark(*pending) if whole else MORE) + (counted(text) if usage else chunk(text))
        if whole:
            at_mark += pending
            pending = []
    raw += finish() + event({"choices": [], "usage": COUNTED}) + DONE
    stream = TokenStream()
    stream.told(ids[0], word(ids[0]))

    cuts = sorted(min(cut, len(raw)) for cut in cuts)
    passed = (
        b"".join(stream.feed(raw[start:end]) for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True))
        + stream.end()
    )

    assert stream.seen.failure is None
    assert said_in(passed) == "".join(map(word, ids[1:]))
    assert b'"role"' not in passed
    assert passed.count(b'"finish_reason": "length"') == 1
    assert passed.endswith(DONE)
    assert stream.ids == at_mark


@pytest.mark.parametrize(
    "raw",
    [opening() + mark(8) + chunk("Ho"), opening() + mark(8) + chunk("Hi"), opening() + MORE + chunk("Ho") + finish()],
    ids=["token and text", "token", "text"],
)
def test_an_answer_that_begins_with_another_token_has_failed_and_nothing_passes(raw: bytes) -> None:
    stream = TokenStream()
    stream.told(9, "Hi")

    assert stream.feed(raw) == b""
    assert stream.seen.failure is not None


def said(raw: bytes) -> list[Any]:
    """The parsed events."""
    return [json.loads(line[6:]) for line in raw.decode().split("\n") if line.startswith("data: {")]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_client_has_it_before_decode_has_a_page(start: Any, path: str) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["p0"].handing_over.clear()
            prompt: dict[str, Any] = chat("hi") if "chat" in path else {"model": "tiny", "prompt": "hi"}
            async with cluster.session.post(cluster.url + path, json={**prompt, **MESSAGE, "stream": True}) as response:
                begun = await response.content.readany()
                assert said_in(begun) == "t0 "
                cluster.workers["p0"].handing_over.set()
                raw = begun + await response.read()

            assert said_in(raw) == WHOLE
            events = said(raw)
            assert raw.count(b'"role"') == (1 if "chat" in path else 0)
            assert [bool(one.get("usage")) for one in events] == [False] * (len(events) - 1) + [True]
            assert events[-1]["usage"]["completion_tokens"] == 6
            assert len({one["id"] for one in events}) == 1
            assert raw.count(b"[DONE]") == 1
            last = await cluster.last()
            assert (last["first_token_from"], last["outcome"], last["generated_tokens"]) == ("prefill", "ok", 6)
            assert last["actual_cached_tokens"] == 0
            _, metrics = await cluster.text("/metrics")
            assert 'mainstem_first_tokens_total{from="prefill"} 1.0' in metrics

    run(scenario())


@pytest.mark.parametrize("fault", [Fault.HANDOFF, Fault.DIE_MIDSTREAM], ids=str)
def test_a_hand_off_that_fails_behind_it_costs_the_client_time_alone(start: Any, fault: Fault) -> None:
    async def scenario() -> None:
        async with start(*BOTH) as cluster:
            one = FaultsLeft(1)
            for worker in (worker for name, worker in cluster.workers.items() if name[0] == "p"):
                worker.handing_over.clear()
                worker.fault, worker.faults_left = fault, one
            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json={**chat("hi"), **MESSAGE, "stream": True}
            ) as response:
                begun = await response.content.readany()
                for name in ("p0", "p1"):
                    cluster.workers[name].handing_over.set()
                raw = begun + await response.read()

            assert said_in(begun) == "t0 "
            assert said_in(raw) == WHOLE
            assert raw.count(b'"role"') == 1
            assert b'"error"' not in raw
            assert said(raw)[-1]["usage"]["completion_tokens"] == 6
            last = await cluster.last()
            assert [one["then"] for one in last["tries"]] == ["resume", None]
            assert last["first_token_from"] == "prefill"

    run(scenario())


def test_where_nothing_else_is_left_the_stream_ends_with_the_error(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["p0"].fault = Fault.HANDOFF

            status, events = await cluster.events(chat("hi", **MESSAGE))

            assert status == 200
            assert "handoff" in (await cluster.last())["error"]
            error = json.loads(events[-1])["error"]
            assert "Prefill transfer failed" in error["message"]
            assert error["code"] == "worker_handoff"

    run(scenario())


@pytest.mark.parametrize(
    ("section", "fields", "headers"),
    [
        ({"first_token_from": "decode"}, {}, {}),
        ({"resumes": 0}, {}, {}),
        ({}, {}, {"x-mainstem-resume": "never"}),
        ({}, {"logprobs": True}, {}),
        ({}, {"max_tokens": 1}, {}),
    ],
    ids=["configured", "no resumes", "forbidden", "logprobs", "one token"],
)
def test_it_is_decodes_where_the_stream_could_not_go_on(
    start: Any, section: dict[str, Any], fields: dict[str, Any], headers: dict[str, str]
) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", **section) as cluster:
            body = {**chat("hi", **MESSAGE), "stream": True, **fields}
            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json=body, headers=headers
            ) as response:
                assert response.status == 200
                assert said_in(await response.read()).startswith("t0 ")

            assert cluster.received("p0")["stream"] is False
            assert (await cluster.last())["first_token_from"] == "decode"

    run(scenario())


@pytest.mark.parametrize("change", [{"late_token": True}, {"marks": False}, {"fault": Fault.OTHER_PROMPT}], ids=str)
def test_a_prefill_worker_that_cannot_say_it_costs_nothing(start: Any, change: dict[str, Any]) -> None:
    """Of another engine, or with another prompt, which is found out before the client is told anything."""

    async def scenario() -> None:
        async with start("p0", "p1", "d0") as cluster:
            one = FaultsLeft(1)
            for name in ("p0", "p1"):
                vars(cluster.workers[name]).update(change, faults_left=one)

            status, events = await cluster.events(chat("hi", **MESSAGE))

            assert status == 200
            assert spoken(events) == WHOLE
            last = await cluster.last()
            assert last["outcome"] == "ok"
            if "fault" in change:
                assert [one["then"] for one in last["tries"]] == ["retry", None]
            else:
                assert last["first_token_from"] == "decode"

    run(scenario())


def test_a_client_that_leaves_behind_it_ends_the_request_on_both_workers(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["p0"].handing_over.clear()
            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json={**chat("hi"), **MESSAGE, "stream": True}
            ) as response:
                await response.content.readany()
            rid = cluster.received("p0")["rid"]

            await cluster.until(lambda: all(rid in worker.aborted for worker in cluster.workers.values()))
            last = await cluster.last()
            assert (last["outcome"], last["first_token_from"]) == ("cancelled", "prefill")

    run(scenario())


def test_a_prefill_worker_that_is_gone_behind_it_is_replaced(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH) as cluster:
            for name in ("p0", "p1"):
                cluster.workers[name].handing_over.clear()
            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json={**chat("hi"), **MESSAGE, "stream": True}
            ) as response:
                begun = await response.content.readany()
                asked = "p0" if cluster.workers["p0"].received else "p1"
                await cluster.workers[asked].stop()
                cluster.workers["p1" if asked == "p0" else "p0"].handing_over.set()
                raw = begun + await asyncio.wait_for(response.read(), 10)

            assert said_in(raw) == WHOLE
            assert [one["then"] for one in (await cluster.last())["tries"]][-2:] == ["resume", None]

    run(scenario())


def test_hand_offs_that_fail_behind_it_leave_the_stream_its_own_new_starts(start: Any) -> None:
    """Two hand-offs fail, then two decode workers break off: each has its own limit."""

    async def scenario() -> None:
        names = ("p0", "p1", "p2", "d0", "d1", "d2", "d3", "d4")
        async with start(*names) as cluster:
            # A decode worker's fault is taken when the request comes, also by the two whose hand-off fails.
            handoffs, breaks = FaultsLeft(2), FaultsLeft(4)
            for name, worker in cluster.workers.items():
                if name[0] == "p":
                    worker.fault, worker.faults_left = Fault.HANDOFF, handoffs
                else:
                    worker.fault, worker.faults_left = Fault.DIE_MIDSTREAM, breaks

            status, events = await cluster.events(chat("hi", **MESSAGE))

            assert status == 200
            assert spoken(events) == WHOLE
            tries = (await cluster.last())["tries"]
            assert [one["then"] for one in tries] == ["resume"] * 4 + [None]

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_the_cache_had_is_known_when_prefill_ends(start: Any, path: str) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            prompt: dict[str, Any] = chat("hi " * 40) if "chat" in path else {"model": "tiny", "prompt": "hi " * 40}
            for _ in range(2):
                async with cluster.session.post(cluster.url + path, json={**prompt, **MESSAGE, "stream": True}) as one:
                    assert said_in(await one.read()) == WHOLE
                last = await cluster.last()

            assert (last["first_token_from"], last["outcome"]) == ("prefill", "ok")
            assert last["actual_cached_tokens"] > 0

    run(scenario())
