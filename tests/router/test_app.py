"""The whole router over real sockets, between a real client and simulated workers: what the client saw."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import openai
import pytest

from router.fake_worker import PAGE_BYTES
from router.fleet import FeedMode
from tests.router.served import PREFIX, chat, run
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.pages import chain_ids, namespace, root_id


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
            assert re.fullmatch("[0-9a-f]{34}", decode["rid"])
            assert decode["rid"] == headers["x-request-id"] + "00"

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
            deltas = [choice[0]["delta"] for choice in texts if choice]
            assert deltas == [{"role": "assistant", "content": ""}, {"content": "t0 "}, {"content": "t1 "}, {}]
            assert json.loads(events[-2])["usage"]["completion_tokens"] == 2
            assert events[-1] == "[DONE]"
            assert cluster.received("p0")["stream"] is True
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
            assert cluster.router.fleet["p0"].state() == "starting"
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

            explained = f"/api/explain/{cluster.router.ledger.newest(1)[0].id}"
            for path in ("/", "/metrics", "/api/state", "/api/events", explained):
                for given, wanted in (
                    ({}, 401),
                    (basic("secre"), 401),
                    (basic("secret"), 200),
                    (bearer("secret"), 200),
                ):
                    async with cluster.session.get(cluster.url + path, headers=given) as response:
                        assert response.status == wanted, (path, given)
                        assert ("www-authenticate" in response.headers) == (wanted == 401)
            for path in ("/health", "/ready"):
                assert (await cluster.get(path))[0] == 200

    run(scenario())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(password: str) -> dict[str, str]:
    return {"authorization": aiohttp.encode_basic_auth("anybody", password)}


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
            status, answer = await cluster.get("/v1/chat/completions")
            assert (status, set(answer["error"])) == (405, {"message", "type", "param", "code"})

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


def test_of_requests_that_come_at_once_the_first_is_sent_before_the_last_is_read(start: Any) -> None:
    """Else a worker that has nothing to do would wait until all were read."""

    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            url = urlsplit(cluster.url)
            opened = [await asyncio.open_connection(url.hostname, url.port) for _ in range(16)]
            body = json.dumps(chat("hi", max_tokens=2)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            for _, writer in opened:
                writer.write(head + body)

            while not cluster.workers["p0"].received:
                await asyncio.sleep(0)
            assert len(cluster.router.ledger.newest(16)) < 16

            for reader, writer in opened:
                assert (await reader.readline()).split()[1] == b"200"
                writer.close()

    run(scenario())
