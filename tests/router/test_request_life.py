"""A request's life over real sockets, with workers that fail in every way: what the client saw, and the workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.client import Client, Message
from router.config import CostConfig
from router.fake_worker import FIRST_TOKEN, Fault, FaultsLeft
from router.openai import Endpoint
from tests.router.served import BOTH, MESSAGE, PREFIX, WHOLE, Cluster, chat, run, spoken


@pytest.mark.parametrize("leg", ["p0", "d0"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status"), [(Fault.ERROR, 502), (Fault.DROP, 502), (Fault.BAD_REQUEST, 400)], ids=str
)
def test_a_failing_leg_ends_the_request_with_an_error_and_aborts_the_other(
    start: Any, leg: str, fault: Fault, status: int, stream: bool
) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            other = {"p0": "d0", "d0": "p0"}[leg]
            cluster.workers[leg].fault = fault
            if leg == "d0":
                cluster.workers["p0"].fault = Fault.HANG

            found, answer, headers = await cluster.post(chat("hi", stream=stream))

            assert found == status
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            rid = headers["x-request-id"] + "00"
            await cluster.until(lambda: rid in cluster.workers[other].aborted)
            last = await cluster.last()
            assert last["outcome"] == "error"
            assert leg in last["error"]
            _, state = await cluster.get("/api/state")
            assert all(worker["inflight_requests"] == 0 for worker in state["workers"])
            assert all(worker["outstanding_uncached_tokens"] == 0 for worker in state["workers"])

    run(scenario())


@asynccontextmanager
async def asking_decode_late(
    start: Any, monkeypatch: pytest.MonkeyPatch, ungranted_tokens: int
) -> AsyncIterator[Cluster]:
    """A pair in which a prompt is expected to take so long that decode would be asked after a minute."""
    monkeypatch.setattr("router.dispatch.DECODE_AFTER_MOST_S", 60.0)
    async with start("p0", "d0", cost=CostConfig(prefill_overhead_s=300.0), retries=0) as cluster:
        cluster.workers["p0"].ungranted_tokens = ungranted_tokens
        await cluster.workers["p0"].register(cluster.url)
        yield cluster


@pytest.mark.parametrize("stream", [False, True])
def test_decode_is_asked_when_prefill_has_had_time_to_begin(
    start: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of what the prompt is expected to take: of one that fails before that, decode has not heard."""

    async def scenario() -> None:
        async with asking_decode_late(start, monkeypatch, 8192) as cluster:
            cluster.workers["p0"].fault = Fault.ERROR

            status, _, _ = await cluster.post(chat("hi", stream=stream))

            assert status == 502
            assert cluster.workers["d0"].received == []

            cluster.workers["p0"].fault = Fault.NONE
            status, _, _ = await cluster.post({**chat("hi"), **MESSAGE})

            assert status == 200, "and of one that is computed before that, it hears at once"

    run(scenario())


