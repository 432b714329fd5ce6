"""More requests than there is room for: who waits, who goes first, who is told to come again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from router.fake_worker import Fault
from tests.router.served import PREFIX, Cluster, chat, run

TINY = {"capacity_tokens": 400, "max_context_tokens": 4096}
"""A decode worker with room for one request of PREFIX beside nothing else."""


async def held(cluster: Cluster, text: str, **more: Any) -> asyncio.Task[Any]:
    """A request that has reached decode and is answered when the gates open."""
    before = len(cluster.workers["d0"].received)
    task = asyncio.create_task(cluster.events(chat(text, **more)))
    await cluster.until(lambda: len(cluster.workers["d0"].received) > before)
    return task


def test_a_request_waits_before_prefill_until_decode_has_room_for_it(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker=TINY, queue_timeout_s=10) as cluster:
            cluster.workers["d0"].gate.clear()
            first = await held(cluster, f"1 {PREFIX}", max_tokens=8)
            second = asyncio.create_task(cluster.events(chat(f"2 {PREFIX}", max_tokens=8)))
            await cluster.until(lambda: len(cluster.router.admission) == 1)
            await asyncio.sleep(0.3)

            assert len(cluster.workers["p0"].received) == 1, "nothing is computed that decode has no room for"
            _, metrics = await cluster.text("/metrics")
            assert "mainstem_waiting_requests 1.0" in metrics
            cluster.workers["d0"].gate.set()

            assert [(await task)[0] for task in (first, second)] == [200, 200]
            assert (await cluster.last())["queued_s"] > 0.2

    run(scenario())


def test_what_can_never_fit_is_refused_with_the_numbers(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker={"max_context_tokens": 100}) as cluster:
            status, answer, _ = await cluster.post(chat(PREFIX, max_tokens=8))

            assert status == 400
            assert answer["error"]["code"] == "context_length_exceeded"
            assert "100" in answer["error"]["message"]

    run(scenario())


def test_a_full_queue_answers_at_once_with_429_and_says_when_to_come_again(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker=TINY, queue_timeout_s=10, queue_max_requests=1) as cluster:
            cluster.workers["d0"].gate.clear()
            first = await held(cluster, f"1 {PREFIX}", max_tokens=8)
            second = asyncio.create_task(cluster.events(chat(f"2 {PREFIX}", max_tokens=8)))
            await cluster.until(lambda: len(cluster.router.admission) == 1)

            status, answer, headers = await cluster.post(chat(f"3 {PREFIX}"))

            assert (status, answer["error"]["type"], answer["error"]["code"]) == (429, "rate_limit_error", "overloaded")
            assert int(headers["retry-after"]) >= 1
            cluster.workers["d0"].gate.set()
            await asyncio.gather(first, second)

    run(scenario())


def test_who_waits_too_long_gets_503(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker=TINY, queue_timeout_s=0.4) as cluster:
            cluster.workers["d0"].gate.clear()
            first = await held(cluster, f"1 {PREFIX}", max_tokens=8)

            status, answer, headers = await cluster.post(chat(f"2 {PREFIX}"))

            assert (status, answer["error"]["message"]) == (503, "no worker had room within 0.4 s")
            assert "retry-after" in headers
            cluster.workers["d0"].gate.set()
            await first

    run(scenario())


def test_a_client_that_leaves_the_queue_is_forgotten(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", worker=TINY, queue_timeout_s=10) as cluster:
            cluster.workers["d0"].gate.clear()
            first = await held(cluster, f"1 {PREFIX}", max_tokens=8)
            second = asyncio.create_task(cluster.events(chat(f"2 {PREFIX}")))
            await cluster.until(lambda: len(cluster.router.admission) == 1)
            second.cancel()

            await cluster.until(lambda: len(cluster.router.admission) == 0)
            cluster.workers["d0"].gate.set()
            await first
            assert len(cluster.workers["p0"].received) == 1

    run(scenario())


def test_a_tenant_that_floods_waits_behind_itself(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("flood sk-flood\nquiet sk-quiet\n")

    async def scenario() -> None:
        async with start("p0", "d0", worker=TINY, queue_timeout_s=20, api_key_file=keys) as cluster:
            ended: list[str] = []

            async def ask(tenant: str, number: int) -> None:
                async with cluster.session.post(
                    cluster.url + "/v1/chat/completions",
                    json=chat(f"{tenant} {number} {PREFIX}", max_tokens=2),
                    headers={"authorization": f"Bearer sk-{tenant}"},
                ) as response:
                    assert response.status == 200, await response.text()
                ended.append(tenant)

            cluster.workers["p0"].fault = Fault.NONE
            cluster.workers["d0"].gate.clear()
            blocking = asyncio.create_task(
                cluster.session.post(
                    cluster.url + "/v1/chat/completions",
                    json=chat(f"0 {PREFIX}", max_tokens=2, stream=True),
                    headers={"authorization": "Bearer sk-flood"},
                )
            )
            await cluster.until(lambda: len(cluster.workers["d0"].received) == 1)
            flood = [asyncio.create_task(ask("flood", number)) for number in range(12)]
            await cluster.until(lambda: len(cluster.router.admission) == 12)
            quiet = [asyncio.create_task(ask("quiet", number)) for number in range(2)]
            await cluster.until(lambda: len(cluster.router.admission) == 14)
            cluster.workers["d0"].gate.set()
            await asyncio.gather(*flood, *quiet)
            (await blocking).release()

            assert ended.index("quiet") <= 2
            assert ended[:6].count("quiet") == 2

    run(scenario())


@pytest.mark.parametrize(
    ("rule", "status", "served"), [("aggregate", 200, "m0"), ("queue", 503, None), ("fail", 503, None)]
)
def test_without_prefill_workers_the_rule_decides(start: Any, rule: str, status: int, served: str | None) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", "m0", on_no_prefill=rule, queue_timeout_s=0.5) as cluster:
            cluster.workers["p0"].state = "draining"
            await cluster.until(lambda: cluster.router.fleet["p0"].state() == "draining")

            found, answer, headers = await cluster.post(chat("hi"))

            assert found == status, answer
            assert headers.get("x-mainstem-prefill") == served
            if served:
                assert headers["x-mainstem-mode"] == "aggregated"
            else:
                assert answer["error"]["code"] in ("no_worker", "overloaded")

    run(scenario())


def test_the_queue_rule_waits_for_a_prefill_worker(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", "m0", on_no_prefill="queue", queue_timeout_s=10) as cluster:
            cluster.workers["p0"].state = "draining"
            await cluster.until(lambda: cluster.router.fleet["p0"].state() == "draining")
            asking = asyncio.create_task(cluster.post(chat("hi")))
            await cluster.until(lambda: len(cluster.router.admission) == 1)
            cluster.workers["p0"].state = "ready"

            # From here on any of them is as good: what it waited for is that there are prefill workers again.
            assert (await asking)[0] == 200

    run(scenario())
