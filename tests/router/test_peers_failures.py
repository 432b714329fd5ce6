"""What other routers were seen to get wrong, each as a test that this one passes.

sglang-router 0.3.2, smg 1.13, vllm-router 0.1.17, Dynamo 1.6.1, litellm 1.106; measured on simulated workers.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from router.fake_worker import Fault
from tests.router.served import PREFIX, Cluster, chat, run

FOUR = ("p0", "p1", "p2", "p3", "d0", "d1")


async def revive(cluster: Cluster, *names: str) -> None:
    """Processes that were killed are started again: other lives, at other ports."""
    for name in names:
        one = cluster.workers[name]
        one.epoch += 1
        await one.start()
        one.renew(cluster.url, 0.2)


def test_the_first_token_does_not_wait_for_the_clients_acknowledgement(start: Any) -> None:
    """sglang-router: +43 ms, Dynamo: +40 ms on the second event. The cause is a socket without TCP_NODELAY."""

    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            found: list[int] = []
            serve = cluster.router.dispatcher.serve

            async def spied(endpoint: Any, client: Any, tenant: str = "") -> None:
                transport = client._receive.__self__.transport
                found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                await serve(endpoint, client, tenant)

            cluster.router.dispatcher.serve = spied
            await cluster.post(chat("hi"))

            assert found == [1]

    run(scenario())


def test_unrelated_sessions_do_not_all_land_on_one_worker(start: Any) -> None:
    """sglang-router: 24 of 24 on the first of four."""

    async def scenario() -> None:
        async with start(*FOUR) as cluster:
            for number in range(24):
                await cluster.post(chat(f"{number} {PREFIX}"))

            counts = [len(cluster.workers[name].received) for name in FOUR[:4]]
            assert max(counts) <= 8, counts

    run(scenario())


def test_token_ids_are_routed_by_their_prefix_and_batches_are_served(start: Any) -> None:
    """sglang-router and smg: 422 for both, or no cache awareness."""

    async def scenario() -> None:
        async with start(*FOUR) as cluster:
            ids = list(range(10, 200))
            status, _, first = await cluster.post({"model": "tiny", "prompt": ids}, "/v1/completions")
            await cluster.until(lambda: cluster.router.index.held(first["x-mainstem-prefill"]) > 0)
            again, _, second = await cluster.post({"model": "tiny", "prompt": [*ids, 7]}, "/v1/completions")
            batch, _, _ = await cluster.post({"model": "tiny", "prompt": ["a", "b"]}, "/v1/completions")

            assert (status, again, batch) == (200, 200, 200)
            assert second["x-mainstem-prefill"] == first["x-mainstem-prefill"]
            assert int(second["x-mainstem-matched-tokens"]) > 100

    run(scenario())


def test_fields_that_the_router_does_not_know_reach_the_engine(start: Any) -> None:
    """sglang-router drops them; Dynamo answers 400."""

    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            fields = {"priority": 3, "custom_params": {"a": [1]}, "regex": "a+", "cache_salt": "s", "max_tokens": 2}
            status, _, _ = await cluster.post(chat("hi", **fields))

            assert status == 200
            for name in ("p0", "d0"):
                got = cluster.received(name)
                assert {field: got[field] for field in fields} == fields

    run(scenario())


def test_a_dead_worker_costs_no_client_anything(start: Any) -> None:
    """sglang-router: four 500s and 502s; smg: three 502s; litellm: 4 of 40 requests; Dynamo: 503s for ten seconds."""

    async def scenario() -> None:
        async with start(*FOUR) as cluster:
            for name in ("p0", "p1", "d0"):
                await cluster.workers[name].stop()
            statuses = [(await cluster.post(chat(f"{number} {PREFIX}")))[0] for number in range(40)]

            assert statuses == [200] * 40

    run(scenario())


def test_after_a_full_outage_the_first_workers_that_are_back_serve_at_once(start: Any) -> None:
    """sglang-router and smg: 56 s of 503 although all workers are back."""

    async def scenario() -> None:
        async with start("p0", "p1", "d0", "d1", worker={"lease_s": 0.6}) as cluster:
            for one in cluster.workers.values():
                await one.stop()
            await cluster.until(lambda: all(worker.lost for worker in cluster.router.fleet))
            status, answer, headers = await cluster.post(chat("hi"))
            assert (status, answer["error"]["code"]) == (503, "no_worker")
            assert "retry-after" in headers

            await revive(cluster, "p0", "d0")
            async with asyncio.timeout(2):
                while (await cluster.post(chat("hi")))[0] != 200:
                    await asyncio.sleep(0.02)
            await revive(cluster, "p1", "d1")
            statuses = [(await cluster.post(chat(f"{number} {PREFIX}")))[0] for number in range(30)]

            assert statuses == [200] * 30, "smg: 28 of 30 were 503"

    run(scenario())


def test_a_stream_that_cannot_be_saved_ends_with_an_error_event(start: Any) -> None:
    """sglang-router and vllm-router: the connection is just cut."""

    async def scenario() -> None:
        async with start("p0", "d0", resumes=0) as cluster:
            cluster.workers["d0"].fault = Fault.DIE_MIDSTREAM
            _, events = await cluster.events(chat("hi", max_tokens=6))

            assert json.loads(events[-1])["error"]["code"] == "worker_broken"

    run(scenario())


def test_before_any_worker_has_come_the_answer_is_503_and_not_404(start: Any) -> None:
    """smg: 404 model_not_found; Dynamo: 404 with an empty body."""

    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            for name in ("p0", "d0"):
                await cluster.workers[name].register(cluster.url, leaving=True)
                await cluster.workers[name].stop()
            status, answer, headers = await cluster.post(chat("hi"))

            assert (status, answer["error"]["code"]) == (503, "no_worker")
            assert headers["retry-after"] == "1"
            assert (await cluster.post({"model": "other", "messages": []}))[0] == 404

    run(scenario())


def test_a_hot_prefix_spreads_over_workers_in_flight(start: Any) -> None:
    """sglang-router and vllm-router: 100 % on one worker at 32 clients; Dynamo: 512 of 512 in two of seven runs."""

    async def scenario() -> None:
        async with start(*FOUR, cost={"hot_requests": 2, "learn": False, "prefill_tokens_per_s": 250}) as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].gate.clear()
            asking = [asyncio.create_task(cluster.events(chat(f"{PREFIX} {number}"))) for number in range(32)]
            decodes = [cluster.workers[name] for name in ("d0", "d1")]
            await cluster.until(lambda: sum(len(one.received) for one in decodes) == 32)
            for one in decodes:
                one.gate.set()
            assert [(await task)[0] for task in asking] == [200] * 32

            counts = [len(cluster.workers[name].received) for name in FOUR[:4]]
            assert max(counts) < 24, counts

    run(scenario())


def test_a_client_that_leaves_before_a_whole_answer_ends_the_request_on_both_workers(start: Any) -> None:
    """litellm: the workers go on."""

    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["p0"].fault = Fault.HANG
            asking = asyncio.create_task(cluster.post(chat("hi")))
            await cluster.until(lambda: bool(cluster.workers["p0"].received))
            rid = cluster.received("p0")["rid"]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

            async with asyncio.timeout(1):
                while not all(rid in one.aborted for one in cluster.workers.values()):
                    await asyncio.sleep(0.01)
            assert (await cluster.last())["outcome"] == "cancelled"

    run(scenario())


def test_an_error_has_openais_shape_wherever_it_comes_from(start: Any) -> None:
    """vllm-router and sglang-router: plain text, or nothing; Dynamo: a shape of its own."""

    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            cluster.workers["d0"].fault = Fault.ERROR
            asked: list[tuple[str, str, Any]] = [
                ("POST", "/v1/chat/completions", b"{"),
                ("POST", "/v1/chat/completions", json.dumps(chat("hi"))),
                ("GET", "/v1/chat/completions", None),
                ("GET", "/v1/models/none", None),
                ("POST", "/nowhere", b"{}"),
            ]
            for method, path, body in asked:
                async with cluster.session.request(method, cluster.url + path, data=body) as response:
                    answer = await response.json()
                assert response.status >= 400
                assert set(answer["error"]) == {"message", "type", "param", "code"}, path

    run(scenario())


def test_revived_workers_are_in_use_within_two_seconds(start: Any) -> None:
    """sglang-router and smg: idle for 45 s, until the next health check."""

    async def scenario() -> None:
        async with start("p0", "p1", "d0", "d1") as cluster:
            await cluster.workers["p1"].stop()
            for number in range(8):
                assert (await cluster.post(chat(f"{number} {PREFIX}")))[0] == 200
            await revive(cluster, "p1")
            before = len(cluster.workers["p1"].received)

            async with asyncio.timeout(2):
                number = 100
                while len(cluster.workers["p1"].received) == before:
                    number += 1
                    assert (await cluster.post(chat(f"{number} {PREFIX}")))[0] == 200

    run(scenario())
