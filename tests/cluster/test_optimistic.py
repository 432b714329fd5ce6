"""Prefill that does not wait until decode has found pages: SGLang's `optimistic-prefill-attempts`.

A prompt is computed while decode still looks for pages, and kept until it has them. Outputs are those of one SGLang,
also while others are aborted, and nothing is left of those that were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.chaos.leaks import flushed, leaked_requests, leaked_tokens
from benchmarks.handoff_aborts import disturb
from benchmarks.reference import Reference, find_references
from engine.launch.cluster import Cluster
from tests.cluster.conftest import local_cpu, monolithic, started
from tests.cluster.test_identity import differing

LENGTHS = (40, 90, 160, 290, 700, 1500)
ABORTS = 12


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    with started(monolithic(), tmp_path_factory.mktemp("mono")) as cluster:
        worker = cluster.plan.workers[0]
        found, _replaced = find_references(f"http://{worker.host}:{worker.port}", worker.served_model, LENGTHS)
    return found


@pytest.fixture(scope="module")
def optimistic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = local_cpu()
    groups = tuple(
        group.model_copy(update={"engine": group.engine | {"optimistic-prefill-attempts": 1}})
        if group.role == "prefill"
        else group
        for group in config.workers
    )
    with started(config.model_copy(update={"workers": groups}), tmp_path_factory.mktemp("optimistic")) as cluster:
        yield cluster


def test_outputs_are_the_monolithic_ones_cold_and_cached(optimistic: Cluster, references: list[Reference]) -> None:
    assert differing(optimistic, references) == []
    assert differing(optimistic, references) == []


def test_outputs_stay_the_same_while_others_are_aborted_and_nothing_is_left(
    optimistic: Cluster, references: list[Reference]
) -> None:
    new = flushed(optimistic, optimistic.url)
    tally = disturb(optimistic, references[:4], ABORTS, seed=5)
    left = flushed(optimistic, optimistic.url)
    assert sum(tally.aborts.values()) >= ABORTS
    assert (tally.different, tally.hangs, dict(tally.failed)) == (0, 0, {})
    leaked = {name: (leaked_tokens(new[name], now), leaked_requests(new[name], now)) for name, now in left.items()}
    assert set(leaked.values()) == {(0, 0)}, leaked


def test_many_at_once_are_all_answered(optimistic: Cluster, references: list[Reference]) -> None:
    """More than decode grants pages to at a time: those that wait are computed already."""
    chooser = random.Random(2)
    many = [chooser.choice(references[:4]) for _ in range(12)]
    with ThreadPoolExecutor(12) as threads:
        found = threads.map(lambda reference: differing(optimistic, [reference]), many)
        assert [lengths for lengths in found if lengths] == []
