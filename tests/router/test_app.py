"""The whole router over real sockets, between a real client and simulated workers: what the client saw."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import uvicorn

from router.app import Router, create_app
from router.client import Client, Message
from router.config import RouterSection, RouterSpec
from router.fake_worker import PAGE_BYTES, FakeWorker, Fault, Handoffs
from router.fleet import FeedMode
from router.openai import Endpoint
from router.server import listen
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.pages import chain_ids, namespace, root_id

TokenizerFolder = Callable[[str], Path]
PREFIX = "The quick brown fox jumps over the lazy dog. " * 20


@dataclass
class Cluster:
    """One router and its workers."""

    router: Router
    url: str
    session: aiohttp.ClientSession
    workers: dict[str, FakeWorker] = field(default_factory=dict)

    async def until_ready(self) -> None:
        await self.until(lambda: not self.router.unready())

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(15):
            while not holds():
                await asyncio.sleep(0.01)

    async def post(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any, dict[str, str]]:
        """Status, parsed body, headers in lower case."""
        data = body if isinstance(body, bytes) else json.dumps(body)
        async with self.session.post(self.url + path, data=data) as response:
            return response.status, await response.json(), {key.lower(): val for key, val in response.headers.items()}

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def events(self, body: dict[str, Any]) -> tuple[int, list[str]]:
        """Status, and the stream's data lines."""
        async with self.session.post(self.url + "/v1/chat/completions", json={**body, "stream": True}) as response:
            raw = (await response.read()).decode()
            return response.status, [line[6:] for line in raw.split("\n") if line.startswith("data: ")]

    async def last(self) -> dict[str, Any]:
        """The newest request in the state, once it is over."""
        await self.until(lambda: self.router.ledger.newest(1)[0].outcome != "running")
        _, state = await self.get("/api/state")
        newest: dict[str, Any] = state["requests"][0]
        return newest

    def received(self, name: str) -> dict[str, Any]:
        """The body that this worker got last."""
        return self.workers[name].received[-1].body


@pytest.fixture
def start(tokenizer_folder: TokenizerFolder, tmp_path: Path) -> Callable[..., Any]:
    """start(names, **settings of the router section): an opened cluster with workers of these names."""
    folder = tokenizer_folder("chatml")

    @asynccontextmanager
    async def opened(
        *names: str, renew_s: float = 0.2, worker: dict[str, Any] | None = None, **section: Any
    ) -> AsyncIterator[Cluster]:
        key = ClusterKey.generate()
        key.write(tmp_path / "key")
        spec = RouterSpec(
            section=RouterSection(**section), model="tiny", model_path=folder, key_file=tmp_path / "key", cluster="test"
        )
        router = Router(spec)
        handoffs = Handoffs()
        with listen("127.0.0.1", 0) as bound:
            server = uvicorn.Server(
                uvicorn.Config(create_app(router), log_config=None, access_log=False, timeout_graceful_shutdown=1)
            )
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
                cluster = Cluster(router, url, session)
                await cluster.until(lambda: server.started)
                for name in names or ("p0", "p1", "d0"):
                    role = {"p": "prefill", "d": "decode", "m": "both"}[name[0]]
                    one = FakeWorker(name, role, key, handoffs, **(worker or {}))  # type: ignore[arg-type]
                    await one.start()
                    one.renew(url, renew_s)
                    cluster.workers[name] = one
                await cluster.until_ready()
                try:
                    yield cluster
                finally:
                    for one in cluster.workers.values():
                        await one.stop()
                    router.closing.set()
                    server.should_exit = True
                    await asyncio.wait_for(serving, 10)

    return opened


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "system", "content": text}], **fields}


