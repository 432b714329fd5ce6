"""NVIDIA Dynamo's radix tree in the scenario of `benchmarks.index`, one JSON object a row.

Runs in a Python that has `ai-dynamo-runtime` and nothing of this project. Dynamo makes JSON of events and
hashes tokens itself; its answer counts as given when it is a dictionary, as a policy in Python needs it.

    PYTHON -m benchmarks.index_dynamo '{"workers": 64, ...}' 2048 8192
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Another Python's package.
from dynamo._core import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]

from benchmarks.index_scenario import EVENT_PAGES, Scenario, percentiles_us


def stored(parent: int | None, pages: list[int]) -> bytes:
    blocks = [{"block_hash": page, "tokens_hash": page} for page in pages]
    return json.dumps({"event_id": 0, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}}).encode()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def events(scenario: Scenario) -> list[tuple[int, bytes]]:
    made = []
    for worker, pages in scenario.background():
        for start in range(0, len(pages), EVENT_PAGES):
            made.append((worker, stored(pages[start - 1] if start else None, pages[start : start + EVENT_PAGES])))
    return made


def hashed(prompts: Iterator[list[int]], page_tokens: int) -> object:
    return compute_block_hash_for_seq(next(prompts), page_tokens)


def matched(tree: Any, chains: Iterator[list[int]]) -> object:
    return tree.find_matches(next(chains)).scores


def rows(scenario: Scenario, prompt_tokens: list[int]) -> list[dict[str, Any]]:
    applied = events(scenario)
    tree, before_bytes, began_s = RadixTree(), resident_bytes(), time.perf_counter()
    for worker, event in applied:
        tree.apply_event(worker, event)
    events_per_s = round(len(applied) / (time.perf_counter() - began_s))
    bytes_per_page = round((resident_bytes() - before_bytes) / scenario.background_pages, 1)
    made = []
    for tokens in prompt_tokens:
        prompts = scenario.prompts(tokens)
        chains = [compute_block_hash_for_seq(prompt, scenario.page_tokens) for prompt in prompts]
        for chain in chains:
            for worker in range(scenario.workers):
                tree.apply_event(worker, stored(None, chain[: scenario.held(worker, len(chain))]))
        prompt, chain = itertools.cycle(prompts), itertools.cycle(chains)
        expected = {worker: scenario.held(worker, len(chains[0])) for worker in range(scenario.workers)}
        found = {worker: pages for (worker, _), pages in tree.find_matches(chains[0]).scores.items()}
        if found != expected:
            raise RuntimeError(f"wanted {expected}, found {found}")
        ids = percentiles_us(partial(hashed, prompt, scenario.page_tokens), min(200, scenario.repetitions))
        match = percentiles_us(partial(matched, tree, chain), scenario.repetitions)
        made.append(
            {
                "name": "dynamo",
                "prompt_tokens": tokens,
                "workers": scenario.workers,
                "page_tokens": scenario.page_tokens,
                "ids_us_p50": ids[0],
                "match_us_p50": match[0],
                "match_us_p99": match[1],
                "decision_us_p50": None,
                "decision_us_p99": None,
                "events_per_s": events_per_s,
                "bytes_per_page": bytes_per_page,
            }
        )
    return made


if __name__ == "__main__":
    print(json.dumps(rows(Scenario(**json.loads(sys.argv[1])), [int(tokens) for tokens in sys.argv[2:]])))
