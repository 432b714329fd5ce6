"""One long prefix from many clients, through the real router over sockets: it is shared, not pinned.

One worker has it before the clients begin, one after the other: who looks for the cache alone stays there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from aiohttp import web

from router.app import Router, create_app
from router.config import RouterSection, RouterSpec
from router.fake_worker import FakeWorker, Handoffs
from router.server import listen
from transfer.auth import ClusterKey
from transfer.wire import Role

pytestmark = pytest.mark.thorough

TokenizerFolder = Callable[[str], Path]
PREFIX = list(range(2300))
END_TOKENS = 20
STAGGER_S, THINK_S, ANSWER_S = 0.3, 0.005, 0.08
OVERHEAD_S, TOKENS_PER_S = 0.01, 4600
PER_CLIENT = {8: 12, 32: 4}
"""Requests of each, by how many clients there are."""


class BusyWorker(FakeWorker):
    """Prefills take their time, one after the other, and answers take theirs.

    Without that, too few requests would be in flight for a prefix to be hot, and what the router learns of the
    workers' speeds would be the noise of the machine.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._computing = asyncio.Lock()

    async def _prefill(self, ids: list[int], body: dict[str, Any]) -> int:
        async with self._computing:
            _, pages, held = self._match(ids, body)
            await asyncio.sleep(OVERHEAD_S + (len(pages) - held) * self.page_tokens / TOKENS_PER_S)
            return await super()._prefill(ids, body)

    async def _respond(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await super()._respond(request, body)
        if self.role != "prefill":
            await asyncio.sleep(ANSWER_S)
        return response


@asynccontextmanager
async def opened(folder: Path, key_file: Path, roles: dict[str, Role], policy: str) -> AsyncIterator[str]:
    """A router in front of workers of these names: its address."""
    key = ClusterKey.generate()
    key.write(key_file)
    section = RouterSection.model_validate(
        {"policy": policy, "cost": {"prefill_overhead_s": OVERHEAD_S, "prefill_tokens_per_s": TOKENS_PER_S}}
    )
    router = Router(RouterSpec(section=section, model="tiny", model_path=folder, key_file=key_file, cluster="test"))
    handoffs = Handoffs()
    workers = [BusyWorker(name, role, key, handoffs, page_tokens=16) for name, role in roles.items()]
    with listen("127.0.0.1", 0) as bound:
        server = uvicorn.Server(
            uvicorn.Config(create_app(router), log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            async with asyncio.timeout(15):
                while not server.started:
                    await asyncio.sleep(0.01)
                for worker in workers:
                    await worker.start()
                    worker.renew(url, 0.2)
                while router.unready():
                    await asyncio.sleep(0.01)
            yield url
        finally:
            for worker in workers:
                await worker.stop()
            router.closing.set()
            server.should_exit = True
            await asyncio.wait_for(serving, 10)


async def ask_for_all(url: str, clients: int) -> tuple[Counter[str], float]:
    """Requests by prefill worker, and the share of prompt tokens that these had, as they say themselves."""
    sent: Counter[str] = Counter()
    records: list[str] = []

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        body = {"model": "tiny", "prompt": [*PREFIX, *([number] * END_TOKENS)], "max_tokens": 4}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200
            await response.read()
            sent[response.headers["x-mainstem-prefill"]] += 1
            records.append(response.headers["x-request-id"])

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(STAGGER_S * number / clients)
        for place in range(PER_CLIENT[clients]):
            await ask(session, 1 + number * PER_CLIENT[clients] + place)
            await asyncio.sleep(THINK_S)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        await ask(session, 0)
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(session, number))
        cached_tokens = prompt_tokens = 0
        for record in records:
            async with session.get(f"{url}/api/explain/{record}") as response:
                explained = await response.json()
                prompt_tokens += explained["prompt_tokens"]
                cached_tokens += explained["actual_cached_tokens"]
    return sent, cached_tokens / prompt_tokens


BOTH: dict[str, Role] = {f"m{number}": "both" for number in range(4)}
APART: dict[str, Role] = {**{f"p{number}": "prefill" for number in range(4)}, "d0": "decode", "d1": "decode"}


def hot(roles: dict[str, Role], clients: int, policy: str, folder: Path, key_file: Path) -> tuple[float, float]:
    """Requests of the busiest worker that prefills over the mean, and the hit rate; of all, the first one too."""

    async def scenario() -> tuple[Counter[str], float]:
        async with opened(folder, key_file, roles, policy) as url:
            return await ask_for_all(url, clients)

    sent, hit_rate = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert sent.total() == 1 + clients * PER_CLIENT[clients]
    return max(sent.values()) * 4 / sent.total(), hit_rate


@pytest.mark.parametrize(("roles", "clients"), [(BOTH, 8), (APART, 32)], ids=["both, 8", "apart, 32"])
def test_a_hot_prefix_is_shared_by_all_workers_and_still_hit(
    roles: dict[str, Role], clients: int, tokenizer_folder: TokenizerFolder, tmp_path: Path
) -> None:
    busiest, hit_rate = hot(roles, clients, "mainstem", tokenizer_folder("chatml"), tmp_path / "key")

    assert busiest < 1.5
    assert hit_rate > 0.9


def test_who_looks_for_the_prefix_alone_would_send_all_of_it_to_one_worker(
    tokenizer_folder: TokenizerFolder, tmp_path: Path
) -> None:
    busiest, _ = hot(BOTH, 8, "longest_prefix", tokenizer_folder("chatml"), tmp_path / "key")

    assert busiest == 4
