"""The simulated worker finds in its cache what real SGLang finds in its own, request by request.

Requests come one after the other to a small KV pool: conversations that go on, prompts with a common
beginning that part in the middle of a page, the same prompt again, prompts longer than a chunk. So
runs of pages are split and dropped all the time, and one wrong choice of what to drop shows later.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.client import post_json
from engine.sim import Finished, Prefilled, SimConfig, SimJob, SimWorker
from tests.cluster.conftest import monolithic, started
from transfer.pages import chain_ids, root_id
from transfer.wire import Removed

PAGE_TOKENS = 16
POOL_TOKENS = 2048
CHUNK_TOKENS = 512
REQUESTS = 100
VOCABULARY = 40_000


@dataclass
class Asked:
    prompt: list[int]
    output: list[int]
    cached_tokens: int


class Prompts:
    """The next prompt, given the conversations so far. Equal seeds and answers give equal prompts."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.documents = [self.tokens(length) for length in (16, 40, 96, 160, 333, 400)]
        self.conversations: list[list[int]] = []

    def tokens(self, count: int) -> list[int]:
        return [self.chance.randrange(1000, VOCABULARY) for _ in range(count)]

    def next(self) -> list[int]:
        kind = self.chance.random()
        if self.conversations and kind < 0.45:
            latest = self.conversations[-6:]
            return self.chance.choice(latest) + self.tokens(self.chance.randrange(1, 60))
        if self.conversations and kind < 0.55:
            return list(self.chance.choice(self.conversations[-4:]))
        document = self.chance.choice(self.documents)
        if kind < 0.85:
            cut = self.chance.randrange(1, len(document) + 1)
            return document[:cut] + self.tokens(self.chance.randrange(1, 120))
        if kind < 0.95:
            return document + self.tokens(-len(document) % PAGE_TOKENS)
        return document + self.tokens(self.chance.randrange(300, 700))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    config = monolithic()
    engine: dict[str, Any] = {
        **config.engine,
        "max-total-tokens": POOL_TOKENS,
        "chunked-prefill-size": CHUNK_TOKENS,
        "page-size": PAGE_TOKENS,
    }
    config = config.model_copy(update={"engine": engine})
    with started(config, tmp_path_factory.mktemp("pool")) as cluster:
        worker = cluster.plan.workers[0]
        return list(_asked(f"http://{worker.host}:{worker.port}"))


def _asked(url: str) -> Iterator[Asked]:
    prompts = Prompts(7)
    for number in range(REQUESTS):
        prompt = prompts.next()
        tokens = 1 if number % 3 == 0 else prompts.chance.randrange(2, 40)
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answer = post_json(url, "/generate", {"input_ids": prompt, "sampling_params": sampling})
        output = answer["output_ids"]
        assert len(output) == tokens
        yield Asked(prompt, output, answer["meta_info"]["cached_tokens"])
        prompts.conversations.append((prompt + output)[: POOL_TOKENS // 4])


def simulated(requests: list[Asked]) -> tuple[list[int], int]:
    """cached_tokens of each request in the simulation, and the pages that it dropped."""
    root = root_id("any")
    config = SimConfig(
        capacity_tokens=POOL_TOKENS, page_tokens=PAGE_TOKENS, prefill_tokens_per_s=1000, chunk_tokens=CHUNK_TOKENS
    )
    worker = SimWorker("sim", config, 1, root)
    cached: list[int] = []
    dropped = 0
    now_s = 0.0
    for rid, one in enumerate(requests):
        ids = chain_ids(root, one.prompt, PAGE_TOKENS)
        output_ids = chain_ids(root, one.prompt + one.output, PAGE_TOKENS)
        worker.submit(SimJob(rid, ids, len(one.prompt), len(one.output), output_ids), now_s)
        ended = False
        while not ended:
            now_s = worker.next_event_s
            for event in worker.advance(now_s):
                if isinstance(event, Prefilled):
                    cached.append(event.cached_tokens)
                ended |= isinstance(event, Finished)
        dropped += sum(len(event.ids) for event in worker.page_events() if isinstance(event, Removed))
    return cached, dropped


def test_cached_tokens_of_a_sequence_of_requests_are_those_of_real_sglang(asked: list[Asked]) -> None:
    cached, dropped = simulated(asked)

    assert cached == [one.cached_tokens for one in asked]
    pool_pages = POOL_TOKENS // PAGE_TOKENS
    assert dropped > 2 * pool_pages, "the pool was too large for this to show anything"
    assert sum(1 for tokens in cached if tokens) > REQUESTS // 3
