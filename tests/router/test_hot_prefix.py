"""One long prefix from many clients at once, through the real router over sockets: it is shared, not pinned."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import aiohttp
import pytest
import uvicorn

from router.app import Router, create_app
from router.config import RouterSection, RouterSpec
from router.fake_worker import FakeWorker, Handoffs
from router.server import listen
from transfer.auth import ClusterKey
from transfer.wire import Role

TokenizerFolder = Callable[[str], Path]
CLIENTS, REQUESTS = 32, 256
PREFIX = list(range(2300))
END_TOKENS = 20


@asynccontextmanager
async def opened(folder: Path, key_file: Path, roles: dict[str, Role], policy: str) -> AsyncIterator[str]:
    """A router in front of workers of these names: its address."""
    key = ClusterKey.generate()
    key.write(key_file)
    section = RouterSection.model_validate({"policy": policy})
    router = Router(RouterSpec(section=section, model="tiny", model_path=folder, key_file=key_file, cluster="test"))
    handoffs = Handoffs()
    workers = [FakeWorker(name, role, key, handoffs, page_tokens=16) for name, role in roles.items()]
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


async def ask_for_all(url: str) -> tuple[Counter[str], float]:
    """Requests by prefill worker, and the share of prompt tokens that these had, as they say themselves."""
    numbers = count()
    sent: Counter[str] = Counter()
    cached_tokens = prompt_tokens = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal cached_tokens, prompt_tokens
        while (number := next(numbers)) < REQUESTS:
            prompt = [*PREFIX, *([number] * END_TOKENS)]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200
                answer = await response.json()
                sent[response.headers["x-mainstem-prefill"]] += 1
                record = response.headers["x-request-id"]
            async with session.get(f"{url}/api/explain/{record}") as response:
                explained = await response.json()
            prompt_tokens += answer["usage"]["prompt_tokens"]
            cached_tokens += explained["actual_cached_tokens"]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session, asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client(session))
    return sent, cached_tokens / prompt_tokens


BOTH: dict[str, Role] = {f"m{number}": "both" for number in range(4)}
APART: dict[str, Role] = {**{f"p{number}": "prefill" for number in range(4)}, "d0": "decode", "d1": "decode"}


def hot(roles: dict[str, Role], policy: str, folder: Path, key_file: Path) -> tuple[float, float]:
    """Requests of the busiest worker that prefills over the mean, and the hit rate."""

    async def scenario() -> tuple[Counter[str], float]:
        async with opened(folder, key_file, roles, policy) as url:
            return await ask_for_all(url)

    sent, hit_rate = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert sent.total() == REQUESTS
    return max(sent.values()) * 4 / REQUESTS, hit_rate


@pytest.mark.parametrize("roles", [BOTH, APART], ids=["both", "apart"])
def test_a_hot_prefix_is_shared_by_all_workers_and_still_hit(
    roles: dict[str, Role], tokenizer_folder: TokenizerFolder, tmp_path: Path
) -> None:
    busiest, hit_rate = hot(roles, "mainstem", tokenizer_folder("chatml"), tmp_path / "key")

    assert busiest < 1.5
    assert hit_rate > 0.9


def test_by_the_hash_of_its_beginning_all_of_it_would_go_to_one_worker(
    tokenizer_folder: TokenizerFolder, tmp_path: Path
) -> None:
    busiest, _ = hot(BOTH, "session_hash", tokenizer_folder("chatml"), tmp_path / "key")

    assert busiest == 4
