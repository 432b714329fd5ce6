"""The index and the choice, timed: tokens to ids, ids to holders, and all of it to the cost of every pair.

    ids        tokens -> page ids
    match      ids -> leading pages of each worker, as a dictionary
    decision   tokens -> ids -> match -> cost of every pair of workers, as the router's placement does it
    events     messages of one stored event of 16 pages, from bytes on the wire to the index
    bytes      of the index for a page that one worker holds, all counted

`--dynamo-python PYTHON` measures NVIDIA Dynamo's RadixTree beside it; PYTHON has `ai-dynamo-runtime` (1.6.1).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.index_scenario import (
    BACKGROUND_PAGES,
    EVENT_PAGES,
    PROMPT_TOKENS,
    WORKERS,
    Scenario,
    percentiles_us,
)
from router.config import RouterSection
from router.fleet import FeedMode, Fleet
from router.index import Index
from router.placement import Placement
from transfer.pages import chain_ids, root_id
from transfer.wire import Batch, Registration, Role, Stored, decode_published, encode

ROOT_FOLDER = Path(__file__).parents[1]
ROOT = root_id("benchmark")
MAX_BYTES = 256 * 1024 * 1024
"""The router's default."""
COLUMNS = (
    "name",
    "prompt_tokens",
    "workers",
    "page_tokens",
    "ids_us_p50",
    "match_us_p50",
    "match_us_p99",
    "decision_us_p50",
    "decision_us_p99",
    "events_per_s",
    "bytes_per_page",
)

Row = dict[str, Any]
Decide = Callable[[list[int]], object]
"""Tokens -> the chosen pair."""


def decision(index: Index, workers: list[str], page_tokens: int) -> Decide:
    """All that a choice computes: ids, match, and the cost of every pair of so many prefill and decode workers.

    Decode worker n holds what prefill worker n does.
    """
    fleet = Fleet()
    twins = [(f"decode-{number}", worker) for number, worker in enumerate(workers)]
    roles: list[tuple[str, Role]] = [(worker, "prefill") for worker in workers]
    roles += [(decode, "decode") for decode, _ in twins]
    for worker, role in roles:
        registration = Registration(
            worker=worker,
            epoch=1,
            role=role,
            state="ready",
            url="",
            events="",
            replay="",
            model="",
            page_tokens=page_tokens,
            kv_dtype="",
            capacity_tokens=1_000_000,
            max_context_tokens=1_000_000,
        )
        fleet.register(registration, 0.0)
        fleet[worker].mode = FeedMode.EXACT
    placement = Placement(RouterSection(), fleet)

    def decide(tokens: list[int]) -> object:
        ids = chain_ids(ROOT, tokens, page_tokens)
        held = index.match(ids)
        held |= {decode: held[worker] for decode, worker in twins if worker in held}
        prefills, decodes = fleet.candidates()
        return placement.choose(prefills, decodes, held, ids, len(tokens), page_tokens, "", 0.0)

    return decide


def name(worker: int) -> str:
    return f"worker-{worker}"


def wire_messages(scenario: Scenario) -> list[bytes]:
    """The background as the workers' agents send it."""
    messages: list[bytes] = []
    for worker, pages in scenario.background():
        for start in range(0, len(pages), EVENT_PAGES):
            event = Stored(pages[start - 1] if start else ROOT, start, pages[start : start + EVENT_PAGES])
            messages.append(encode(Batch(name(worker), 1, len(messages) + 1, [event])))
    return messages


def apply(index: Index, message: bytes) -> None:
    """As the follower does it."""
    batch = decode_published(message)
    if not isinstance(batch, Batch):
        raise TypeError(f"wanted a Batch, found {type(batch).__name__}")
    for event in batch.events:
        if isinstance(event, Stored):
            index.stored(batch.worker, event.parent, event.depth, event.ids, event.tier)


