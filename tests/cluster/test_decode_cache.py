"""Decode keeps a prefix cache: what it holds of a prompt is not handed over again, and nothing else changes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from benchmarks.client import Answer, complete, get_json
from engine.config import ClusterConfig
from engine.launch.cluster import Cluster
from tests.cluster.conftest import local_cpu, started

PAGE_BYTES = 737_280
"""SmolLM2-135M in float32: 16 tokens x 30 layers x K and V x 3 heads x 64 x 4 bytes."""
EVENT_TRAVEL_S = 0.5
WAIT_S = 10.0


def prompt_of(length: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(1000, 20_000) for _ in range(length)]


def asked(cluster: Cluster, prompt: list[int], max_tokens: int = 2) -> tuple[Answer, dict[str, Any]]:
    """The answer, and what was handed over for it."""
    answer = complete(cluster.url, cluster.plan.router.model, prompt, max_tokens, ignore_eos=True)
    assert answer.error == "", answer
    time.sleep(EVENT_TRAVEL_S)
    deadline_s = time.monotonic() + WAIT_S
    while not (moved := get_json(cluster.url, f"/api/explain/{answer.headers['x-request-id']}")["handoff"]):
        assert time.monotonic() < deadline_s, "the router was not told of the hand-off"
        time.sleep(0.05)
    return answer, moved


def test_only_what_decode_lacks_is_moved_and_cached_tokens_stay_what_prefill_saved(live: Cluster) -> None:
    prompt = prompt_of(100, 1)
    first, all_of_it = asked(live, prompt)
    again, the_rest = asked(live, prompt)
    whole_pages, nothing = asked(live, prompt[:96])

    assert (all_of_it["pages"], all_of_it["prefix_tokens"], all_of_it["moved_bytes"]) == (7, 0, 7 * PAGE_BYTES)
    assert (the_rest["pages"], the_rest["prefix_tokens"], the_rest["moved_bytes"]) == (1, 96, PAGE_BYTES)
    assert (nothing["pages"], nothing["prefix_tokens"], nothing["moved_bytes"]) == (0, 96, 0)
    # Prefill computes the last token itself, so of 96 tokens it uses 80; decode holds all of them.
    assert [one.cached_tokens for one in (first, again, whole_pages)] == [0, 96, 80]
    assert [one.matched_tokens for one in (first, again, whole_pages)] == [0, 96, 80]


def counted(cluster: Cluster) -> dict[str, int]:
    """The router's sums over all pairs and transports."""
    with urlopen(cluster.url + "/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    names = {
        "handoffs": "mainstem_handoffs_total",
        "pages": "mainstem_handoff_pages_total",
        "bytes": "mainstem_handoff_bytes_total",
        "prefix_tokens": "mainstem_handoff_prefix_tokens_total",
    }
    return {
        name: int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric + "{")))
        for name, metric in names.items()
    }


def narrow(**engine: Any) -> ClusterConfig:
    """One prefill worker, and a decode worker whose pool is small."""
    config = local_cpu()
    prefill, decode = config.workers
    return config.model_copy(
        update={
            "workers": (
                prefill.model_copy(update={"count": 1}),
                decode.model_copy(update={"engine": {**decode.engine, **engine}}),
            )
        }
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of these tests only: what its counters say is what they did."""
    config = narrow(**{"max-total-tokens": 320, "num-reserved-decode-tokens": 16})
    with started(config, tmp_path_factory.mktemp("small")) as cluster:
        yield cluster


def test_the_metrics_have_counted_it(small: Cluster) -> None:
    before = counted(small)
    asked(small, prompt_of(160, 4))
    asked(small, prompt_of(160, 4))

    deadline_s = time.monotonic() + WAIT_S
    while (after := counted(small))["handoffs"] < before["handoffs"] + 2:
        assert time.monotonic() < deadline_s, (before, after)
        time.sleep(0.1)

    grown = {name: after[name] - before[name] for name in after}
    # The second time, decode holds all ten pages of the prompt.
    assert grown == {"handoffs": 2, "pages": 10, "bytes": 10 * PAGE_BYTES, "prefix_tokens": 160}


def test_requests_that_lose_their_pages_for_a_while_end_with_the_same_tokens(small: Cluster) -> None:
    """A full decode pool: SGLang takes the pages of some requests away, keeps them in memory, and goes on later."""
    shared = prompt_of(32, 10)
    prompts = [[*shared, *prompt_of(16, 20 + number)] for number in range(4)]

    def answer(prompt: list[int]) -> str:
        one = complete(small.url, small.plan.router.model, prompt, 64, ignore_eos=True)
        assert one.error == "", one
        return one.text

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(answer, prompts))

    assert together == alone
    log = small.plan.folders.log_file("decode-0").read_text()
    assert "Retract requests" in log, "the pool was never full: the test shows nothing"
    assert "Traceback" not in log


def test_a_pool_that_is_full_of_old_prompts_takes_new_ones(small: Cluster) -> None:
    """What the cache holds gives way: as many prompts as fill the pool several times."""
    for number in range(12):
        answer = complete(small.url, small.plan.router.model, prompt_of(200, 100 + number), 4, ignore_eos=True)
        assert answer.error == "", answer
    assert Path(small.plan.folders.log_file("decode-0")).read_text().count("Traceback") == 0