def test_a_chat_goes_through_both_workers(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            status, answer, headers = await cluster.post(chat(PREFIX, max_tokens=3, user="me"))

            assert status == 200
            assert answer["choices"][0]["message"]["content"] == "t0 t1 t2"
            assert headers["x-mainstem-prefill"] == "p0"
            assert headers["x-mainstem-decode"] == "d0"
            assert headers["x-mainstem-matched-tokens"] == "0"
            prefill, decode = cluster.received("p0"), cluster.received("d0")
            assert prefill == decode
            ids = cluster.router.renderer.chat(chat(PREFIX)).ids
            assert decode["input_ids"] == ids
            assert {name: decode[name] for name in chat(PREFIX, max_tokens=3, user="me")} == chat(
                PREFIX, max_tokens=3, user="me"
            )
            worker = cluster.workers["p0"]
            assert decode["bootstrap_host"] == f"{worker.epoch}@127.0.0.1"
            assert decode["bootstrap_port"] == worker.registration().handoff_port
            assert 0 < decode["bootstrap_room"] < 2**63
            assert re.fullmatch("[0-9a-f]{32}", decode["rid"])
            assert headers["x-request-id"] == decode["rid"]

    run(scenario())


def test_a_request_for_a_life_that_is_over_fails_at_once_and_the_next_life_is_used_as_soon_as_it_registers(
    start: Any,
) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", renew_s=3600.0) as cluster:
            worker = cluster.workers["p0"]
            before = worker.epoch
            worker.epoch += 1  # restarted at the same address; the router does not know it yet

            status, answer, _ = await cluster.post(chat(PREFIX))

            assert status == 502
            assert f"p0: restarted: wanted epoch {before}, found {before + 1}" in answer["error"]["message"]
            await worker.register(cluster.url)
            assert (await cluster.post(chat(PREFIX)))[0] == 200

    run(scenario())


def test_what_choices_are_made_from_is_shown_and_counted(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "p1", "d0", shadow_policies=["round_robin", "mainstem"]) as cluster:
            learned = dict(cluster.router.placement.model.constants())
            for _ in range(4):
                assert (await cluster.post(chat(PREFIX)))[0] == 200
            state = (await cluster.get("/api/state"))[1]
            async with cluster.session.get(cluster.url + "/metrics") as response:
                text = await response.text()

            assert state["policy"] == "mainstem"
            assert state["learned"].keys() == learned.keys()
            assert state["learned"]["prefill_tokens_per_s"] != learned["prefill_tokens_per_s"]
            shadows = {shadow["policy"]: shadow for shadow in state["shadows"]}
            assert {name: shadow["requests"] for name, shadow in shadows.items()} == {"round_robin": 4, "mainstem": 4}
            # Two workers, so that round robin misses twice.
            assert 0.4 < shadows["round_robin"]["hit_rate"] < 0.5
            for line in (
                'mainstem_worker_index_mode{mode="exact",worker="p0"} 1.0',
                'mainstem_shadow_requests_total{policy="round_robin"} 4.0',
                'mainstem_cost_constant{name="prefill_tokens_per_s"}',
                "mainstem_cost_observations_total 4.0",
            ):
                assert line in text, line
            decided = re.findall(r'mainstem_decisions_total\{policy="mainstem",reason="(\w+)"\} (\d)', text)
            assert sum(int(count) for _, count in decided) == 4
            assert {"equals"} < {reason for reason, _ in decided} <= {"equals", "cache", "load", "spill"}

    run(scenario())


def test_audits_of_every_worker_are_counted_and_shown(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker={"audit_s": 0.05}) as cluster:
            await cluster.post(chat(PREFIX))
            await cluster.until(lambda: cluster.router.audits["p0"].audits > 1)
            _, state = await cluster.get("/api/state")
            async with cluster.session.get(cluster.url + "/metrics") as response:
                text = await response.text()

            shown = {worker["name"]: worker for worker in state["workers"]}["p0"]
            assert (shown["audits"] > 1, shown["agreement"], shown["mode"]) == (True, 1.0, "exact")
            assert re.search(r'mainstem_index_audits_total\{worker="p0"\} [1-9]', text)
            for name, value in (("audit_agreement", 1.0), ("audits_refuted_total", 0.0), ("heals_total", 0.0)):
                assert f'mainstem_index_{name}{{worker="p0"}} {value}' in text, name

    run(scenario())


def test_what_was_handed_over_is_counted_shown_and_explained(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            _, _, headers = await cluster.post(chat(PREFIX))
            body = cluster.received("d0")
            ids = cluster.router.renderer.chat(chat(PREFIX)).ids
            record = cluster.router.ledger.get(headers["x-request-id"])
            await cluster.until(lambda: bool(record.handoffs))
            pages = -(-len(ids) // 4)
            _, explained = await cluster.get(f"/api/explain/{headers['x-request-id']}")

            moved = explained["handoff"]
            assert record.handoffs[0].room == body["bootstrap_room"]
            assert (moved["transport"], moved["pages"], moved["failed"]) == ("simulated", pages, 0)
            assert (moved["moved_bytes"], moved["prefix_tokens"]) == (pages * PAGE_BYTES, 0)
            root = root_id(namespace("tiny", "", ""))
            held = chain_ids(root, ids, 4)[:10]
            await cluster.workers["d0"].store(root, 0, held)
            _, _, headers = await cluster.post(chat(PREFIX))
            again = cluster.router.ledger.get(headers["x-request-id"])
            await cluster.until(lambda: bool(again.handoffs))
            _, explained = await cluster.get(f"/api/explain/{headers['x-request-id']}")
            assert (explained["handoff"]["pages"], explained["handoff"]["prefix_tokens"]) == (pages - 10, 40)

            labels = '{decode="d0",prefill="p0",transport="simulated"}'

            async def counted() -> str:
                async with cluster.session.get(cluster.url + "/metrics") as response:
                    text: str = await response.text()
                    return text

            async with asyncio.timeout(15):
                while f"mainstem_handoff_pages_total{labels} {2 * pages - 10}.0" not in await counted():
                    await asyncio.sleep(0.05)
            text = await counted()
            assert f"mainstem_handoff_bytes_total{labels} {float((2 * pages - 10) * PAGE_BYTES)}" in text
            assert f"mainstem_handoff_prefix_tokens_total{labels} 40.0" in text
            both = '{decode="d0",outcome="ok",prefill="p0",transport="simulated"}'
            assert f"mainstem_handoffs_total{both} 2.0" in text
            assert f"mainstem_handoff_seconds_total{both}" in text

    run(scenario())


def test_a_stream_passes_byte_for_byte(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            status, events = await cluster.events(chat("hi", max_tokens=2, stream_options={"include_usage": True}))

            assert status == 200
            texts = [json.loads(event)["choices"] for event in events[:-1]]
            assert [choice[0]["delta"] for choice in texts if choice] == [{"content": "t0 "}, {"content": "t1 "}, {}]
            assert json.loads(events[-2])["usage"]["completion_tokens"] == 2
            assert events[-1] == "[DONE]"
            assert cluster.received("p0")["stream"] is False
            assert cluster.received("d0")["stream"] is True
            last = await cluster.last()
            assert (last["outcome"], last["stream"], last["generated_tokens"]) == ("ok", True, 2)
            assert last["ttft_s"] > 0

    run(scenario())


def test_a_shared_prefix_goes_to_its_holder_and_another_prefix_elsewhere(start: Any) -> None:
    async def scenario() -> None:
        async with start() as cluster:
            _, _, first = await cluster.post(chat(PREFIX + "one"))
            home = first["x-mainstem-prefill"]
            await cluster.until(lambda: cluster.router.index.held(home) > 0)

            _, _, second = await cluster.post(chat(PREFIX + "two"))
            _, _, third = await cluster.post(chat("You are a helpful assistant. " + PREFIX[::-1]))

            assert second["x-mainstem-prefill"] == home
            matched = int(second["x-mainstem-matched-tokens"])
            assert matched > 200
            assert matched % 4 == 0
            assert third["x-mainstem-prefill"] != home
            _, state = await cluster.get("/api/state")
            by_id = {request["id"]: request for request in state["requests"]}
            shared = by_id[second["x-request-id"]]
            assert shared["predicted_cached_tokens"] == shared["actual_cached_tokens"] == matched
            assert by_id[first["x-request-id"]]["actual_cached_tokens"] == 0
            assert state["totals"]["predicted_cached_tokens"] == state["totals"]["actual_cached_tokens"] >= matched
            _, explained = await cluster.get(f"/api/explain/{second['x-request-id']}")
            assert explained["decision"]["cache_choice"] == home
            assert len(explained["decision"]["candidates"]) == 2
            assert explained["reason"] == f"cache: holds {matched} tokens"

    run(scenario())


def test_a_salt_keeps_tenants_apart(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            await cluster.post(chat(PREFIX, cache_salt="a"))
            await cluster.until(lambda: cluster.router.index.held("p0") > 0)

            _, _, same = await cluster.post(chat(PREFIX, cache_salt="a"))
            _, _, other = await cluster.post(chat(PREFIX, cache_salt="b"))

            assert int(same["x-mainstem-matched-tokens"]) > 200
            assert other["x-mainstem-matched-tokens"] == "0"
            assert (await cluster.last())["actual_cached_tokens"] == 0

    run(scenario())


def test_the_openai_client_works_unmodified(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            client = openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)
            messages: Any = [{"role": "user", "content": "hi"}]

            answer = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
            assert answer.choices[0].message.content == "t0 t1 t2"
            stream = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, stream=True)
            assert "".join([event.choices[0].delta.content or "" async for event in stream]) == "t0 t1 t2 "
            completion = await client.completions.create(model="tiny", prompt="hi", max_tokens=2)
            assert completion.choices[0].text == "t0 t1"
            assert cluster.received("d0")["prompt"] == cluster.router.renderer.completion({"prompt": "hi"}).ids
            assert [model.id async for model in client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="other", messages=messages)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError, match="max_tokens: wanted at least 1, found -1"):
                await client.chat.completions.create(model="tiny", messages=messages, max_tokens=-1)
            await client.close()

    run(scenario())


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
            rid = headers["x-request-id"]
            await cluster.until(lambda: rid in cluster.workers[other].aborted)
            last = await cluster.last()
            assert last["outcome"] == "error"
            assert leg in last["error"]
            _, state = await cluster.get("/api/state")
            assert all(worker["inflight_requests"] == 0 for worker in state["workers"])
            assert all(worker["outstanding_uncached_tokens"] == 0 for worker in state["workers"])

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_is_no_success(start: Any, stream: bool) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["d0"].fault = Fault.EMPTY

            status, answer, _ = await cluster.post(chat("hi", stream=stream))

            assert status == 502
            assert answer["error"]["message"] == "d0 ended its answer without a token"

    run(scenario())


def test_an_error_as_the_first_event_is_an_http_error(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["d0"].fault = Fault.ERROR_EVENT_FIRST

            status, answer, _ = await cluster.post(chat("hi", stream=True))

            assert status == 502
            assert "prefill failed" in answer["error"]["message"]

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault.ERROR_EVENT, "simulated: out of memory"),
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
            rid = cluster.received("d0")["rid"]

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
            assert answer["error"]["message"] == "d0 sent nothing within 0.3 s"
            rid = headers["x-request-id"]
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
            names = [f"{headers['x-request-id']}_{number}" for number in range(2)]
            await cluster.until(lambda: all(worker.aborted == names for worker in cluster.workers.values()))

    run(scenario())


def test_a_whole_answer_that_stalls_is_ended_by_the_request_timeout(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", request_timeout_s=0.5) as cluster:
            cluster.workers["d0"].fault = Fault.STALL

            status, answer, headers = await cluster.post(chat("hi"))

            assert (status, answer["error"]["message"]) == (504, "not done within 0.5 s")
            await cluster.until(lambda: headers["x-request-id"] in cluster.workers["d0"].aborted)

    run(scenario())


def test_an_unreachable_worker_is_avoided_by_the_next_request(start: Any) -> None:
    async def scenario() -> None:
        async with start() as cluster:
            _, _, first = await cluster.post(chat(PREFIX))
            dead = first["x-mainstem-prefill"]
            await cluster.until(lambda: cluster.router.index.held(dead) > 0)
            await cluster.workers[dead]._runner.cleanup()  # its HTTP side is gone, its agent lives

            failed, answer, headers = await cluster.post(chat(PREFIX))
            status, _, again = await cluster.post(chat(PREFIX))

            assert (failed, headers["x-mainstem-prefill"]) == (502, dead)
            assert answer["error"]["code"] in ("worker_unreachable", "worker_broken")
            assert (status, again["x-mainstem-prefill"] != dead) == (200, True)
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
            assert all(worker.state(cluster.router.clock_s()) == "ready" for worker in cluster.router.fleet)

    run(scenario())


def test_a_router_that_was_ready_stays_so_while_one_workers_pages_are_not_known(start: Any) -> None:
    async def scenario() -> None:
        async with start() as cluster:
            # Nothing is awaited here, so nobody mends the modes meanwhile.
            cluster.router.fleet["p0"].mode = FeedMode.LOAD_ONLY
            assert cluster.router.unready() == []

            for name in ("p1", "p2"):
                if name in cluster.router.fleet:
                    cluster.router.fleet[name].mode = FeedMode.LOAD_ONLY
            assert "the pages of p0 are not known yet" in cluster.router.unready()

    run(scenario())


def test_what_cannot_be_rendered_passes_unmodified_and_is_shown_so(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
            body = {"model": "tiny", "messages": [{"role": "user", "content": image}]}

            status, _, headers = await cluster.post(body)

            assert status == 200
            assert headers["x-mainstem-matched-tokens"] == "0"
            got = cluster.workers["d0"].received[-1]
            assert got.raw.startswith(json.dumps(body).encode()[:-1])
            assert "input_ids" not in got.body
            assert (await cluster.last())["reason"] == "not rendered: content part: image_url"

    run(scenario())


def test_what_is_nested_too_deeply_to_be_rendered_passes_as_it_came(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            schema: dict[str, Any] = {}
            for _ in range(600):
                schema = {"properties": schema}
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}

            status, _, _ = await cluster.post(chat("hi", tools=[tool]))

            assert status == 200
            assert (await cluster.last())["reason"] == "not rendered: nested too deeply"

    run(scenario())


def test_a_prompt_beyond_the_context_is_refused_before_any_worker_sees_it(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker={"max_context_tokens": 50}) as cluster:
            status, answer, headers = await cluster.post(chat(PREFIX))

            assert status == 400
            assert answer["error"]["code"] == "context_length_exceeded"
            assert re.search(r"the prompt has \d+ tokens, and this model's context is 50", answer["error"]["message"])
            assert "x-request-id" in headers
            assert cluster.workers["p0"].received == []

    run(scenario())


def test_a_worker_that_does_both_serves_alone(start: Any) -> None:
    async def scenario() -> None:
        async with start("m0") as cluster:
            await cluster.post(chat(PREFIX))
            await cluster.until(lambda: cluster.router.index.held("m0") > 0)
            status, _, headers = await cluster.post(chat(PREFIX))

            assert status == 200
            assert headers["x-mainstem-prefill"] == headers["x-mainstem-decode"] == "m0"
            assert "bootstrap_room" not in cluster.received("m0")
            last = await cluster.last()
            assert last["actual_cached_tokens"] == last["predicted_cached_tokens"] > 200
            assert len(cluster.workers["m0"].received) == 2

    run(scenario())


def test_nobody_there_is_503_and_not_ready(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            assert await cluster.get("/ready") == (200, {"ready": True, "reasons": []})
            for task in [task for worker in cluster.workers.values() for task in worker._tasks[1:]]:
                task.cancel()
            assert await cluster.workers["d0"].register(cluster.url, leaving=True) == 200

            status, answer, _ = await cluster.post(chat("hi"))

            assert status == 503
            assert answer["error"]["code"] == "no_worker"
            assert await cluster.get("/ready") == (503, {"ready": False, "reasons": ["no decode worker is ready"]})
            assert (await cluster.get("/health"))[0] == 200

    run(scenario())


def test_only_holders_of_the_clusters_key_register(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            path = cluster.url + "/internal/register"
            worker = cluster.workers["p0"]
            body = msgspec.json.encode(msgspec.structs.replace(worker.registration(), worker="evil"))
            stranger = ClusterKey.generate().sign(body, time.time())
            stale = worker.key.sign(body, time.time() - 60)
            for headers in ({}, {SIGNATURE_HEADER: stranger}, {SIGNATURE_HEADER: stale}):
                async with cluster.session.post(path, data=body, headers=headers) as response:
                    assert response.status == 401
            assert "evil" not in cluster.router.fleet

    run(scenario())


def test_a_malformed_signature_is_401(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            path, body = cluster.url + "/internal/register", b"{}"
            stamp, _, mac = cluster.workers["p0"].key.sign(body, time.time()).partition(":")
            for value in ("", ":", "nan:", "é:é", f"{stamp}:é", f"é:{mac}", f"{stamp}:{mac}é", "1" * 5000):
                async with cluster.session.post(path, data=body, headers={SIGNATURE_HEADER: value}) as response:
                    assert response.status == 401, value
            # One byte that is no UTF-8, which HTTP clients in Python do not send.
            reader, writer = await asyncio.open_connection("127.0.0.1", int(cluster.url.rpartition(":")[2]))
            head = "POST /internal/register HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n"
            writer.write(f"{head}{SIGNATURE_HEADER}: {stamp}:\xe9\r\n\r\n{{}}".encode("latin-1"))
            assert b" 401 " in await asyncio.wait_for(reader.readline(), 10)
            writer.close()

    run(scenario())


def test_a_starting_worker_neither_has_to_fit_nor_keeps_others_out(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            worker = cluster.workers["p0"]
            worker.epoch, worker.state = worker.epoch + 1, "starting"  # it crashed

            assert await worker.register(cluster.url) == 200
            assert cluster.router.fleet["p0"].state(cluster.router.clock_s()) == "starting"
            assert await cluster.workers["d0"].register(cluster.url) == 200
            worker.state = "ready"
            assert await worker.register(cluster.url) == 200
            worker.kv_dtype = "float16"
            assert await worker.register(cluster.url) == 400
            assert await worker.register(cluster.url, leaving=True) == 200

    run(scenario())


def test_a_worker_whose_pages_found_no_room_is_shown_as_approximate_and_is_ready(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.router.index.max_nodes = 10
            await cluster.post(chat(PREFIX))
            await cluster.until(lambda: cluster.router.fleet["p0"].mode == "approximate")

            assert (await cluster.get("/ready"))[0] == 200
            _, state = await cluster.get("/api/state")
            assert {one["name"]: one["mode"] for one in state["workers"]} == {"p0": "approximate", "d0": "exact"}

    run(scenario())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "other", "model: wanted 'tiny', found 'other'"),
        ("version", 9, "version: wanted 3, found 9"),
        ("page_tokens", 8, "page_tokens: wanted 4 as d0 has, found 8"),
    ],
)
def test_a_worker_that_does_not_fit_is_told_why(start: Any, field: str, value: Any, message: str) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            worker = cluster.workers["p0"]
            body = msgspec.json.encode(msgspec.structs.replace(worker.registration(), **{field: value}))
            headers = {SIGNATURE_HEADER: worker.key.sign(body, time.time())}
            async with cluster.session.post(cluster.url + "/internal/register", data=body, headers=headers) as response:
                assert response.status == 400
                assert (await response.json())["error"]["message"] == message

    run(scenario())


def test_an_api_key_is_asked_for_where_one_is_configured(start: Any, tmp_path: Path) -> None:
    (tmp_path / "api").write_text("secret\n")

    async def scenario() -> None:
        async with start("p0", "d0", api_key_file=tmp_path / "api") as cluster:
            status, answer, _ = await cluster.post(chat("hi"))
            assert status == 401
            assert answer["error"]["code"] == "invalid_api_key"
            assert (await cluster.get("/v1/models"))[0] == 401
            client = openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="secret", max_retries=0)
            done = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
            assert done.choices
            await client.close()

    run(scenario())


def test_the_dashboards_state_metrics_and_events_agree(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            await cluster.post(chat(PREFIX))
            await cluster.post(b"{")
            await cluster.last()

            _, state = await cluster.get("/api/state")
            async with cluster.session.get(cluster.url + "/metrics") as response:
                metrics = await response.text()
            async with cluster.session.get(cluster.url + "/api/events") as response:
                event = json.loads((await response.content.readline()).removeprefix(b"data: "))

            assert state["totals"]["requests"] == event["totals"]["requests"] == 2
            assert state["totals"]["errors"] == 1
            assert "mainstem_requests_total 2.0" in metrics
            assert "mainstem_errors_total 1.0" in metrics
            assert 'mainstem_worker_ready{role="prefill",worker="p0"} 1.0' in metrics
            assert "mainstem_request_seconds_count 1.0" in metrics
            assert sum(bucket["requests"] for bucket in state["series"]) == 2
            prompt = len(cluster.router.renderer.chat(chat(PREFIX)).ids)
            assert state["totals"]["prompt_tokens"] == sum(one["prompt_tokens"] for one in state["series"]) == prompt
            names = {worker["name"]: worker for worker in state["workers"]}
            assert names["p0"]["mode"] == names["d0"]["mode"] == "exact"
            assert names["p0"]["requests"] == names["d0"]["requests"] == 1
            assert "quick brown" not in json.dumps(state)

    run(scenario())


def test_the_dashboard_is_served_from_the_package(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster, cluster.session.get(cluster.url + "/") as response:
            assert (response.status, response.content_type) == (200, "text/html")
            assert "<html" in (await response.text()).lower()

    run(scenario())


def test_unknown_paths_are_refused_in_the_apis_shape(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            status, answer = await cluster.get("/v1/embeddings")
            assert (status, set(answer["error"])) == (404, {"message", "type", "param", "code"})
            assert (await cluster.get("/api/explain/none"))[0] == 404

    run(scenario())


@pytest.mark.parametrize("path", ["/", "/api/state", "/api/events"])
def test_no_cache_keeps_what_the_dashboard_shows(start: Any, path: str) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster, cluster.session.get(cluster.url + path) as response:
            assert response.headers["cache-control"] == "no-store"

    run(scenario())


def test_the_dashboards_stream_ends_when_the_router_is_told_to_stop(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster, cluster.session.get(cluster.url + "/api/events") as response:
            assert (await response.content.readline()).startswith(b"data: {")
            cluster.router.closing.set()
            await asyncio.wait_for(response.read(), 10)

    run(scenario())
