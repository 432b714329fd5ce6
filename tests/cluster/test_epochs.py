"""A request is meant for one life of a prefill worker: another life says so at once, and nothing is held against it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import msgspec
import pytest

from benchmarks.client import Answer, complete, get_json
from benchmarks.words import sentence
from engine.launch.cluster import Cluster
from engine.spec import WorkerSpec
from tests.cluster.conftest import local_cpu, started
from transfer.wire import bound_host

BACK_S = 120.0
SOON_S = 5.0
"""At once, on a machine that is busy with starting a worker. A hand-off's own deadline is 120 s."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker of its own: the test kills the first."""
    config = local_cpu()
    prefill, decode = config.workers
    one_of_each = (prefill.model_copy(update={"count": 1}), decode)
    with started(config.model_copy(update={"workers": one_of_each}), tmp_path_factory.mktemp("epochs")) as made:
        yield made


def prefill_state(cluster: Cluster) -> dict[str, Any]:
    workers: list[dict[str, Any]] = get_json(cluster.url, "/api/state")["workers"]
    return next((one for one in workers if one["name"] == "prefill-0"), {"state": "gone", "epoch": 0})


def spec_of(cluster: Cluster, name: str) -> WorkerSpec:
    return next(worker for worker in cluster.plan.workers if worker.name == name)


def posted(worker: WorkerSpec, prefill: WorkerSpec, room: int, epoch: int | None) -> tuple[int, str, float]:
    """What one leg of a request gets, sent to the worker itself: status, text, seconds."""
    body = {
        "model": worker.served_model,
        "prompt": [1000 + number for number in range(40)],
        "max_tokens": 4,
        "bootstrap_host": prefill.host if epoch is None else bound_host(prefill.host, epoch),
        "bootstrap_port": prefill.handoff_port,
        "bootstrap_room": room,
    }
    began_s = time.monotonic()
    connection = HTTPConnection(worker.host, worker.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, time.monotonic() - began_s


def test_after_a_kill_queued_requests_are_answered_by_the_next_life(cluster: Cluster) -> None:
    """There is no other prefill worker: they wait for it, and are sent to it as soon as it is there."""
    model = cluster.plan.router.model
    before = prefill_state(cluster)["epoch"]
    answers: list[Answer] = []

    def ask(number: int) -> None:
        answers.append(complete(cluster.url, model, sentence(700 + number, 900), 4))

    # Seconds of compute each: some are queued, one is computed.
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    killed_s = time.monotonic()
    os.kill(cluster.workers["prefill-0"], signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=BACK_S)

    assert time.monotonic() - killed_s < BACK_S
    assert [answer.error for answer in answers] == ["", "", ""], answers
    assert prefill_state(cluster)["epoch"] > before
    tries = [get_json(cluster.url, f"/api/explain/{answer.headers['x-request-id']}")["tries"] for answer in answers]
    assert any(len(one) > 1 for one in tries), tries
    after = complete(cluster.url, model, sentence(710, 30), 4)
    assert (after.error, after.prefill) == ("", "prefill-0")


def test_both_legs_of_a_request_for_an_earlier_life_say_at_once_which_one_they_found(cluster: Cluster) -> None:
    prefill, decode = spec_of(cluster, "prefill-0"), spec_of(cluster, "decode-0")
    epoch = prefill_state(cluster)["epoch"]
    for leg in (prefill, decode):
        status, text, took_s = posted(leg, prefill, room=77, epoch=epoch - 1)
        assert status == 500, text
        assert "restarted" in text
        assert str(epoch - 1) in text
        assert str(epoch) in text
        assert took_s < SOON_S


def test_a_request_without_an_epoch_and_one_with_the_right_one_are_served(cluster: Cluster) -> None:
    prefill, decode = spec_of(cluster, "prefill-0"), spec_of(cluster, "decode-0")
    for room, epoch in ((78, None), (79, prefill_state(cluster)["epoch"])):
        results: dict[str, tuple[int, str, float]] = {}

        def ask(leg: WorkerSpec, room: int = room, epoch: int | None = epoch, found: Any = results) -> None:
            found[leg.name] = posted(leg, prefill, room, epoch)

        threads = [threading.Thread(target=ask, args=(leg,)) for leg in (prefill, decode)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=BACK_S)
        assert [status for status, _, _ in results.values()] == [200, 200], results


def test_a_host_that_is_none_fails_its_request_and_not_the_worker(cluster: Cluster) -> None:
    prefill, decode = spec_of(cluster, "prefill-0"), spec_of(cluster, "decode-0")
    broken = msgspec.structs.replace(prefill, host="yesterday@127.0.0.1")
    for leg in (prefill, decode):
        status, text, took_s = posted(leg, broken, room=80, epoch=None)
        assert (status, "wanted HOST or EPOCH@HOST" in text, took_s < SOON_S) == (500, True, True), text
    assert complete(cluster.url, cluster.plan.router.model, sentence(711, 30), 4).error == ""
