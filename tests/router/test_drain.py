"""A worker is taken out of service: what it has ends or goes on elsewhere, and no client notices."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from tests.router.served import PREFIX, WHOLE, Cluster, chat, run
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.wire import Drain


async def tell(cluster: Cluster, wish: Drain, key: ClusterKey | None = None) -> int:
    body = msgspec.json.encode(wish)
    headers = {SIGNATURE_HEADER: (key or cluster.router.key).sign(body, time.time())}
    async with cluster.session.post(f"{cluster.url}/internal/drain", data=body, headers=headers) as response:
        return response.status


async def drained(cluster: Cluster, name: str) -> None:
    assert await tell(cluster, Drain(worker=name)) == 200
    await cluster.until(lambda: cluster.router.fleet[name].state() == "draining")


def test_a_draining_worker_gets_nothing_new_until_it_is_told_otherwise(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "p1", "d0", "d1") as cluster:
            await drained(cluster, "p0")
            await drained(cluster, "d1")
            for number in range(6):
                _, _, headers = await cluster.post(chat(f"{number} {PREFIX}"))
                assert (headers["x-mainstem-prefill"], headers["x-mainstem-decode"]) == ("p1", "d0")

            assert await tell(cluster, Drain(worker="p0", drain=False)) == 200
            await cluster.until(lambda: cluster.router.fleet["p0"].state() == "ready")

    run(scenario())


def test_only_who_has_the_clusters_key_may_ask_and_only_for_a_worker_of_it(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0") as cluster:
            assert await tell(cluster, Drain(worker="p0"), ClusterKey.generate()) == 401
            assert await tell(cluster, Drain(worker="nobody")) == 404
            async with cluster.session.post(f"{cluster.url}/internal/drain", data=b"{}") as response:
                assert response.status == 401
            await asyncio.sleep(0.5)
            assert cluster.router.fleet["p0"].state() == "ready"

    run(scenario())


def test_what_it_has_goes_on_elsewhere_when_it_may_wait_no_longer(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", "d1") as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].gate.clear()
            stream = asyncio.create_task(cluster.events(chat(f"1 {PREFIX}", max_tokens=6)))
            await cluster.until(lambda: any(record.ttft_s is not None for record in cluster.router.ledger.newest(1)))
            leaving = cluster.router.ledger.newest(1)[0].decision.decode
            staying = {"d0": "d1", "d1": "d0"}[leaving]
            await drained(cluster, leaving)
            await asyncio.sleep(0.2)
            assert not stream.done(), "short requests get time to end by themselves"

            cluster.workers[staying].gate.set()
            assert await tell(cluster, Drain(worker=leaving, move=True)) == 200

            _, events = await stream
            assert "".join(_texts(events)) == WHOLE
            last = await cluster.last()
            assert [(one["failed"], one["then"]) for one in last["tries"]] == [("moved", "resume"), (None, None)]
            assert (last["outcome"], last["decode"]) == ("ok", staying)
            await cluster.until(lambda: cluster.router.fleet[leaving].inflight_requests == 0)
            assert cluster.router.fleet[leaving].state() == "draining", "nothing has failed there"

    run(scenario())


def test_what_cannot_go_on_elsewhere_stays_to_its_end(start: Any) -> None:
    async def scenario() -> None:
        async with start("p0", "d0", "d1") as cluster:
            for name in ("d0", "d1"):
                cluster.workers[name].gate.clear()
            fields = {"max_tokens": 6, "tools": [{"type": "function", "function": {"name": "f"}}]}
            stream = asyncio.create_task(cluster.events(chat(f"1 {PREFIX}", **fields)))
            await cluster.until(lambda: any(record.ttft_s is not None for record in cluster.router.ledger.newest(1)))
            leaving = cluster.router.ledger.newest(1)[0].decision.decode
            await drained(cluster, leaving)
            await tell(cluster, Drain(worker=leaving, move=True))
            await asyncio.sleep(0.2)
            assert not stream.done()
            cluster.workers[leaving].gate.set()

            _, events = await stream
            assert "".join(_texts(events)) == WHOLE
            assert len((await cluster.last())["tries"]) == 1

    run(scenario())


def _texts(events: list[str]) -> list[str]:
    parsed = [msgspec.json.decode(event) for event in events if event != "[DONE]"]
    return [one["choices"][0]["delta"].get("content") or "" for one in parsed if one["choices"]]