def test_decode_is_asked_once_prefill_has_said_a_token(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose answer does not end before decode has its pages."""

    async def scenario() -> None:
        async with asking_decode_late(start, monkeypatch, 8192) as cluster:
            cluster.workers["p0"].handing_over.clear()
            asking = asyncio.create_task(cluster.events({**chat("hi"), **MESSAGE}))
            await cluster.until(lambda: bool(cluster.workers["d0"].received))
            cluster.workers["p0"].handing_over.set()
            _, events = await asking
            assert spoken(events) == WHOLE

    run(scenario())


def test_decode_is_asked_at_once_where_prefill_waits_for_it(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with asking_decode_late(start, monkeypatch, 0) as cluster:
            cluster.workers["p0"].fault = Fault.HANG
            asking = asyncio.create_task(cluster.post(chat("hi")))
            await cluster.until(lambda: bool(cluster.workers["d0"].received))
            asking.cancel()

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_is_no_success(start: Any, stream: bool) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", first_token_from="decode") as cluster:
            cluster.workers["d0"].fault = Fault.EMPTY

            status, answer, _ = await cluster.post(chat("hi", stream=stream))

            assert status == 502
            assert answer["error"]["message"] == "d0 ended its answer without a token"

    run(scenario())


def test_an_error_as_the_first_event_is_an_http_error(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", first_token_from="decode") as cluster:
            cluster.workers["d0"].fault = Fault.ERROR_EVENT_FIRST

            status, answer, _ = await cluster.post(chat("hi", stream=True))

            assert status == 502
            assert "prefill failed" in answer["error"]["message"]

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault.ERROR_EVENT, "d0: simulated: out of memory"),
        (Fault.ABORTED, "d0: the worker aborted the request"),
        (Fault.DIE_MIDSTREAM, "d0 closed the connection within its answer"),
    ],
    ids=str,
)
def test_a_failure_within_a_stream_is_its_last_event(start: Any, fault: Fault, message: str) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["d0"].fault = fault
            cluster.workers["d0"].gate.clear()

            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json=chat("hi", max_tokens=9, stream=True)
            ) as response:
                assert response.status == 200
                begun = await response.content.readany()
                cluster.workers["d0"].gate.set()
                rest = await response.read()

            assert b"t0 " in begun
            events = [line[6:] for line in (begun + rest).decode().split("\n") if line.startswith("data: ")]
            errors = [json.loads(event)["error"] for event in events if '"error"' in event]
            assert [error["message"] for error in errors] == [message]  # one, and only one
            rid = cluster.received("d0")["rid"]
            await cluster.until(lambda: rid in cluster.workers["d0"].aborted)
            assert (await cluster.last())["outcome"] == "error"

    run(scenario())


def test_a_client_that_leaves_ends_the_request_on_both_workers(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["d0"].fault = Fault.STALL
            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json=chat("hi", stream=True)
            ) as response:
                await response.content.readany()
            rid = cluster.received("p0")["rid"]

            await cluster.until(lambda: all(rid in worker.aborted for worker in cluster.workers.values()))
            assert (await cluster.last())["outcome"] == "cancelled"

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_silent_pair_is_given_up_after_the_first_byte_timeout(start: Any, stream: bool) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", first_byte_timeout_s=0.3) as cluster:
            cluster.workers["p0"].fault = Fault.HANG

            status, answer, headers = await cluster.post(chat("hi", stream=stream))

            assert status == 504
            assert answer["error"]["message"] == (
                "d0 sent nothing within 0.3 s" if stream else "p0 handed nothing over to d0 within 0.3 s"
            )
            rid = headers["x-request-id"] + "00"
            await cluster.until(lambda: all(rid in worker.aborted for worker in cluster.workers.values()))

    run(scenario())


def test_a_stream_that_stalls_is_ended_by_the_request_timeout(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", request_timeout_s=0.5) as cluster:
            cluster.workers["d0"].fault = Fault.STALL

            status, events = await cluster.events(chat("hi"))

            assert status == 200
            assert json.loads(events[-1])["error"]["message"] == "not done within 0.5 s"

    run(scenario())


def test_a_worker_that_stops_renewing_takes_its_requests_along(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker={"lease_s": 0.6}) as cluster:
            cluster.workers["p0"].fault = Fault.HANG
            asking = asyncio.create_task(cluster.post(chat("hi")))
            await cluster.until(lambda: bool(cluster.workers["p0"].received))
            cluster.workers["p0"]._tasks[-1].cancel()  # it hangs, and so does its agent

            status, answer, _ = await asking

            assert status == 502
            assert answer["error"]["message"] == "p0 was lost"
            rid = cluster.received("d0")["rid"]
            await cluster.until(lambda: rid in cluster.workers["d0"].aborted)
            assert (await cluster.get("/ready"))[0] == 503

    run(scenario())


def test_a_stream_outlives_its_prefill_worker_but_not_its_decode_worker(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker={"lease_s": 0.6}) as cluster:
            cluster.workers["d0"].gate.clear()
            asking = asyncio.create_task(cluster.events(chat("hi")))
            await cluster.until(lambda: any(record.ttft_s is not None for record in cluster.router.ledger.newest(1)))

            cluster.workers["p0"]._tasks[-1].cancel()
            await cluster.until(lambda: cluster.router.fleet["p0"].lost)
            assert not asking.done()
            cluster.workers["d0"]._tasks[-1].cancel()

            status, events = await asking
            assert status == 200
            assert json.loads(events[-1])["error"]["message"] == "d0 was lost"

    run(scenario())


@pytest.mark.thorough
def test_a_client_that_does_not_read_holds_neither_load_nor_a_task(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", request_timeout_s=0.5) as cluster:
            cluster.workers["d0"].fault = Fault.STALL
            request: list[Message] = [{"type": "http.request", "body": json.dumps(chat("hi", stream=True)).encode()}]
            never = asyncio.Event()
            sent = 0

            async def receive() -> Message:
                if not request:
                    await never.wait()
                return request.pop()

            async def send(message: Message) -> None:
                # Status and a piece are taken, and then the connection's buffer is full.
                nonlocal sent
                sent += 1
                if sent > 2:
                    await never.wait()

            dispatcher = cluster.router.dispatcher
            serving = asyncio.create_task(dispatcher.serve(Endpoint.CHAT, Client(receive, send)))
            await cluster.until(lambda: sent > 2)

            assert (await cluster.last())["outcome"] == "error"
            assert all(worker.inflight_requests == 0 for worker in cluster.router.fleet)
            await asyncio.wait_for(serving, 10)

    run(scenario())


def test_every_prompt_of_a_batch_is_aborted_by_its_name(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", request_timeout_s=0.5) as cluster:
            cluster.workers["p0"].fault = Fault.HANG

            status, _, headers = await cluster.post({"model": "tiny", "prompt": ["a", "b"]}, "/v1/completions")

            assert status == 504
            names = [f"{headers['x-request-id']}00_{number}" for number in range(2)]
            await cluster.until(lambda: all(worker.aborted == names for worker in cluster.workers.values()))

    run(scenario())


def test_a_whole_answer_that_stalls_is_ended_by_the_request_timeout(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", request_timeout_s=0.5) as cluster:
            cluster.workers["d0"].fault = Fault.STALL

            status, answer, headers = await cluster.post(chat("hi"))

            assert (status, answer["error"]["message"]) == (504, "not done within 0.5 s")
            await cluster.until(lambda: headers["x-request-id"] + "00" in cluster.workers["d0"].aborted)

    run(scenario())


def test_an_unreachable_worker_costs_no_request_and_is_avoided_until_it_is_back(start: Any) -> None:
    async def scenario() -> None:
        async with start() as cluster:
            _, _, first = await cluster.post(chat(PREFIX))
            dead = first["x-mainstem-prefill"]
            await cluster.until(lambda: cluster.router.index.held(dead) > 0)
            await cluster.workers[dead]._runner.cleanup()  # its HTTP side is gone, its agent lives

            status, _, headers = await cluster.post(chat(PREFIX))

            assert (status, headers["x-mainstem-prefill"] != dead) == (200, True)
            last = await cluster.last()
            assert [one["then"] for one in last["tries"]] == ["retry", None]
            assert last["tries"][0]["failed"].startswith(f"{dead}: ")
            _, state = await cluster.get("/api/state")
            assert {worker["name"]: worker["state"] for worker in state["workers"]}[dead] == "suspect"

    run(scenario())


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.EMPTY, Fault.DROP])
def test_a_worker_that_fails_at_once_is_not_taken_for_an_idle_one(fault: Fault, start: Any) -> None:
    async def scenario() -> None:
        async with start("m0", "m1") as cluster:
            cluster.workers["m0"].fault = fault
            statuses = [(await cluster.post(chat(f"{number} {PREFIX}")))[0] for number in range(8)]

            assert statuses.count(200) >= 7

    run(scenario())


def test_a_client_to_blame_makes_no_worker_suspect(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["d0"].fault = Fault.BAD_REQUEST
            status, _, _ = await cluster.post(chat("hi"))

            assert status == 400
            assert all(worker.state() == "ready" for worker in cluster.router.fleet)

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("role", "fault"),
    [
        ("p", Fault.ERROR),
        ("p", Fault.DROP),
        ("p", Fault.HANG),
        ("p", Fault.HANDOFF),
        ("p", Fault.OTHER_PROMPT),
        ("d", Fault.ERROR),
        ("d", Fault.DROP),
        ("d", Fault.HANG),
        ("d", Fault.EMPTY),
        ("d", Fault.ERROR_EVENT_FIRST),
        ("d", Fault.HANDOFF),
        ("d", Fault.OTHER_PROMPT),
        ("d", Fault.SHORT),
    ],
    ids=str,
)
def test_before_the_first_token_another_pair_is_tried_and_the_client_sees_nothing_of_it(
    start: Any, role: str, fault: Fault, stream: bool
) -> None:
    if stream and fault in (Fault.SHORT, Fault.OTHER_PROMPT) and role == "d":
        pytest.skip("known only from the sums at the end of a stream")
    if not stream and fault is Fault.ERROR_EVENT_FIRST:
        pytest.skip("an event of a stream")
    if not stream and (role, fault) == ("d", Fault.HANG):
        pytest.skip("known only from what others took: the test below")

    async def scenario() -> None:
        # Of all workers of the role the first one that is asked fails, once.
        limits = {"handoff_floor_s": 1.0, "first_byte_timeout_s": 1.0} if fault is Fault.HANG else {}
        async with start(*BOTH, **limits) as cluster:
            one = FaultsLeft(1)
            for worker in (worker for name, worker in cluster.workers.items() if name[0] == role):
                worker.fault, worker.faults_left = fault, one

            if stream:
                status, events = await cluster.events(chat("hi", **MESSAGE))
                assert spoken(events) == WHOLE
                assert not any('"error"' in event for event in events)
            else:
                status, answer, _ = await cluster.post(chat("hi", max_tokens=6))
                assert answer["choices"][0]["message"]["content"] == WHOLE.strip()

            assert status == 200
            last = await cluster.last()
            tries = last["tries"]
            asked = [(one["prefill"], one["decode"]) for one in tries]
            assert len(asked) == len(set(asked)), "a pair that failed is never asked again"
            assert 2 <= len(asked) <= 3
            # What prefill has said by then is kept.
            assert {one["then"] for one in tries[:-1]} <= ({"retry", "resume"} if stream else {"retry"})
            assert tries[-1]["then"] is None
            assert last["outcome"] == "ok"
            rids = {f"{last['id']}{number:02x}" for number, one in enumerate(tries) if one["failed"] is not None}
            await cluster.until(lambda: rids <= cluster.aborted())
            assert f"{last['id']}{len(tries) - 1:02x}" not in cluster.aborted()
            _, state = await cluster.get("/api/state")
            assert all(worker["inflight_requests"] == 0 for worker in state["workers"])
            assert all(worker["outstanding_uncached_tokens"] == 0 for worker in state["workers"])

    run(scenario())


def test_pairs_without_a_way_between_them_are_passed_over_until_one_has_it(start: Any) -> None:
    """Nothing was computed: that is no retry."""

    async def scenario() -> None:
        async with start(*BOTH, retries=1) as cluster:
            three = FaultsLeft(3)
            for name in ("d0", "d1"):
                cluster.workers[name].fault, cluster.workers[name].faults_left = Fault.APART, three

            status, answer, _ = await cluster.post(chat("hi", max_tokens=6))

            assert (status, answer["choices"][0]["message"]["content"]) == (200, WHOLE.strip())
            tries = (await cluster.last())["tries"]
            assert [one["failed"].partition(": ")[2] for one in tries[:3]] == ["apart"] * 3
            assert len({(one["prefill"], one["decode"]) for one in tries}) == 4

    run(scenario())


def test_a_whole_answer_that_takes_far_longer_than_others_did_is_made_elsewhere(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", "d1", stall_timeout_s=0.8) as cluster:
            asked = chat("hi", max_tokens=8)
            for _ in range(40):
                await cluster.post(asked)
            one = FaultsLeft(1)
            for name in ("d0", "d1"):
                cluster.workers[name].fault, cluster.workers[name].faults_left = Fault.HANG, one

            status, answer, _ = await cluster.post(asked)

            assert (status, answer["choices"][0]["message"]["content"]) == (200, f"{WHOLE}t6 t7")
            first, second = (await cluster.last())["tries"]
            assert first["failed"] == f"{first['decode']}: timeout"
            assert (first["then"], second["failed"]) == ("retry", None)
            assert first["decode"] != second["decode"]

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("fault", [Fault.ERROR_EVENT, Fault.ABORTED, Fault.DIE_MIDSTREAM, Fault.STALL], ids=str)
def test_a_stream_that_is_cut_off_goes_on_elsewhere_as_if_nothing_had_happened(
    start: Any, fault: Fault, path: str
) -> None:
    async def scenario() -> None:
        async with start(*BOTH, "d2", stall_timeout_s=0.8) as cluster:
            # The second one fails too: the stream goes on twice.
            two = FaultsLeft(2)
            for worker in (worker for name, worker in cluster.workers.items() if name[0] == "d"):
                worker.fault, worker.faults_left = fault, two
            prompt: dict[str, Any] = chat("hi") if "chat" in path else {"model": "tiny", "prompt": "hi"}
            async with cluster.session.post(cluster.url + path, json={**prompt, **MESSAGE, "stream": True}) as response:
                raw = (await response.read()).decode()
                assert response.status == 200

            events = [json.loads(line[6:]) for line in raw.split("\n") if line.startswith("data: {")]
            assert not any("error" in event for event in events), raw
            choices = [event["choices"][0] for event in events if event["choices"]]
            text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
            assert text == WHOLE
            assert len({event["id"] for event in events}) == 1
            assert [choice["finish_reason"] for choice in choices][-1] == "length"
            assert raw.count("[DONE]") == 1
            assert raw.count('"role"') == (1 if "chat" in path else 0)
            assert "mainstem:" not in raw
            last = await cluster.last()
            assert events[-1]["usage"]["completion_tokens"] == 6
            assert events[-1]["usage"]["prompt_tokens"] == last["prompt_tokens"]
            assert [one["then"] for one in last["tries"]] == ["resume", "resume", None]
            assert last["generated_tokens"] == 6
            assert last["outcome"] == "ok"
            decode = cluster.received(last["tries"][-1]["decode"])
            told = [token for token in decode["input_ids" if "chat" in path else "prompt"] if token >= FIRST_TOKEN]
            assert told == [FIRST_TOKEN + number for number in range(len(told))]
            assert len(told) + decode["max_tokens"] == 6
            _, metrics = await cluster.text("/metrics")
            assert 'mainstem_failed_attempts_total{then="resume"}' in metrics

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "headers", "why"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {}, "tools"),
        ({"frequency_penalty": 0.5}, {}, "frequency_penalty"),
        ({}, {"x-mainstem-resume": "never"}, "the client forbids it"),
    ],
)
def test_what_cannot_go_on_elsewhere_ends_with_an_error_and_says_why(
    start: Any, fields: dict[str, Any], headers: dict[str, str], why: str
) -> None:
    async def scenario() -> None:
        async with start(*BOTH) as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].fault = Fault.DIE_MIDSTREAM

            async with cluster.session.post(
                cluster.url + "/v1/chat/completions", json=chat("hi", stream=True, **MESSAGE, **fields), headers=headers
            ) as response:
                raw = (await response.read()).decode()

            events = [line[6:] for line in raw.split("\n") if line.startswith("data: ")]
            assert json.loads(events[-1])["error"]["code"] == "worker_broken"
            last = await cluster.last()
            assert last["tries"][-1]["then"] == f"cannot go on elsewhere: {why}"

    run(scenario())


def test_a_stream_whose_tokens_are_not_known_does_not_go_on_elsewhere(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH, worker={"marks": False}) as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].fault = Fault.DIE_MIDSTREAM

            _, events = await cluster.events(chat("hi", **MESSAGE))

            assert spoken(events[:-1]) == "t0 t1 "
            assert (await cluster.last())["tries"][-1]["then"] == "cannot go on elsewhere: tokens unknown"

    run(scenario())


def test_an_untrue_stream_ends_with_an_error(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH) as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].fault = Fault.SHORT

            _, events = await cluster.events(chat("hi", **MESSAGE))

            error = json.loads(events[-1])["error"]
            assert error["code"] == "worker_untrue"
            assert error["message"].endswith("ended for its length after 5 of 6 tokens")
            assert (await cluster.last())["outcome"] == "error"

    run(scenario())


def test_a_worker_whose_engine_hangs_loses_its_streams_to_another(start: Any) -> None:
    """Its connections are open and its agent renews: nothing else would ever end this."""

    async def scenario() -> None:
        async with start("p0", "d0", "d1", hung_s=5) as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].gate.clear()
            asking = asyncio.create_task(cluster.events(chat("hi", **MESSAGE)))
            await cluster.until(lambda: any(record.ttft_s is not None for record in cluster.router.ledger.newest(1)))
            hung = cluster.router.ledger.newest(1)[0].decision.decode
            other = {"d0": "d1", "d1": "d0"}[hung]
            cluster.workers[other].gate.set()

            cluster.workers[hung].silent_s = 6.0

            _, events = await asking
            assert spoken(events) == WHOLE
            assert (await cluster.last())["tries"][0]["failed"] == f"{hung}: lost"
            assert cluster.router.fleet[hung].state() == "hung"
            cluster.workers[hung].silent_s = 0.1
            await cluster.until(lambda: cluster.router.fleet[hung].state() == "ready")

    run(scenario())


def test_a_worker_that_failed_is_in_use_again_within_two_seconds_of_being_well(start: Any) -> None:
    async def scenario() -> None:
        async with start("m0", "m1") as cluster:
            cluster.workers["m0"].fault = Fault.ERROR
            for number in range(6):
                assert (await cluster.post(chat(f"{number} {PREFIX}")))[0] == 200
            cluster.workers["m0"].fault = Fault.NONE

            async with asyncio.timeout(2):
                while (await cluster.post(chat(f"{asyncio.get_running_loop().time()} {PREFIX}")))[2][
                    "x-mainstem-decode"
                ] != "m0":
                    await asyncio.sleep(0.02)

    run(scenario())


async def asked_without_decode(cluster: Cluster) -> asyncio.Task[Any]:
    """A request that came a moment ago, when the only decode worker was draining."""
    cluster.workers["d0"].state = "draining"
    await cluster.until(lambda: cluster.router.fleet["d0"].state() == "draining")
    asking = asyncio.create_task(cluster.post(chat("hi")))
    await asyncio.sleep(0.3)
    return asking


def test_a_request_waits_for_a_worker_that_is_about_to_come(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH[:3], queue_timeout_s=10) as cluster:
            asking = await asked_without_decode(cluster)
            assert not asking.done()

            cluster.workers["d0"].state = "ready"

            assert (await asking)[0] == 200

    run(scenario())


def test_a_client_that_leaves_while_it_waits_for_a_worker_is_let_go(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH[:3], queue_timeout_s=10) as cluster:
            asking = await asked_without_decode(cluster)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            cluster.workers["d0"].state = "ready"
            await cluster.until(lambda: cluster.router.fleet["d0"].state() == "ready")
            await asyncio.sleep(0.3)

            assert not cluster.workers["d0"].received

    run(scenario())


def test_when_everything_fails_little_is_tried_again(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH, retry_burst=2, retry_fraction=0.0) as cluster:
            for worker in cluster.workers.values():
                worker.fault = Fault.ERROR
            statuses = [(await cluster.post(chat(f"{number}")))[0] for number in range(6)]

            assert statuses == [502] * 6
            assert sum(len(record.tries) for record in cluster.router.ledger.newest(6)) == 6 + 2
            assert (await cluster.last())["tries"][-1]["then"] == "too many requests are tried again already"

    run(scenario())


def test_a_stream_may_last_longer_than_its_pages_may_take(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", handoff_floor_s=0.8, first_byte_timeout_s=0.8) as cluster:
            cluster.workers["d0"].gate.clear()
            asking = asyncio.create_task(cluster.events(chat("hi", **MESSAGE)))
            await asyncio.sleep(1.2)
            cluster.workers["d0"].gate.set()

            _, events = await asking

            assert spoken(events) == WHOLE
            assert len((await cluster.last())["tries"]) == 1

    run(scenario())


def test_a_failed_hand_off_blames_neither_where_both_answer(start: Any) -> None:
    async def scenario() -> None:
        async with start(*BOTH) as cluster:
            one = FaultsLeft(1)
            for name in ("p0", "p1"):
                cluster.workers[name].fault, cluster.workers[name].faults_left = Fault.HANDOFF, one
            status, _, _ = await cluster.post(chat("hi"))

            last = await cluster.last()
            first, second = last["tries"]
            assert status == 200
            assert first["failed"].endswith(": handoff")
            assert first["prefill"] != second["prefill"]
            assert first["decode"] != second["decode"]
            assert all(worker.state() == "ready" for worker in cluster.router.fleet)

    run(scenario())