def measure(scenario: Scenario, prompt_tokens: list[int]) -> list[Row]:
    """Our rows for one fleet and page size."""
    messages = wire_messages(scenario)
    index = Index(MAX_BYTES)
    began_s = time.perf_counter()
    for message in messages:
        apply(index, message)
    events_per_s = round(len(messages) / (time.perf_counter() - began_s))
    bytes_per_page = round(index.bytes / len(index), 1)
    workers = [name(worker) for worker in range(scenario.workers)]
    rows = []
    for tokens in prompt_tokens:
        prompts = scenario.prompts(tokens)
        chains = [chain_ids(ROOT, prompt, scenario.page_tokens) for prompt in prompts]
        for chain in chains:
            for worker, known_as in enumerate(workers):
                index.stored(known_as, ROOT, 0, chain[: scenario.held(worker, len(chain))])
        expected = {known_as: scenario.held(worker, len(chains[0])) for worker, known_as in enumerate(workers)}
        found = index.match(chains[0])
        if found != expected:
            raise RuntimeError(f"wanted {expected}, found {found}")
        ids_us = _ids_us(prompts, scenario)
        match_us = _match_us(index, chains, scenario)
        decision_us = _decision_us(decision(index, workers, scenario.page_tokens), prompts, scenario)
        values = (*ids_us[:1], *match_us, *decision_us, events_per_s, bytes_per_page)
        shape = ("mainstem", tokens, scenario.workers, scenario.page_tokens)
        rows.append(dict(zip(COLUMNS, (*shape, *values), strict=True)))
    return rows


def _ids_us(prompts: list[list[int]], scenario: Scenario) -> tuple[float, float]:
    prompt = itertools.cycle(prompts)
    return percentiles_us(lambda: chain_ids(ROOT, next(prompt), scenario.page_tokens), min(200, scenario.repetitions))


def _match_us(index: Index, chains: list[list[int]], scenario: Scenario) -> tuple[float, float]:
    chain = itertools.cycle(chains)
    return percentiles_us(lambda: index.match(next(chain)), scenario.repetitions)


def _decision_us(decide: Decide, prompts: list[list[int]], scenario: Scenario) -> tuple[float, float]:
    prompt = itertools.cycle(prompts)
    return percentiles_us(lambda: decide(next(prompt)), max(100, scenario.repetitions // 10))


def dynamo(python: str, scenario: Scenario, prompt_tokens: list[int]) -> list[Row]:
    """Dynamo's rows, measured by a child process. Raises CalledProcessError where it fails."""
    shape = json.dumps(dataclasses.asdict(scenario))
    command = [python, "-m", "benchmarks.index_dynamo", shape, *map(str, prompt_tokens)]
    child = subprocess.run(command, cwd=ROOT_FOLDER, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Row] = json.loads(child.stdout.splitlines()[-1])
    return [{column: row[column] for column in COLUMNS} for row in rows]


def run(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for page_tokens, workers in itertools.product(arguments.pages, WORKERS):
        scenario = Scenario(
            workers,
            page_tokens,
            background_pages=BACKGROUND_PAGES // 10 if arguments.quick else BACKGROUND_PAGES,
            repetitions=200 if arguments.quick else 2000,
        )
        report.progress(f"{workers} workers, pages of {page_tokens} tokens")
        rows += measure(scenario, list(PROMPT_TOKENS))
        if arguments.dynamo_python:
            rows += dynamo(arguments.dynamo_python, scenario, list(PROMPT_TOKENS))
    return rows


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; numbers are rough")
    parser.add_argument("--pages", type=int, nargs="+", default=[64], metavar="TOKENS", help="tokens a page")
    parser.add_argument("--dynamo-python", metavar="PYTHON", help="a Python that has ai-dynamo-runtime")
    arguments = parser.parse_args()
    rows = run(arguments)
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    result = {"benchmark": "index", "rows": rows}
    report.publish(result, COLUMNS, [[row[column] for column in COLUMNS] for row in rows], arguments.json)


if __name__ == "__main__":
    main()
